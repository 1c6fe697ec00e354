package main

import (
	"context"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/supervise"
)

// TestBackgroundWorkOutlivesPanics: background work that panics is counted, and
// makes the daemon unready while it does so again and again.
func TestBackgroundWorkOutlivesPanics(t *testing.T) {
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ca.pem"), ca.PEM(), 0o600))
	environ := []string{"NANOMDM_API=" + testKey}
	o, _, err := parseOptions([]string{"-ca", filepath.Join(dir, "ca.pem"), "-listen", "127.0.0.1:0",
		"-storage-dsn", filepath.Join(dir, "mdm.db")}, environ, os.Stat)
	require.NoError(t, err)
	log := &syncBuffer{}
	s, err := wire(o, environ, newLogger(log, o), io.Discard, time.Now)
	require.NoError(t, err)
	signals, code := make(chan os.Signal, 1), make(chan int, 1)
	go func() { code <- s.run(context.Background(), signals) }()
	d := &daemon{t: t, url: "http://" + s.fronts[0].listener.Addr().String(), log: log}
	d.eventually("/readyz", http.StatusOK)

	for range supervise.ManyFailures {
		require.Equal(t, http.StatusOK, d.probe("/readyz"))
		require.Error(t, s.supervisor.Once("broken", func() { panic("boom") }))
	}
	require.Equal(t, http.StatusServiceUnavailable, d.probe("/readyz"))
	_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Contains(t, text, `nanomdm_background_restarts_total{component="broken"} 5`)
	require.Contains(t, log.String(), "panic: boom")
	require.NoError(t, s.supervisor.Once("broken", func() {}))
	require.Equal(t, http.StatusOK, d.probe("/readyz"))

	signals <- syscall.SIGTERM
	select {
	case c := <-code:
		require.Zero(t, c, log)
	case <-time.After(30 * time.Second):
		t.Fatal("the daemon does not stop")
	}
}
