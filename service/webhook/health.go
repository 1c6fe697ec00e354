package webhook

import (
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

const (
	// downAfter failures without a success in between mean that the receiver
	// is down.
	downAfter = 10
	// maxBackoff bounds the pause after an event's failure, and maxProbe the
	// pause between probes of a receiver that is down.
	maxBackoff = 5 * time.Minute
	maxProbe   = 30 * time.Second
)

// health is the state of a sink's receiver: how often it failed, whether it
// is down and probed, and until when it asked for a pause. Each method takes
// the present, so that tests need no clock. It belongs to one goroutine.
type health struct {
	backoff     backoff.Policy
	failures    int // since the last success
	down        bool
	probes      int       // since the receiver is down
	probeAt     time.Time // the next one
	pausedUntil time.Time
}

// succeeded notes that the receiver answered as it should. It reports whether
// the receiver was down until now.
func (h *health) succeeded() (recovered bool) {
	recovered = h.down
	h.failures, h.down = 0, false
	return recovered
}

// failed notes a failure of the receiver. It reports whether the receiver is
// down from now on.
func (h *health) failed(now time.Time) (wentDown bool) {
	if h.failures++; h.down || h.failures < downAfter {
		return false
	}
	h.down, h.probes = true, 0
	h.scheduleProbe(now)
	return true
}

// pause keeps Retry-After of an answer; the longest one counts.
func (h *health) pause(until time.Time) {
	if until.After(h.pausedUntil) {
		h.pausedUntil = until
	}
}

func (h *health) paused(now time.Time) bool { return now.Before(h.pausedUntil) }

// probe reports whether a receiver that is down is to be tried now. If so, the
// next probe is scheduled.
func (h *health) probe(now time.Time) bool {
	if !h.down || now.Before(h.probeAt) {
		return false
	}
	h.scheduleProbe(now)
	return true
}

func (h *health) scheduleProbe(now time.Time) {
	h.probes++
	h.probeAt = now.Add(min(h.backoff.Pause(h.probes), maxProbe))
}

// probeAgain makes the next probe due: the last one did not reach the
// receiver.
func (h *health) probeAgain(now time.Time) { h.probeAt = now }
