package push

import (
	"strconv"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestLateResultsLeaveTheAnswerAlone: a result that comes after Push has
// returned does not touch the answer; the race detector reports it otherwise.
func TestLateResultsLeaveTheAnswerAlone(t *testing.T) {
	const n = 1000
	c := &call{results: make(map[string]Result), left: n, done: make(chan struct{})}
	c.returned = true
	var late sync.WaitGroup
	late.Go(func() {
		for i := range n {
			c.resolve(strconv.Itoa(i), Result{APNsID: "late"})
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
