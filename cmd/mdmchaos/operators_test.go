//go:build linux

package main

import (
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"
)

// An operator repeats a call until it is complete: all enrollments have the
// command, or the call has an idempotency key and the server refused the rest.
func TestCallsAreCompleted(t *testing.T) {
	for _, c := range []struct {
		name         string
		replies      []string // the status first
		acknowledged int
	}{
		{"all at once", []string{`200{"command_uuid": "C", "status": {"A": {}, "B": {}}}`}, 2},
		{"after an outage", []string{`503{"error": "away"}`, `500{"command_error": "away", "status": {}}`, `200{"command_uuid": "C", "status": {"A": {}, "B": {}}}`}, 2},
		{"one refused", []string{`207{"command_uuid": "C", "status": {"A": {}, "B": {"command_error": "not enrolled"}}}`}, 1},
		{"all refused", []string{`500{"command_uuid": "C", "status": {"A": {"command_error": "not enrolled"}, "B": {"command_error": "not enrolled"}}}`}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			replies := c.replies
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				w.WriteHeader(map[string]int{"200": 200, "207": 207, "500": 500, "503": 503}[replies[0][:3]])
				_, _ = io.WriteString(w, replies[0][3:])
				replies = replies[1:]
			}))
			defer server.Close()
			o := &operator{keyed: true, api: newAPI(server.URL), history: newHistory(), rng: rand.New(rand.NewPCG(1, 1))}
			made := &call{marker: "op-0-0", requestType: requestTypes[0].name, ids: []string{"A", "B"}}
			o.history.begin(made)
			all := &operators{}
			o.repeat(t.Context(), made, all)
			require.Empty(t, replies)
			require.Empty(t, all.givenUp)
			require.Len(t, made.acknowledged, c.acknowledged)
			require.Equal(t, "C", made.uuid)
		})
	}
}
