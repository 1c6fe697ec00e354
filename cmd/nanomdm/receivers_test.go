package main

import (
	"encoding/json"
	"flag"
	"fmt"
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

// receiverWatch is how long TestReceiversThatFail watches events that fail.
// All three tries take about half a minute where the receiver answers at
// once: run with -args -receiver-watch=90s.
var receiverWatch = flag.Duration("receiver-watch", 3*time.Second, "how long failing webhook receivers are watched")

// badReceiver is a receiver of NanoMDM's events with a fault: it fails at the
// TokenUpdates of devices called BAD.
type badReceiver struct {
	*httptest.Server

	mu     sync.Mutex
	events map[string]int // how often each came, by its ID
	bad    map[string]bool
	taken  map[string]int // first deliveries that were taken, by device
}

func newBadReceiver(t *testing.T, fail http.HandlerFunc) *badReceiver {
	b := &badReceiver{events: make(map[string]int), bad: make(map[string]bool), taken: make(map[string]int)}
	b.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var e webhook.Event
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
			t.Errorf("no event: %v", err)
			return
		}
		id := ""
		if e.Checkin != nil {
			id = e.Checkin.IDs.ID
		} else {
			id = e.Acknowledge.IDs.ID
		}
		bad := e.Topic == "mdm.TokenUpdate" && strings.HasPrefix(id, "BAD")
		b.mu.Lock()
		b.events[e.EventID]++
		b.bad[e.EventID] = bad
		if !bad && b.events[e.EventID] == 1 {
			b.taken[id]++
		}
		b.mu.Unlock()
		if bad {
			fail(w, r)
		}
	}))
	t.Cleanup(b.Close)
	return b
}

// count returns the taken events of devices with a prefix.
func (b *badReceiver) count(prefix string) (n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for id, taken := range b.taken {
		if strings.HasPrefix(id, prefix) {
			n += taken
		}
	}
	return n
}

// tries returns how many events that the receiver fails to take came how
// often, and how many others came again.
func (b *badReceiver) tries() (of map[int]int, others int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	of = make(map[int]int)
	for id, n := range b.events {
		switch {
		case b.bad[id]:
			of[n]++
		case n > 1:
			others++
		}
	}
	return of, others
}

// Receivers that were written for NanoMDM, which waits for nobody, fail at
// some events in various ways. The events of other devices arrive at once and
// once, the failing event comes three times at most, and no receiver counts as
// down.
func TestReceiversThatFail(t *testing.T) {
	kinds := map[string]*badReceiver{
		"refuses": newBadReceiver(t, func(w http.ResponseWriter, _ *http.Request) {
			http.Error(w, "unknown topic", http.StatusInternalServerError)
		}),
		"slow": newBadReceiver(t, func(_ http.ResponseWriter, r *http.Request) { // it goes on without its client
			select {
			case <-time.After(2 * time.Second):
			case <-t.Context().Done():
			}
		}),
		"crashes":  newBadReceiver(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }),
		"keyerror": newBadReceiver(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "KeyError: 'udid'", http.StatusBadRequest) }),
	}
	var sinks []string
	for name, r := range kinds {
		if name != "refuses" {
			sinks = append(sinks, fmt.Sprintf(`{"name": %q, "url": %q, "tokens": true, "filter": {"idle": true}, "on_error": "skip"}`, name, r.URL))
		}
	}
	config := filepath.Join(t.TempDir(), "webhook.json")
	require.NoError(t, os.WriteFile(config, []byte(`{"sinks": [`+strings.Join(sinks, ",")+`]}`), 0o600))
	d := start(t, "http", "-webhook-url", kinds["refuses"].URL, "-webhook-config", config, "-webhook-timeout", "1s")

	const devices, bad = 200, 20
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 20}}
	var busy sync.WaitGroup
	room := make(chan struct{}, 20)
	for i := range devices {
		room <- struct{}{}
		busy.Go(func() {
			defer func() { <-room }()
			name := fmt.Sprintf("GOOD%03d", i)
			if i < bad { // they come first, and hold up the others if anything does
				name = fmt.Sprintf("BAD%03d", i)
			}
			dev := d.device(name, mdmtest.Config{Client: client})
			if err := dev.Enroll(t.Context()); err != nil {
				t.Error(err)
				return
			}
			if _, err := dev.Poll(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	busy.Wait()
	begun := time.Now()
	for name, r := range kinds {
		require.Eventually(t, func() bool { return r.count("GOOD") >= 3*(devices-bad) }, 30*time.Second, 10*time.Millisecond,
			"%s: %d events of other devices", name, r.count("GOOD"))
	}
	t.Logf("events of other devices: all delivered %v after the last one", time.Since(begun).Round(time.Millisecond))
	pace(t.Context(), *receiverWatch)
	complete := *receiverWatch > time.Minute
	for name, r := range kinds {
		of, others := r.tries()
		require.Zero(t, others, "%s: others' events came once", name)
		require.Equal(t, 3*(devices-bad), r.count("GOOD"), name)
		require.Equal(t, bad, of[1]+of[2]+of[3], "%s: each event comes three times at most: %v", name, of)
		if complete {
			require.Equal(t, bad, of[3], "%s: %v", name, of)
			require.Equal(t, 2*bad, r.count("BAD"), "%s: what stands behind a dead letter follows", name)
		}
	}
	require.NotContains(t, d.log.String(), "is down")
	_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	for name := range kinds {
		if name == "refuses" {
			name = "webhook"
		}
		require.Contains(t, text, `nanomdm_webhook_down{sink="`+name+`"} 0`)
		if complete {
			require.Contains(t, text, fmt.Sprintf(`nanomdm_webhook_given_up_total{sink=%q,why="refused"} %d`+"\n", name, bad))
		}
	}
}
