package apns_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

const topic = "com.apple.mgmt.External.9a2f"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// source is a CertificateSource that can be changed.
type source struct {
	mu      sync.Mutex
	certs   map[string]tls.Certificate
	version int
	err     error
	asked   int
}

func (s *source) PushCertificate(_ context.Context, topic string) (tls.Certificate, string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	if s.err != nil {
		return tls.Certificate{}, "", s.err
	}
	cert, ok := s.certs[topic]
	if !ok {
		return tls.Certificate{}, "", fmt.Errorf("topic %s: %w", topic, apns.ErrNoCertificate)
	}
	return cert, fmt.Sprint(s.version), nil
}

func (s *source) put(topic string, cert tls.Certificate) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version++
	s.certs[topic] = cert
}

func (s *source) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func newServer(t testing.TB, cfg apnstest.Config) *apnstest.Server {
	t.Helper()
	srv, err := apnstest.NewServer(cfg)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	return srv
}

func newSource(t testing.TB, srv *apnstest.Server) *source {
	t.Helper()
	cert, err := srv.ClientCertificate(topic)
	require.NoError(t, err)
	src := &source{certs: map[string]tls.Certificate{}}
	src.put(topic, cert)
	return src
}

// newClient returns a client of srv that goes through no proxy.
func newClient(t testing.TB, srv *apnstest.Server, src apns.CertificateSource, cfg apns.Config) *apns.Client {
	t.Helper()
	cfg.URL = srv.URL()
	cfg.RootCAs = srv.RootCAs()
	if cfg.Proxy == nil {
		cfg.Proxy = func(*url.URL) (*url.URL, error) { return nil, nil }
	}
	c, err := apns.New(src, cfg)
	require.NoError(t, err)
	t.Cleanup(c.Close)
	return c
}

func token(i int) []byte {
	b := make([]byte, 32)
	binary.BigEndian.PutUint64(b, uint64(i))
	return b
}

func notification(i int) apns.Notification {
	return apns.Notification{Token: token(i), Magic: "magic", Topic: topic}
}

// pushAll sends n pushes with as many callers as c asks for.
func pushAll(c *apns.Client, n int) []apns.Outcome {
	out := make([]apns.Outcome, n)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, c.Concurrency()) {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				out[i] = c.Push(context.Background(), notification(i))
			}
		})
	}
	wg.Wait()
	return out
}

func requireAccepted(t *testing.T, outcomes []apns.Outcome) {
	t.Helper()
	for i, o := range outcomes {
		require.Equal(t, apns.Accepted, o.Class, "push %d: %v %+v", i, o.Class, o)
	}
}

func TestPushRefusedLocally(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{})
	for reason, n := range map[string]apns.Notification{
		"MissingDeviceToken": {Topic: topic},
		"BadDeviceToken":     {Topic: topic, Token: make([]byte, 5000)},
		"MissingTopic":       {Token: token(1)},
		"BadTopic":           {Token: token(1), Topic: "a\r\nb"},
		"BadMessageId":       {Token: token(1), Topic: topic, ID: "a b"},
		"PayloadTooLarge":    {Token: token(1), Topic: topic, Magic: strings.Repeat("x", 4096)},
	} {
		o := c.Push(t.Context(), n)
		require.Equal(t, reason, o.Reason)
		require.Contains(t, []apns.Class{apns.OurFault, apns.DoNotRetry}, o.Class)
		require.Zero(t, o.Status)
	}
	require.Zero(t, srv.Counts().Dials)
}

