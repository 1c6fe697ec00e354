package main

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/service/webhook"
)

// consumer is a webhook receiver that keeps what it took.
type consumer struct {
	*httptest.Server

	mu      sync.Mutex
	n       int
	took    []webhook.Event
	headers []http.Header
	// refuse says whether to answer the nth request with 503.
	refuse func(n int) bool
}

func newConsumer(t *testing.T, refuse func(n int) bool) *consumer {
	c := &consumer{refuse: refuse}
	c.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // the daemon was killed
		}
		var e webhook.Event
		if err := json.Unmarshal(body, &e); err != nil {
			t.Errorf("no event: %v", err)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		c.n++
		if c.refuse != nil && c.refuse(c.n) {
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		c.took = append(c.took, e)
		c.headers = append(c.headers, r.Header)
	}))
	t.Cleanup(c.Close)
	return c
}

func (c *consumer) events() []webhook.Event {
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]webhook.Event(nil), c.took...)
}

// topics are those of what was taken, for the first time, with the status of
// reports.
func (c *consumer) topics() (list []string) {
	seen := make(map[string]bool)
	for _, e := range c.events() {
		if seen[e.EventID] {
			continue
		}
		seen[e.EventID] = true
		if e.Acknowledge != nil {
			list = append(list, e.Topic+" "+e.Acknowledge.Status)
		} else {
			list = append(list, e.Topic)
		}
	}
	return list
}

func TestWebhook(t *testing.T) {
	all := newConsumer(t, func(n int) bool { return n == 2 })
	results := newConsumer(t, nil)
	config := filepath.Join(t.TempDir(), "webhook.json")
	require.NoError(t, os.WriteFile(config, []byte(`{"sinks": [
		{"name": "results", "url": "`+results.URL+`", "keys": ["whsec_c2VjcmV0"], "filter": {"topics": ["mdm.Connect"], "request_types": ["ProfileList"]}},
		{"name": "log", "filter": {"topics": ["mdm.CheckOut"]}}]}`), 0o600))
	d := start(t, "http", "-webhook-url", all.URL, "-webhook-hmac-key", "k1", "-webhook-old-key", "k2", "-webhook-config", config)
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	for uuid, requestType := range map[string]string{"C1": "ProfileList", "C2": "SecurityInfo"} {
		status, body, _ := d.api("PUT", "/v1/enqueue/D1?nopush=1", "nanomdm", testKey, mdmtest.NewCommand(uuid, requestType, nil))
		require.Equal(t, 200, status, body)
	}
	_, err := dev.Poll(t.Context())
	require.NoError(t, err)
	require.NoError(t, dev.CheckOut(t.Context()))
	require.Eventually(t, func() bool { return len(all.topics()) == 6 && len(results.topics()) == 1 }, 30*time.Second, 20*time.Millisecond,
		"%v %v", all.topics(), results.topics())
	require.ElementsMatch(t, []string{"mdm.Authenticate", "mdm.TokenUpdate", "mdm.Connect Idle", "mdm.Connect Acknowledged", "mdm.Connect Acknowledged",
		"mdm.CheckOut"}, all.topics())
	require.Equal(t, "C1", results.events()[0].Acknowledge.CommandUUID)
	header := all.headers[0]
	require.NotEmpty(t, header.Get("X-Hmac-Signature"))
	require.Len(t, strings.Fields(header.Get("Webhook-Signature")), 2)
	require.Equal(t, all.events()[0].EventID, header.Get("Webhook-Id"))

	require.Eventually(t, func() bool {
		_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
		for _, line := range []string{
			`nanomdm_webhook_delivered_total{sink="webhook"} 6`, `nanomdm_webhook_failures_total{sink="webhook"} 1`,
			`nanomdm_webhook_given_up_total{sink="webhook",why="age"} 0`, `nanomdm_webhook_given_up_total{sink="webhook",why="count"} 0`,
			`nanomdm_webhook_given_up_total{sink="webhook",why="refused"} 0`,
			`nanomdm_webhook_down{sink="results"} 0`, `nanomdm_webhook_delivered_total{sink="results"} 1`,
		} {
			if !strings.Contains(text, line+"\n") {
				return false
			}
		}
		return true
	}, 30*time.Second, 50*time.Millisecond)
	status, body, _ := d.api("GET", "/v1/events?topic=mdm.CheckOut&wait=10s", "nanomdm", testKey, nil)
	require.Equal(t, 200, status)
	require.Contains(t, body, `"mdm.CheckOut"`)
	status, body, _ = d.api("GET", "/v1/sinks", "nanomdm", testKey, nil)
	require.Equal(t, 200, status)
	require.NotContains(t, body, "whsec_")
	require.NotContains(t, d.log.String(), "whsec_")
}

