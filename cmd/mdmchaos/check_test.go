//go:build linux

package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The checker finds each kind of violation in a history that has it, and none
// in one that has not.
func TestCheckDevice(t *testing.T) {
	at := func(second int) time.Time { return time.Unix(int64(1000+second), 0) }
	good := func() (*deviceHistory, []*call, *snapshot, []string) {
		calls := []*call{
			{operator: 0, number: 0, marker: "op-0-0", uuid: "A", acknowledged: map[string]bool{"D": true}, begun: at(1)},
			{operator: 0, number: 1, marker: "op-0-1", uuid: "B", acknowledged: map[string]bool{"D": true}, begun: at(2)},
		}
		d := &deviceHistory{
			offers: []offer{{"A", "op-0-0", at(3)}, {"B", "op-0-1", at(5)}},
			results: []result{
				{uuid: "A", status: "NotNow", nonce: nonce("D", "A"), at: at(4)}, {uuid: "A", status: "Acknowledged", nonce: nonce("D", "A"), at: at(4)},
				{uuid: "B", status: "Error", nonce: nonce("D", "B"), at: at(6)},
			},
		}
		snap := &snapshot{enabled: true, states: map[string]string{"A": "acknowledged", "B": "error"},
			results: map[string]string{"A": nonce("D", "A"), "B": nonce("D", "B")}}
		return d, calls, snap, []string{"A", "B"}
	}
	for _, c := range []struct {
		name  string
		spoil func(d *deviceHistory, calls []*call, snap *snapshot, events *[]string)
		want  string
	}{
		{"nothing", func(*deviceHistory, []*call, *snapshot, *[]string) {}, ""},
		{"disabled", func(_ *deviceHistory, _ []*call, s *snapshot, _ *[]string) { s.enabled = false }, "not enrolled"},
		{"lost result", func(_ *deviceHistory, _ []*call, s *snapshot, _ *[]string) { s.states["B"] = "queued" }, `has it as "queued"`},
		{"other bytes", func(_ *deviceHistory, _ []*call, s *snapshot, _ *[]string) { s.results["A"] = "x" }, "not the one that was sent"},
		{"lost command", func(d *deviceHistory, _ []*call, s *snapshot, _ *[]string) {
			d.offers, d.results = d.offers[:1], d.results[:2]
			delete(s.states, "B")
		}, "is gone"},
		{"never delivered", func(d *deviceHistory, _ []*call, s *snapshot, _ *[]string) {
			d.offers, d.results = d.offers[:1], d.results[:2]
			s.states["B"] = "queued"
		}, "is queued at the end"},
		{"offered after its end", func(d *deviceHistory, _ []*call, _ *snapshot, _ *[]string) {
			d.offers = append(d.offers, offer{"A", "op-0-0", at(7)})
		}, "after its answer had been taken"},
		{"out of order", func(d *deviceHistory, _ []*call, _ *snapshot, _ *[]string) {
			d.offers[0], d.offers[1] = offer{"B", "op-0-1", at(3)}, offer{"A", "op-0-0", at(4)}
		}, "was offered after number 1"},
		{"two commands of one call", func(d *deviceHistory, _ []*call, _ *snapshot, _ *[]string) {
			d.offers = append(d.offers, offer{"C", "op-0-1", at(7)})
		}, "made two commands"},
		{"lost event", func(_ *deviceHistory, _ []*call, _ *snapshot, e *[]string) { *e = (*e)[:1] }, "never arrived"},
		{"events out of order", func(_ *deviceHistory, _ []*call, _ *snapshot, e *[]string) { *e = []string{"B", "A"} }, "before that of A"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, calls, snap, events := good()
			c.spoil(d, calls, snap, &events)
			var found findings
			checkDevice(&found, "D", d, calls, snap)
			checkEvents(&found, "D", "webhook", terminal(d, anyType), events)
			if c.want == "" {
				require.Empty(t, found.list)
				return
			}
			require.NotEmpty(t, found.list)
			require.Contains(t, strings.Join(found.list, "\n"), c.want)
		})
	}
}

// An enrollment clears the queue, so what was queued before it is not missed.
func TestCleared(t *testing.T) {
	c := &call{begun: time.Unix(100, 0)}
	require.False(t, cleared(&deviceHistory{enrolled: []time.Time{time.Unix(50, 0)}}, c))
	require.True(t, cleared(&deviceHistory{enrolled: []time.Time{time.Unix(50, 0), time.Unix(200, 0)}}, c))
}

// A sink that takes one type of command is not missed for another type.
func TestTerminalByType(t *testing.T) {
	d := &deviceHistory{results: []result{
		{uuid: "A", status: "NotNow", requestType: "RemoveProfile"}, {uuid: "B", status: "Error", requestType: "RemoveProfile"},
		{uuid: "A", status: "Acknowledged", requestType: "RemoveProfile"}, {uuid: "C", status: "Acknowledged", requestType: "RemoveProvisioningProfile"},
	}}
	require.Equal(t, []string{"B", "A", "C"}, terminal(d, everything[0].takes))
	require.Equal(t, []string{"B", "A"}, terminal(d, sinkPerType()[0].takes))
	require.Equal(t, []string{"C"}, terminal(d, sinkPerType()[1].takes))
}
