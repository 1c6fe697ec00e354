package httpmdm

import (
	"context"
	"time"

	"golang.org/x/sync/semaphore"
)

// How many bytes are allocated for each byte of a body. TestMemoryOfBodies
// measures both together, on each engine.
const (
	// readCopies is for reading: the body itself, and the smaller pieces that it
	// grew out of.
	readCopies = 2
	// workCopies is for the rest: decoding, the result's and the event's rows, and
	// the copies that database drivers make.
	workCopies = 8
	// BodyCopies is how often each byte of a body counts in Config.MaxInFlight.
	BodyCopies = readCopies + workCopies
	// LeastInFlight is the least MaxInFlight, in bodies of MaxBody.
	LeastInFlight = 2 * workCopies
)

// freeBytes is how much of each body takes nothing from the budget, in bytes.
// Polls and most reports are smaller.
const freeBytes = 4 << 10

// workPatience is how long a request whose body was read waits for memory to be
// handled. Requests with memory wait for no others, so that some is free soon.
const workPatience = 5 * time.Second

// memory is the budget of Config.MaxInFlight. One half is for bodies as they
// arrive, whose senders may be slow; the other is for those that are here and
// whose sender is known.
type memory struct {
	reading, working *semaphore.Weighted
}

func newMemory(bytes int64) *memory {
	return &memory{reading: semaphore.NewWeighted(bytes / 2), working: semaphore.NewWeighted(bytes / 2)}
}

// work takes memory to work on a body, and returns the function that gives it
// back. The error is errOverload, or that of ctx.
func (m *memory) work(ctx context.Context, body []byte) (release func(), err error) {
	n := (int64(len(body)) - freeBytes) * workCopies
	if n <= 0 {
		return func() {}, nil
	}
	waiting, cancel := context.WithTimeout(ctx, workPatience)
	defer cancel()
	if m.working.Acquire(waiting, n) != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, errOverload
	}
	return func() { m.working.Release(n) }, nil
}
