package sqlstore

import (
	"math"
	"testing"

	"github.com/stretchr/testify/require"
)

// What a flush could not write is written by the next one, and what came since
// comes after it.
func TestActivityIsRestored(t *testing.T) {
	offer := func(at int64, uuid string) activity {
		return activity{id: "D", seen: at, offered: uuid, offers: 1, offeredAt: at}
	}
	for name, c := range map[string]struct {
		before, since []activity
		want          activity
	}{
		"an offer that was not due": {
			[]activity{offer(100, "C1")}, nil,
			offer(100, "C1"),
		},
		"one that was": {
			[]activity{offer(10, "C1")}, nil,
			offer(10, "C1"),
		},
		"offered again since": {
			[]activity{offer(10, "C1")},
			[]activity{offer(100, "C1")},
			activity{id: "D", seen: 100, offered: "C1", offers: 2, offeredAt: 10},
		},
		"answered since": {
			[]activity{offer(10, "C1")},
			[]activity{{id: "D", seen: 100}},
			activity{id: "D", seen: 100},
		},
		"has gone on since": {
			[]activity{offer(10, "C1")},
			[]activity{offer(100, "C2")},
			activity{id: "D", seen: 100, offered: "C2", offers: 1, offeredAt: 100},
		},
		"pushed since": {
			[]activity{offer(100, "C1")},
			[]activity{{id: "D", paid: 7, setPushAt: true, pushAt: 9}},
			activity{id: "D", seen: 100, paid: 7, setPushAt: true, pushAt: 9, offered: "C1", offers: 1, offeredAt: 100},
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := &activityLog{limit: 10, pending: make(map[string]activity)}
			for _, n := range c.before {
				a.note(n)
			}
			taken, _ := a.take(50)
			require.Len(t, taken, 1, "it was seen")
			for _, n := range c.since {
				a.note(n)
			}
			a.restore(taken)
			rows, _ := a.take(math.MaxInt64)
			require.Equal(t, []activity{c.want}, rows)
			rows, _ = a.take(math.MaxInt64)
			require.Empty(t, rows)
		})
	}
}
