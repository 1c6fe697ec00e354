package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"
)

// The measurements of reports: without a webhook receiver, with one, and with
// one that takes requests and does not answer. Each is made with as many
// messages as get an answer, and at a steady pace.
const (
	unhookedName = "reports without webhook"
	hookedName   = "reports with webhook"
	hangingName  = "reports, webhook receiver hangs"
	pacedReports = 1000 // a second
	pacedDevices = 800
)

// pacedLoad is those reports, with the polls that they come after. Devices have
// connections of their own, so that there are more than are ever busy: with fewer,
// what is late would wait in the client, and the daemon could not catch up by larger
// batches.
var pacedLoad = load{connections: 256, rate: pacedReports * (commandsEach + 1) / commandsEach}

func pacedName(name string) string { return fmt.Sprintf("%d a second: %s", pacedReports, name) }

// pacedTimes is how often each of some devices comes in a time, at that pace.
func pacedTimes(devices int, length time.Duration) int {
	return int(math.Ceil(length.Seconds() * pacedReports / commandsEach / float64(devices)))
}

// webhook measures what it costs devices that their reports are told to a
// receiver. Each round begins and ends with reports without one, for half as long
// each, since the database grows meanwhile and some engines are the slower for it.
// The two kinds with a receiver are between, in changing order. The receiver is part
// of this process, so that its processor time is the client's.
func (b *bench) webhook(ctx context.Context, devices []device) error {
	unhooked := newTurn(unhookedName, devices, b.o.paced/2, func(measure func() error) error { return measure() })
	hooked := newTurn(hookedName, devices, 0, func(measure func() error) error { return b.hooked(ctx, false, measure) })
	hanging := newTurn(hangingName, devices, b.o.paced, func(measure func() error) error { return b.hooked(ctx, true, measure) })
	// Tables that are nearly empty are the fastest, and the first turn would have
	// them to itself: it does not count.
	first := unhooked
	first.length = min(first.length, time.Minute)
	first.full, first.paced = &series{load: first.full.load}, &series{load: first.paced.load}
	if err := b.take(ctx, first, devices); err != nil {
		return err
	}
	for round := range b.o.rounds {
		turns := []turn{unhooked, hooked, hanging, unhooked}
		if round%2 == 1 {
			slices.Reverse(turns)
		}
		for _, t := range turns {
			if err := b.take(ctx, t, devices); err != nil {
				return err
			}
		}
	}
	for _, t := range []turn{unhooked, hooked, hanging} {
		b.conclude(t.full)
		b.conclude(t.paced)
	}
	return nil
}

// turn is one kind of receiver, and the measurements of reports with it.
type turn struct {
	during      func(measure func() error) error
	full, paced *series
	length      time.Duration // at least, at a steady pace
}

func newTurn(name string, devices []device, length time.Duration, during func(measure func() error) error) turn {
	paced := pacedLoad
	paced.connections = min(paced.connections, max(1, len(steadyDevices(devices))/2)) // none comes on two at once
	return turn{
		during: during,
		full:   &series{name: name, load: load{connections: 64}},
		paced:  &series{name: pacedName(name), load: paced},
		length: length,
	}
}

// steadyDevices are those that report at a steady pace.
func steadyDevices(devices []device) []device { return devices[:min(pacedDevices, len(devices))] }

// take makes the measurements of a turn: at full speed, then at a steady pace.
func (b *bench) take(ctx context.Context, t turn, devices []device) error {
	return t.during(func() error {
		visits, err := b.visits(ctx, devices, commandsEach)
		if err != nil {
			return err
		}
		if err := b.round(ctx, t.full, visits); err != nil {
			return err
		}
		steady := steadyDevices(devices)
		times := max(1, pacedTimes(len(steady), t.length))
		if visits, err = b.repeatedVisits(ctx, steady, commandsEach, times); err != nil {
			return err
		}
		return b.round(ctx, t.paced, visits)
	})
}

// hooked measures while there is a receiver, and sees to it that it got
// everything afterwards.
func (b *bench) hooked(ctx context.Context, hangs bool, measure func() error) error {
	receiver, err := newReceiver()
	if err != nil {
		return err
	}
	defer receiver.close()
	if !hangs {
		receiver.open()
	}
	sink, err := json.Marshal(map[string]any{
		"url": "http://" + receiver.Addr().String(), "filter": map[string]any{"topics": []string{"mdm.Connect"}},
	})
	if err != nil {
		return err
	}
	if _, err := b.daemon.call(ctx, http.MethodPut, "/v1/sinks/mdmbench", sink); err != nil {
		return err
	}
	if err := measure(); err != nil {
		return err
	}
	receiver.open()
	if err := b.drained(ctx, hangs); err != nil {
		return err
	}
	_, err = b.daemon.call(ctx, http.MethodDelete, "/v1/sinks/mdmbench", nil)
	return err
}

// receiver answers requests over kept connections and does no more than it
// must, as it is not what is measured. It answers once it is open.
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
		if err := skipRequest(in); err != nil {
			return
		}
		<-r.opened
		if _, err := io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"); err != nil {
			return
		}
	}
}

// skipRequest reads a request with a body of known length.
func skipRequest(in *bufio.Reader) error {
	length := 0
	for {
		line, err := in.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimSpace(line)
		if len(line) == 0 {
			_, err := in.Discard(length)
			return err
		}
		if name, value, _ := bytes.Cut(line, []byte(": ")); string(name) == "Content-Length" {
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		}
	}
}

// close refuses new connections. Connections that the daemon keeps end with it.
func (r *receiver) close() {
	r.open()
	_ = r.Close()
}

// drained waits until the receiver has got everything, and says how much it
// was if it waited for long.
func (b *bench) drained(ctx context.Context, say bool) error {
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
		if lost := sink.Backlog.Dead + sink.Backlog.Dropped; lost > 0 {
			return fmt.Errorf("%d events were given up", lost)
		}
		if left == 0 {
			if !say {
				return nil
			}
			resident, err := b.daemon.resident()
			fmt.Fprintf(os.Stderr, "%-10s  %d events waited, all taken after %v; memory at its highest so far %d MB\n",
				b.db.label, first, time.Since(begun).Round(100*time.Millisecond), resident>>20)
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
// not.
func hookedRatio(r *report) (float64, bool) {
	return inTurns(r, hookedName, unhookedName, func(m row) []float64 { return m.rates })
}

// hangingLatency compares the p99 of paced reports while the receiver hangs to
// that of reports without one.
func hangingLatency(r *report) (float64, bool) {
	return inTurns(r, pacedName(hangingName), pacedName(unhookedName), func(m row) []time.Duration { return m.p99s })
}

// inTurns compares a measurement with one that was made before and after it in each
// round: it is the median of the rounds' quotients. Means of two are geometric, so that
// three times as much and a third as much cancel out.
func inTurns[T float64 | time.Duration](r *report, of, to string, values func(m row) []T) (float64, bool) {
	m, ok := r.find(of, 0)
	n, also := r.find(to, 0)
	if !ok || !also {
		return 0, false
	}
	var quotients []float64
	for i, v := range values(m) {
		before, after := values(n)[2*i], values(n)[2*i+1]
		quotients = append(quotients, math.Log(float64(v))-(math.Log(float64(before))+math.Log(float64(after)))/2)
	}
	return math.Exp(median(quotients)), true
}