func TestEveryReason(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{})
	since := time.UnixMilli(1700000000123).UTC()
	for _, tt := range []struct {
		status int
		reason string
		class  apns.Class
	}{
		{410, "Unregistered", apns.TokenDead},
		{410, "ExpiredToken", apns.TokenDead},
		{400, "BadDeviceToken", apns.DoNotRetry},
		{400, "DeviceTokenNotForTopic", apns.DoNotRetry},
		{403, "Forbidden", apns.DoNotRetry},
		{413, "PayloadTooLarge", apns.DoNotRetry},
		{400, "BadTopic", apns.OurFault},
		{403, "BadCertificate", apns.CertificateFault},
		{429, "TooManyRequests", apns.RetryLater},
		{500, "InternalServerError", apns.RetryLater},
		{503, "ServiceUnavailable", apns.RetryLater},
		{503, "Shutdown", apns.RetryLater},
	} {
		srv.SetAnswer(func(apnstest.Push) apnstest.Answer {
			return apnstest.Answer{Status: tt.status, Reason: tt.reason, Timestamp: since, RetryAfter: time.Hour}
		})
		o := c.Push(t.Context(), notification(1))
		require.Equal(t, tt.class, o.Class, tt.reason)
		require.Equal(t, tt.reason, o.Reason)
		require.Equal(t, tt.status, o.Status)
		require.NoError(t, o.Err)
		if tt.class == apns.TokenDead {
			require.Equal(t, since, o.TokenDeadSince)
		} else {
			require.Zero(t, o.TokenDeadSince)
		}
		if tt.class == apns.RetryLater {
			require.Equal(t, time.Hour, o.RetryAfter)
		}
	}
	require.Equal(t, 1, srv.Counts().Dials, "the connection stays in use")
}

// APNs ends an idle connection with a 400; the push goes out on a new one.
func TestIdleTimeoutReconnects(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{})
	var once atomic.Bool
	srv.SetAnswer(func(apnstest.Push) apnstest.Answer {
		if once.CompareAndSwap(false, true) {
			return apnstest.Answer{Status: 400, Reason: "IdleTimeout"}
		}
		return apnstest.Answer{}
	})
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})
	require.Equal(t, 2, srv.Counts().Dials)
	require.EqualValues(t, 1, c.Stats().Retries)
}

// A shutting-down server keeps its answer, and gets no more streams.
func TestShutdownMovesOn(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{})
	srv.SetAnswer(func(apnstest.Push) apnstest.Answer {
		return apnstest.Answer{Status: 503, Reason: "Shutdown"}
	})
	require.Equal(t, apns.RetryLater, c.Push(t.Context(), notification(1)).Class)
	srv.SetAnswer(nil)
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})
	require.Equal(t, 2, srv.Counts().Dials)
}

func TestColdStartDialsOnce(t *testing.T) {
	srv := newServer(t, apnstest.Config{Latency: 5 * time.Millisecond})
	src := newSource(t, srv)
	c := newClient(t, srv, src, apns.Config{})
	requireAccepted(t, pushAll(c, 1000))
	require.Equal(t, 1, srv.Counts().Dials)
	require.EqualValues(t, 1, c.Stats().Dials)
	require.Equal(t, 1, src.asked)
}

func TestStreamLimitOpensConnections(t *testing.T) {
	srv := newServer(t, apnstest.Config{Latency: 20 * time.Millisecond, MaxConcurrentStreams: 10})
	c := newClient(t, srv, newSource(t, srv), apns.Config{Workers: 60, MaxConnsPerTopic: 4})
	requireAccepted(t, pushAll(c, 500))
	counts := srv.Counts()
	require.Equal(t, 4, counts.Dials)
	require.Equal(t, 500, counts.Requests)
	require.Zero(t, c.Stats().Retries)
}

func TestCutConnectionsLoseNothing(t *testing.T) {
	srv := newServer(t, apnstest.Config{Latency: 10 * time.Millisecond})
	c := newClient(t, srv, newSource(t, srv), apns.Config{Workers: 200})
	var accepted, cut atomic.Int64
	srv.SetOnPush(func(apnstest.Push) {
		if accepted.Add(1)%300 == 0 && cut.Load() < 5 {
			cut.Add(int64(srv.CutConnections(1)))
		}
	})
	requireAccepted(t, pushAll(c, 2000))
	require.EqualValues(t, 5, cut.Load())
	require.Positive(t, c.Stats().Retries)
	for i := range 2000 {
		require.Positive(t, srv.Accepted(token(i)))
	}
}

