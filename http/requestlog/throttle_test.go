package requestlog

import (
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

func TestThrottle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var th Throttle
		_, ok := th.Allow("a")
		require.True(t, ok)
		for range 5 {
			_, ok = th.Allow("a")
			require.False(t, ok)
		}
		_, ok = th.Allow("b")
		require.True(t, ok, "another cause")
		time.Sleep(throttleEvery)
		skipped, ok := th.Allow("a")
		require.True(t, ok)
		require.Equal(t, 5, skipped)
		for i := range 2 * maxCauses {
			th.Allow(strconv.Itoa(i))
		}
		require.LessOrEqual(t, len(th.causes), maxCauses+1, "causes come from outside")
		_, ok = th.Allow("one more")
		require.False(t, ok, "the further ones count as one")
		time.Sleep(throttleEvery)
		_, ok = th.Allow("one more")
		require.True(t, ok)
	})
}
