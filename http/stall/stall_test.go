package stall

import (
	"context"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestSince(t *testing.T) {
	now := time.Now()
	w := New(slog.New(slog.DiscardHandler), func() time.Time { return now })
	early := now
	for range 100 { // hours of a busy process
		now = now.Add(longest)
		require.False(t, w.Since(early))
	}
	held := now
	now = now.Add(longest + time.Millisecond) // nobody looked
	require.True(t, w.Since(held))
	require.True(t, w.Since(now), "it may have waited in the system")
	require.EqualValues(t, 1, w.Count())

	now = now.Add(backlog)
	require.False(t, w.Since(now))
	require.True(t, w.Since(held), "for ever")
	require.EqualValues(t, 1, w.Count())
}

func TestRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := New(slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx) }()
		arrived := time.Now()
		time.Sleep(time.Hour) // the watch beats meanwhile
		require.False(t, w.Since(arrived))
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
	})
}
