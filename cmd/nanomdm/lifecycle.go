package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/http/gate"
	"github.com/nanomdm/nanomdm/supervise"
)

// The limits of every HTTP server here. A handler that waits longer on purpose
// sets its own deadlines with http.ResponseController. The write timeout counts
// from the end of the header, so that it holds the reading of the body too. The
// idle timeout is above the 60 seconds that proxies commonly keep a connection,
// so that it is the proxy which closes it.
const (
	readHeaderTimeout = 10 * time.Second
	readTimeout       = time.Minute
	writeTimeout      = 2 * time.Minute
	idleTimeout       = 2 * time.Minute
	maxHeaderBytes    = 64 << 10 // of devices alone
	maxAPIHeaderBytes = 1 << 20  // with the API: NanoMDM's calls name enrollments in the URL
	maxHeadersMemory  = 64 << 20 // of all requests, copies included
)

// component is a part of the daemon that lives as long as it does: the store,
// the sweeps, the push sender. A nil function does nothing.
type component struct {
	name string
	// start returns once the component works. Its context ends if the daemon
	// has to stop while it is still starting; it has no meaning later.
	start func(context.Context) error
	// stop returns when nothing of the component runs any more, and gives up
	// when its context ends.
	stop func(context.Context) error
}

// server runs the daemon's components and HTTP servers and stops them in order.
// Fill it with serve, add and background, then call run once.
type server struct {
	log          *slog.Logger
	drainDelay   time.Duration // between the announcement of a stop and the drain
	drainTimeout time.Duration // for requests under way
	stopTimeout  time.Duration // for each component
	// started is called when all components work, stopping when a signal asks
	// the daemon to end. Both may be nil and must not block.
	started  func()
	stopping func()
	// supervisor runs background components.
	supervisor *supervise.Supervisor

	headers    *gate.Headers
	turned     func(server string) // counts those whose headers are too many; may be nil
	components []component
	fronts     []front
	failed     chan error    // of what ended by itself; only the first counts
	drain      chan struct{} // closed when draining begins
}

// front is an HTTP server on its listener.
type front struct {
	name     string
	listener net.Listener
	http     *http.Server
	cut      context.CancelFunc // ends the contexts of its requests
}

func newServer(log *slog.Logger, drainTimeout, stopTimeout time.Duration) *server {
	return &server{
		log: log, drainTimeout: drainTimeout, stopTimeout: stopTimeout,
		headers: gate.NewHeaders(maxHeadersMemory), supervisor: supervise.New(supervise.Config{Logger: log}),
		failed: make(chan error, 1), drain: make(chan struct{}),
	}
}

// add appends a component. Components start in the order in which they were
// added and stop in the reverse. One that is starting may add others, which
// start after those that were added before.
func (s *server) add(c component) { s.components = append(s.components, c) }

// background adds a component that is one function, which runs until its
// context ends. If it fails or returns before, it starts again; see package supervise.
func (s *server) background(name string, run func(context.Context) error) {
	var cancel context.CancelFunc
	done := make(chan error, 1)
	s.add(component{
		name: name,
		start: func(context.Context) error {
			var ctx context.Context
			ctx, cancel = context.WithCancel(context.Background())
			go func() {
				err := s.supervisor.Run(ctx, name, run)
				if errors.Is(err, context.Canceled) {
					err = nil
				}
				done <- err
			}()
			return nil
		},
		stop: func(ctx context.Context) error {
			cancel()
			select {
			case err := <-done:
				return err
			case <-ctx.Done():
				return ctx.Err()
			}
		},
	})
}

