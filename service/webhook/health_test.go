package webhook

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/backoff"
)

var noon = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func failTimes(h *health, n int, now time.Time) (wentDown int) {
	for range n {
		if h.failed(now) {
			wentDown++
		}
	}
	return wentDown
}

func TestHealthDownAndBack(t *testing.T) {
	h := health{backoff: backoff.Policy{First: 100 * time.Millisecond, Max: maxBackoff}}
	require.Zero(t, failTimes(&h, downAfter-1, noon))
	require.False(t, h.succeeded(), "it was not down")
	require.Zero(t, failTimes(&h, downAfter-1, noon), "a success begins the count anew")
	require.False(t, h.down)
	require.Equal(t, 1, failTimes(&h, 5, noon), "it goes down once")
	require.True(t, h.down)
	require.True(t, h.succeeded())
	require.False(t, h.down)
	require.False(t, h.succeeded())
}

func TestHealthProbes(t *testing.T) {
	h := health{backoff: backoff.Policy{First: 100 * time.Millisecond, Max: maxBackoff}}
	require.False(t, h.probe(noon), "a receiver that is not down needs none")
	failTimes(&h, downAfter, noon)
	require.False(t, h.probe(noon))
	now := noon
	for i := range 30 {
		next := h.probeAt
		pause := min(100*time.Millisecond<<i, maxBackoff)
		require.GreaterOrEqual(t, next.Sub(now), min(pause/2, maxProbe), i)
		require.LessOrEqual(t, next.Sub(now), min(pause*5/4, maxProbe), i)
		require.False(t, h.probe(next.Add(-1)))
		require.True(t, h.probe(next))
		require.False(t, h.probe(next), "one probe each time")
		now = next
	}
	h.probeAgain(now)
	require.True(t, h.probe(now))
	h.succeeded()
	require.False(t, h.probe(now.Add(time.Hour)))
	failTimes(&h, downAfter, now)
	require.LessOrEqual(t, h.probeAt.Sub(now), 125*time.Millisecond, "the next outage begins with short pauses")
}

func TestHealthPause(t *testing.T) {
	var h health
	require.False(t, h.paused(noon))
	h.pause(noon.Add(time.Minute))
	h.pause(noon.Add(time.Second))
	require.True(t, h.paused(noon.Add(59*time.Second)), "the longest one counts")
	require.False(t, h.paused(noon.Add(time.Minute)))
}
