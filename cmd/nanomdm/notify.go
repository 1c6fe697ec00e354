package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strconv"
	"time"
)

// notifier sends the daemon's state to systemd. A nil notifier does nothing.
//
// Source: sd_notify(3), sd_watchdog_enabled(3).
type notifier struct {
	socket net.UnixAddr
	// watchdog is how often systemd wants a sign of life; 0 is never.
	watchdog time.Duration
}

// newNotifier reads where systemd listens from the environment; nil if nowhere.
func newNotifier(getenv func(string) string) (*notifier, error) {
	path := getenv("NOTIFY_SOCKET")
	if path == "" {
		return nil, nil
	}
	if path[0] != '/' && path[0] != '@' {
		return nil, fmt.Errorf("NOTIFY_SOCKET %q is neither a path nor an abstract socket", path)
	}
	n := &notifier{socket: net.UnixAddr{Name: path, Net: "unixgram"}}
	text := getenv("WATCHDOG_USEC")
	if text == "" {
		return n, nil
	}
	if pid := getenv("WATCHDOG_PID"); pid != "" && pid != strconv.Itoa(os.Getpid()) {
		return n, nil // meant for another process
	}
	usec, err := strconv.ParseInt(text, 10, 64)
	if err != nil || usec <= 0 {
		return nil, fmt.Errorf("WATCHDOG_USEC %q is not a number of microseconds", text)
	}
	n.watchdog = time.Duration(usec) * time.Microsecond
	return n, nil
}

// The messages that systemd understands.
const (
	notifyReady    = "READY=1"
	notifyStopping = "STOPPING=1"
	notifyAlive    = "WATCHDOG=1"
)

// notifyWaiting keeps systemd from giving up on a start that waits for the
// database, for as long as each of its attempts may take and some more.
func notifyWaiting(attempt time.Duration) string {
	return fmt.Sprintf("STATUS=waiting for the database\nEXTEND_TIMEOUT_USEC=%d", (2*attempt + time.Minute).Microseconds())
}

// notify sends one message.
func (n *notifier) notify(state string) error {
	if n == nil {
		return nil
	}
	conn, err := net.DialUnix("unixgram", nil, &n.socket)
	if err != nil {
		return fmt.Errorf("notifying systemd: %w", err)
	}
	_, err = conn.Write([]byte(state))
	if err = errors.Join(err, conn.Close()); err != nil {
		return fmt.Errorf("notifying systemd: %w", err)
	}
	return nil
}

// watch gives the signs of life until ctx ends. systemd restarts a daemon that
// does not get to do this.
func (n *notifier) watch(ctx context.Context, log *slog.Logger) error {
	ticker := time.NewTicker(n.watchdog / 2)
	defer ticker.Stop()
	for {
		if err := n.notify(notifyAlive); err != nil {
			log.Warn("no sign of life given", "error", err)
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
