//lint:file-ignore SA1019 x/net/http2 marks its client API deprecated in favour of net/http's ClientConn, which offers neither Ping nor a view of the peer's stream limit without a request.

package apns

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"time"

	"golang.org/x/net/http2"
)

// maxAnswer bounds the part of an answer's body that is read; Apple's bodies have
// less than 100 bytes.
const maxAnswer = 4096

// limitCheck is the interval between two reads of the server's stream limit,
// which SETTINGS may change at any time.
const limitCheck = time.Second

// conn is one HTTP/2 connection of a topic's pool.
type conn struct {
	cc      *http2.ClientConn
	version string // of the certificate it was dialed with

	// Guarded by topic.mu.
	inUse    int // streams handed out
	limit    int // streams the server allows
	limitAt  time.Time
	answered bool // APNs has answered a stream: the connection works
	retired  bool // out of the pool; closed when inUse is 0
}

// transport makes HTTP/2 connections from TLS connections.
type transport struct {
	h2           *http2.Transport
	writeTimeout time.Duration
}

func newTransport(cfg Config) transport {
	return transport{writeTimeout: cfg.PingInterval + cfg.PingTimeout, h2: &http2.Transport{
		DisableCompression: true,
		// The pool counts streams itself; a stream over the limit waits for
		// the previous one's last bookkeeping instead of failing.
		StrictMaxConcurrentStreams: true,
		ReadIdleTimeout:            cfg.PingInterval,
		PingTimeout:                cfg.PingTimeout,
		MaxHeaderListSize:          16 << 10,
	}}
}

// newConn starts HTTP/2 on tc, which it owns from then on. It returns once
// the server has spoken: its SETTINGS are known by then, and so is, with
// TLS 1.3, whether it accepted the client certificate.
func (t transport) newConn(ctx context.Context, tc *tls.Conn, version string) (*conn, error) {
	g := newBufferedConn(tc, t.writeTimeout)
	cc, err := t.h2.NewClientConn(g)
	if err != nil {
		g.Close()
		return nil, err
	}
	// SETTINGS is the server's first frame, so it precedes the answer.
	if err := cc.Ping(ctx); err != nil {
		cc.Close()
		return nil, err
	}
	cn := &conn{cc: cc, version: version}
	cn.refreshLimit(time.Now())
	return cn, nil
}

// refreshLimit reads the server's stream limit.
func (cn *conn) refreshLimit(now time.Time) {
	// Fits an int on 32 bits too.
	cn.limit = int(min(cn.cc.State().MaxConcurrentStreams, 1<<30))
	cn.limitAt = now
}

// usable reports whether new streams may be opened. It is quick, but a
// connection that died before its first stream passes for usable.
func (cn *conn) usable() bool { return cn.cc.CanTakeNewRequest() }

// lost reports whether the connection has ended or is ending.
func (cn *conn) lost() bool {
	st := cn.cc.State()
	return st.Closed || st.Closing
}

// roundTrip sends req and reads the whole answer.
func (cn *conn) roundTrip(req *http.Request) (*http.Response, []byte, error) {
	res, err := cn.cc.RoundTrip(req)
	if err != nil {
		return nil, nil, err
	}
	defer res.Body.Close()
	if res.StatusCode == http.StatusOK {
		return res, nil, nil
	}
	body, err := readAtMost(res.Body, maxAnswer)
	if err != nil {
		return nil, nil, err
	}
	return res, body, nil
}

// goAwayReason returns the reason that came with the GOAWAY that ended a
// connection, if any.
func goAwayReason(err error) string {
	var ga http2.GoAwayError
	if !errors.As(err, &ga) {
		return ""
	}
	reason, _ := parseAnswer([]byte(ga.DebugData))
	return reason
}
