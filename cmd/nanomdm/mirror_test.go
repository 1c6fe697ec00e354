package main

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// TestMirror: the server that a fleet came from gets its check-ins, in order and
// also those of the time in which it was away, so that a device can go back.
func TestMirror(t *testing.T) {
	old := newMortal(t, "-migration", "-retro", "-storage-dsn", t.TempDir()+"/old.db")
	d := &daemon{t: t, ca: old.ca, dir: old.dir, log: &syncBuffer{}, stdout: &syncBuffer{}}
	d.launch("http", "-mirror-url", old.url+"/migration", "-mirror-key", testKey)
	t.Cleanup(d.stop)
	at := &chosenReplica{url: d.url}
	device := func(udid string) *mdmtest.Device {
		return d.device(udid, mdmtest.Config{Client: &http.Client{Transport: at}})
	}
	enrollment := func(id string) (e struct {
		Enabled bool `json:"enabled"`
		Tally   int  `json:"token_update_tally"`
	}) {
		t.Helper()
		if status, body, _ := old.api("GET", "/v1/enrollments/"+id, "nanomdm", testKey, nil); status == 200 {
			require.NoError(t, json.Unmarshal([]byte(body), &e))
		}
		return e
	}
	there := func(id string, enabled bool) {
		t.Helper()
		require.Eventually(t, func() bool { return enrollment(id).Enabled == enabled }, time.Minute, 50*time.Millisecond, "%s\n%s", d.log, old.log)
	}
	first, second := device("FIRST"), device("SECOND")
	require.NoError(t, first.Enroll(t.Context()))
	there("FIRST", true)

	old.kill()
	require.NoError(t, first.SetBootstrapToken(t.Context(), []byte("bootstrap")))
	require.NoError(t, second.Enroll(t.Context()))
	require.NoError(t, second.Enroll(t.Context()), "again")
	require.NoError(t, first.CheckOut(t.Context()))
	require.NoError(t, first.Enroll(t.Context()))
	require.NoError(t, first.SetBootstrapToken(t.Context(), []byte("newer")))
	_, sinks, _ := d.api("GET", "/v1/sinks", "nanomdm", testKey, nil)
	require.Contains(t, sinks, `"form": "checkin"`)
	require.NotContains(t, sinks, testKey)
	old.begin()
	old.ready()
	there("SECOND", true)
	require.Eventually(t, func() bool {
		status, body, _ := old.api("POST", "/v1/enrollments/FIRST/bootstrap_token", "nanomdm", testKey, []byte("{}"))
		return status == 200 && strings.Contains(body, "bmV3ZXI=")
	}, time.Minute, 50*time.Millisecond, "%s", d.log)
	require.True(t, enrollment("FIRST").Enabled)

	// The way back: -retro pins the certificate that the device shows.
	status, body, _ := old.api("PUT", "/v1/enqueue/FIRST?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status, body)
	at.url = old.url
	visit, err := first.Poll(t.Context())
	require.NoError(t, err)
	require.Len(t, visit.Exchanges, 1)
	require.Equal(t, "C1", visit.Exchanges[0].Command.UUID)
}

// A mirror that sends the daemon elsewhere gets it nowhere, and one that hangs keeps
// neither devices nor other receivers waiting.
func TestMirrorThatMisbehaves(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { t.Errorf("%s %s", r.Method, r.URL) }))
	t.Cleanup(elsewhere.Close)
	var asked atomic.Int64
	done := make(chan struct{})
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) == 1 {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
			return
		}
		<-done
	}))
	t.Cleanup(mirror.Close)
	t.Cleanup(func() { close(done) })
	hook := newConsumer(t, nil)
	d := start(t, "http", "-mirror-url", mirror.URL+"/migration", "-mirror-key", testKey, "-webhook-url", hook.URL)
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	require.Eventually(t, func() bool { return asked.Load() > 1 }, time.Minute, 10*time.Millisecond, "it is tried again")
	require.NoError(t, dev.SetBootstrapToken(t.Context(), []byte("bootstrap")))
	_, err := dev.Poll(t.Context())
	require.NoError(t, err)
	require.Eventually(t, func() bool { return len(hook.events()) >= 4 }, time.Minute, 10*time.Millisecond)
}
