package sqlstore

import (
	"errors"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestWriteProbe(t *testing.T) {
	var p writeProbe
	var now time.Duration
	broken := errors.New("disk full")
	writes, result := 0, error(nil)
	ask := func() error {
		now += time.Second
		return p.ask(now, func() error { writes++; return result })
	}
	for range 20 {
		require.NoError(t, ask())
	}
	require.Equal(t, 2, writes, "it costs little while it works")
	result = broken
	for writes < 3 {
		require.NoError(t, ask())
	}
	require.ErrorIs(t, ask(), broken, "the second time in a row")
	require.ErrorIs(t, ask(), broken)
	result = nil
	require.NoError(t, ask(), "at once")
	result = broken
	for writes < 7 {
		require.NoError(t, ask(), "one failure is none")
	}
}
