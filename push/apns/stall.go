package apns

import (
	"container/list"
	"context"
	"sync"
	"time"
)

// A few streams that are never answered must not eat up the workers: at ten
// thousand pushes a second, one in a hundred would fill any pool within
// seconds. So a push whose stream takes much longer than others do gives its
// worker's slot back and waits on in a second lane of the same size. When
// that is full as well, its oldest push is given up, but only after many
// pushes that began later have been answered: if APNs as a whole is slow,
// nobody is overtaken and everybody waits.

const (
	slowFactor  = 8                      // times the usual latency is slow
	slowAtLeast = 250 * time.Millisecond // faster than this is never slow
	slowUnknown = time.Second            // until there is a usual latency
	overtaken   = 3                      // times the number of workers
)

// workers is the pool of slots and the lane of slow pushes.
type workers struct {
	slots   chan struct{}
	slowMax time.Duration

	mu       sync.Mutex
	latency  time.Duration // moving average of answered streams
	answered uint64        // streams answered so far
	lane     list.List     // of *task, oldest first
	gaveUp   uint64
}

// task is one push that has a worker or is in the lane.
type task struct {
	topic  *topic
	cancel context.CancelCauseFunc

	// Guarded by workers.mu.
	elem     *list.Element // its place in the lane; nil while it has a slot
	done     bool
	answered uint64 // workers.answered when the stream began
}

func newWorkers(n int, streamTimeout time.Duration) *workers {
	return &workers{slots: make(chan struct{}, n), slowMax: streamTimeout / 2}
}

// slowAfter returns the age at which a stream counts as slow.
func (w *workers) slowAfter() time.Duration {
	d := slowUnknown
	if w.latency > 0 {
		d = max(slowFactor*w.latency, slowAtLeast)
	}
	return min(d, w.slowMax)
}

// streamBegins marks that k's stream goes out now. The function it returns
// must be called when the stream has ended, with whether it was answered.
func (w *workers) streamBegins(k *task) (ends func(answered bool)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k.answered = w.answered
	began := time.Now()
	var timer *time.Timer
	if k.elem == nil {
		timer = time.AfterFunc(w.slowAfter(), func() { w.slow(k) })
	}
	return func(answered bool) {
		if timer != nil {
			timer.Stop()
		}
		if !answered {
			return
		}
		took := time.Since(began)
		w.mu.Lock()
		defer w.mu.Unlock()
		w.answered++
		if w.latency == 0 {
			w.latency = took
		} else {
			w.latency += (took - w.latency) / 16
		}
	}
}

// slow moves k to the lane, if there is room or some can be made.
func (w *workers) slow(k *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if k.done || k.elem != nil {
		return
	}
	if w.lane.Len() >= cap(w.slots) && !w.giveUpLocked(nil) {
		return
	}
	k.elem = w.lane.PushBack(k)
	<-w.slots
}

// finish gives back what k holds.
func (w *workers) finish(k *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k.done = true
	if k.elem == nil {
		<-w.slots
		return
	}
	w.lane.Remove(k.elem) // a push that was given up has left already
}

// giveUp ends the oldest slow push of t, for whose streams others wait.
func (w *workers) giveUp(t *topic) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.giveUpLocked(t)
}

// giveUpLocked ends the oldest slow push that has been overtaken, of topic t
// or of any if t is nil. It reports whether there was one.
func (w *workers) giveUpLocked(t *topic) bool {
	for e := w.lane.Front(); e != nil; e = e.Next() {
		k := e.Value.(*task)
		if t != nil && k.topic != t {
			continue
		}
		if w.answered-k.answered <= overtaken*uint64(cap(w.slots)) {
			return false // nor has any younger one
		}
		w.lane.Remove(e)
		w.gaveUp++
		k.cancel(ErrStalled)
		return true
	}
	return false
}
