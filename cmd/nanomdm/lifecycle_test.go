package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// asDaemon makes the test binary the daemon, for tests of a whole process.
const asDaemon = "TEST_BINARY_IS_THE_DAEMON"

func TestMain(m *testing.M) {
	if os.Getenv(asDaemon) != "" {
		main()
	}
	goleak.VerifyTestMain(m)
}

// diary notes what happened, in order.
type diary struct {
	mu      sync.Mutex
	entries []string
}

func (d *diary) note(entry string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.entries = append(d.entries, entry)
}

func (d *diary) component(name string) component {
	return component{
		name:  name,
		start: func(context.Context) error { d.note("start " + name); return nil },
		stop:  func(context.Context) error { d.note("stop " + name); return nil },
	}
}

// running is a server under test on a real listener.
type running struct {
	url     string
	signals chan os.Signal
	code    chan int
	client  *http.Client
}

// launch runs s with a handler on a port of its own.
func launch(t *testing.T, s *server, handler http.Handler) *running {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s.serve("http", listener, handler, nil, maxHeaderBytes)
	r := &running{
		url:     "http://" + listener.Addr().String(),
		signals: make(chan os.Signal, 2),
		code:    make(chan int, 1),
		client:  &http.Client{Transport: &http.Transport{}},
	}
	t.Cleanup(r.client.CloseIdleConnections)
	go func() { r.code <- s.run(t.Context(), r.signals) }()
	return r
}

type answer struct {
	status int
	body   string
	err    error
}

// get asks in the background.
func (r *running) get() <-chan answer {
	done := make(chan answer, 1)
	go func() {
		resp, err := r.client.Get(r.url)
		if err != nil {
			done <- answer{err: err}
			return
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		done <- answer{resp.StatusCode, string(body), err}
	}()
	return done
}

// within receives, and fails the test rather than hang.
func within[T any](t *testing.T, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(20 * time.Second):
		require.FailNow(t, "nothing came")
		panic("unreachable")
	}
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestSignalDrainsThenStopsLastFirst(t *testing.T) {
	var d diary
	s := newServer(quiet(), time.Minute, time.Minute)
	s.add(d.component("store"))
	s.add(component{name: "nothing to start or stop"})
	s.add(d.component("push"))
	entered, leave := make(chan struct{}), make(chan struct{})
	r := launch(t, s, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(entered)
		<-s.draining() // the listener closes with this request under way
		<-leave
		d.note("answered")
		_, _ = io.WriteString(w, "done")
	}))
	got := r.get()
	within(t, entered)
	r.signals <- syscall.SIGTERM
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", strings.TrimPrefix(r.url, "http://"))
		if err == nil {
			conn.Close()
		}
		return err != nil
	}, 20*time.Second, time.Millisecond, "the listener stays open")
	require.Empty(t, r.code)
	close(leave)
	require.Equal(t, answer{status: 200, body: "done"}, within(t, got))
	require.Equal(t, 0, within(t, r.code))
	require.Equal(t, []string{"start store", "start push", "answered", "stop push", "stop store"}, d.entries)
}

func TestEndOfContextStopsToo(t *testing.T) {
	var d diary
	s := newServer(quiet(), time.Minute, time.Minute)
	s.add(d.component("store"))
	ctx, cancel := context.WithCancel(t.Context())
	code := make(chan int, 1)
	go func() { code <- s.run(ctx, nil) }()
	cancel()
	require.Equal(t, 0, within(t, code))
}

func TestDrainTimeoutCutsRequests(t *testing.T) {
	var d diary
	s := newServer(quiet(), 10*time.Millisecond, time.Minute)
	s.add(d.component("store"))
	entered, ended := make(chan struct{}), make(chan struct{})
	r := launch(t, s, http.HandlerFunc(func(_ http.ResponseWriter, req *http.Request) {
		close(entered)
		<-req.Context().Done()
		close(ended)
	}))
	got := r.get()
	within(t, entered)
	r.signals <- os.Interrupt
	require.Equal(t, 1, within(t, r.code))
	within(t, ended)
	require.Error(t, within(t, got).err)
	require.Equal(t, []string{"start store", "stop store"}, d.entries)
}

