package push

import (
	"context"
	"errors"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// claimTime is how long a claim of the sweep holds: longer than a push with
	// all its tries.
	claimTime = 2 * time.Minute
	// skipTime is the pause before the sweep looks again at due pushes of a
	// stopped topic.
	skipTime = 15 * time.Minute
)

// Sweep sends due pushes until ctx ends, and returns the error of ctx. It is
// work for lease.Hold: one replica sweeps, under the lease that current returns.
func (s *Service) Sweep(ctx context.Context, current func() storage.Lease) error {
	failing := false
	for {
		more, err := s.sweep(ctx, current())
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, storage.ErrLeaseLost): // lease.Hold is about to notice
			<-ctx.Done()
			return ctx.Err()
		case err != nil && !failing: // once for each outage
			s.log.WarnContext(ctx, "cannot look for pushes that are due", "error", err)
		}
		failing = err != nil
		if more {
			continue
		}
		if err := backoff.Sleep(ctx, s.cfg.SweepEvery); err != nil {
			return err
		}
	}
}

// sweep claims due pushes and starts them, as slots come free.
func (s *Service) sweep(ctx context.Context, l storage.Lease) (more bool, err error) {
	now := s.cfg.Now()
	claim := storage.PushClaim{
		Now: now, Until: now.Add(claimTime), Limit: s.batch, Skip: s.topics.skip(),
		SkipUntil: now.Add(skipTime), RenewedUntil: now.Add(s.cfg.APNs.CertificateTTL),
	}
	if len(s.cfg.Retry) > 0 {
		claim.Silence = s.cfg.Retry[0]
	}
	targets, more, err := s.store.ClaimDuePushes(ctx, l, claim)
	if err != nil {
		return false, err
	}
	s.swept.Add(int64(len(targets)))
	for _, t := range targets {
		if !s.reserve(t.ID) {
			continue
		}
		started := s.startPush(ctx, t, &pendingPush{id: t.ID})
		s.pushes.Done() // of reserve
		if !started {
			break
		}
	}
	return more, nil
}

// reserve marks an enrollment as in flight, unless it is, or is pending for a
// caller. The reservation counts as a push, so that Close waits for it.
func (s *Service) reserve(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, inFlight := s.inFlight[id]
	_, pending := s.pending[id]
	if inFlight || pending || s.closed {
		return false
	}
	s.pushes.Add(1)
	s.inFlight[id] = struct{}{}
	return true
}