// A sink that was taken out of the configuration is told nothing more, and
// goes on where it was when it comes back.
func TestSinkLeavesTheConfiguration(t *testing.T) {
	c := newConsumer(t, nil)
	d := start(t, "http", "-webhook-url", c.URL)
	require.NoError(t, d.device("D1", mdmtest.Config{}).Enroll(t.Context()))
	require.Eventually(t, func() bool { return len(c.topics()) == 2 }, 30*time.Second, 20*time.Millisecond)
	d.stop()
	d.launch("http")
	status, body, _ := d.api("GET", "/v1/sinks/webhook", "nanomdm", testKey, nil)
	require.Equal(t, 200, status)
	require.Contains(t, body, `"configured": true`)
	status, _, _ = d.api("DELETE", "/v1/sinks/webhook", "nanomdm", testKey, nil)
	require.Equal(t, 409, status, "another replica may have it")
	d.stop()
	d.launch("http", "-webhook-url", c.URL)
	require.NoError(t, d.device("D2", mdmtest.Config{}).Enroll(t.Context()))
	require.Eventually(t, func() bool { return len(c.topics()) == 4 }, 30*time.Second, 20*time.Millisecond)
}

func TestEventsAreLeftToOthers(t *testing.T) {
	c := newConsumer(t, nil)
	d := start(t, "http", "-webhook-url", c.URL, "-webhook-workers", "0")
	require.NoError(t, d.device("D1", mdmtest.Config{}).Enroll(t.Context()))
	_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.NotContains(t, text, `nanomdm_lease_held{lease="events"}`)
	require.Empty(t, c.events())
	// Another replica on the same database sends them.
	other := begin(t, nil, "-storage-dsn", filepath.Join(d.dir, "mdm.db"))
	other.eventually("/readyz", 200)
	require.Eventually(t, func() bool { return len(c.topics()) == 2 }, 30*time.Second, 20*time.Millisecond)
}

func TestLoadSinks(t *testing.T) {
	write := func(text string) string {
		file := filepath.Join(t.TempDir(), "webhook.json")
		require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
		return file
	}
	parsed := func(args ...string) options {
		o, _, err := parseOptions(append([]string{"-disable-mdm", "-api", "x"}, args...), nil, os.Stat)
		require.NoError(t, err)
		return o
	}
	for text, want := range map[string]string{
		`{`: "not the JSON", `{"sinks": [{"name": "a", "url": "x"}]}`: "sink number 1: url", `{"sheep": []}`: "sheep",
		`{"sinks": [{"name": "a"}, {"name": "a"}]}`: "twice", `{"sinks": [{"name": "webhook"}]}`: "-webhook-url",
	} {
		_, err := loadSinks(parsed("-webhook-url", "http://h/", "-webhook-config", write(text)))
		require.ErrorContains(t, err, want)
		require.ErrorContains(t, err, "-webhook-config")
	}
	_, err := loadSinks(parsed("-webhook-url", "http://h/", "-webhook-hmac-key", "whsec_!"))
	require.ErrorContains(t, err, "keys")
	sinks, err := loadSinks(parsed("-webhook-url", "http://h/", "-webhook-hmac-key", "a", "-webhook-old-key", "b"))
	require.NoError(t, err)
	require.Len(t, sinks, 1)
	require.Equal(t, []string{"a", "b"}, sinks[0].Keys)
	require.True(t, sinks[0].Tokens && sinks[0].Filter.Idle && sinks[0].Enabled, "as NanoMDM sends it")
	var stderr strings.Builder
	code := run(context.Background(), []string{"-disable-mdm", "-api", "x", "-webhook-config", write("{")}, nil, io.Discard, &stderr, nil)
	require.Equal(t, 1, code)
	require.Contains(t, stderr.String(), "-webhook-config")
}

// A hook is asked while an Authenticate is under way, which is told once all
// the same, with the trace that it came with.
func TestWebhookBesideTheAuthenticateHook(t *testing.T) {
	const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	asked := make(chan string, 10)
	hook := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { asked <- r.Header.Get("Traceparent") }))
	defer hook.Close()
	receiver := newConsumer(t, nil)
	d := start(t, "http", "-webhook-url", receiver.URL, "-authenticate-url", hook.URL)
	dev, err := mdmtest.NewDevice(d.url+"/mdm", d.device("D1", mdmtest.Config{}).Identity(), mdmtest.Config{
		UDID: "D1", Client: &http.Client{Transport: traced{trace}},
	})
	require.NoError(t, err)
	require.NoError(t, dev.Enroll(t.Context()))
	require.Equal(t, trace, within(t, asked))
	require.Empty(t, asked)
	require.NoError(t, dev.CheckOut(t.Context()))
	require.Eventually(t, func() bool { return len(receiver.topics()) >= 3 }, 30*time.Second, 10*time.Millisecond)
	require.Equal(t, []string{"mdm.Authenticate", "mdm.TokenUpdate", "mdm.CheckOut"}, receiver.topics())
	for i, header := range receiver.headers {
		require.Equal(t, trace, header.Get("Traceparent"), i)
	}
}

// traced adds a traceparent to each request.
type traced struct{ parent string }

func (tr traced) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Traceparent", tr.parent)
	return http.DefaultTransport.RoundTrip(r)
}