func TestSecondSignalLeavesAtOnce(t *testing.T) {
	s := newServer(quiet(), time.Minute, time.Minute)
	stopped := make(chan struct{})
	s.add(component{name: "store", stop: func(context.Context) error { close(stopped); return nil }})
	entered, leave := make(chan struct{}), make(chan struct{})
	r := launch(t, s, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(entered)
		<-leave
	}))
	got := r.get()
	within(t, entered)
	r.signals <- os.Interrupt
	r.signals <- os.Interrupt
	require.Equal(t, 1, within(t, r.code))
	select {
	case <-stopped:
		require.Fail(t, "it waited for the drain")
	default:
	}
	close(leave) // the process would be gone; here its goroutines must end
	within(t, got)
	within(t, stopped)
}

func TestFailedStartStopsWhatStarted(t *testing.T) {
	var d diary
	s := newServer(quiet(), time.Minute, time.Minute)
	s.add(d.component("store"))
	s.add(component{
		name:  "push",
		start: func(context.Context) error { return errors.New("no") },
		stop:  func(context.Context) error { d.note("stop push"); return nil },
	})
	s.add(d.component("never"))
	r := launch(t, s, http.NotFoundHandler())
	require.Equal(t, 1, within(t, r.code))
	require.Equal(t, []string{"start store", "stop store"}, d.entries)
	require.Error(t, within(t, r.get()).err, "the listener is closed")
}

func TestSignalDuringStart(t *testing.T) {
	s := newServer(quiet(), time.Minute, time.Minute)
	starting := make(chan struct{})
	s.add(component{name: "store", start: func(ctx context.Context) error {
		close(starting)
		<-ctx.Done() // a database that is away
		return ctx.Err()
	}})
	r := launch(t, s, http.NotFoundHandler())
	within(t, starting)
	require.Equal(t, http.StatusNotFound, within(t, r.get()).status, "requests are answered while components start")
	r.client.CloseIdleConnections()
	r.signals <- syscall.SIGTERM
	require.Equal(t, 0, within(t, r.code))
}

func TestComponentsAddedDuringStart(t *testing.T) {
	var d diary
	s := newServer(quiet(), time.Minute, time.Minute)
	s.started = func() { d.note("started") }
	s.stopping = func() { d.note("stopping") }
	store := d.component("store")
	open := store.start
	store.start = func(ctx context.Context) error {
		s.add(d.component("push"))
		return open(ctx)
	}
	s.add(store)
	r := launch(t, s, http.NotFoundHandler())
	require.Equal(t, http.StatusNotFound, within(t, r.get()).status)
	require.Eventually(t, func() bool { d.mu.Lock(); defer d.mu.Unlock(); return len(d.entries) == 3 }, 20*time.Second, time.Millisecond)
	r.client.CloseIdleConnections()
	r.signals <- syscall.SIGTERM
	require.Equal(t, 0, within(t, r.code))
	require.Equal(t, []string{"start store", "start push", "started", "stopping", "stop push", "stop store"}, d.entries)
}

func TestDrainDelayServesOn(t *testing.T) {
	s := newServer(quiet(), time.Minute, time.Minute)
	s.drainDelay = 300 * time.Millisecond
	started, stopping := make(chan struct{}), make(chan struct{})
	s.started = func() { close(started) }
	s.stopping = func() { close(stopping) }
	r := launch(t, s, http.NotFoundHandler())
	within(t, started)
	begun := time.Now()
	r.signals <- syscall.SIGTERM
	within(t, stopping)
	require.Equal(t, http.StatusNotFound, within(t, r.get()).status, "a new request during the delay")
	r.client.CloseIdleConnections()
	require.Equal(t, 0, within(t, r.code))
	require.GreaterOrEqual(t, time.Since(begun), s.drainDelay)
}

