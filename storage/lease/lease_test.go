package lease

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/supervise"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const ttl = 9 * time.Second

// table is one lease in memory, and a store that may fail.
type table struct {
	mu   sync.Mutex
	row  storage.Lease
	down bool
}

var errDown = errors.New("the database is down")

func (tb *table) with(fn func() error) error {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	if tb.down {
		return errDown
	}
	return fn()
}

func (tb *table) setDown(down bool) {
	tb.mu.Lock()
	defer tb.mu.Unlock()
	tb.down = down
}

func (tb *table) PeekLease(_ context.Context, name string) (l storage.Lease, err error) {
	err = tb.with(func() error {
		l = tb.row
		l.Name = name
		return nil
	})
	return l, err
}

func (tb *table) TakeLease(_ context.Context, seen storage.Lease, holder string) (l storage.Lease, err error) {
	err = tb.with(func() error {
		if tb.row.Holder != seen.Holder || tb.row.Fence != seen.Fence || tb.row.Beat != seen.Beat {
			return storage.ErrLeaseLost
		}
		tb.row = storage.Lease{Name: seen.Name, Holder: holder, Fence: seen.Fence + 1, Beat: seen.Beat + 1}
		l = tb.row
		return nil
	})
	return l, err
}

func (tb *table) RenewLease(_ context.Context, held storage.Lease) (l storage.Lease, err error) {
	err = tb.with(func() error {
		if tb.row.Holder != held.Holder || tb.row.Fence != held.Fence {
			return storage.ErrLeaseLost
		}
		tb.row.Beat++
		l = tb.row
		return nil
	})
	return l, err
}

func (tb *table) ReleaseLease(_ context.Context, held storage.Lease) error {
	return tb.with(func() error {
		if tb.row.Holder == held.Holder && tb.row.Fence == held.Fence {
			tb.row.Holder = ""
			tb.row.Beat++
		}
		return nil
	})
}

func hold(ctx context.Context, tb *table, holder string, work Work) error {
	return Hold(ctx, tb, "sheep", holder, ttl, slog.New(slog.DiscardHandler), work)
}

// until is work that ends with its context.
func until(ctx context.Context, _ func() storage.Lease) error {
	<-ctx.Done()
	return context.Cause(ctx)
}

func TestHoldTakesAFreeLeaseAtOnceAndReleasesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := new(table)
		before := time.Now()
		broken := errors.New("work failed")
		err := hold(t.Context(), tb, "a", func(_ context.Context, current func() storage.Lease) error {
			require.Equal(t, storage.Lease{Name: "sheep", Holder: "a", Fence: 1, Beat: 1}, current())
			return broken
		})
		require.ErrorIs(t, err, broken)
		require.Zero(t, time.Since(before))
		require.Empty(t, tb.row.Holder)
	})
}

func TestHoldRenewsAsLongAsWorkRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := new(table)
		err := hold(t.Context(), tb, "a", func(_ context.Context, current func() storage.Lease) error {
			time.Sleep(10 * ttl)
			require.EqualValues(t, 1, current().Fence)
			require.GreaterOrEqual(t, current().Beat, int64(29))
			return nil
		})
		require.NoError(t, err)
	})
}

func TestHoldFollowsAReleasedLeaseWithinAskEvery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := new(table)
		ctx, stop := context.WithCancel(t.Context())
		before := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() { require.ErrorIs(t, hold(ctx, tb, "a", until), context.Canceled) })
		synctest.Wait()
		wg.Go(func() {
			require.NoError(t, hold(t.Context(), tb, "b", func(_ context.Context, current func() storage.Lease) error {
				require.EqualValues(t, 2, current().Fence)
				require.GreaterOrEqual(t, time.Since(before), 10*ttl)
				require.LessOrEqual(t, time.Since(before), 10*ttl+askEvery)
				return nil
			}))
		})
		time.Sleep(10 * ttl)
		stop()
		wg.Wait()
	})
}

func TestHoldWaitsTheWholeTimeToLiveForADeadHolder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &table{row: storage.Lease{Name: "sheep", Holder: "dead", Fence: 7, Beat: 9}}
		before := time.Now()
		// A last sign of life, which a candidate that only looks at the end
		// would miss.
		time.AfterFunc(ttl/2, func() { _, _ = tb.RenewLease(t.Context(), storage.Lease{Holder: "dead", Fence: 7}) })
		require.NoError(t, hold(t.Context(), tb, "heir", func(_ context.Context, current func() storage.Lease) error {
			require.EqualValues(t, 8, current().Fence)
			return nil
		}))
		require.GreaterOrEqual(t, time.Since(before), ttl+ttl/2)
		require.LessOrEqual(t, time.Since(before), ttl+ttl/2+2*askEvery)
	})
}