func TestGoAwayLosesNothing(t *testing.T) {
	for name, mode := range map[string]apnstest.GoAwayMode{"graceful": apnstest.Graceful, "abrupt": apnstest.Abrupt} {
		t.Run(name, func(t *testing.T) {
			srv := newServer(t, apnstest.Config{Latency: 10 * time.Millisecond})
			c := newClient(t, srv, newSource(t, srv), apns.Config{Workers: 100})
			var accepted, sent atomic.Int64
			srv.SetOnPush(func(apnstest.Push) {
				if accepted.Add(1)%150 == 0 && sent.Load() < 5 {
					sent.Add(int64(srv.GoAway(mode, "")))
				}
			})
			requireAccepted(t, pushAll(c, 1000))
			require.GreaterOrEqual(t, sent.Load(), int64(5))
			for i := range 1000 {
				require.Positive(t, srv.Accepted(token(i)))
			}
			require.Greater(t, srv.Counts().Dials, 1)
		})
	}
}

// The reason that comes with a GOAWAY may be about the certificate.
func TestGoAwayReason(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{})
	var waiting sync.WaitGroup
	waiting.Add(2)
	srv.SetAnswer(func(p apnstest.Push) apnstest.Answer {
		waiting.Done()
		if p.Token[7] == 1 {
			return apnstest.Answer{Stall: true}
		}
		return apnstest.Answer{}
	})
	stalled := make(chan apns.Outcome)
	go func() { stalled <- c.Push(context.Background(), notification(1)) }()
	// The second stream is answered, so the first is not above the
	// last-stream-id and may have been processed.
	require.Eventually(t, func() bool { return srv.Counts().Stalled == 1 }, 5*time.Second, time.Millisecond)
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(2))})
	waiting.Wait()
	srv.GoAway(apnstest.Abrupt, "BadCertificate")
	o := <-stalled
	require.Equal(t, apns.CertificateFault, o.Class, "%+v", o)
	require.Equal(t, "BadCertificate", o.Reason)
}

func TestResetStreamIsRetried(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{})
	var tries atomic.Int64
	srv.SetAnswer(func(apnstest.Push) apnstest.Answer {
		return apnstest.Answer{Reset: tries.Add(1) <= 3}
	})
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})
	require.EqualValues(t, 4, tries.Load())

	srv.SetAnswer(func(apnstest.Push) apnstest.Answer { return apnstest.Answer{Reset: true} })
	o := c.Push(t.Context(), notification(1))
	require.Equal(t, apns.RetryLater, o.Class, "tries are bounded")
	require.Error(t, o.Err)
}

func TestStreamTimeout(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{StreamTimeout: 50 * time.Millisecond})
	srv.SetStall(1)
	o := c.Push(t.Context(), notification(1))
	require.Equal(t, apns.RetryLater, o.Class)
	require.ErrorIs(t, o.Err, apns.ErrTimeout)
	require.Zero(t, o.Status)
	srv.SetStall(0)
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})
	require.Equal(t, 1, srv.Counts().Dials, "a stalled stream does not cost the connection")
}

func TestCallerGivesUp(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, srv), apns.Config{Workers: 1})
	srv.SetStall(1)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 2 { // one has the worker, one waits for it
		wg.Go(func() {
			o := c.Push(ctx, notification(1))
			require.Equal(t, apns.RetryLater, o.Class)
			require.ErrorIs(t, o.Err, context.Canceled)
		})
	}
	require.Eventually(t, func() bool { return srv.Counts().Stalled == 1 }, 5*time.Second, time.Millisecond)
	cancel()
	wg.Wait()
	require.Zero(t, c.Stats().Workers)
}

