package webhook

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/core"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// receiver is a consumer: a real HTTP server, on connections in memory, so
// that all of it runs by a test's clock.
type receiver struct {
	conns  chan net.Conn
	closed chan struct{}
	server *http.Server

	mu     sync.Mutex
	dials  int
	got    []delivery
	inside map[string]int // requests under way by enrollment
	most   int            // of all at once
	atOnce int            // events of an enrollment that came while another one was under way
	answer func(w http.ResponseWriter, d *delivery)
	away   bool // connections are refused
}

// delivery is one request that a receiver got.
type delivery struct {
	at     time.Time
	header http.Header
	body   []byte
	event  Event
	status int
	n      int // which one it is, from 1
	done   <-chan struct{}
}

func (d *delivery) enrollment() string {
	switch {
	case d.event.Checkin != nil:
		return d.event.Checkin.IDs.ID
	case d.event.Acknowledge != nil:
		return d.event.Acknowledge.IDs.ID
	case d.event.Server != nil && d.event.Server.IDs != nil:
		return d.event.Server.IDs.ID
	}
	return ""
}

// what is the command of a report, else the topic.
func (d *delivery) what() string {
	if d.event.Acknowledge != nil {
		return d.event.Acknowledge.CommandUUID
	}
	return strings.TrimPrefix(d.event.Topic, "mdm.")
}

func newReceiver(t *testing.T) *receiver {
	r := &receiver{conns: make(chan net.Conn), closed: make(chan struct{}), inside: make(map[string]int)}
	r.server = &http.Server{Handler: r}
	var serving sync.WaitGroup
	serving.Go(func() { _ = r.server.Serve(r) })
	t.Cleanup(func() {
		require.NoError(t, r.server.Close())
		serving.Wait()
		require.Zero(t, r.atOnce)
	})
	return r
}

func (r *receiver) Accept() (net.Conn, error) {
	select {
	case c := <-r.conns:
		return c, nil
	case <-r.closed:
		return nil, net.ErrClosed
	}
}

func (r *receiver) Close() error {
	close(r.closed)
	return nil
}

func (r *receiver) Addr() net.Addr { return &net.TCPAddr{} }

// refuses has the receiver refuse new connections.
func (r *receiver) refuses(away bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away = away
}

func (r *receiver) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	r.mu.Lock()
	away := r.away
	r.mu.Unlock()
	if away {
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	ours, theirs := net.Pipe()
	select {
	case r.conns <- theirs:
	case <-r.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.dials++
	return ours, nil
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return
	}
	d := delivery{at: time.Now(), header: req.Header, body: body, done: req.Context().Done()}
	if err := errors.Join(json.Unmarshal(body, &d.event), validate(body)); err != nil {
		panic(err)
	}
	r.mu.Lock()
	if r.inside[d.enrollment()] > 0 { // the handler may not know yet that its sender has left
		r.mu.Unlock()
		time.Sleep(time.Millisecond)
		r.mu.Lock()
	}
	if r.inside[d.enrollment()]++; r.inside[d.enrollment()] > 1 {
		r.atOnce++
	}
	total := 0
	for _, n := range r.inside {
		total += n
	}
	r.most = max(r.most, total)
	d.n = len(r.got) + 1
	r.got = append(r.got, d)
	answer := r.answer
	r.mu.Unlock()
	rec := &statusWriter{ResponseWriter: w}
	defer func() { // also if the answer is a panic
		r.mu.Lock()
		defer r.mu.Unlock()
		r.inside[d.enrollment()]--
		r.got[d.n-1].status = rec.status
	}()
	if answer != nil {
		answer(rec, &d)
	}
	if rec.status == 0 && req.Context().Err() == nil {
		rec.status = http.StatusOK
	}
}

type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// answers changes how the receiver answers; nil is 200.
func (r *receiver) answers(how func(w http.ResponseWriter, d *delivery)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.answer = how
}

func status(code int) func(http.ResponseWriter, *delivery) {
	return func(w http.ResponseWriter, _ *delivery) { w.WriteHeader(code) }
}

// mostAtOnce is how many deliveries were under way at once, at most.
func (r *receiver) mostAtOnce() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.most
}

func (r *receiver) requests() []delivery {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.got)
}

// taken lists what was taken of an enrollment, by the first time.
func (r *receiver) taken(enrollment string) (what []string) {
	seen := make(map[string]bool)
	for _, d := range r.requests() {
		if d.enrollment() == enrollment && d.status == 200 && !seen[d.event.EventID] {
			seen[d.event.EventID] = true
			what = append(what, d.what())
		}
	}
	return what
}

// world is a server without a network: store, middleware and deliverer.
type world struct {
	t        *testing.T
	store    *sqlstore.Store
	log      *logged
	sinks    *Sinks
	receiver *receiver
	devices  service.Handler
	stops    []func()
}

