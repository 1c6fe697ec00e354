package main

import (
	"context"
	"crypto/x509"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/metrics"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func TestEveryMetricIsServed(t *testing.T) {
	d := start(t, "http")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	status, _, _ := d.api("PUT", "/v1/enqueue/D1?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status)
	status, _, _ = d.api("PUT", "/mdm", "", "", []byte("no identity"))
	require.Equal(t, 400, status)
	status, _, _ = d.api("GET", "/v1/audit", "", "", nil)
	require.Equal(t, 401, status)
	status, _, _ = d.api("GET", "/v1/push/D1", "nanomdm", testKey, nil)
	require.Equal(t, 500, status, "there is no push certificate")
	status, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Equal(t, 200, status)
	require.Regexp(t, `(?m)^nanomdm_identity_certificate_expiry_seconds 3\.15\d*e\+07$`, text)
	for _, line := range []string{
		`nanomdm_ready 1`, `nanomdm_store_up 1`, `nanomdm_queue_commands{state="queued"} 1`, `nanomdm_queue_commands{state="notnow"} 0`,
		`nanomdm_device_requests_total{message="TokenUpdate",outcome="ok"} 1`, `nanomdm_device_refusals_total{reason="identity"} 1`,
		`nanomdm_identity_certificates_expiring{within="0d"} 0`, `nanomdm_push_owed_enrollments 0`,
		`nanomdm_api_refusals_total{reason="no_key"} 1`, `nanomdm_sealing{what="secrets"} 0`, `nanomdm_sealing{what="commands"} 0`,
		`nanomdm_pushes_total{class="certificate_fault",reason="",topic=""} 1`, `nanomdm_push_stopped_topics 1`,
	} {
		require.Contains(t, text, line+"\n")
	}
	// These have nothing to show here.
	elsewhere := map[string]string{
		"nanomdm_background_restarts_total":       "TestBackgroundWorkOutlivesPanics",
		"nanomdm_http_turned_away_total":          "TestTooManyRequests",
		"nanomdm_tls_certificate_expiry_seconds":  "needs -tls-cert",
		"nanomdm_metrics_source_failures_total":   "TestSources",
		"nanomdm_lease_held":                      "begins after some time, see below",
		"nanomdm_push_certificate_expiry_seconds": "TestStoredThingsAreServed",
		"nanomdm_webhook_backlog_events":          "TestStoredThingsAreServed",
		"nanomdm_webhook_oldest_seconds":          "TestStoredThingsAreServed",
		"nanomdm_webhook_events":                  "TestStoredThingsAreServed",
		"nanomdm_webhook_off":                     "TestStoredThingsAreServed",
		"nanomdm_webhook_delivered_total":         "TestWebhook",
		"nanomdm_webhook_failures_total":          "TestWebhook",
		"nanomdm_webhook_given_up_total":          "TestWebhook",
		"nanomdm_webhook_down":                    "TestWebhook",
	}
	for _, m := range metrics.Table() {
		if elsewhere[m.Name] == "" {
			require.Contains(t, text, "# TYPE "+m.Name+" "+string(m.Kind)+"\n")
		}
	}
	for _, secret := range []string{testKey, "D1", d.dir} {
		require.NotContains(t, text, secret)
	}
	require.Eventually(t, func() bool {
		_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
		return strings.Contains(text, `nanomdm_lease_held{lease="`)
	}, 30*time.Second, 50*time.Millisecond, "periodic work is done by somebody")
	status, _, _ = d.api("GET", "/metrics", "nanomdm", "wrong", nil)
	require.Equal(t, 401, status)
}

func TestEarliestCertificate(t *testing.T) {
	require.True(t, earliest(nil).IsZero())
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	soon := time.Now().Add(time.Hour).Truncate(time.Second)
	id, err := ca.Issue("x", mdmtest.WithValidity(time.Now().Add(-time.Hour), soon))
	require.NoError(t, err)
	require.True(t, soon.Equal(earliest([]*x509.Certificate{ca.Cert(), id.Cert})))
}

// A scrape, and both probes, while devices are busy.
func TestScrapeUnderLoad(t *testing.T) {
	d, _ := startProcess(t)
	honest := d.honest(10)
	defer honest.stop()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range 20 {
		require.NoError(t, ctx.Err())
		begun := time.Now()
		status, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
		require.Equal(t, 200, status)
		require.Contains(t, text, "nanomdm_device_request_duration_seconds_bucket")
		require.Equal(t, 200, d.probe("/healthz"))
		require.Equal(t, 200, d.probe("/readyz"))
		require.Less(t, time.Since(begun), 5*time.Second)
	}
	n, p99 := honest.wait(t, 100)
	t.Logf("p99 of %d polls %v", n, p99)
	require.Zero(t, honest.refused.Load())
}

func TestStoredThingsAreServed(t *testing.T) {
	file := filepath.Join(t.TempDir(), "mdm.db")
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: file})
	require.NoError(t, err)
	require.NoError(t, store.PutEventSink(t.Context(), storage.EventSink{Name: "hook", URL: "http://127.0.0.1:1/", Enabled: true}))
	require.NoError(t, store.PutEventSink(t.Context(), storage.EventSink{Name: "off", URL: "http://127.0.0.1:1/"}))
	require.NoError(t, store.Close())
	sqliteExec(t, file, fmt.Sprintf(`INSERT INTO nano_push_certs (topic, cert_pem, key_pem, not_after, created_at, updated_at)
		VALUES ('com.apple.mgmt.x', x'00', x'00', %d, 1, 1)`, time.Now().Add(-time.Hour).UnixMicro()))
	d := begin(t, nil, "-storage-dsn", file)
	d.eventually("/readyz", 200)
	_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Contains(t, text, `nanomdm_webhook_backlog_events{sink="hook"} 0`)
	require.Contains(t, text, `nanomdm_webhook_oldest_seconds{sink="hook"} 0`)
	require.Contains(t, text, `nanomdm_webhook_off{sink="hook"} 0`)
	require.Contains(t, text, `nanomdm_webhook_off{sink="off"} 1`)
	require.Regexp(t, `nanomdm_push_certificate_expiry_seconds\{topic="com.apple.mgmt.x"\} -360\d`, text)
	for _, state := range []string{"waiting", "again", "dead", "dropped"} {
		require.Contains(t, text, `nanomdm_webhook_events{sink="hook",state="`+state+`"} 0`)
	}
}
