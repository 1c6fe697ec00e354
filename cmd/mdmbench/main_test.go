package main

import (
	"bytes"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

func testDevice(t *testing.T) (*mdmtest.CA, device) {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	devices, err := newDevices(t.Context(), ca, 7, 1)
	require.NoError(t, err)
	return ca, devices[0]
}

// The reference is honest: it takes what is signed, and nothing else.
func TestReferenceVerifies(t *testing.T) {
	ca, d := testDevice(t)
	other, err := mdmtest.NewCA()
	require.NoError(t, err)
	m, err := d.idle("")
	require.NoError(t, err)
	tampered := message{wire: bytes.Replace(m.wire, []byte("Idle"), []byte("Idly"), 1)}

	for name, c := range map[string]struct {
		ca     *mdmtest.CA
		send   message
		failed int
	}{
		"good":       {ca, m, 0},
		"tampered":   {ca, tampered, 1},
		"foreign CA": {other, m, 1},
	} {
		t.Run(name, func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if verify(r, c.ca.Pool()) != nil {
					w.WriteHeader(http.StatusBadRequest)
				}
			}))
			defer server.Close()
			o, err := drive(t.Context(), server.Listener.Addr().String(), load{connections: 1, lax: true}, [][]message{{c.send}})
			require.NoError(t, err)
			require.Equal(t, 1, o.requests)
			require.Equal(t, c.failed, o.failed, o.failure)
		})
	}
}

// A daemon that answers anything but the next command is found out.
func TestDriveChecksReplies(t *testing.T) {
	_, d := testDevice(t)
	visit, err := d.fetch([]string{"uuid-1", "uuid-2"}, "")
	require.NoError(t, err)
	require.Len(t, visit, 3)
	for name, c := range map[string]struct {
		replies []string
		failed  int
	}{
		"right":           {[]string{"<uuid-1>", "<uuid-2>", ""}, 0},
		"wrong command":   {[]string{"<uuid-1>", "<uuid-1>", ""}, 1},
		"offered again":   {[]string{"<uuid-1>", "<uuid-2>", "<uuid-2>"}, 1},
		"nothing at all":  {[]string{"", "", ""}, 2},
		"connection lost": {[]string{"<uuid-1>", "hang up"}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			replies := c.replies
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				reply := replies[0]
				replies = replies[1:]
				if reply == "hang up" {
					panic(http.ErrAbortHandler)
				}
				_, _ = w.Write([]byte(reply))
			}))
			defer server.Close()
			o, err := drive(t.Context(), server.Listener.Addr().String(), load{connections: 1}, [][]message{visit})
			require.NoError(t, err)
			require.Equal(t, c.failed, o.failed, o.failure)
			require.Equal(t, len(c.replies), o.requests)
		})
	}
}

func TestMissedGoalsAreBold(t *testing.T) {
	pgsql := engines()[0]
	r := &report{engine: pgsql, enqueueRatio: 1.25, rows: []row{
		{name: "idle", connections: 8, ratio: 0.99},
		{name: "idle", connections: 128, ratio: 1.25},
		{name: "fetch and acknowledge", connections: 64, ratio: 0.7, dbCounts: true, dbCommits: 0.05},
		{name: historyName(0), connections: 8, ratio: 2},
		{name: historyName(500), connections: 8, ratio: 1.9},
		// In turns, the rounds are compared each by itself.
		{name: unhookedName, connections: 64, rates: []float64{1000, 1000, 500, 500, 100, 100}},
		{name: hookedName, connections: 64, rates: []float64{800, 450, 10}},
		{name: pacedName(unhookedName), connections: 256, p99s: []time.Duration{10, 10, 100, 100, 1000, 1000}},
		{name: pacedName(hangingName), connections: 256, p99s: []time.Duration{12, 500, 10}},
	}}
	var b strings.Builder
	require.NoError(t, write(&b, &options{devices: 2000, fleet: 200_000, history: 500, rounds: 5}, []*report{r}))
	out := b.String()
	for _, want := range []string{
		"| idle, 8 connections | **0.99** (≥ 1.00) |",
		"| idle, 128 connections | 1.25 (≥ 1.25) |",
		"64 connections | 0.70 (≥ 0.70) |",
		"to idle with none | 0.95 (≥ 0.95) |",
		"| commits a report, 64 connections | **0.06** (≤ 0.05) |",
		"to NanoMDM's statements | 1.25 (≥ 1.00) |",
		"Not measured: MariaDB, MySQL, SQLite.",
		"to reports without | 0.80 (≥ 0.80) |",
		"to p99 without webhook | 1.20 (≤ 1.20) |",
	} {
		require.Contains(t, out, want)
	}
	require.Contains(t, out, "| "+hookedName+" | 64 | 0 | – | – |", "it was not compared to the reference")
	require.NotContains(t, out, "200000 enrollments", "what was not measured has no line")

	r.enqueueRatio = 0
	b.Reset()
	require.NoError(t, write(&b, &options{}, []*report{r}))
	require.NotContains(t, b.String(), "to NanoMDM's statements |")
}

// Turns without a webhook come before and after the turns that they are compared with.
func TestTurns(t *testing.T) {
	for _, test := range []struct {
		unhooked, hanging []time.Duration
		want              float64
	}{
		{[]time.Duration{10, 40}, []time.Duration{20}, 1},
		{[]time.Duration{10, 40}, []time.Duration{30}, 1.5},
		{[]time.Duration{10, 10, 10, 40}, []time.Duration{30, 20}, math.Sqrt(3)},
	} {
		r := &report{rows: []row{
			{name: pacedName(unhookedName), p99s: test.unhooked},
			{name: pacedName(hangingName), p99s: test.hanging},
		}}
		ratio, ok := hangingLatency(r)
		require.True(t, ok)
		require.InDelta(t, test.want, ratio, 1e-9)
	}
}

func TestMedianAndPercentile(t *testing.T) {
	require.Equal(t, 2.0, median([]float64{9, 1, 2}))
	values := []float64{9, 1, 0, 2}
	require.Equal(t, 1.5, median(values))
	require.Equal(t, []float64{9, 1, 0, 2}, values)
	o := outcome{latencies: []time.Duration{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11}}
	require.Equal(t, time.Duration(6), o.percentile(0.5))
	require.Zero(t, outcome{}.percentile(0.99))
}

func TestReadStat(t *testing.T) {
	s, err := readStat(os.Getpid())
	if err != nil {
		t.Skip("no /proc here")
	}
	require.Equal(t, os.Getppid(), s.parent)
	require.GreaterOrEqual(t, s.cpu, time.Duration(0))
}