// TestHoldCountsNoTimeUnwatched: while the database could not be read the
// holder may have renewed.
func TestHoldCountsNoTimeUnwatched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &table{row: storage.Lease{Name: "sheep", Holder: "dead", Fence: 7, Beat: 9}}
		before := time.Now()
		time.AfterFunc(ttl-askEvery/2, func() { tb.setDown(true) })
		time.AfterFunc(2*ttl, func() { tb.setDown(false) })
		require.NoError(t, hold(t.Context(), tb, "heir", func(context.Context, func() storage.Lease) error { return nil }))
		require.GreaterOrEqual(t, time.Since(before), 3*ttl)
	})
}

// TestHoldStopsWorkBeforeAnHeirBegins: a holder that cannot reach the database
// stops by itself before anybody else may believe to hold the lease.
func TestHoldStopsWorkBeforeAnHeirBegins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := new(table)
		cut := &table{} // a's way to the table, which will be cut
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var stopped atomic.Pointer[time.Time]
		var wg sync.WaitGroup
		wg.Go(func() {
			a := &gate{table: tb, gate: cut}
			_ = Hold(ctx, a, "sheep", "a", ttl, slog.New(slog.DiscardHandler), func(ctx context.Context, _ func() storage.Lease) error {
				<-ctx.Done()
				require.ErrorIs(t, context.Cause(ctx), storage.ErrLeaseLost)
				now := time.Now()
				stopped.Store(&now)
				stop() // not again
				return nil
			})
		})
		synctest.Wait()
		wg.Go(func() {
			require.NoError(t, hold(t.Context(), tb, "b", func(_ context.Context, current func() storage.Lease) error {
				require.NotNil(t, stopped.Load(), "a still works")
				require.True(t, stopped.Load().Before(time.Now()))
				require.EqualValues(t, 2, current().Fence)
				return nil
			}))
		})
		time.Sleep(2 * ttl)
		cut.setDown(true)
		wg.Wait()
	})
}

// gate is a table behind a network that can be cut.
type gate struct {
	*table
	gate *table
}

func (g *gate) PeekLease(ctx context.Context, name string) (l storage.Lease, err error) {
	err = g.gate.with(func() error { l, err = g.table.PeekLease(ctx, name); return err })
	return l, err
}

func (g *gate) RenewLease(ctx context.Context, held storage.Lease) (l storage.Lease, err error) {
	err = g.gate.with(func() error { l, err = g.table.RenewLease(ctx, held); return err })
	return l, err
}

func (g *gate) ReleaseLease(ctx context.Context, held storage.Lease) error {
	return g.gate.with(func() error { return g.table.ReleaseLease(ctx, held) })
}

func TestHoldSurvivesAShortOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := new(table)
		time.AfterFunc(ttl, func() { tb.setDown(true) })
		time.AfterFunc(ttl+ttl/3, func() { tb.setDown(false) })
		require.NoError(t, hold(t.Context(), tb, "a", func(ctx context.Context, current func() storage.Lease) error {
			time.Sleep(4 * ttl)
			require.NoError(t, ctx.Err())
			require.EqualValues(t, 1, current().Fence)
			return nil
		}))
	})
}

// TestHoldComesBack: a lease that was taken away is waited for again.
func TestHoldComesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := new(table)
		terms := []int64{}
		time.AfterFunc(ttl, func() {
			tb.mu.Lock()
			tb.row.Holder, tb.row.Fence = "thief", tb.row.Fence+1
			tb.mu.Unlock()
		})
		require.NoError(t, hold(t.Context(), tb, "a", func(ctx context.Context, current func() storage.Lease) error {
			terms = append(terms, current().Fence)
			if len(terms) == 1 {
				return until(ctx, current)
			}
			return nil
		}))
		require.Equal(t, []int64{1, 3}, terms)
	})
}

// TestHoldKeepsTheLeaseWhileWorkWindsDown: the end of ctx is no reason to let
// somebody else in while work still runs.
func TestHoldKeepsTheLeaseWhileWorkWindsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := new(table)
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		err := hold(ctx, tb, "a", func(ctx context.Context, current func() storage.Lease) error {
			<-ctx.Done()
			beat := current().Beat
			time.Sleep(3 * ttl)
			l, err := tb.PeekLease(t.Context(), "sheep")
			require.NoError(t, err)
			require.Equal(t, "a", l.Holder)
			require.Greater(t, l.Beat, beat)
			return ctx.Err()
		})
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Empty(t, tb.row.Holder)
	})
}

func TestHoldEndsWhileItWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &table{row: storage.Lease{Holder: "dead", Fence: 1, Beat: 1}}
		ctx, stop := context.WithTimeout(t.Context(), ttl/2)
		defer stop()
		require.ErrorIs(t, hold(ctx, tb, "a", until), context.DeadlineExceeded)
		require.Equal(t, "dead", tb.row.Holder)
	})
}

// A panic of work is an error of Hold, and the lease is free for others.
func TestPanicIsAnError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tb := &table{}
		err := Hold(t.Context(), tb, "sweep", "a", ttl, slog.New(slog.DiscardHandler), func(context.Context, func() storage.Lease) error { panic("boom") })
		var p *supervise.Panic
		require.ErrorAs(t, err, &p)
		require.Equal(t, "boom", p.Value)
		require.Empty(t, tb.row.Holder)
	})
}
