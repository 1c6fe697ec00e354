// Package lease lets one replica at a time do a piece of periodic work.
//
// It is a loop around storage.Leases. It compares no wall clocks of machines: a
// candidate takes a lease over after it has watched the lease unchanged for a
// whole time to live. Two replicas never believe for long that both hold a
// lease, but a process that was stopped may still believe it when it continues.
// Therefore writes under a lease check its Fence in their own transaction, and
// work without such a check must tolerate being done twice.
package lease

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/supervise"
)

// askEvery is the interval at which a candidate reads the lease. It is shorter
// with a time to live below three seconds.
const askEvery = time.Second

// releaseTimeout bounds the release of a lease when the process stops.
const releaseTimeout = 5 * time.Second

// Work is the job of a holder. Its context ends when the lease is lost or the
// caller of Hold stops; it must return soon after that. current returns the
// lease, for the check of its Fence, and may be called by any number of
// goroutines.
type Work func(ctx context.Context, current func() storage.Lease) error

// Hold waits until holder has the lease of that name and runs work under it,
// renewing the lease every third of ttl. When the lease is lost, Hold waits for
// work to return and then for the lease again. When work returns earlier, or ctx
// ends, Hold releases the lease and returns the error of work or of ctx. A panic of
// work is such an error, too: a *supervise.Panic.
//
// holder must differ between all replicas and starts; every holder of a name
// must use the same ttl. Hold logs errors of the store and tries again, for as
// long as it has the lease. Hold may be called for several names at once.
func Hold(ctx context.Context, store storage.Leases, name, holder string, ttl time.Duration, logger *slog.Logger, work Work) error {
	k := &keeper{store: store, name: name, holder: holder, ttl: ttl, log: logger.With("lease", name)}
	for {
		since, err := k.acquire(ctx)
		if err != nil {
			return err
		}
		lost, err := k.keep(ctx, since, work)
		if !lost {
			k.release(ctx)
			if err == nil {
				err = ctx.Err()
			}
			return err
		}
		k.log.WarnContext(ctx, "lost the lease")
	}
}

// keeper is one call of Hold.
type keeper struct {
	store   storage.Leases
	name    string
	holder  string
	ttl     time.Duration
	log     *slog.Logger
	current atomic.Pointer[storage.Lease]
}

// acquire watches the lease until it can take it. It returns the time from which
// the lease's time to live counts, and fails only when ctx ends.
func (k *keeper) acquire(ctx context.Context) (since time.Time, err error) {
	var seen storage.Lease
	var seenAt time.Time // zero: nothing seen yet
	complained := false
	for {
		now, err := k.store.PeekLease(ctx, k.name)
		at := time.Now()
		switch {
		case err != nil:
			// The lease may have changed unseen: begin again.
			seenAt = time.Time{}
			if ctx.Err() == nil && !complained {
				complained = true
				k.log.WarnContext(ctx, "cannot read the lease", "error", err)
			}
		case now.Holder != "" && (seenAt.IsZero() || now.Fence != seen.Fence || now.Beat != seen.Beat):
			complained = false
			seen, seenAt = now, at
		case now.Holder == "" || at.Sub(seenAt) >= k.ttl:
			taken, err := k.store.TakeLease(ctx, now, k.holder)
			if err == nil {
				k.current.Store(&taken)
				k.log.InfoContext(ctx, "took the lease", "fence", taken.Fence)
				return at, nil
			}
			if !errors.Is(err, storage.ErrLeaseLost) && ctx.Err() == nil {
				k.log.WarnContext(ctx, "cannot take the lease", "error", err)
			}
			seenAt = time.Time{}
		}
		wait := min(k.ttl/3, askEvery)
		if !seenAt.IsZero() {
			wait = min(wait, max(k.ttl-time.Since(seenAt), time.Millisecond))
		}
		if err := backoff.Sleep(ctx, wait); err != nil {
			return time.Time{}, err
		}
	}
}

// keep runs work and renews the lease until work returns. A lease counts as
// lost a little before another replica may take it.
func (k *keeper) keep(ctx context.Context, since time.Time, work Work) (lost bool, err error) {
	workCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan error, 1)
	go func() {
		done <- supervise.Recovered(func() error { return work(workCtx, func() storage.Lease { return *k.current.Load() }) })
	}()
	// The lease is renewed while work finishes after ctx has ended.
	store := context.WithoutCancel(ctx)
	safe := k.ttl - k.ttl/6
	wait := k.ttl / 3
	for {
		timer := time.NewTimer(wait)
		select {
		case err := <-done:
			timer.Stop()
			return false, err
		case <-timer.C:
		}
		at := time.Now()
		renewCtx, stop := context.WithDeadline(store, since.Add(safe))
		renewed, err := k.store.RenewLease(renewCtx, *k.current.Load())
		stop()
		switch {
		case err == nil:
			k.current.Store(&renewed)
			since, wait = at, k.ttl/3
		case errors.Is(err, storage.ErrLeaseLost) || time.Since(since) >= safe:
			cancel(storage.ErrLeaseLost)
			if err := <-done; errors.As(err, new(*supervise.Panic)) {
				return false, err
			}
			return true, nil
		default:
			k.log.WarnContext(ctx, "cannot renew the lease", "error", err)
			wait = min(k.ttl/10, max(safe-time.Since(since), time.Millisecond))
		}
	}
}

func (k *keeper) release(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), releaseTimeout)
	defer cancel()
	if err := k.store.ReleaseLease(ctx, *k.current.Load()); err != nil {
		k.log.WarnContext(ctx, "cannot release the lease; others wait for its time to live", "error", err)
	}
}