type logged struct {
	mu    sync.Mutex
	lines []string
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(p))
	return len(p), nil
}

func (l *logged) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, line := range l.lines {
		if strings.Contains(line, text) {
			n++
		}
	}
	return n
}

const receiverURL = "http://receiver.example.org/events"

func hook(change func(*storage.EventSink)) storage.EventSink {
	k := storage.EventSink{Name: "hook", URL: receiverURL, Tokens: true, Enabled: true}
	if change != nil {
		change(&k)
	}
	return k
}

// newWorld has one sink, unless others are given. It belongs into a synctest
// bubble.
func newWorld(t *testing.T, sinks ...storage.EventSink) *world {
	t.Helper()
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: ":memory:"})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	w := &world{t: t, store: store, log: &logged{}, receiver: newReceiver(t)}
	if sinks == nil {
		sinks = []storage.EventSink{hook(nil)}
	}
	w.sinks, err = OpenSinks(t.Context(), store, sinks, w.logger())
	require.NoError(t, err)
	w.devices = service.Chain(core.New(store, core.Config{}), Middleware(w.sinks, []string{"ticket"}, time.Now, nil))
	t.Cleanup(func() {
		for _, stop := range w.stops {
			stop()
		}
	})
	return w
}

func (w *world) logger() *slog.Logger { return slog.New(slog.NewTextHandler(w.log, nil)) }

// replica is a deliverer that runs.
type replica struct {
	*Deliverer
	stop func()
}

// deliver starts a replica's deliverer.
func (w *world) deliver(holder string, cfg Config) *replica {
	w.t.Helper()
	return w.deliverFrom(w.store, holder, cfg)
}

// deliverFrom is deliver with a store of the caller's.
func (w *world) deliverFrom(store Store, holder string, cfg Config) *replica {
	w.t.Helper()
	cfg.Logger = w.logger()
	r := &replica{Deliverer: NewDeliverer(store, w.sinks, holder, cfg)}
	r.dial = w.receiver.dial
	ctx, cancel := context.WithCancel(w.t.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = r.Run(ctx) })
	running.Go(func() { _ = w.sinks.Run(ctx) })
	r.stop = func() { cancel(); running.Wait() }
	w.stops = append(w.stops, r.stop)
	return r
}

func (w *world) says(id string, m mdm.Message) {
	w.t.Helper()
	_, err := w.devices.Handle(w.t.Context(), &service.Request{Message: m, Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}})
	require.NoError(w.t, err)
}

func (w *world) enroll(ids ...string) {
	w.t.Helper()
	for _, id := range ids {
		who := mdm.Enrollment{UDID: id}
		w.says(id, &mdm.Authenticate{Enrollment: who, Topic: "com.apple.mgmt.x", Raw: []byte("authenticate")})
		w.says(id, &mdm.TokenUpdate{Enrollment: who, Topic: "com.apple.mgmt.x", PushMagic: "m", Token: []byte("t"), Raw: []byte("token")})
	}
}

// report has the device say what came of a command.
func (w *world) report(id, command string) {
	w.t.Helper()
	w.says(id, &mdm.Report{Enrollment: mdm.Enrollment{UDID: id}, Status: mdm.StatusAcknowledged, CommandUUID: command, Raw: []byte("report " + command)})
}

func commands(n int) (out []string) {
	for i := range n {
		out = append(out, fmt.Sprintf("C%03d", i))
	}
	return out
}

func (w *world) backlog() storage.SinkBacklog {
	w.t.Helper()
	backlogs, err := w.store.EventBacklogs(w.t.Context())
	require.NoError(w.t, err)
	for _, b := range backlogs {
		if b.Sink == "hook" {
			return b
		}
	}
	return storage.SinkBacklog{}
}

// drained waits, by the test's clock, until nothing is before the sink.
func (w *world) drained(within time.Duration) {
	w.t.Helper()
	for begun := time.Now(); ; time.Sleep(time.Second) {
		n, err := w.store.WaitingCounts(w.t.Context())
		require.NoError(w.t, err)
		if b := w.backlog(); n.Unnumbered+b.Behind+b.Waiting+b.Again == 0 {
			return
		}
		require.Less(w.t, time.Since(begun), within, "%+v", w.backlog())
	}
}

// inBubble runs a test by a clock of its own.
func inBubble(t *testing.T, test func(t *testing.T)) {
	t.Helper()
	synctest.Test(t, test)
}

// storedSink is the world's only sink.
func (w *world) storedSink() storage.EventSink {
	w.t.Helper()
	sinks, err := w.store.EventSinks(w.t.Context())
	require.NoError(w.t, err)
	require.Len(w.t, sinks, 1)
	return sinks[0]
}
