package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	startTimeout = 10 * time.Second
	stopTimeout  = 10 * time.Second
)

// daemon is the server program while it runs.
type daemon struct {
	cmd *exec.Cmd
	log logBuffer
	// exited is closed when the process has ended; err is its outcome.
	exited chan struct{}
	err    error
}

// startDaemon starts the program in dir. The settings of the caller's own
// server stay out of its environment.
func startDaemon(program, dir, apiKey string, args ...string) (*daemon, error) {
	// A relative path would be looked up in dir.
	program, err := filepath.Abs(program)
	if err != nil {
		return nil, err
	}
	d := &daemon{exited: make(chan struct{})}
	d.cmd = exec.Command(program, args...)
	d.cmd.Dir = dir
	for _, pair := range os.Environ() {
		if !strings.HasPrefix(pair, "NANOMDM_") {
			d.cmd.Env = append(d.cmd.Env, pair)
		}
	}
	d.cmd.Env = append(d.cmd.Env, "NANOMDM_API="+apiKey)
	d.cmd.Stdout, d.cmd.Stderr = &d.log, &d.log
	if err := d.cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the server: %w", err)
	}
	go func() {
		d.err = d.cmd.Wait()
		close(d.exited)
	}()
	return d, nil
}

// ready waits until the server answers GET /version.
func (d *daemon) ready(ctx context.Context, server *api) (version string, err error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ticker := time.NewTicker(50 * time.Millisecond)
	defer ticker.Stop()
	for {
		if version, err = server.version(ctx); err == nil {
			return version, nil
		}
		select {
		case <-ticker.C:
		case <-d.exited:
			return "", fmt.Errorf("the server ended at once: %w", d.outcome())
		case <-ctx.Done():
			return "", fmt.Errorf("the server does not answer: %w", err)
		}
	}
}

// stop sends SIGTERM and waits; an exit code other than 0 is an error. It may
// be called again.
func (d *daemon) stop() error {
	select {
	case <-d.exited:
		return d.outcome()
	default:
	}
	if err := d.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stopping the server: %w", err)
	}
	timer := time.NewTimer(stopTimeout)
	defer timer.Stop()
	select {
	case <-d.exited:
		return d.outcome()
	case <-timer.C:
		_ = d.cmd.Process.Kill() // the only error is that it has just ended
		<-d.exited
		return fmt.Errorf("the server did not stop in %v after SIGTERM", stopTimeout)
	}
}

// outcome is valid once exited is closed.
func (d *daemon) outcome() error {
	if d.err != nil {
		return fmt.Errorf("the server's exit: %w", d.err)
	}
	return nil
}

// freeAddress finds a port that nobody listens on. Another program may take
// it before the server does; then the server says so.
func freeAddress() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return listener.Addr().String(), listener.Close()
}

// logBuffer keeps the end of what is written to it.
type logBuffer struct {
	mu  sync.Mutex
	buf []byte
}

const logKept = 64 << 10

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.buf = append(b.buf, p...)
	if excess := len(b.buf) - logKept; excess > 0 {
		b.buf = append(b.buf[:0], b.buf[excess:]...)
	}
	return len(p), nil
}

// tail is the last lines.
func (b *logBuffer) tail(lines int) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := bytes.Split(bytes.TrimRight(b.buf, "\n"), []byte("\n"))
	return string(bytes.Join(all[max(0, len(all)-lines):], []byte("\n")))
}
