package httpapi

import (
	"context"
	"net/http"
	"sync"
	"time"
)

const (
	// maxWaits bounds the calls that wait for a command or an event.
	// adminWaits of the places are kept for admins, and one key takes no more
	// than maxKeyWaits.
	maxWaits    = 256
	adminWaits  = 64
	maxKeyWaits = 32
)

var errTooManyWaits = &problem{http.StatusServiceUnavailable, "too many calls wait, of this API key or of all; try again, or without wait"}

// waits counts the calls that wait. Safe for concurrent use.
type waits struct {
	mu    sync.Mutex
	all   int
	byKey map[string]int
}

// begin takes a place for a caller, or fails with errTooManyWaits. The caller
// gives the place back with end.
func (w *waits) begin(c caller) (end func(), err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	limit := maxWaits
	if c.role < roleAdmin {
		limit -= adminWaits
	}
	if w.all >= limit || w.byKey[c.id] >= maxKeyWaits {
		return nil, errTooManyWaits
	}
	if w.byKey == nil {
		w.byKey = make(map[string]int)
	}
	w.all++
	w.byKey[c.id]++
	return func() { w.end(c) }, nil
}

func (w *waits) end(c caller) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all--
	if w.byKey[c.id]--; w.byKey[c.id] == 0 {
		delete(w.byKey, c.id)
	}
}

// logWatch lets any number of calls wait for the next event with one poll of
// the log for all of them: one of the callers polls, and another one takes over
// when it leaves.
type logWatch struct {
	last func(context.Context) (int64, error)
	// polling has a place for the caller that polls.
	polling chan struct{}

	mu sync.Mutex
	// newest is the number of the newest event that a poll found; changed is
	// closed when it rises, or when a poll fails.
	newest  int64
	changed chan struct{}
}

func newLogWatch(last func(context.Context) (int64, error)) *logWatch {
	return &logWatch{last: last, polling: make(chan struct{}, 1), changed: make(chan struct{})}
}

func (w *logWatch) state() (newest int64, changed <-chan struct{}) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.newest, w.changed
}

// wait returns true when there may be events after a number, and false when
// ctx or stop ends first.
func (w *logWatch) wait(ctx context.Context, number int64, stop <-chan struct{}) bool {
	ticker := time.NewTicker(pollEvery)
	defer ticker.Stop()
	for {
		newest, changed := w.state()
		if newest > number {
			return true
		}
		select {
		case w.polling <- struct{}{}:
			found := w.poll(ctx, number, stop, ticker.C)
			<-w.polling
			return found
		case <-changed:
			if newest, _ = w.state(); newest == failedPoll {
				return true
			}
		case <-ctx.Done():
			return false
		case <-stop:
			return false
		}
	}
}

// failedPoll in place of a number makes every waiter read for itself.
const failedPoll = -1

// poll polls the log until there is an event after a number.
func (w *logWatch) poll(ctx context.Context, number int64, stop <-chan struct{}, tick <-chan time.Time) bool {
	for {
		select {
		case <-tick:
		case <-ctx.Done():
			return false
		case <-stop:
			return false
		}
		newest, err := w.last(ctx)
		if ctx.Err() != nil {
			return false
		}
		if err != nil {
			newest = failedPoll
		}
		w.note(newest)
		if newest > number || newest == failedPoll {
			return true // the next read reports the fault
		}
	}
}

func (w *logWatch) note(newest int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if newest == w.newest && newest != failedPoll {
		return
	}
	w.newest = newest
	close(w.changed)
	w.changed = make(chan struct{})
}
