package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// On a machine whose clock is wrong, commands are due, expire and wake their
// devices by the database's clock.
func TestWrongClock(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		if engine.Name == "sqlite" {
			continue // its clock is the machine's
		}
		for _, wrong := range []time.Duration{-10 * time.Minute, 10 * time.Minute} {
			t.Run(engine.Name+"/"+wrong.String(), func(t *testing.T) {
				t.Parallel()
				keepsTimes(t, engine.Config(t), func() time.Time { return time.Now().Add(wrong) })
			})
		}
	}
}

func keepsTimes(t *testing.T, db sqlstore.Config, now func() time.Time) {
	b := newBedroom(t, apnstest.Config{})
	d := startAt(t, now, append(b.args, "-storage", db.Driver, "-storage-dsn", db.DSN)...)
	b.certify(d)
	b.sleeps(d, "D1")

	due := time.Now().Add(3 * time.Second)
	body, err := json.Marshal(map[string]any{"ids": []string{"D1"}, "request_type": "DeviceInformation", "command_uuid": "C1",
		"options": map[string]any{"not_before": due.UTC().Format(time.RFC3339Nano), "expires_after": "5m"}})
	require.NoError(t, err)
	status, text, _ := d.api("POST", "/v1/commands", "nanomdm", testKey, body)
	require.Equal(t, http.StatusOK, status, text)
	var list struct {
		Queue []struct {
			CommandUUID string    `json:"command_uuid"`
			State       string    `json:"state"`
			ExpiresAt   time.Time `json:"expires_at"`
		} `json:"queue"`
	}
	_, text, _ = d.api("GET", "/v1/enrollments/D1/queue?state=scheduled", "nanomdm", testKey, nil)
	require.NoError(t, json.Unmarshal([]byte(text), &list), text)
	require.Len(t, list.Queue, 1)
	require.Equal(t, "scheduled", list.Queue[0].State)
	require.WithinDuration(t, due.Add(5*time.Minute), list.Queue[0].ExpiresAt, time.Second)

	b.eventually("the device is woken", func() bool { return len(b.acknowledged("D1")) == 1 })
	require.WithinRange(t, time.Now(), due.Add(-2*time.Second), due.Add(50*time.Second))

	status, text, _ = d.api("POST", "/v1/commands", "nanomdm", testKey,
		fmt.Appendf(nil, `{"ids": ["D1"], "request_type": "DeviceInformation", "command_uuid": "C2", "options": {"expires_after": "5m"}}`))
	require.Equal(t, http.StatusOK, status, text)
	_, text, _ = d.api("GET", "/v1/commands/C2", "nanomdm", testKey, nil)
	require.NoError(t, json.Unmarshal([]byte(text), &list), text)
	require.Len(t, list.Queue, 1, text)
	require.WithinDuration(t, time.Now().Add(5*time.Minute), list.Queue[0].ExpiresAt, 5*time.Second)
}

// startAt is start with a clock.
func startAt(t *testing.T, now func() time.Time, args ...string) *daemon {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	d := &daemon{t: t, ca: ca, dir: t.TempDir(), log: &syncBuffer{}, signals: make(chan os.Signal, 2), code: make(chan int, 1)}
	require.NoError(t, os.WriteFile(filepath.Join(d.dir, "ca.pem"), ca.PEM(), 0o600))
	environ := []string{"NANOMDM_API=" + testKey}
	o, _, err := parseOptions(append([]string{"-ca", filepath.Join(d.dir, "ca.pem"), "-listen", "127.0.0.1:0"}, args...), environ, os.Stat)
	require.NoError(t, err)
	s, err := wire(o, environ, newLogger(d.log, o), io.Discard, now)
	require.NoError(t, err)
	go func() { d.code <- s.run(context.Background(), d.signals) }()
	d.url = "http://" + s.fronts[0].listener.Addr().String()
	t.Cleanup(d.stop)
	d.eventually("/readyz", http.StatusOK)
	return d
}
