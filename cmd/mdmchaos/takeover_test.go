//go:build linux

package main

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A take-over lasts from the last renewal of one holder until another holder
// has the lease. Renewals and the first look are no take-overs.
func TestTakeovers(t *testing.T) {
	w := &leaseWatch{seen: make(map[string]leaseSighting)}
	at := func(second int) time.Time { return time.Unix(int64(1000+second), 0) }
	for _, s := range []leaseSighting{
		{fence: 3, beat: 7, at: at(0)}, {fence: 3, beat: 8, at: at(5)}, {fence: 3, beat: 8, at: at(6)},
		{fence: 4, beat: 9, at: at(20)}, {fence: 4, beat: 10, at: at(25)}, {fence: 5, beat: 11, at: at(27)},
	} {
		w.note("events", s)
	}
	require.Equal(t, 2, w.takeovers)
	require.Equal(t, 15*time.Second, w.longest)
}
