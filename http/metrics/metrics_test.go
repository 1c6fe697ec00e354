package metrics

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

var update = flag.Bool("update", false, "write the generated files anew")

func scrape(t *testing.T, m *Metrics) string {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	require.Equal(t, 200, w.Code, w.Body.String())
	return w.Body.String()
}

func TestMessagesByTypeAndOutcome(t *testing.T) {
	m := New("1.2.3")
	var resp *service.Response
	var err error
	h := m.Middleware()(service.HandlerFunc(func(context.Context, *service.Request) (*service.Response, error) { return resp, err }))
	for _, c := range []struct {
		message mdm.Message
		resp    *service.Response
		err     error
	}{
		{&mdm.Authenticate{}, &service.Response{}, nil},
		{&mdm.TokenUpdate{}, nil, storage.ErrNotEnrolled},
		{&mdm.Report{Status: mdm.StatusIdle}, nil, fmt.Errorf("polling: %w", storage.ErrUnavailable)},
		{&mdm.Report{Status: "a device's own words"}, nil, errors.New("broken")},
		{&mdm.GetToken{}, nil, &service.StatusError{Status: 400, Err: errors.New("x")}},
		{&mdm.DeclarativeManagement{}, &service.Response{Status: 404}, nil},
		{&mdm.DeclarativeManagement{}, nil, &service.StatusError{Status: 502, Err: errors.New("x")}},
	} {
		resp, err = c.resp, c.err
		gotResp, gotErr := h.Handle(t.Context(), &service.Request{Message: c.message})
		require.Same(t, c.resp, gotResp)
		require.Equal(t, c.err, gotErr)
	}
	m.Refused(httpmdm.ReasonPeer)
	m.Panicked()
	m.Committed(1)
	m.Committed(5)
	m.Polled(256)
	m.TurnedAway("device", "limit")()
	text := scrape(t, m)
	for _, line := range []string{
		`nanomdm_device_requests_total{message="Authenticate",outcome="ok"} 1`,
		`nanomdm_device_requests_total{message="TokenUpdate",outcome="refused"} 1`,
		`nanomdm_device_requests_total{message="Idle",outcome="unavailable"} 1`,
		`nanomdm_device_requests_total{message="OtherReport",outcome="error"} 1`,
		`nanomdm_device_requests_total{message="GetToken",outcome="refused"} 1`,
		`nanomdm_device_requests_total{message="DeclarativeManagement",outcome="refused"} 1`,
		`nanomdm_device_requests_total{message="DeclarativeManagement",outcome="error"} 1`,
		`nanomdm_device_request_duration_seconds_count{message="DeclarativeManagement"} 2`,
		`nanomdm_device_refusals_total{reason="untrusted_peer"} 1`,
		`nanomdm_http_turned_away_total{reason="limit",side="device"} 1`,
		`nanomdm_http_panics_total 1`,
		`nanomdm_store_commit_messages_bucket{le="4"} 1`,
		`nanomdm_store_commit_messages_bucket{le="8"} 2`,
		`nanomdm_store_commit_messages_sum 6`,
		`nanomdm_store_commit_messages_count 2`,
		`nanomdm_store_poll_messages_bucket{le="128"} 0`,
		`nanomdm_store_poll_messages_bucket{le="256"} 1`,
		`version="1.2.3"} 1`,
		"go_goroutines ", "process_resident_memory_bytes ",
	} {
		require.Contains(t, text, line)
	}
	require.NotContains(t, text, "own words")
}

func TestSources(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := New("x")
		var asked atomic.Int64
		var fail error
		m.Add(Source{Name: "queue", Every: 15 * time.Second, Collect: func(ctx context.Context, emit Emit) error {
			_, bounded := ctx.Deadline()
			require.True(t, bounded)
			emit("nanomdm_queue_commands", float64(asked.Add(1)), "queued")
			return fail
		}})
		m.Add(Source{Name: "always", Collect: func(_ context.Context, emit Emit) error {
			emit("nanomdm_store_retries_total", 7)
			return nil
		}})
		require.Contains(t, scrape(t, m), `nanomdm_queue_commands{state="queued"} 1`)
		time.Sleep(14 * time.Second)
		require.Contains(t, scrape(t, m), `nanomdm_queue_commands{state="queued"} 1`, "asked once in 15 seconds")
		time.Sleep(time.Second)
		text := scrape(t, m)
		require.Contains(t, text, `nanomdm_queue_commands{state="queued"} 2`)
		require.Contains(t, text, "# TYPE nanomdm_queue_commands gauge")
		require.Contains(t, text, "# TYPE nanomdm_store_retries_total counter\nnanomdm_store_retries_total 7")

		fail = errors.New("the database is away")
		time.Sleep(15 * time.Second)
		text = scrape(t, m)
		require.NotContains(t, text, "nanomdm_queue_commands{", "no stale numbers")
		require.NotContains(t, text, "database is away")
		// The counter may have been gathered before the source failed.
		require.Contains(t, scrape(t, m), `nanomdm_metrics_source_failures_total{source="queue"} 1`)
	})
}

func TestSlowSourcesAreAskedLessOften(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := New("x")
		asked := 0
		m.Add(Source{Name: "slow", Every: 15 * time.Second, Collect: func(context.Context, Emit) error {
			asked++
			time.Sleep(5 * time.Second)
			return nil
		}})
		for range 12 { // three minutes
			scrape(t, m)
			time.Sleep(15 * time.Second)
		}
		require.Equal(t, 2, asked)
	})
}

