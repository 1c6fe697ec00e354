package webhook

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"strconv"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// maxReply is how much of a reply is read so that its connection can be
	// used again, in bytes.
	maxReply = 64 << 10
	// writeBuffer, in bytes for each connection, holds most requests whole, so
	// that they go out in one write.
	writeBuffer = 32 << 10
	// maxSending bounds the bodies of large events in memory, in bytes of
	// payload; one of them costs about three times as much.
	maxSending = 32 << 20
	// maxRetryAfter bounds what a receiver may ask for.
	maxRetryAfter = time.Hour
)

// failure is why an event was not delivered.
type failure struct {
	text string
	// unsubscribed: the receiver wants no more events (410).
	unsubscribed bool
	// after is Retry-After; 0 if there was none.
	after time.Duration
	// permanent: the event cannot be sent, now or later.
	permanent bool
	// received: the receiver has the event and is to blame for it alone. It
	// answered an error, or not in time, or dropped the connection. An answer
	// that says that the receiver is not available is none.
	received bool
	// answered: the receiver sent a status of its own.
	answered bool
}

// sender does the HTTP of all sinks.
type sender struct {
	client *http.Client
	// guarded is the client for sinks that were made through the API.
	guarded *http.Client
	timeout time.Duration // of one try
	log     storage.EventLog
	large   *semaphore.Weighted
}

// dialer makes connections.
type dialer func(ctx context.Context, network, address string) (net.Conn, error)

func newSender(log storage.EventLog, timeout time.Duration, workers int, roots *x509.CertPool, guard callout.Guard, dial dialer) *sender {
	guardedDial := dial
	if dial == nil {
		plain := net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}
		checked := plain
		checked.ControlContext = guard.Control
		dial, guardedDial = plain.DialContext, checked.DialContext
	}
	transport := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dial,
		TLSClientConfig:        &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12},
		TLSHandshakeTimeout:    10 * time.Second,
		ForceAttemptHTTP2:      true,
		MaxIdleConnsPerHost:    workers,
		WriteBufferSize:        writeBuffer,
		IdleConnTimeout:        90 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
	}
	guarded := transport.Clone()
	guarded.Proxy, guarded.DialContext = nil, guardedDial
	return &sender{
		log:     log,
		timeout: timeout,
		large:   semaphore.NewWeighted(maxSending),
		client:  callout.Client(transport),
		guarded: callout.Client(guard.Transport(guarded, transport)),
	}
}

func (s *sender) close() {
	s.client.CloseIdleConnections()
	s.guarded.CloseIdleConnections()
}

// send tries once. attempt is the number of the try, from 1.
func (s *sender) send(ctx context.Context, k *storage.EventSink, r *storage.Event, attempt int) *failure {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	if r.RawApart {
		weight := min(r.RawSize, maxSending)
		if err := s.large.Acquire(ctx, weight); err != nil {
			return &failure{text: "too many large events at once"}
		}
		defer s.large.Release(weight)
		raw, err := s.log.EventPayload(ctx, r.Seq)
		if err != nil {
			return &failure{text: err.Error()}
		}
		whole := *r
		whole.Raw = raw
		r = &whole
	}
	body, err := bodyOf(k.Form, r)
	if err != nil {
		return &failure{text: err.Error(), permanent: true}
	}
	return s.post(ctx, k, r, body, attempt)
}

var errNoCheckin = errors.New("the check-in is not kept any more")

// bodyOf is an event in a sink's form.
func bodyOf(form storage.EventForm, r *storage.Event) ([]byte, error) {
	switch {
	case form == storage.FormEvent:
		return render(r)
	case len(r.Raw) == 0:
		return nil, errNoCheckin
	}
	return r.Raw, nil
}

// request makes the request of one try, without a trace and an attempt.
func request(ctx context.Context, k *storage.EventSink, id string, body []byte) (*http.Request, error) {
	method, media := http.MethodPost, "application/json; charset=utf-8"
	if k.Form == storage.FormCheckin {
		method, media = http.MethodPut, mdm.ContentTypeCheckin
	}
	req, err := http.NewRequestWithContext(ctx, method, k.URL, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", media)
	req.Header.Set("User-Agent", "nanomdm")
	switch {
	case k.Form == storage.FormEvent:
		sign(req.Header, k.Keys, id, time.Now(), body)
	case len(k.Keys) > 0:
		req.SetBasicAuth("nanomdm", k.Keys[0])
	}
	return req, nil
}

func (s *sender) post(ctx context.Context, k *storage.EventSink, r *storage.Event, body []byte, attempt int) *failure {
	// A connection that was kept may turn out to be closed: the transport then
	// makes a new one, which may fail.
	var connected atomic.Bool
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GetConn: func(string) { connected.Store(false) },
		GotConn: func(httptrace.GotConnInfo) { connected.Store(true) },
	})
	req, err := request(ctx, k, r.ID, body)
	if err != nil {
		return &failure{text: "the sink's URL cannot be used"}
	}
	if r.TraceParent != "" {
		req.Header.Set(callout.HeaderTraceParent, r.TraceParent)
	}
	if attempt > 1 {
		req.Header.Set(headerAttempt, strconv.Itoa(attempt))
	}
	client := s.guarded
	if k.Configured { // the operator of the server chose the URL
		client = s.client
	}
	resp, err := client.Do(req)
	if err != nil {
		return &failure{text: reason(err), received: connected.Load()}
	}
	defer resp.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxReply))
	f := &failure{text: fmt.Sprintf("HTTP %d", resp.StatusCode)}
	switch resp.StatusCode {
	case http.StatusGone:
		f.unsubscribed = true
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		f.after = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	default:
		if resp.StatusCode/100 == 2 {
			return nil
		}
		f.received, f.answered = true, true
		f.after = retryAfter(resp.Header.Get("Retry-After"), time.Now())
	}
	return f
}

// reason is the text of an error, without the URL.
func reason(err error) string {
	if errors.Is(err, context.DeadlineExceeded) {
		return "no answer in time"
	}
	return callout.WithoutURL(err).Error()
}

// retryAfter reads the header, in seconds or as a date (RFC 9110, 10.2.3).
func retryAfter(value string, now time.Time) time.Duration {
	if value == "" {
		return 0
	}
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		return min(time.Duration(seconds)*time.Second, maxRetryAfter)
	}
	at, err := http.ParseTime(value)
	if err != nil {
		return 0
	}
	return max(0, min(at.Sub(now), maxRetryAfter))
}
