// Package apnstest is a fake Apple Push Notification service: real TLS, real
// HTTP/2, required client certificates, and Apple's checks of requests. Its
// behaviour can change while it runs: latency, stream limits, answers, stalls,
// cut connections, GOAWAY.
//
// Tests and load generators use it, so it does not depend on package testing.
package apnstest

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// Config holds what is optional about a [Server]. The zero value works.
type Config struct {
	// Addr is where to listen. Default: 127.0.0.1, a free port.
	Addr string
	// Hosts are further names and addresses for the server's certificate,
	// which is always good for localhost, 127.0.0.1, ::1 and Addr's host.
	Hosts []string
	// CA issues the server's certificate and the push certificates; it is one
	// of [NewCA], or any authority with its key. Default: a new one.
	CA tls.Certificate
	// Latency is how long an answer takes. Default: none.
	Latency time.Duration
	// MaxConcurrentStreams is what SETTINGS allow on a connection.
	// Default: 1000.
	MaxConcurrentStreams uint32
	// OnPush is called for each accepted push before its answer is sent, from
	// many goroutines at once. It should return quickly. The same push may
	// come again. Default: no call.
	OnPush func(Push)
}

// Push is one accepted notification.
type Push struct {
	Token []byte
	Magic string
	Topic string
}

// Answer is the answer of the service to a push.
type Answer struct {
	// Status is the HTTP status; 0 is 200.
	Status int
	// Reason goes into the body of any status but 200.
	Reason string
	// Timestamp goes into the body unless it is zero, in milliseconds; APNs
	// sends it with 410.
	Timestamp time.Time
	// RetryAfter is sent in a Retry-After header, in seconds, unless zero.
	RetryAfter time.Duration
	// Reset ends the stream with RST_STREAM and no answer.
	Reset bool
	// Stall never answers.
	Stall bool
}

// Counts counts what a [Server] received and did.
type Counts struct {
	Requests    int // valid or not, retries included
	Accepted    int // answered 200
	Stalled     int // never answered
	Dials       int // TCP connections accepted
	Handshakes  int // of these, TLS and client certificate fine
	Connections int // open now
}

const (
	handshakeTimeout = 10 * time.Second
	// lingerTime is how long a connection that the server ends stays half
	// open, so that the client reads the reason.
	lingerTime = 200 * time.Millisecond
)

// Server is a fake APNs. Its methods may be called from any goroutine.
type Server struct {
	url      string
	ca       *authority
	listener net.Listener
	tls      *tls.Config
	wg       sync.WaitGroup
	ctx      context.Context // ends with Close
	cancel   context.CancelFunc

	mu        sync.Mutex
	closed    bool
	behaviour behaviour
	stalled   float64 // fraction of a stall that is due
	counts    Counts
	tokens    map[string]int
	conns     map[*conn]struct{}
}

// behaviour is the part of a server that can change while it runs.
type behaviour struct {
	latency time.Duration
	streams uint32
	stall   float64
	answer  func(Push) Answer
	onPush  func(Push)
}

// NewServer starts a server. Close it after use.
func NewServer(cfg Config) (*Server, error) {
	if cfg.Addr == "" {
		cfg.Addr = "127.0.0.1:0"
	}
	if cfg.MaxConcurrentStreams == 0 {
		cfg.MaxConcurrentStreams = 1000
	}
	host, _, err := net.SplitHostPort(cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("apnstest: Config.Addr: %w", err)
	}
	hosts := append([]string{"localhost", "127.0.0.1", "::1"}, cfg.Hosts...)
	if host != "" {
		hosts = append(hosts, host)
	}
	ca, err := newAuthority(cfg.CA)
	if err != nil {
		return nil, err
	}
	cert, err := ca.serverCertificate(hosts)
	if err != nil {
		return nil, fmt.Errorf("apnstest: making the server certificate: %w", err)
	}
	l, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		return nil, fmt.Errorf("apnstest: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &Server{
		ctx:      ctx,
		cancel:   cancel,
		url:      "https://" + l.Addr().String(),
		ca:       ca,
		listener: l,
		tls: &tls.Config{
			MinVersion:   tls.VersionTLS12,
			Certificates: []tls.Certificate{cert},
			NextProtos:   []string{http2.NextProtoTLS},
			ClientAuth:   tls.RequireAndVerifyClientCert,
			ClientCAs:    ca.pool(),
		},
		behaviour: behaviour{latency: cfg.Latency, streams: cfg.MaxConcurrentStreams, onPush: cfg.OnPush},
		tokens:    make(map[string]int),
		conns:     make(map[*conn]struct{}),
	}
	s.wg.Go(s.accept)
	return s, nil
}

