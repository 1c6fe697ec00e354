package upkeep

import (
	"context"
	"log/slog"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

const (
	// queueEvery bounds the delay of a scheduled command, and of the state
	// "expired" in the API; devices are never offered an expired command.
	queueEvery = time.Second
	// keysAge is how long an idempotency key is kept. keysEvery is the interval
	// between two searches for older keys.
	keysAge   = 7 * 24 * time.Hour
	keysEvery = time.Hour
)

// Queue expires commands, queues scheduled ones and removes old idempotency
// keys. All fields are required.
type Queue struct {
	Store Store
	Log   *slog.Logger
	Now   func() time.Time
}

// Work runs until ctx ends, under the lease that current returns.
func (q *Queue) Work(ctx context.Context, current func() storage.Lease) error {
	var searched time.Time // the last complete search for old keys by this holder
	forget := func(ctx context.Context, l storage.Lease, limit int) (int, error) {
		now := q.Now()
		if now.Sub(searched) < keysEvery {
			return 0, nil
		}
		n, err := q.Store.ForgetEnqueued(ctx, l, now.Add(-keysAge), limit)
		if err == nil && n < limit {
			searched = now
		}
		return n, err
	}
	return repeat(ctx, queueEvery, q.Log, "cannot sweep the queue", func() error {
		for _, step := range []func(context.Context, storage.Lease, int) (int, error){
			q.Store.ExpireCommands, q.Store.PromoteCommands, forget,
		} {
			for {
				n, err := step(ctx, current(), batchRows)
				if err != nil {
					return err
				}
				if n < batchRows {
					break
				}
			}
		}
		return nil
	})
}
