package storagetest

import (
	"context"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
)

func leaseTests() []subtest {
	return []subtest{
		{"nobody's lease is the zero one", leaseNobodys},
		{"a free lease goes to one of many", leaseOneOfMany},
		{"renewing keeps the fence", leaseRenewed},
		{"a lease that moved since it was seen is not taken", leaseMoved},
		{"who was overtaken can neither renew nor release", leaseOvertaken},
		{"a released lease is free and keeps its fence", leaseReleased},
		{"names differ byte for byte", leaseNames},
		{"one replica works at a time", leaseHeld},
		{"a dead holder is followed after the time to live", leaseDeadHolder},
	}
}

func leaseNobodys(t *testing.T, h *Harness) {
	l, err := h.Store.PeekLease(t.Context(), "sheep")
	require.NoError(t, err)
	require.Equal(t, storage.Lease{Name: "sheep"}, l)
	_, err = h.Store.RenewLease(t.Context(), storage.Lease{Name: "sheep", Holder: "a", Fence: 1})
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	require.NoError(t, h.Store.ReleaseLease(t.Context(), storage.Lease{Name: "sheep", Holder: "a", Fence: 1}))
}

// take takes a lease as it stands.
func take(t *testing.T, s storage.Leases, name, holder string) storage.Lease {
	t.Helper()
	seen, err := s.PeekLease(t.Context(), name)
	require.NoError(t, err)
	l, err := s.TakeLease(t.Context(), seen, holder)
	require.NoError(t, err)
	require.Equal(t, storage.Lease{Name: name, Holder: holder, Fence: seen.Fence + 1, Beat: seen.Beat + 1}, l)
	now, err := s.PeekLease(t.Context(), name)
	require.NoError(t, err)
	require.Equal(t, l, now)
	return l
}

func leaseOneOfMany(t *testing.T, h *Harness) {
	for round := range 3 { // the first has no row yet
		seen, err := h.Store.PeekLease(t.Context(), "sheep")
		require.NoError(t, err)
		require.EqualValues(t, round, seen.Fence)
		var wg sync.WaitGroup
		errs := make([]error, 8)
		for i := range errs {
			wg.Go(func() { _, errs[i] = h.Store.TakeLease(t.Context(), seen, string(rune('a'+i))) })
		}
		wg.Wait()
		won := 0
		for _, err := range errs {
			if err == nil {
				won++
			} else {
				require.ErrorIs(t, err, storage.ErrLeaseLost)
			}
		}
		require.Equal(t, 1, won)
	}
}

func leaseRenewed(t *testing.T, h *Harness) {
	l := take(t, h.Store, "sheep", "a")
	renewed, err := h.Store.RenewLease(t.Context(), l)
	require.NoError(t, err)
	require.Equal(t, storage.Lease{Name: "sheep", Holder: "a", Fence: l.Fence, Beat: l.Beat + 1}, renewed)
}

func leaseMoved(t *testing.T, h *Harness) {
	seen := take(t, h.Store, "sheep", "a")
	_, err := h.Store.RenewLease(t.Context(), seen)
	require.NoError(t, err)
	_, err = h.Store.TakeLease(t.Context(), seen, "b")
	require.ErrorIs(t, err, storage.ErrLeaseLost)
}

func leaseOvertaken(t *testing.T, h *Harness) {
	old := take(t, h.Store, "sheep", "a")
	l := take(t, h.Store, "sheep", "b")
	_, err := h.Store.RenewLease(t.Context(), old)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	require.NoError(t, h.Store.ReleaseLease(t.Context(), old))
	now, err := h.Store.PeekLease(t.Context(), "sheep")
	require.NoError(t, err)
	require.Equal(t, l, now)

	again := take(t, h.Store, "sheep", "a")
	_, err = h.Store.RenewLease(t.Context(), old)
	require.ErrorIs(t, err, storage.ErrLeaseLost, "the same holder, but not the same term")
	require.Greater(t, again.Fence, l.Fence)
}

func leaseReleased(t *testing.T, h *Harness) {
	l := take(t, h.Store, "sheep", "a")
	require.NoError(t, h.Store.ReleaseLease(t.Context(), l))
	now, err := h.Store.PeekLease(t.Context(), "sheep")
	require.NoError(t, err)
	require.Empty(t, now.Holder)
	require.Equal(t, l.Fence, now.Fence)
	_, err = h.Store.RenewLease(t.Context(), l)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	require.Equal(t, l.Fence+1, take(t, h.Store, "sheep", "b").Fence)
}

func leaseNames(t *testing.T, h *Harness) {
	for _, name := range []string{"sheep", "Sheep", "sheep "} {
		require.EqualValues(t, 1, take(t, h.Store, name, "a").Fence)
	}
}

// leaseHeld has two replicas and three holders want one lease, each for a
// while.
func leaseHeld(t *testing.T, h *Harness) {
	second := h.Open(t, nil)
	stores := []storage.Leases{h.Store, second, second}
	var mu sync.Mutex
	working, terms := 0, []int64{}
	var wg sync.WaitGroup
	for i, s := range stores {
		wg.Go(func() {
			err := lease.Hold(t.Context(), s, "sheep", string(rune('a'+i)), time.Second, slog.New(slog.DiscardHandler),
				func(ctx context.Context, current func() storage.Lease) error {
					mu.Lock()
					working++
					terms = append(terms, current().Fence)
					alone := working == 1
					mu.Unlock()
					if !alone {
						t.Error("two at once")
					}
					// Each renewal is seen by the holder.
					beat := current().Beat
					for ctx.Err() == nil && current().Beat == beat {
						time.Sleep(time.Millisecond)
					}
					mu.Lock()
					working--
					mu.Unlock()
					return ctx.Err()
				})
			if err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	require.Equal(t, []int64{1, 2, 3}, terms)
}

func leaseDeadHolder(t *testing.T, h *Harness) {
	const ttl = 300 * time.Millisecond
	dead := take(t, h.Store, "sheep", "dead")
	began := time.Now()
	err := lease.Hold(t.Context(), h.Store, "sheep", "heir", ttl, slog.New(slog.DiscardHandler),
		func(_ context.Context, current func() storage.Lease) error {
			require.GreaterOrEqual(t, time.Since(began), ttl)
			require.Equal(t, dead.Fence+1, current().Fence)
			_, err := h.Store.RenewLease(t.Context(), dead)
			require.ErrorIs(t, err, storage.ErrLeaseLost)
			return nil
		})
	require.NoError(t, err)
}
