package push

import (
	"context"
	"errors"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

const (
	// claimTime is how long a sweep has for what it claimed: longer than a
	// push with all its tries.
	claimTime = 2 * time.Minute
	// skipTime is when the sweep looks again at what is due to a stopped topic.
	skipTime = 15 * time.Minute
)

// Sweep pays what is due until ctx ends, whose error it returns. It is work
// for lease.Hold: one replica sweeps, under the lease that current returns.
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
		timer := time.NewTimer(s.cfg.SweepEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// sweep claims what is due and starts the pushes, of which no more are under
// way than there are slots.
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
		if !s.board(t.ID) {
			continue
		}
		started := s.launch(ctx, t, &want{id: t.ID})
		s.pushes.Done() // of board
		if !started {
			break
		}
	}
	return more, nil
}

// board makes an enrollment fly, unless it does or is wanted by a caller, who
// pays for it. It counts as a push, so that Close waits for it.
func (s *Service) board(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, flying := s.flying[id]
	_, wanted := s.wanted[id]
	if flying || wanted || s.closed {
		return false
	}
	s.pushes.Add(1)
	s.flying[id] = struct{}{}
	return true
}
