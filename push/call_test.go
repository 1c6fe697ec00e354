package push

import (
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// What lands after the caller's patience is over does not touch the answer
// that is being made up; the race detector says if it does.
func TestLateResultsLeaveTheAnswerAlone(t *testing.T) {
	const n = 1000
	c := &call{results: make(map[string]Result), left: n, done: make(chan struct{})}
	c.over = true
	var late sync.WaitGroup
	late.Go(func() {
		for i := range n {
			c.settle(strconv.Itoa(i), Result{APNsID: "late"})
		}
	})
	for i := range n {
		c.results[strconv.Itoa(i)] = Result{Owed: true}
	}
	late.Wait()
	require.Len(t, c.results, n)
	for _, r := range c.results {
		require.Equal(t, Result{Owed: true}, r)
	}
}
