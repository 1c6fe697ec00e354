package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// The measurements of reports, without a webhook receiver and with one.
const (
	unhookedName = "reports without webhook"
	hookedName   = "reports with webhook"
	hangingName  = "reports, webhook receiver hangs"
)

// webhook measures what it costs devices that their reports are told to a
// receiver, and what a receiver costs them that takes requests and does not
// answer. The receiver is part of this process, so that its processor time is
// the client's.
func (b *bench) webhook(ctx context.Context, devices []device) error {
	measure := func(name string) error {
		return b.compare(ctx, name, 64, 0, false, func(int) ([][]message, error) { return b.visits(ctx, devices, commandsEach) })
	}
	if err := measure(unhookedName); err != nil {
		return err
	}
	answer := make(chan struct{})
	open := sync.OnceFunc(func() { close(answer) })
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.URL.Path != "/hang" {
			return
		}
		select {
		case <-answer:
		case <-r.Context().Done():
		}
	})}
	var serving sync.WaitGroup
	serving.Go(func() { _ = server.Serve(listener) })
	defer func() {
		open()
		_ = server.Close()
		serving.Wait()
	}()
	for _, hook := range []struct{ measurement, path string }{{hookedName, "/"}, {hangingName, "/hang"}} {
		sink, err := json.Marshal(map[string]any{
			"url": "http://" + listener.Addr().String() + hook.path, "filter": map[string]any{"topics": []string{"mdm.Connect"}},
		})
		if err != nil {
			return err
		}
		if _, err := b.daemon.call(ctx, http.MethodPut, "/v1/sinks/mdmbench", sink); err != nil {
			return err
		}
		if err := measure(hook.measurement); err != nil {
			return err
		}
		if hook.measurement == hangingName {
			open()
		}
		if err := b.drained(ctx, hook.measurement); err != nil {
			return err
		}
		if _, err := b.daemon.call(ctx, http.MethodDelete, "/v1/sinks/mdmbench", nil); err != nil {
			return err
		}
	}
	return nil
}

// drained waits until the receiver has got everything.
func (b *bench) drained(ctx context.Context, name string) error {
	begun, first := time.Now(), int64(-1)
	for {
		text, err := b.daemon.call(ctx, http.MethodGet, "/v1/sinks/mdmbench", nil)
		if err != nil {
			return err
		}
		var sink struct {
			Backlog struct{ Behind, Waiting, Dead, Dropped int64 }
		}
		if err := json.Unmarshal(text, &sink); err != nil {
			return err
		}
		left := sink.Backlog.Behind + sink.Backlog.Waiting
		if first < 0 {
			first = left
		}
		if left == 0 {
			resident, err := b.daemon.resident()
			fmt.Fprintf(os.Stderr, "%-10s  %-32s %d events waited, all taken after %v; %d given up; memory at its highest so far %d MB\n",
				b.db.label, name, first, time.Since(begun).Round(time.Second), sink.Backlog.Dead+sink.Backlog.Dropped, resident>>20)
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// hookedRatio compares reports that are told to a receiver to those that are
// not, by their ratios to the reference.
func hookedRatio(r *report) (float64, bool) {
	m, ok := r.find(hookedName, 64)
	n, also := r.find(unhookedName, 64)
	if !ok || !also {
		return 0, false
	}
	return m.ratio / n.ratio, true
}

// hangingLatency compares the p99 of reports while the receiver hangs to that
// of reports without one.
func hangingLatency(r *report) (float64, bool) {
	m, ok := r.find(hangingName, 64)
	n, also := r.find(unhookedName, 64)
	if !ok || !also {
		return 0, false
	}
	return m.p99.Seconds() / n.p99.Seconds(), true
}
