//go:build linux

package main

import (
	"sync"
	"time"
)

// history is everything that was acknowledged, and what devices saw. Its
// methods may be called at once.
type history struct {
	mu       sync.Mutex
	calls    []*call
	devices  map[string]*deviceHistory
	requests int // of devices and operators
	failed   int // of them, without a good answer

	lastAnswer time.Time
	stall      time.Duration // the longest time without any good answer
	stalledAt  time.Time
}

// call is one command that an operator queued, with all its repetitions.
type call struct {
	operator, number int
	marker           string // stands in the command, so that devices tell two commands of one call
	requestType      string
	uuid             string
	ids              []string
	acknowledged     map[string]bool // by enrollment
	begun            time.Time       // of the first attempt
	accepted         time.Time       // of the first good answer
	timing           *timing         // nil: at once and for ever
}

// deviceHistory is what one device saw, in its own order.
type deviceHistory struct {
	offers  []offer
	results []result // those that got their 200, in order
	// enrolled is when each enrollment after the first began.
	enrolled []time.Time
}

type offer struct {
	uuid, marker string
	at           time.Time
}

type result struct {
	uuid, status, nonce string
	requestType         string
	at                  time.Time
}

func newHistory() *history {
	return &history{devices: make(map[string]*deviceHistory)}
}

// answered notes the outcome of one request.
func (h *history) answered(good bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.requests++
	if !good {
		h.failed++
		return
	}
	now := time.Now()
	if gap := now.Sub(h.lastAnswer); !h.lastAnswer.IsZero() && gap > h.stall {
		h.stall, h.stalledAt = gap, now
	}
	h.lastAnswer = now
}

func (h *history) device(id string) *deviceHistory {
	d := h.devices[id]
	if d == nil {
		d = &deviceHistory{}
		h.devices[id] = d
	}
	return d
}

func (h *history) offered(id, uuid, marker string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.device(id)
	d.offers = append(d.offers, offer{uuid: uuid, marker: marker, at: time.Now()})
}

func (h *history) reported(id string, x result) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.device(id)
	x.at = time.Now()
	d.results = append(d.results, x)
}

// enrolling notes that a device begins to enroll again: from now on its queue
// may be cleared.
func (h *history) enrolling(id string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.device(id)
	d.enrolled = append(d.enrolled, time.Now())
}

func (h *history) begin(c *call) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.acknowledged, c.begun = make(map[string]bool), time.Now()
	h.calls = append(h.calls, c)
}

// accept notes which enrollments an answer said the command is queued for.
func (h *history) accept(c *call, uuid string, ids []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c.uuid = uuid
	if c.accepted.IsZero() {
		c.accepted = time.Now()
	}
	for _, id := range ids {
		c.acknowledged[id] = true
	}
}

// counts are the sizes of what was noted.
func (h *history) counts() (requests, failed, calls, results int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, d := range h.devices {
		results += len(d.results)
	}
	for _, c := range h.calls {
		calls += len(c.acknowledged)
	}
	return h.requests, h.failed, calls, results
}
