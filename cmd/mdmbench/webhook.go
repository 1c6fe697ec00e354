package main

import (
	"bufio"
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

// The measurements of reports, without a webhook receiver and with one: as many
// as get an answer, and pacedRate a second.
const (
	unhookedName = "reports without webhook"
	againName    = "reports without webhook, again"
	hookedName   = "reports with webhook"
	hangingName  = "reports, webhook receiver hangs"
	pacedRate    = 1000
	pacedVisits  = 800
)

func pacedName(name string) string { return fmt.Sprintf("%d a second: %s", pacedRate, name) }

// webhook measures what it costs devices that their reports are told to a
// receiver, and what a receiver costs them that takes requests and does not
// answer. Reports without one are measured before and after, since the database
// grows meanwhile and some engines are the slower for it. The receiver is part
// of this process, so that its processor time is the client's.
func (b *bench) webhook(ctx context.Context, devices []device) error {
	measure := func(name string) error {
		err := b.compare(ctx, name, load{connections: 64}, func(int) ([][]message, error) { return b.visits(ctx, devices, commandsEach) })
		if err != nil {
			return err
		}
		some := devices[:min(pacedVisits, len(devices))]
		return b.compare(ctx, pacedName(name), load{connections: 64, rate: pacedRate}, func(int) ([][]message, error) {
			return b.visits(ctx, some, commandsEach)
		})
	}
	if err := measure(unhookedName); err != nil {
		return err
	}
	receiver, err := newReceiver()
	if err != nil {
		return err
	}
	defer receiver.close()
	for _, hook := range []struct{ measurement, path string }{{hookedName, "/"}, {hangingName, "/hang"}} {
		sink, err := json.Marshal(map[string]any{
			"url": "http://" + receiver.Addr().String() + hook.path, "filter": map[string]any{"topics": []string{"mdm.Connect"}},
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
			receiver.open()
		}
		if err := b.drained(ctx, hook.measurement); err != nil {
			return err
		}
		if _, err := b.daemon.call(ctx, http.MethodDelete, "/v1/sinks/mdmbench", nil); err != nil {
			return err
		}
	}
	return measure(againName)
}

// receiver answers requests over kept connections and does no more than it
// must, as it is not what is measured. What goes to /hang is answered once it
// is open.
type receiver struct {
	net.Listener
	open   func()
	opened chan struct{}
}

func newReceiver() (*receiver, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &receiver{Listener: listener, opened: make(chan struct{})}
	r.open = sync.OnceFunc(func() { close(r.opened) })
	go func() {
		for {
			c, err := r.Accept()
			if err != nil {
				return
			}
			go r.serve(c)
		}
	}()
	return r, nil
}

func (r *receiver) serve(c net.Conn) {
	defer c.Close()
	for in := bufio.NewReader(c); ; {
		request, err := http.ReadRequest(in)
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, request.Body); err != nil {
			return
		}
		if request.URL.Path == "/hang" {
			<-r.opened
		}
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"); err != nil {
			return
		}
	}
}

// close takes no more connections. Those that the daemon keeps end with it.
func (r *receiver) close() {
	r.open()
	_ = r.Close()
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
	return r.toMean(func(m row) float64 { return m.ratio }, hookedName, unhookedName, againName)
}

// hangingLatency compares the p99 of paced reports while the receiver hangs to
// that of reports without one.
func hangingLatency(r *report) (float64, bool) {
	return r.toMean(func(m row) float64 { return m.p99.Seconds() }, pacedName(hangingName), pacedName(unhookedName), pacedName(againName))
}

// toMean compares a value of a measurement to the mean of those of the ones
// before it and after it.
func (r *report) toMean(value func(m row) float64, name, before, after string) (float64, bool) {
	var values [3]float64
	for i, name := range []string{name, before, after} {
		m, ok := r.find(name, 64)
		if !ok {
			return 0, false
		}
		values[i] = value(m)
	}
	return 2 * values[0] / (values[1] + values[2]), true
}
