package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// systemd is the other side of a notification socket.
func systemd(t *testing.T) (path string, messages <-chan string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	require.NoError(t, err)
	c := make(chan string, 100)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return
			}
			c <- string(buf[:n])
		}
	}()
	t.Cleanup(func() { conn.Close(); <-done })
	return path, c
}

func environ(pairs map[string]string) func(string) string {
	return func(name string) string { return pairs[name] }
}

func TestNotify(t *testing.T) {
	path, messages := systemd(t)
	n, err := newNotifier(environ(map[string]string{"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "20000", "WATCHDOG_PID": strconv.Itoa(os.Getpid())}))
	require.NoError(t, err)
	require.NoError(t, n.notify(notifyReady))
	require.Equal(t, "READY=1", within(t, messages))
	require.NoError(t, n.notify(notifyWaiting(15*time.Second)))
	require.Equal(t, "STATUS=waiting for the database\nEXTEND_TIMEOUT_USEC=90000000", within(t, messages))

	require.Equal(t, 20*time.Millisecond, n.watchdog)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- n.watch(ctx, quiet()) }()
	for range 3 {
		require.Equal(t, "WATCHDOG=1", within(t, messages))
	}
	cancel()
	require.ErrorIs(t, <-done, context.Canceled)
}

func TestNotifierFromEnvironment(t *testing.T) {
	n, err := newNotifier(environ(nil))
	require.NoError(t, err)
	require.Nil(t, n)
	require.NoError(t, n.notify(notifyReady), "without systemd nobody is told")

	n, err = newNotifier(environ(map[string]string{"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"}))
	require.NoError(t, err)
	require.Zero(t, n.watchdog, "another process is watched")
	require.ErrorContains(t, n.notify(notifyReady), "notifying systemd", "nobody listens there")

	for _, bad := range []map[string]string{
		{"NOTIFY_SOCKET": "relative"},
		{"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "soon"},
	} {
		_, err := newNotifier(environ(bad))
		require.Error(t, err)
	}
}