func TestMistakesOfSourcesShow(t *testing.T) {
	for _, emit := range []func(Emit){
		func(e Emit) { e("nanomdm_no_such_metric", 1) },
		func(e Emit) { e("nanomdm_queue_commands", 1) },
	} {
		m := New("x")
		m.Add(Source{Name: "wrong", Collect: func(_ context.Context, e Emit) error { emit(e); return nil }})
		w := httptest.NewRecorder()
		m.Handler().ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
		require.Equal(t, http.StatusInternalServerError, w.Code)
	}
}

func TestTable(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range Table() {
		assert.False(t, seen[m.Name], m.Name)
		seen[m.Name] = true
		assert.Regexp(t, `^nanomdm_[a-z]+(_[a-z]+)*$`, m.Name)
		assert.Equal(t, m.Kind == Counter, strings.HasSuffix(m.Name, "_total"), m.Name)
		assert.True(t, strings.HasSuffix(m.Help, "."), m.Name)
	}
}

func TestMetricsPage(t *testing.T) {
	const file = "../../docs/metrics.md"
	page := page()
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(page), 0o644))
	}
	have, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, page, string(have), "run go test ./http/metrics -run TestMetricsPage -update")
}

func page() string {
	var b strings.Builder
	b.WriteString(`# Metrics

<!-- Made by go test ./http/metrics -run TestMetricsPage -update -->

` + "`GET /metrics`" + ` answers in Prometheus' text format, behind an API key of any role. Give Prometheus a key that may only read: ` + "`nanoctl keys create prometheus -role read > /etc/prometheus/nanomdm.key`" + `. A scrape job:

` + "```yaml" + `
scrape_configs:
  - job_name: nanomdm
    authorization:
      credentials_file: /etc/prometheus/nanomdm.key # sent as a bearer token
    static_configs:
      - targets: ["nanomdm-1:9000", "nanomdm-2:9000"]
` + "```" + `

Counters count what this replica did. Gauges of the queue, of pushes owed, of the webhook and of certificates are read from the shared database, so every replica shows the same: take ` + "`max`" + `, not ` + "`sum`" + `. They are read at most every 15 seconds (certificates: every five minutes), and less often where reading takes long.

Beside the tables there are Prometheus' usual ` + "`go_*` and `process_*`" + `. [grafana-dashboard.json](grafana-dashboard.json) and [prometheus-alerts.yaml](prometheus-alerts.yaml) are to be imported as they are.
`)
	group := ""
	for _, m := range Table() {
		if m.Group != group {
			group = m.Group
			fmt.Fprintf(&b, "\n## %s\n\n| metric | kind | labels | |\n|---|---|---|---|\n", group)
		}
		labels := ""
		if len(m.Labels) > 0 {
			labels = "`" + strings.Join(m.Labels, "`, `") + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", m.Name, m.Kind, labels, m.Help)
	}
	b.WriteString("\n## Reasons of refusals\n\n| reason | answer | |\n|---|---|---|\n")
	for _, reason := range httpmdm.Reasons() {
		said := explanations[reason]
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", reason, said[0], said[1])
	}
	return b.String()
}

// explanations says of each reason what is answered and what it means.
var explanations = map[string][2]string{
	httpmdm.ReasonMethod:       {"405", "no message, and neither PUT nor POST"},
	httpmdm.ReasonOrigin:       {"403", "a web page's request, as its headers say"},
	httpmdm.ReasonIdentity:     {"400", "no certificate or signature, a broken one, or not of `-ca`"},
	httpmdm.ReasonPeer:         {"400", "the certificate header from an address that is not in `-trusted-proxies`"},
	httpmdm.ReasonByteBudget:   {"503", "a device that has sent `-max-hourly-bytes` within the hour"},
	httpmdm.ReasonUnusedHeader: {"400", "a certificate header, though `-cert-header` is not given"},
	httpmdm.ReasonPin:          {"400", "a certificate that belongs to another enrollment, was retired, or may not take this one over; the log says which"},
	httpmdm.ReasonUnrecognized: {"403", "`-authenticate-url` refused the device"},
	httpmdm.ReasonNotEnrolled:  {"400", "a message that needs an enrollment, from a device without one"},
	httpmdm.ReasonTopic:        {"400", "a TokenUpdate with another APNs topic than the Authenticate had; the audit has a record"},
	httpmdm.ReasonTopicCA:      {"400", "an enrollment to an APNs topic, or a certificate for a device there, that `-topic-ca` leaves to other CAs; the audit has a record"},
	httpmdm.ReasonOwnWord:      {"409", "a message in a migration that differs from what a device has told this server itself"},
	httpmdm.ReasonChannels:     {"400", "a new user of a device that has `-max-user-channels` of them"},
	httpmdm.ReasonTooLarge:     {"413", "a body larger than `-max-body`, or than `-max-checkin` or `-max-status` for its type"},
	httpmdm.ReasonSlow:         {"408", "a body that came too slowly"},
	httpmdm.ReasonMalformed:    {"400", "not a property list, or not a message"},
	httpmdm.ReasonOverload:     {"503", "bodies and their copies reached `-max-in-flight`"},
	httpmdm.ReasonCrowded:      {"503", "too many requests of the certificate or the client address were under way, or waited for their bodies"},
	httpmdm.ReasonUnavailable:  {"503", "the database or the server at `-authenticate-url` was away or too busy, or the client left"},
	httpmdm.ReasonOther:        {"varies", "what a backend or a policy decided"},
	httpmdm.ReasonError:        {"500", "a fault of the daemon's: the log has it"},
}

func TestEveryReasonIsExplained(t *testing.T) {
	require.Len(t, explanations, len(httpmdm.Reasons()))
	for _, reason := range httpmdm.Reasons() {
		require.NotEmpty(t, explanations[reason][1], reason)
	}
}
