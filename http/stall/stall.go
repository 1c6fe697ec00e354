// Package stall notices that the process stood still: it was stopped, its
// virtual machine was paused, or the machine had no time for it. A process that
// goes on after that holds requests whose clients have given up, and may have
// gone on elsewhere.
package stall

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

const (
	// beatEvery is how often Watch notes that the process runs.
	beatEvery = 250 * time.Millisecond
	// longest is how long a process may do nothing before that is a stall.
	longest = 2 * time.Second
	// backlog is how long after a stall requests are still read that the system
	// took in during it.
	backlog = time.Second
)

// Watch knows when the process stood still. Its methods may be called
// concurrently.
type Watch struct {
	log *slog.Logger
	now func() time.Time

	mu    sync.Mutex
	beat  time.Time // when the process was last seen to run
	ended time.Time // end of the last stall
	count int64
}

// New returns a Watch that sees a process that runs now. now is a clock with
// monotonic readings, time.Now if nil.
func New(log *slog.Logger, now func() time.Time) *Watch {
	if now == nil {
		now = time.Now
	}
	return &Watch{log: log, now: now, beat: now()}
}

// Run watches until ctx ends.
func (w *Watch) Run(ctx context.Context) error {
	ticker := time.NewTicker(beatEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			w.look()
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// look notes that the process runs, and a stall that ends with that.
func (w *Watch) look() {
	w.mu.Lock()
	now := w.now()
	stood := now.Sub(w.beat)
	w.beat = now
	if stood > longest {
		w.ended = now
		w.count++
	}
	w.mu.Unlock()
	if stood > longest {
		w.log.Warn("the process stood still; check-ins that it held are refused", "for", stood.Round(time.Millisecond))
	}
}

// Since says whether the process stood still since a request came in, or so
// shortly before that the request may have waited for that. It does not rely on
// Run having noticed.
func (w *Watch) Since(arrived time.Time) bool {
	w.look()
	w.mu.Lock()
	defer w.mu.Unlock()
	return !w.ended.IsZero() && arrived.Before(w.ended.Add(backlog))
}

// Count is how often the process stood still.
func (w *Watch) Count() int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.count
}
