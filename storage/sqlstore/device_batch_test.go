package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

func never(error) bool { return false }

// wide has room for everything.
func wide() batchConfig {
	return batchConfig{inFlight: 1, rows: 1000, bytes: 1 << 20, waiting: 1000, hopeless: never}
}

func TestBatcherLoneCallerRunsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBatcher(wide(), func(_ context.Context, items []int) error {
			require.Equal(t, []int{7}, items)
			return nil
		})
		before := time.Now()
		require.NoError(t, b.do(t.Context(), 7, 1))
		require.Zero(t, time.Since(before))
	})
}

// recorder is a run function of one second that notes its batches.
type recorder struct {
	mu      sync.Mutex
	batches [][]int
	now     int
	most    int
	fail    func(items []int) error
}

func (r *recorder) run(_ context.Context, items []int) error {
	r.mu.Lock()
	r.batches = append(r.batches, append([]int(nil), items...))
	r.now++
	r.most = max(r.most, r.now)
	r.mu.Unlock()
	time.Sleep(time.Second)
	r.mu.Lock()
	r.now--
	r.mu.Unlock()
	if r.fail != nil {
		return r.fail(items)
	}
	return nil
}

// doAll sends items in this order, each from a goroutine of its own, and
// returns their errors.
func doAll(t *testing.T, b *batcher[int], items []int, size int) []error {
	errs := make([]error, len(items))
	var wg sync.WaitGroup
	for i, item := range items {
		wg.Go(func() { errs[i] = b.do(t.Context(), item, size) })
		synctest.Wait()
	}
	wg.Wait()
	return errs
}

func TestBatcherGathers(t *testing.T) {
	six := []int{1, 2, 3, 4, 5, 6}
	for _, tc := range []struct {
		name    string
		change  func(*batchConfig)
		size    int
		batches [][]int
		took    time.Duration
	}{
		{"while one is in flight", func(*batchConfig) {}, 1, [][]int{{1}, {2, 3, 4, 5, 6}}, 2 * time.Second},
		{"two in flight", func(c *batchConfig) { c.inFlight = 2 }, 1, [][]int{{1}, {2}, {3, 4, 5, 6}}, 2 * time.Second},
		{"bounded in rows", func(c *batchConfig) { c.rows = 2 }, 1, [][]int{{1}, {2, 3}, {4, 5}, {6}}, 4 * time.Second},
		{"bounded in bytes", func(c *batchConfig) { c.bytes = 30 }, 10, [][]int{{1}, {2, 3, 4}, {5, 6}}, 3 * time.Second},
		{"larger than the bound", func(c *batchConfig) { c.bytes = 5 }, 10, [][]int{{1}, {2}, {3}, {4}, {5}, {6}}, 6 * time.Second},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := wide()
				tc.change(&cfg)
				var r recorder
				b := newBatcher(cfg, r.run)
				before := time.Now()
				for _, err := range doAll(t, b, six, tc.size) {
					require.NoError(t, err)
				}
				require.Equal(t, tc.batches, r.batches)
				require.Equal(t, tc.took, time.Since(before))
				require.LessOrEqual(t, r.most, cfg.inFlight)
				require.Zero(t, b.running)
				require.Zero(t, b.waiting)
				require.Empty(t, b.queue)
			})
		})
	}
}

func TestBatcherBadItemFailsAlone(t *testing.T) {
	bad := errors.New("three is bad")
	synctest.Test(t, func(t *testing.T) {
		r := recorder{fail: func(items []int) error {
			for _, item := range items {
				if item == 3 {
					return bad
				}
			}
			return nil
		}}
		b := newBatcher(wide(), r.run)
		errs := doAll(t, b, []int{1, 2, 3, 4}, 1)
		require.Equal(t, []error{nil, nil, bad, nil}, errs)
		require.Equal(t, [][]int{{1}, {2, 3, 4}, {2}, {3}, {4}}, r.batches)
	})
}

func TestBatcherHopelessErrorIsEverybodys(t *testing.T) {
	down := errors.New("database is down")
	synctest.Test(t, func(t *testing.T) {
		cfg := wide()
		cfg.hopeless = func(err error) bool { return errors.Is(err, down) }
		r := recorder{fail: func([]int) error { return down }}
		b := newBatcher(cfg, r.run)
		require.Equal(t, []error{down, down, down}, doAll(t, b, []int{1, 2, 3}, 1))
		require.Equal(t, [][]int{{1}, {2, 3}}, r.batches)
	})
}

func TestBatcherRefusesWhenFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := wide()
		cfg.waiting = 2
		var r recorder
		b := newBatcher(cfg, r.run)
		errs := doAll(t, b, []int{1, 2, 3, 4}, 1)
		require.Equal(t, []error{nil, nil, nil, storage.ErrBusy}, errs)
		require.NoError(t, b.do(t.Context(), 5, 1), "there is room again")
	})
}

func TestBatcherCancelledCallerLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := wide()
		cfg.waiting = 2
		var r recorder
		b := newBatcher(cfg, r.run)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		wg.Go(func() { require.NoError(t, b.do(t.Context(), 1, 1)) })
		synctest.Wait()
		wg.Go(func() { require.ErrorIs(t, b.do(ctx, 2, 1), context.Canceled) })
		synctest.Wait()
		wg.Go(func() { require.NoError(t, b.do(t.Context(), 3, 1)) })
		synctest.Wait()
		cancel()
		synctest.Wait()
		wg.Go(func() { require.NoError(t, b.do(t.Context(), 4, 1), "the place is free") })
		wg.Wait()
		require.Equal(t, [][]int{{1}, {3, 4}}, r.batches)
		require.ErrorIs(t, b.do(ctx, 5, 1), context.Canceled)
		require.Len(t, r.batches, 2)
	})
}

func TestBatcherCancelledWhileExecuting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBatcher(wide(), func(ctx context.Context, _ []int) error {
			time.Sleep(time.Second)
			return ctx.Err()
		})
		ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() { require.NoError(t, b.do(t.Context(), 1, 1)) })
		synctest.Wait()
		wg.Go(func() { require.NoError(t, b.do(ctx, 2, 1), "its batch is under way and the outcome is what counts") })
		wg.Wait()
	})
}

func TestBatcherSurvivesPanic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBatcher(wide(), func(_ context.Context, items []int) error {
			time.Sleep(time.Second)
			if len(items) == 2 {
				panic("boom")
			}
			return nil
		})
		var wg sync.WaitGroup
		wg.Go(func() { require.NoError(t, b.do(t.Context(), 1, 1)) })
		synctest.Wait()
		wg.Go(func() { require.Panics(t, func() { _ = b.do(t.Context(), 2, 1) }) })
		synctest.Wait()
		wg.Go(func() { require.ErrorIs(t, b.do(t.Context(), 3, 1), errPanicked) })
		wg.Wait()
		require.NoError(t, b.do(t.Context(), 4, 1))
	})
}

// TestBatcherUnderLoad has every item done exactly once, or its caller told
// that it was not, with callers that leave at random.
func TestBatcherUnderLoad(t *testing.T) {
	const callers, each = 32, 200
	done := make([]atomic.Int32, callers*each)
	var running atomic.Int32
	cfg := batchConfig{inFlight: 2, rows: 7, bytes: 50, waiting: 20, hopeless: never}
	b := newBatcher(cfg, func(_ context.Context, items []int) error {
		if running.Add(1) > 2 {
			panic("too many in flight")
		}
		defer running.Add(-1)
		for _, item := range items {
			if item%17 == 0 {
				return fmt.Errorf("item %d is bad", item)
			}
		}
		for _, item := range items {
			done[item].Add(1)
		}
		return nil
	})
	var wg sync.WaitGroup
	for c := range callers {
		wg.Go(func() {
			for i := range each {
				item := c*each + i
				ctx, cancel := context.WithTimeout(t.Context(), rand.N(200*time.Microsecond))
				err := b.do(ctx, item, rand.IntN(20))
				cancel()
				switch n := done[item].Load(); {
				case err == nil && n != 1, err != nil && n != 0:
					t.Errorf("item %d: done %d times, error %v", item, n, err)
				case err == nil && item%17 == 0:
					t.Errorf("item %d is bad and did not fail", item)
				}
			}
		})
	}
	wg.Wait()
	require.Zero(t, b.running)
	require.Zero(t, b.waiting)
}

func BenchmarkBatcher(b *testing.B) {
	for _, callers := range []int{1, 16, 128} {
		b.Run(fmt.Sprintf("callers=%d", callers), func(b *testing.B) {
			var batches atomic.Int64
			cfg := batchConfig{inFlight: 1, rows: 128, bytes: 1 << 20, waiting: 1 << 16, hopeless: never}
			batch := newBatcher(cfg, func(context.Context, []int) error {
				batches.Add(1)
				return nil
			})
			b.ReportAllocs()
			b.SetParallelism(callers)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if err := batch.do(b.Context(), 1, 1); err != nil {
						b.Error(err)
					}
				}
			})
			b.ReportMetric(float64(batches.Load())/float64(b.N), "batches/op")
		})
	}
}
