package apns

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/supervise"
)

const (
	userAgent = "nanomdm"
	// maxTries bounds how often one push is sent, maxDials how many failed
	// dials it waits for.
	maxTries = 8
	maxDials = 3
	// maxPayload is Apple's limit on the body.
	maxPayload = 4096
	// maxToken is far beyond any token and keeps the path within what
	// servers accept.
	maxToken = 1024
)

// tryPauses space the third and later tries of one push; the second one follows
// at once.
var tryPauses = backoff.Policy{First: 20 * time.Millisecond, Max: 160 * time.Millisecond}

// errIdle is the error of a try on a connection that APNs calls idle.
var errIdle = errors.New("APNs closed the idle connection")

// Client sends notifications. Make one with [New]. Any number of goroutines may
// call its methods.
type Client struct {
	cfg       Config
	source    CertificateSource
	root      *url.URL
	dialer    dialer
	transport transport
	workers   *workers

	ctx    context.Context // of dials; ends with the client
	cancel context.CancelFunc
	closed chan struct{}

	mu      sync.Mutex
	closing bool
	topics  map[string]*topic
	pushes  sync.WaitGroup // calls of Push
	rest    sync.WaitGroup // dials and closing connections

	stats counters
}

type counters struct {
	conns, streams                      atomic.Int64
	dials, dialFailures, retries, sends atomic.Uint64
}

// Stats is a snapshot of a [Client].
type Stats struct {
	Connections     int    // open, drained ones included
	StreamsInFlight int    // waiting for an answer
	Workers         int    // slots taken
	Slow            int    // slow pushes, which gave their slot back
	Dials           uint64 // connections attempted so far
	DialFailures    uint64 // of these, failed
	Sends           uint64 // requests sent so far, retries included
	Retries         uint64 // requests sent again for the same push so far
	GivenUp         uint64 // pushes that ended with ErrStalled so far
}

// New returns a client that pushes with the certificates of src. It connects
// when the first push needs it. An error names the field of cfg that is
// wrong. Close the client after use.
func New(src CertificateSource, cfg Config) (*Client, error) {
	if src == nil {
		return nil, errors.New("apns: no certificate source")
	}
	cfg, root, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	return &Client{
		cfg:       cfg,
		source:    src,
		root:      root,
		dialer:    dialer{cfg: cfg, root: root},
		transport: newTransport(cfg),
		workers:   newWorkers(cfg.Workers, cfg.StreamTimeout),
		ctx:       ctx,
		cancel:    cancel,
		closed:    make(chan struct{}),
		topics:    make(map[string]*topic),
	}, nil
}

// Concurrency returns how many calls of Push can make progress at once: one for
// each worker, and as many again whose streams stall. A caller that fans out
// makes this many calls, so that stalled streams do not delay the others.
func (c *Client) Concurrency() int { return 2 * c.cfg.Workers }

// Stats returns a snapshot, good for gauges.
func (c *Client) Stats() Stats {
	s := Stats{
		Connections:     int(c.stats.conns.Load()),
		StreamsInFlight: int(c.stats.streams.Load()),
		Workers:         len(c.workers.slots),
		Dials:           c.stats.dials.Load(),
		DialFailures:    c.stats.dialFailures.Load(),
		Sends:           c.stats.sends.Load(),
		Retries:         c.stats.retries.Load(),
	}
	c.workers.mu.Lock()
	defer c.workers.mu.Unlock()
	s.Slow = c.workers.slowList.Len()
	s.GivenUp = c.workers.gaveUp
	return s
}

// Close waits for the pushes in flight, closes all connections and waits for
// that too. Pushes that wait for a worker, and later ones, get [ErrClosed].
// Close may be called more than once.
func (c *Client) Close() {
	c.mu.Lock()
	if !c.closing {
		c.closing = true
		close(c.closed)
	}
	c.mu.Unlock()
	c.pushes.Wait()
	c.cancel()
	c.rest.Wait() // dials, so that no connection is added afterwards
	c.mu.Lock()
	for _, t := range c.topics {
		t.retireAll()
	}
	c.mu.Unlock()
	c.rest.Wait()
}

// Push sends n and returns what APNs answered. It waits for a worker as long
// as ctx allows, and then no longer than PushTimeout. A push that ends
// without an answer is [RetryLater] with an Err.
func (c *Client) Push(ctx context.Context, n Notification) Outcome {
	if n.ID == "" {
		n.ID = uuid.NewString()
	}
	o := c.push(ctx, n)
	o.APNsID = n.ID
	return o
}

