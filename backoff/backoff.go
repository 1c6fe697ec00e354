// Package backoff spaces attempts: a sleep that ends with its context, and the
// pauses after failures in a row.
package backoff

import (
	"context"
	"math/rand/v2"
	"time"
)

// Sleep waits for d. It returns the error of ctx if ctx ends first.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Policy describes pauses that double with each failure in a row: First after
// the first failure, Max at most. Both are positive.
type Policy struct {
	First, Max time.Duration
}

// Pause returns the pause after the nth failure in a row, with jitter. The
// first failure is number 1; smaller numbers count as 1.
func (p Policy) Pause(n int) time.Duration {
	d := p.First
	for ; n > 1 && d < p.Max; n-- {
		d *= 2
	}
	return Jitter(min(d, p.Max))
}

// Jitter returns a random duration between three quarters and five quarters of
// d, so that callers that failed together do not return together.
func Jitter(d time.Duration) time.Duration {
	if d <= 0 {
		return 0
	}
	return d - d/4 + rand.N(d/2+1)
}