// One stalled stream in a hundred, each of which holds on for the whole
// StreamTimeout, keeps nobody else waiting.
func TestStalledStreamsCostNobodyElse(t *testing.T) {
	const n = 10000
	srv := newServer(t, apnstest.Config{Latency: 5 * time.Millisecond})
	c := newClient(t, srv, newSource(t, srv), apns.Config{
		Workers: 20, StreamTimeout: time.Minute, PushTimeout: time.Minute,
	})
	requireAccepted(t, pushAll(c, 500))
	srv.SetStall(0.01)
	var wg sync.WaitGroup
	var stalled, next atomic.Int64
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	answered := make(chan struct{}, n)
	for range c.Concurrency() {
		wg.Go(func() {
			for i := next.Add(1); i <= n && ctx.Err() == nil; i = next.Add(1) {
				switch o := c.Push(ctx, notification(int(i))); {
				case o.Class == apns.Accepted:
					answered <- struct{}{}
				case errors.Is(o.Err, apns.ErrStalled), ctx.Err() != nil:
					stalled.Add(1)
				default:
					t.Errorf("outcome %+v", o)
				}
			}
		})
	}
	// 100 stall, far more than the 20 workers and the 20 places in the lane.
	deadline := time.After(30 * time.Second)
	for i := range n * 99 / 100 {
		select {
		case <-answered:
		case <-deadline:
			t.Fatalf("stuck after %d answers: %+v", i, c.Stats())
		}
	}
	require.Positive(t, c.Stats().GivenUp)
	cancel()
	wg.Wait()
	require.EqualValues(t, n/100, stalled.Load())
}

// When all of APNs is slow nobody is overtaken, and nobody is given up.
func TestSlowServiceGivesNobodyUp(t *testing.T) {
	srv := newServer(t, apnstest.Config{Latency: time.Millisecond})
	c := newClient(t, srv, newSource(t, srv), apns.Config{Workers: 20})
	requireAccepted(t, pushAll(c, 200))
	srv.SetLatency(600 * time.Millisecond)
	requireAccepted(t, pushAll(c, 100))
	require.Zero(t, c.Stats().GivenUp)
}

func TestCertificateRenewed(t *testing.T) {
	var mu sync.Mutex
	now := time.Now()
	clock := func() time.Time {
		mu.Lock()
		defer mu.Unlock()
		return now
	}
	srv := newServer(t, apnstest.Config{})
	src := newSource(t, srv)
	c := newClient(t, srv, src, apns.Config{Now: clock, CertificateTTL: 30 * time.Second})
	for i := range 10 {
		requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(i))})
	}
	require.Equal(t, 1, src.asked)

	// A push is in flight while the certificate changes.
	srv.SetLatency(300 * time.Millisecond)
	inFlight := make(chan apns.Outcome)
	go func() { inFlight <- c.Push(context.Background(), notification(50)) }()
	require.Eventually(t, func() bool { return srv.Counts().Requests == 11 }, 5*time.Second, time.Millisecond)
	renewed, err := srv.ClientCertificate(topic)
	require.NoError(t, err)
	src.put(topic, renewed)
	mu.Lock()
	now = now.Add(31 * time.Second)
	mu.Unlock()
	srv.SetLatency(0)
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(51))})
	require.Equal(t, 2, srv.Counts().Handshakes)
	requireAccepted(t, []apns.Outcome{<-inFlight})
	require.Zero(t, c.Stats().Retries, "the push in flight was left alone")
	require.Eventually(t, func() bool { return srv.Counts().Connections == 1 }, 5*time.Second, time.Millisecond)
	require.Equal(t, 2, src.asked)
}

func TestCertificateSourceFails(t *testing.T) {
	var offset atomic.Int64
	srv := newServer(t, apnstest.Config{})
	src := newSource(t, srv)
	src.fail(errors.New("database is down"))
	c := newClient(t, srv, src, apns.Config{Now: func() time.Time { return time.Unix(1700000000+offset.Load(), 0) }})

	o := c.Push(t.Context(), notification(1))
	require.Equal(t, apns.RetryLater, o.Class, "%+v", o)
	require.ErrorContains(t, o.Err, "database is down")
	require.Equal(t, apns.RetryLater, c.Push(t.Context(), notification(1)).Class)
	require.Equal(t, 1, src.asked, "a failing source is not hammered")

	src.fail(nil)
	offset.Add(1)
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})

	src.fail(errors.New("database is down"))
	offset.Add(30)
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})

	src.fail(apns.ErrNoCertificate)
	offset.Add(30)
	require.Equal(t, apns.CertificateFault, c.Push(t.Context(), notification(1)).Class)

	n := notification(1)
	n.Topic = "com.apple.mgmt.unknown"
	src.fail(nil)
	o = c.Push(t.Context(), n)
	require.Equal(t, apns.CertificateFault, o.Class)
	require.ErrorIs(t, o.Err, apns.ErrNoCertificate)
}