func (c *Client) push(ctx context.Context, n Notification) Outcome {
	body, refused := payload(n)
	if refused != nil {
		return *refused
	}
	t := c.enter(n.Topic)
	if t == nil {
		return Outcome{Class: RetryLater, Err: ErrClosed}
	}
	defer c.leave(t)
	select {
	case c.workers.slots <- struct{}{}:
	case <-ctx.Done():
		return Outcome{Class: RetryLater, Err: fmt.Errorf("waiting for a push worker: %w", ctx.Err())}
	case <-c.closed:
		return Outcome{Class: RetryLater, Err: ErrClosed}
	}
	ctx, cancelTimeout := context.WithTimeoutCause(ctx, c.cfg.PushTimeout, ErrTimeout)
	defer cancelTimeout()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	k := &task{topic: t, cancel: cancel}
	defer c.workers.finish(k)
	return c.try(ctx, k, c.request(n, body), body)
}

// try sends req until it is answered or tries, dials or time run out.
func (c *Client) try(ctx context.Context, k *task, req *http.Request, body []byte) Outcome {
	dials, tries := 0, 0
	for {
		o, err := c.send(ctx, k, req, body)
		if err == nil {
			return o
		}
		if ctx.Err() != nil {
			return Outcome{Class: RetryLater, Err: fmt.Errorf("sending push: %w", context.Cause(ctx))}
		}
		if o, final := withoutAnswer(err); final {
			return o
		}
		var de *dialError
		if errors.As(err, &de) {
			dials++
		} else {
			tries++
		}
		if dials >= maxDials || tries >= maxTries {
			return Outcome{Class: RetryLater, Err: fmt.Errorf("sending push: %w", err)}
		}
		if de == nil {
			c.stats.retries.Add(1)
			pauseTry(ctx, tries)
		}
	}
}

// withoutAnswer classifies an error that no retry by the client resolves.
func withoutAnswer(err error) (o Outcome, final bool) {
	o = Outcome{Class: RetryLater, Err: fmt.Errorf("sending push: %w", err)}
	var se *sourceError
	switch {
	case errors.Is(err, ErrNoCertificate), isCertificateAlert(err):
		o.Class = CertificateFault
		return o, true
	case errors.Is(err, ErrTimeout), errors.As(err, &se):
		return o, true
	}
	if reason := goAwayReason(err); verdictOf(http.StatusForbidden, reason).class == CertificateFault {
		o.Class, o.Reason = CertificateFault, reason
		return o, true
	}
	return o, false
}

// pauseTry waits before the third and later tries, or until ctx ends.
func pauseTry(ctx context.Context, tries int) {
	if tries >= 2 {
		_ = backoff.Sleep(ctx, tryPauses.Pause(tries-1)) // the caller checks ctx
	}
}

// send makes one try. An error means that APNs did not answer.
func (c *Client) send(ctx context.Context, k *task, req *http.Request, body []byte) (Outcome, error) {
	cn, err := k.topic.acquire(ctx)
	if err != nil {
		return Outcome{}, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.StreamTimeout, ErrTimeout)
	defer cancel()
	req = req.WithContext(ctx)
	req.Body = io.NopCloser(bytes.NewReader(body))

	c.stats.sends.Add(1)
	c.stats.streams.Add(1)
	ends := c.workers.streamBegins(k)
	ended := false
	defer func() {
		if !ended { // it panicked
			ends(false)
			c.stats.streams.Add(-1)
			k.topic.release(cn, false, nil)
		}
	}()
	res, answer, err := cn.roundTrip(req)
	ended = true
	ends(err == nil)
	c.stats.streams.Add(-1)
	if err != nil && ctx.Err() != nil {
		// The end of the push's context is no fault of the connection.
		err = context.Cause(ctx)
		k.topic.release(cn, false, nil)
		return Outcome{}, err
	}
	if err != nil {
		k.topic.release(cn, false, err)
		return Outcome{}, err
	}
	o := outcomeOf(res.StatusCode, res.Header, answer)
	if o.Reason == reasonIdleTimeout || o.Reason == reasonShutdown {
		k.topic.retire(cn)
	}
	k.topic.release(cn, true, nil)
	if o.Reason == reasonIdleTimeout {
		return Outcome{}, errIdle
	}
	return o, nil
}

