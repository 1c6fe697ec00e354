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

// minConnections is the smallest share of a replica.
const minConnections = 2

// Replica announces this replica while it runs, and shares the connections to
// the database with the others. Connections and Now are needed for that alone.
type Replica struct {
	Store storage.Replicas
	Log   *slog.Logger
	Self  storage.Replica

	// Connections bounds the connections of all replicas together; 0 is no
	// bound. Limit sets this replica's share, which is PerReplica at most.
	Connections, PerReplica int
	Limit                   func(connections int)
	Now                     func() time.Time // the store's clock
}

// Work announces until ctx ends, and retires the replica then. A failure is
// logged at debug level alone, since everything else fails loudly then.
func (r *Replica) Work(ctx context.Context) error {
	for {
		if err := r.Store.AnnounceReplica(ctx, &r.Self); err != nil && ctx.Err() == nil {
			r.Log.DebugContext(ctx, "replica not announced", "error", err)
		} else if err := r.share(ctx); err != nil && ctx.Err() == nil {
			r.Log.DebugContext(ctx, "connections not shared", "error", err)
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

// share divides the connections among the replicas that are up, with one share
// left over for a replica that starts: it takes its own before the others know
// of it.
func (r *Replica) share(ctx context.Context) error {
	if r.Connections == 0 {
		return nil
	}
	replicas, err := r.Store.Replicas(ctx)
	if err != nil {
		return err
	}
	up := 0
	for _, other := range replicas {
		if r.Now().Sub(other.SeenAt) < 3*AnnounceEvery {
			up++
		}
	}
	r.Limit(min(r.PerReplica, max(minConnections, r.Connections/(up+1))))
	return nil
}