// serve adds an HTTP server on a listener, which it owns from then on. It
// accepts from the moment run is called, so that probes are answered while
// components start, and speaks TLS if tlsConfig is not nil, with HTTP/2 unless
// headers may be long: then one that never ends would be held uncounted.
func (s *server) serve(name string, listener net.Listener, handler http.Handler, tlsConfig *tls.Config, maxHeader int) {
	ctx, cut := context.WithCancel(context.Background())
	server := &http.Server{
		Handler:           handler,
		TLSConfig:         tlsConfig,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          newServerErrors(name, s.log),
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	if maxHeader > maxHeaderBytes {
		server.Protocols = &http.Protocols{}
		server.Protocols.SetHTTP1(true)
	}
	listener = s.headers.Serve(server, listener, func() {
		if s.turned != nil {
			s.turned(name)
		}
	})
	s.fronts = append(s.fronts, front{name: name, listener: listener, cut: cut, http: server})
}

// draining is closed when the daemon stops accepting: handlers that wait for
// something to happen return then.
func (s *server) draining() <-chan struct{} { return s.drain }

func (s *server) fail(err error) {
	select {
	case s.failed <- err:
	default: // the daemon is stopping for an earlier one
	}
}

// run starts everything, waits for the first signal or the end of ctx, drains,
// and stops everything. It returns the exit code: 0 for a clean stop, 1 when
// something failed or did not stop in time. A second signal makes it return 1 at
// once, with goroutines still running: the process must end then.
func (s *server) run(ctx context.Context, signals <-chan os.Signal) int {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	code := make(chan int, 1)
	go func() { code <- s.live(ctx) }()
	for first := true; ; first = false {
		select {
		case c := <-code:
			return c
		case sig := <-signals:
			if !first {
				s.log.Warn("second signal, leaving at once", "signal", sig.String())
				return 1
			}
			s.log.Info("stopping", "signal", sig.String())
			stop()
		}
	}
}

// live is the daemon's life until ctx ends.
func (s *server) live(ctx context.Context) int {
	var serving sync.WaitGroup
	for _, f := range s.fronts {
		serving.Go(func() { s.accept(f) })
		s.log.Info("listening", "server", f.name, "address", f.listener.Addr().String())
	}
	started, err := s.start(ctx)
	switch {
	case err != nil && ctx.Err() != nil:
		err = nil // stopped while starting
	case err == nil:
		if s.started != nil {
			s.started()
		}
		select {
		case <-ctx.Done():
			err = s.announce()
		case err = <-s.failed:
		}
	}
	clean := true
	if err != nil {
		s.log.Error("stopping after a failure", "error", err)
		clean = false
	}
	close(s.drain)
	clean = s.drainFronts() && clean
	serving.Wait()
	clean = s.stop(started) && clean
	s.log.Info("stopped", "clean", clean)
	if !clean {
		return 1
	}
	return 0
}

// announce makes the daemon unready, and returns after the time that load
// balancers need to notice. Requests are served meanwhile.
func (s *server) announce() error {
	if s.stopping != nil {
		s.stopping()
	}
	if s.drainDelay <= 0 {
		return nil
	}
	s.log.Info("not ready any more, serving on before the drain", "drain_delay", s.drainDelay)
	timer := time.NewTimer(s.drainDelay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case err := <-s.failed:
		return err
	}
}

// start starts the components in order and returns those that did.
func (s *server) start(ctx context.Context) ([]component, error) {
	for i := 0; i < len(s.components); i++ { // a start may add components
		if ctx.Err() != nil {
			return s.components[:i], ctx.Err()
		}
		c := s.components[i]
		if c.start == nil {
			continue
		}
		if err := c.start(ctx); err != nil {
			return s.components[:i], fmt.Errorf("starting %s: %w", c.name, err)
		}
	}
	return s.components, nil
}

func (s *server) accept(f front) {
	var err error
	if f.http.TLSConfig != nil {
		err = f.http.ServeTLS(f.listener, "", "")
	} else {
		err = f.http.Serve(f.listener)
	}
	if !errors.Is(err, http.ErrServerClosed) {
		s.fail(fmt.Errorf("serving %s: %w", f.name, err))
	}
}

// drainFronts closes the listeners and waits for running requests. Requests
// that do not end in time are cut off: their contexts end and connections
// close.
func (s *server) drainFronts() bool {
	ctx, cancel := context.WithTimeout(context.Background(), s.drainTimeout)
	defer cancel()
	var wait sync.WaitGroup
	clean := make([]bool, len(s.fronts))
	for i, f := range s.fronts {
		wait.Go(func() {
			defer f.cut()
			defer f.listener.Close() // one that was never served is unknown to Shutdown
			if err := f.http.Shutdown(ctx); errors.Is(err, context.DeadlineExceeded) {
				s.log.Warn("requests cut after the drain timeout", "server", f.name, "timeout", s.drainTimeout)
				_ = f.http.Close()
				return
			}
			clean[i] = true
		})
	}
	wait.Wait()
	return !slices.Contains(clean, false)
}

// stop stops components, the last first. One that does not stop in time is left
// behind, so that the others still get their turn.
func (s *server) stop(started []component) bool {
	clean := true
	for _, c := range slices.Backward(started) {
		if c.stop == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), s.stopTimeout)
		done := make(chan error, 1)
		go func() { done <- supervise.Recovered(func() error { return c.stop(ctx) }) }()
		var err error
		select {
		case err = <-done:
		case <-ctx.Done():
			err = ctx.Err()
		}
		cancel()
		if err != nil {
			s.log.Error("component did not stop", "component", c.name, "error", err)
			clean = false
		}
	}
	return clean
}
