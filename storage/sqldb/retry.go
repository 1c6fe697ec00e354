package sqldb

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

// Retries of one transaction: pauses of up to 5 ms, 10 ms, ... 640 ms, about
// two seconds in all. They are spread more widely than backoff.Policy does,
// since transactions that met in a deadlock should not meet again.
const (
	maxAttempts = 9
	firstPause  = 5 * time.Millisecond
)

// retry repeats try while it says that this is worth it.
func (db *DB) retry(ctx context.Context, try func() (again bool, err error)) error {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		again, err := try()
		if err == nil {
			return nil
		}
		if db.closed.Load() {
			return ErrClosed
		}
		if db.dialect.observe != nil {
			db.dialect.observe(err)
		}
		if !again || attempt == maxAttempts || ctx.Err() != nil {
			return db.classify(err)
		}
		db.retries.Add(1)
		db.log.DebugContext(ctx, "repeating a transaction", "attempt", attempt, "error", err)
		if backoff.Sleep(ctx, rand.N(pause)+pause/8) != nil {
			return db.classify(err)
		}
		pause *= 2
	}
}

// classify marks errors that callers tell apart from broken statements: the
// database is away, or too busy to ever get a turn.
func (db *DB) classify(err error) error {
	err = withRemedy(err, db.dialect.remedy)
	switch {
	case errors.Is(err, ErrUnavailable), errors.Is(err, ErrBusy), errors.Is(err, context.Canceled):
		return err
	case db.dialect.retryable(err):
		return fmt.Errorf("%w: %w", ErrBusy, err)
	case db.dialect.operational(err), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return err
}
