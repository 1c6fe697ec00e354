// Package upkeep is the periodic work on the store: it ends and queues commands
// when their time comes, and removes history that the operator does not keep.
//
// [Queue] and [History] have a Work method each, for lease.Hold: one replica at
// a time does the work, and checks its lease in each transaction.
package upkeep

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
)

// batchRows is how many rows one transaction looks at.
const batchRows = 256

// Store is the part of the store that the work needs.
type Store interface {
	storage.Sweeps
	storage.AuditUpkeep
	storage.UserUpkeep
	storage.EnqueueUpkeep
}

// repeat calls step at once and then every so often until ctx ends. After the
// loss of the lease it waits for lease.Hold to end ctx. It logs other failures,
// once for each outage.
func repeat(ctx context.Context, every time.Duration, log *slog.Logger, failure string, step func() error) error {
	failing := false
	for {
		err := step()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, storage.ErrLeaseLost):
			<-ctx.Done()
			return ctx.Err()
		case err != nil && !failing:
			log.WarnContext(ctx, failure, "error", err)
		}
		failing = err != nil
		if err := backoff.Sleep(ctx, every); err != nil {
			return err
		}
	}
}