func TestBackground(t *testing.T) {
	for _, c := range []struct {
		name   string
		result error
		want   int
	}{
		{"ends when told", nil, 0},
		{"ends with its context's error", context.Canceled, 0},
		{"fails at the end", errors.New("flush failed"), 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var d diary
			s := newServer(quiet(), time.Minute, time.Minute)
			s.add(d.component("store"))
			running := make(chan struct{})
			s.background("sweep", func(ctx context.Context) error {
				close(running)
				<-ctx.Done()
				d.note("sweep ended")
				return c.result
			})
			r := launch(t, s, http.NotFoundHandler())
			within(t, running)
			r.signals <- os.Interrupt
			require.Equal(t, c.want, within(t, r.code))
			require.Equal(t, []string{"start store", "sweep ended", "stop store"}, d.entries)
		})
	}
}

func TestStuckComponentDoesNotKeepTheOthers(t *testing.T) {
	var d diary
	s := newServer(quiet(), time.Minute, 10*time.Millisecond)
	s.add(d.component("store"))
	release := make(chan struct{})
	s.add(component{name: "deaf", stop: func(context.Context) error { <-release; return nil }})
	s.background("slow", func(context.Context) error { <-release; return nil })
	r := launch(t, s, http.NotFoundHandler())
	require.Equal(t, http.StatusNotFound, within(t, r.get()).status)
	r.signals <- os.Interrupt
	require.Equal(t, 1, within(t, r.code))
	close(release)
	require.Equal(t, []string{"start store", "stop store"}, d.entries)
}

func TestLostListenerStopsTheDaemon(t *testing.T) {
	s := newServer(quiet(), time.Minute, time.Minute)
	r := launch(t, s, http.NotFoundHandler())
	require.Equal(t, http.StatusNotFound, within(t, r.get()).status)
	require.NoError(t, s.fronts[0].listener.Close())
	require.Equal(t, 1, within(t, r.code))
}

func TestServerLimits(t *testing.T) {
	s := newServer(quiet(), time.Minute, time.Minute)
	r := launch(t, s, http.NotFoundHandler())
	h := s.fronts[0].http
	for _, limit := range []time.Duration{h.ReadHeaderTimeout, h.ReadTimeout, h.WriteTimeout, h.IdleTimeout} {
		require.Positive(t, limit)
	}
	require.Greater(t, h.WriteTimeout, h.ReadTimeout)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url, nil)
	require.NoError(t, err)
	req.Header.Set("X-Long", strings.Repeat("x", maxHeaderBytes+8<<10))
	resp, err := r.client.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, resp.StatusCode)
	r.signals <- os.Interrupt
	require.Equal(t, 0, within(t, r.code))
}

func TestTLSSpeaksHTTP2(t *testing.T) {
	other := httptest.NewTLSServer(http.NotFoundHandler()) // for its certificate
	cert, leaf := other.TLS.Certificates[0], other.Certificate()
	other.Close()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	s := newServer(quiet(), time.Minute, time.Minute)
	s.serve("https", listener, http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		_, _ = io.WriteString(w, req.Proto)
	}), &tls.Config{Certificates: []tls.Certificate{cert}}, maxHeaderBytes)
	signals, code := make(chan os.Signal, 1), make(chan int, 1)
	go func() { code <- s.run(t.Context(), signals) }()
	roots := x509.NewCertPool()
	roots.AddCert(leaf)
	r := &running{url: "https://" + listener.Addr().String(), client: &http.Client{Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots}, ForceAttemptHTTP2: true,
	}}}
	require.Equal(t, answer{status: 200, body: "HTTP/2.0"}, within(t, r.get()))
	r.client.CloseIdleConnections()
	signals <- os.Interrupt
	require.Equal(t, 0, within(t, code))
}
