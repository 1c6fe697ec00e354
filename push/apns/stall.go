package apns

import (
	"container/list"
	"context"
	"sync"
	"time"
)

// A few streams without an answer must not take all workers: at ten thousand
// pushes a second, one in a hundred would fill any pool within seconds. So a
// push whose stream takes much longer than others gives its worker's slot back
// and moves to a list of slow pushes, of the same size. When the list is full,
// the client cancels the oldest slow push, but only after APNs has answered many
// pushes that began later: if APNs as a whole is slow, all pushes wait.

const (
	slowFactor  = 8                      // times the usual latency is slow
	slowAtLeast = 250 * time.Millisecond // faster than this is never slow
	slowUnknown = time.Second            // until there is a usual latency
	overtaken   = 3                      // answers to later pushes, times the number of workers
)

// workers is the pool of slots and the list of slow pushes.
type workers struct {
	slots   chan struct{}
	slowMax time.Duration

	mu       sync.Mutex
	latency  time.Duration // moving average of answered streams
	answered uint64        // streams answered so far
	slowList list.List     // of *task, oldest first
	gaveUp   uint64
}

// task is one push that has a slot or is in the slow list.
type task struct {
	topic  *topic
	cancel context.CancelCauseFunc

	// Guarded by workers.mu.
	elem     *list.Element // its place in the slow list; nil while it has a slot
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

// streamBegins records that k's stream is sent now. The caller calls the returned
// function when the stream has ended, with whether APNs answered.
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

// slow moves k to the slow list, if there is room or a stalled push can leave.
func (w *workers) slow(k *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if k.done || k.elem != nil {
		return
	}
	if w.slowList.Len() >= cap(w.slots) && !w.giveUpLocked(nil) {
		return
	}
	k.elem = w.slowList.PushBack(k)
	<-w.slots
}

// finish returns k's slot, or removes k from the slow list.
func (w *workers) finish(k *task) {
	w.mu.Lock()
	defer w.mu.Unlock()
	k.done = true
	if k.elem == nil {
		<-w.slots
		return
	}
	w.slowList.Remove(k.elem) // no effect on a cancelled push, which has left the list
}

// giveUp cancels the oldest slow push of t, since other pushes wait for a stream.
func (w *workers) giveUp(t *topic) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.giveUpLocked(t)
}

// giveUpLocked cancels the oldest slow push of topic t, or of any topic if t is
// nil, that enough later pushes have overtaken. It reports whether there was one.
func (w *workers) giveUpLocked(t *topic) bool {
	for e := w.slowList.Front(); e != nil; e = e.Next() {
		k := e.Value.(*task)
		if t != nil && k.topic != t {
			continue
		}
		if w.answered-k.answered <= overtaken*uint64(cap(w.slots)) {
			return false // younger ones are overtaken even less
		}
		w.slowList.Remove(e)
		w.gaveUp++
		k.cancel(ErrStalled)
		return true
	}
	return false
}
