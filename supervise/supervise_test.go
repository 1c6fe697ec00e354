package supervise_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/supervise"
)

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		var restarts atomic.Int32
		var failing atomic.Bool
		s := supervise.New(supervise.Config{
			Logger:  slog.New(slog.NewTextHandler(&log, nil)),
			Failed:  func(name string) { require.Equal(t, "sweep", name); restarts.Add(1) },
			Failing: func(_ string, now bool) { failing.Store(now) },
		})
		ctx, stop := context.WithCancel(t.Context())
		var runs atomic.Int32
		done := make(chan error, 1)
		go func() {
			done <- s.Run(ctx, "sweep", func(ctx context.Context) error {
				switch runs.Add(1) {
				case 1:
					panic("boom")
				case 2:
					return errors.New("broken")
				case 3:
					return nil
				case 4, 5:
					panic("again")
				}
				<-ctx.Done()
				return ctx.Err()
			})
		}()
		time.Sleep(3 * time.Second)
		synctest.Wait()
		require.Greater(t, runs.Load(), int32(1), "it starts again after a panic")
		require.False(t, failing.Load(), "one failure is no alarm")
		time.Sleep(time.Minute)
		synctest.Wait()
		require.EqualValues(t, 6, runs.Load())
		require.EqualValues(t, 5, restarts.Load())
		require.True(t, failing.Load(), "five in a row are")
		time.Sleep(supervise.SteadyAfter)
		synctest.Wait()
		require.False(t, failing.Load(), "it runs again")
		stop()
		require.ErrorIs(t, <-done, context.Canceled)
		for _, part := range []string{"panic: boom", "supervise_test.go", "error=broken", "it ended by itself"} {
			require.Contains(t, log.String(), part)
		}
	})
}

// Work that has come to its end is not started again.
func TestRunEnds(t *testing.T) {
	runs := 0
	require.NoError(t, supervise.New(supervise.Config{}).Run(t.Context(), "sink", func(context.Context) error {
		runs++
		return supervise.ErrDone
	}))
	require.Equal(t, 1, runs)
}

// Pieces of work that panic are counted; five in a row are failing until one
// succeeds.
func TestOnce(t *testing.T) {
	var log bytes.Buffer
	failed, failing := 0, map[string]bool{}
	s := supervise.New(supervise.Config{
		Logger:  slog.New(slog.NewTextHandler(&log, nil)),
		Failed:  func(string) { failed++ },
		Failing: func(name string, now bool) { failing[name] = now },
	})
	good, bad := func() {}, func() { panic("boom") }
	for range supervise.ManyFailures - 1 {
		require.ErrorIs(t, s.Once("push", bad), supervise.ErrPanicked)
	}
	require.NoError(t, s.Once("push", good))
	for range supervise.ManyFailures - 1 {
		require.Error(t, s.Once("push", bad))
	}
	require.NoError(t, s.Once("delivery", good), "another's success says nothing")
	require.Empty(t, failing)
	require.Error(t, s.Once("push", bad))
	require.Equal(t, map[string]bool{"push": true}, failing)
	require.NoError(t, s.Once("push", good))
	require.Equal(t, map[string]bool{"push": false}, failing)
	require.Equal(t, 2*supervise.ManyFailures-1, failed)
	require.Contains(t, log.String(), "panic: boom")
	require.Contains(t, log.String(), "supervise_test.go")
}
