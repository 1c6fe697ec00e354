package backoff_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/backoff"
)

func TestSleep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := time.Now()
		require.NoError(t, backoff.Sleep(t.Context(), time.Minute))
		require.Equal(t, time.Minute, time.Since(began))

		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		began = time.Now()
		require.ErrorIs(t, backoff.Sleep(ctx, time.Minute), context.DeadlineExceeded)
		require.Equal(t, time.Second, time.Since(began))
	})
}

func TestPauseDoublesUpToMax(t *testing.T) {
	p := backoff.Policy{First: 4 * time.Second, Max: 20 * time.Second}
	for n, middle := range map[int]time.Duration{
		0: 4 * time.Second, 1: 4 * time.Second, 2: 8 * time.Second, 3: 16 * time.Second,
		4: 20 * time.Second, 5: 20 * time.Second, 1 << 40: 20 * time.Second,
	} {
		for range 100 {
			d := p.Pause(n)
			require.GreaterOrEqual(t, d, middle*3/4, "failure %d", n)
			require.LessOrEqual(t, d, middle*5/4, "failure %d", n)
		}
	}
}

func TestJitterOfSmallTimes(t *testing.T) {
	require.Zero(t, backoff.Jitter(0))
	require.Zero(t, backoff.Jitter(-time.Second))
	require.Equal(t, time.Nanosecond, backoff.Jitter(1))
}
