package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestSupervise(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log bytes.Buffer
		s := newServer(slog.New(slog.NewTextHandler(&log, nil)), time.Minute, time.Minute)
		restarts, failing := 0, false
		s.restarted = func(name string) { require.Equal(t, "sweep", name); restarts++ }
		s.failing = func(_ string, now bool) { failing = now }
		ctx, stop := context.WithCancel(t.Context())
		runs := 0
		done := make(chan error, 1)
		go func() {
			done <- s.supervise(ctx, "sweep", func(ctx context.Context) error {
				runs++
				switch runs {
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
		require.Greater(t, runs, 1, "it starts again after a panic")
		require.False(t, failing, "one failure is no alarm")
		time.Sleep(time.Minute)
		synctest.Wait()
		require.Equal(t, 6, runs)
		require.Equal(t, 5, restarts)
		require.True(t, failing, "five in a row are")
		time.Sleep(steadyAfter)
		synctest.Wait()
		require.False(t, failing, "it runs again")
		stop()
		require.ErrorIs(t, <-done, context.Canceled)
		for _, part := range []string{"panic: boom", "supervise_test.go", "error=broken", "it ended by itself"} {
			require.Contains(t, log.String(), part)
		}
	})
}