// A certificate that APNs refuses in the TLS handshake is the topic's fault.
func TestCertificateRefusedByTLS(t *testing.T) {
	srv, other := newServer(t, apnstest.Config{}), newServer(t, apnstest.Config{})
	c := newClient(t, srv, newSource(t, other), apns.Config{})
	o := c.Push(t.Context(), notification(1))
	require.Equal(t, apns.CertificateFault, o.Class, "%+v", o)
	require.Error(t, o.Err)
}

// A certificate for another topic is answered by APNs itself.
func TestCertificateOfAnotherTopic(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	cert, err := srv.ClientCertificate("com.apple.mgmt.other")
	require.NoError(t, err)
	src := &source{certs: map[string]tls.Certificate{topic: cert}}
	c := newClient(t, srv, src, apns.Config{})
	require.Equal(t, "TopicDisallowed", c.Push(t.Context(), notification(1)).Reason)
}

// Nobody listens: pushes fail with the dial's error, and dials back off
// instead of following each push.
func TestDialFailuresBackOff(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	src := newSource(t, srv)
	srv.Close()
	c := newClient(t, srv, src, apns.Config{Workers: 500})
	for i, o := range pushAll(c, 2000) {
		require.Equal(t, apns.RetryLater, o.Class, "push %d", i)
		var op *net.OpError
		require.ErrorAs(t, o.Err, &op)
	}
	require.Less(t, c.Stats().Dials, uint64(20))
	require.Equal(t, c.Stats().Dials, c.Stats().DialFailures)
}

func TestDialTimeout(t *testing.T) {
	// Accepts and never speaks.
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	srv := newServer(t, apnstest.Config{})
	c, err := apns.New(newSource(t, srv), apns.Config{
		URL: "https://" + l.Addr().String(), DialTimeout: 20 * time.Millisecond,
		Proxy: func(*url.URL) (*url.URL, error) { return nil, nil },
	})
	require.NoError(t, err)
	defer c.Close()
	o := c.Push(t.Context(), notification(1))
	require.Equal(t, apns.RetryLater, o.Class)
	require.ErrorIs(t, o.Err, context.DeadlineExceeded)
}

func TestClose(t *testing.T) {
	srv := newServer(t, apnstest.Config{Latency: 100 * time.Millisecond})
	c := newClient(t, srv, newSource(t, srv), apns.Config{Workers: 5})
	out := make(chan apns.Outcome, 10)
	for i := range 10 {
		go func() { out <- c.Push(context.Background(), notification(i)) }()
	}
	require.Eventually(t, func() bool { return srv.Counts().Requests == 5 }, 5*time.Second, time.Millisecond)
	c.Close()
	accepted := 0
	for range 10 {
		switch o := <-out; {
		case o.Class == apns.Accepted:
			accepted++
		default:
			require.ErrorIs(t, o.Err, apns.ErrClosed)
		}
	}
	require.GreaterOrEqual(t, accepted, 5, "pushes in flight finish")
	require.ErrorIs(t, c.Push(t.Context(), notification(1)).Err, apns.ErrClosed)
	require.Zero(t, c.Stats().Connections)
	c.Close()
}

// A dead connection is found by its PING, and its pushes go elsewhere.
func TestDeadConnectionIsNoticed(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	proxy := newProxy(t)
	c := newClient(t, srv, newSource(t, srv), apns.Config{
		Proxy: proxy.url, PingInterval: 50 * time.Millisecond, PingTimeout: 50 * time.Millisecond,
	})
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})
	proxy.freeze()
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(2))})
	require.Equal(t, 2, srv.Counts().Handshakes)
}