// URL returns the root of the service.
func (s *Server) URL() string { return s.url }

// Close cuts all connections and waits for all goroutines.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.listener.Close()
	s.CutConnections(-1)
	s.wg.Wait()
}

// SetLatency sets how long an answer takes, from the next request on.
func (s *Server) SetLatency(d time.Duration) { s.set(func(m *behaviour) { m.latency = d }) }

// SetMaxConcurrentStreams sets the stream limit of connections yet to come.
func (s *Server) SetMaxConcurrentStreams(n uint32) { s.set(func(m *behaviour) { m.streams = n }) }

// SetStall sets the fraction of pushes, 0 to 1, that get no answer. They are
// spread evenly: 0.01 stalls every hundredth.
func (s *Server) SetStall(fraction float64) { s.set(func(m *behaviour) { m.stall = fraction }) }

// SetAnswer has f answer every valid push from now on; nil accepts all.
func (s *Server) SetAnswer(f func(Push) Answer) { s.set(func(m *behaviour) { m.answer = f }) }

// SetOnPush replaces Config.OnPush.
func (s *Server) SetOnPush(f func(Push)) { s.set(func(m *behaviour) { m.onPush = f }) }

func (s *Server) set(f func(*behaviour)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.behaviour)
}

// Counts returns the counts so far.
func (s *Server) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	c := s.counts
	c.Connections = len(s.conns)
	return c
}

// Accepted returns how often a push to token was answered 200.
func (s *Server) Accepted(token []byte) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tokens[string(token)]
}

// CutConnections closes n connections without GOAWAY, all if n is negative. It
// returns their number.
func (s *Server) CutConnections(n int) int {
	cut := s.pick(n)
	for _, c := range cut {
		c.raw.Close()
	}
	return len(cut)
}

// GoAwayMode is a way to end a connection.
type GoAwayMode int

const (
	// Graceful answers the received requests and refuses new streams.
	Graceful GoAwayMode = iota
	// Abrupt reports unanswered streams as unprocessed and closes the
	// connection.
	Abrupt
)

// GoAway sends GOAWAY on all connections and returns on how many. The reason,
// if not empty, is sent as APNs does, as JSON; with [Abrupt] only.
func (s *Server) GoAway(mode GoAwayMode, reason string) int {
	conns := s.pick(-1)
	for _, c := range conns {
		c.goAway(mode, reason)
	}
	return len(conns)
}

// pick returns n open connections, all if n is negative.
func (s *Server) pick(n int) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	var picked []*conn
	for c := range s.conns {
		if len(picked) == n {
			break
		}
		picked = append(picked, c)
	}
	return picked
}

func (s *Server) accept() {
	for {
		raw, err := s.listener.Accept()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				// Out of descriptors, say; try again unless closed.
				select {
				case <-s.ctx.Done():
					return
				case <-time.After(50 * time.Millisecond):
					continue
				}
			}
			return
		}
		s.wg.Go(func() { s.serve(raw) })
	}
}

// serve runs one connection to its end.
func (s *Server) serve(raw net.Conn) {
	defer raw.Close()
	s.mu.Lock()
	s.counts.Dials++
	streams := s.behaviour.streams
	s.mu.Unlock()

	tc := tls.Server(raw, s.tls)
	ctx, cancel := context.WithTimeout(s.ctx, handshakeTimeout)
	defer cancel()
	if err := tc.HandshakeContext(ctx); err != nil {
		// A reset would discard the alert with the reason.
		raw.SetDeadline(time.Now().Add(lingerTime))
		io.Copy(io.Discard, raw)
		return
	}
	c := newConn(s, raw, tc, streams)
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	s.counts.Handshakes++
	s.conns[c] = struct{}{}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
	}()
	c.run()
}
