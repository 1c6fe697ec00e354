package main

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
)

func TestSupervise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := newServer(slog.New(slog.NewTextHandler(&log, nil)), time.Minute, time.Minute)
		var restarts atomic.Int32
		var failing atomic.Bool
		s.restarted = func(name string) { require.Equal(t, "sweep", name); restarts.Add(1) }
		s.failing = func(_ string, now bool) { failing.Store(now) }
		ctx, stop := context.WithCancel(t.Context())
		var runs atomic.Int32
		done := make(chan error, 1)
		go func() {
			done <- s.supervise(ctx, "sweep", func(ctx context.Context) error {
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
		time.Sleep(steadyAfter)
		synctest.Wait()
		require.False(t, failing.Load(), "it runs again")
		stop()
		require.ErrorIs(t, <-done, context.Canceled)
		for _, part := range []string{"panic: boom", "supervise_test.go", "error=broken", "it ended by itself"} {
			require.Contains(t, log.String(), part)
		}
	})
}
