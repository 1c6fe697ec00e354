package upkeep

import (
	"context"
	"log/slog"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
)

// AnnounceEvery is how often a replica announces itself. One that is silent for
// three times as long is down.
const AnnounceEvery = 15 * time.Second

// retireTime bounds the last word of a replica that stops.
const retireTime = 2 * time.Second

// Replica announces this replica while it runs.
type Replica struct {
	Store storage.Replicas
	Log   *slog.Logger
	Self  storage.Replica
}

// Work announces until ctx ends, and retires the replica then. A failure is
// logged at debug level alone, since everything else fails loudly then.
func (r *Replica) Work(ctx context.Context) error {
	for {
		if err := r.Store.AnnounceReplica(ctx, &r.Self); err != nil && ctx.Err() == nil {
			r.Log.DebugContext(ctx, "replica not announced", "error", err)
		}
		if backoff.Sleep(ctx, AnnounceEvery) != nil {
			break
		}
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), retireTime)
	defer cancel()
	if err := r.Store.RetireReplica(last, r.Self.ID); err != nil {
		r.Log.DebugContext(last, "replica not retired", "error", err)
	}
	return nil
}