// CertificateChanged tells the client that the source has another certificate
// for the topic, or none any more. Pushes that begin afterwards use it.
func (c *Client) CertificateChanged(topic string) {
	c.mu.Lock()
	t := c.topics[topic]
	c.mu.Unlock()
	if t == nil {
		return // no push has used a certificate of the topic yet
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.changes++
}

// enter counts a push in and returns its topic, or nil if the client is
// closed.
func (c *Client) enter(name string) *topic {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing {
		return nil
	}
	c.pushes.Add(1)
	t := c.topics[name]
	if t == nil {
		t = &topic{c: c, name: name}
		c.topics[name] = t
	}
	t.uses++
	return t
}

// leave counts a push out. Devices choose their topics, so that those without a
// certificate are remembered up to a bound.
func (c *Client) leave(t *topic) {
	defer c.pushes.Done()
	c.mu.Lock()
	defer c.mu.Unlock()
	t.uses--
	if t.uses == 0 && len(c.topics) > knownTopics && t.isBare() {
		delete(c.topics, t.name)
	}
}

// goDial dials for t in the background. It returns false once the client's
// context has ended.
func (c *Client) goDial(t *topic, cert *tls.Certificate, version string) bool {
	if c.ctx.Err() != nil {
		return false
	}
	c.stats.dials.Add(1)
	c.rest.Go(func() {
		ctx, cancel := context.WithTimeout(c.ctx, c.cfg.DialTimeout)
		defer cancel()
		var cn *conn
		err := supervise.Recovered(func() (err error) {
			cn, err = c.dial(ctx, cert, version)
			return err
		})
		if err != nil {
			c.stats.dialFailures.Add(1)
		}
		t.dialed(cn, err)
	})
	return true
}

func (c *Client) dial(ctx context.Context, cert *tls.Certificate, version string) (*conn, error) {
	tc, err := c.dialer.dial(ctx, cert)
	if err != nil {
		return nil, err
	}
	cn, err := c.transport.newConn(ctx, tc, version)
	if err != nil {
		return nil, err
	}
	c.stats.conns.Add(1)
	return cn, nil
}

// closeConn closes a connection without streams, in the background because a
// dead peer can delay it.
func (c *Client) closeConn(cn *conn) {
	c.rest.Go(func() {
		if err := supervise.Recovered(cn.cc.Close); err != nil {
			c.cfg.Logger.Debug("an APNs connection was not closed cleanly", "error", err)
		}
		c.stats.conns.Add(-1)
	})
}

// payload returns the body of n, or the outcome that APNs would report for it.
func payload(n Notification) ([]byte, *Outcome) {
	switch {
	case len(n.Token) == 0:
		return nil, &Outcome{Class: OurFault, Reason: reasonMissingDeviceToken}
	case len(n.Token) > maxToken:
		return nil, &Outcome{Class: DoNotRetry, Reason: reasonBadDeviceToken}
	case n.Topic == "":
		return nil, &Outcome{Class: OurFault, Reason: reasonMissingTopic}
	case !visibleASCII(n.Topic):
		return nil, &Outcome{Class: OurFault, Reason: reasonBadTopic}
	case !visibleASCII(n.ID):
		return nil, &Outcome{Class: OurFault, Reason: reasonBadMessageID}
	}
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(struct {
		MDM string `json:"mdm"`
	}{n.Magic}); err != nil {
		return nil, &Outcome{Class: OurFault, Err: fmt.Errorf("encoding payload: %w", err)}
	}
	body := bytes.TrimSuffix(buf.Bytes(), []byte("\n"))
	if len(body) > maxPayload {
		return nil, &Outcome{Class: DoNotRetry, Reason: reasonPayloadTooLarge}
	}
	return body, nil
}

// request returns the request for n, without its body.
func (c *Client) request(n Notification, body []byte) *http.Request {
	u := *c.root
	u.Path = "/3/device/" + hex.EncodeToString(n.Token)
	return &http.Request{
		Method: http.MethodPost,
		URL:    &u,
		Host:   u.Host,
		Header: http.Header{
			"Apns-Topic":      {n.Topic},
			"Apns-Push-Type":  {"mdm"},
			"Apns-Priority":   {"10"},
			"Apns-Expiration": {strconv.FormatInt(c.cfg.Now().Add(c.cfg.Expiration).Unix(), 10)},
			"Apns-Id":         {n.ID},
			"Content-Type":    {"application/json"},
			"User-Agent":      {userAgent},
		},
		ContentLength: int64(len(body)),
	}
}

// visibleASCII reports whether s can be the value of a header.
func visibleASCII(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
