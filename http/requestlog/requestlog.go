// Package requestlog gives every HTTP request an id and one line in the log,
// finds out who is behind the proxies, and turns a panic into a 500.
package requestlog

import (
	"context"
	"crypto/rand"
	"log/slog"
	"net/http"
	"net/netip"
	"runtime/debug"
	"sync/atomic"
	"time"
)

// Config holds what is optional.
type Config struct {
	// Trusted are the networks of the proxies whose X-Forwarded-For and
	// traceparent headers are believed. A Unix socket's peer always is. With
	// no networks at all a traceparent is taken from anyone, and an address
	// from nobody: anyone could claim any.
	Trusted []netip.Prefix
	// Panicked is called for each panic; may be nil.
	Panicked func()
}

type key struct{}

// request is what is known of a request besides itself.
type request struct {
	id          string
	client      string
	traceParent string
	message     atomic.Pointer[message]
}

// message is the device message of a request.
type message struct{ enrollment, kind string }

func of(ctx context.Context) *request {
	if r, ok := ctx.Value(key{}).(*request); ok {
		return r
	}
	return new(request) // ctx is outside a request
}

// SetMessage adds the enrollment and the type of a device message to the line of
// the request that ctx belongs to.
func SetMessage(ctx context.Context, enrollmentID, kind string) {
	if r, ok := ctx.Value(key{}).(*request); ok {
		r.message.Store(&message{enrollmentID, kind})
	}
}

// Enrollment returns the enrollment that SetMessage named, or "".
func Enrollment(ctx context.Context) string {
	if m := of(ctx).message.Load(); m != nil {
		return m.enrollment
	}
	return ""
}

// ID returns the id of the request that ctx belongs to, or "".
func ID(ctx context.Context) string { return of(ctx).id }

// Client returns the address of the client of ctx's request, without a port:
// the address that trusted proxies name, else the peer's. It is "" for a peer
// without an address that names none.
func Client(ctx context.Context) string { return of(ctx).client }

// ClientNetwork returns the network by which a client is limited: its address with
// IPv4, the /64 with IPv6, of which a customer has at least one. It is not valid
// if the client has no address.
func ClientNetwork(ctx context.Context) netip.Prefix {
	addr, err := netip.ParseAddr(Client(ctx))
	if err != nil {
		return netip.Prefix{}
	}
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // an address has as many bits
	return p
}

// TraceParent returns the request's valid traceparent header, to be passed on
// with requests that are made because of it, or "".
func TraceParent(ctx context.Context) string { return of(ctx).traceParent }

// Middleware wraps next. It logs successful requests, and 503, at debug level,
// errors of the client at info and errors of the server at error.
func Middleware(logger *slog.Logger, cfg Config, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		info := describe(r, cfg.Trusted)
		r = r.WithContext(context.WithValue(r.Context(), key{}, info))
		rec := &recorder{ResponseWriter: w}
		start := time.Now()
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				if cfg.Panicked != nil {
					cfg.Panicked()
				}
				logger.Error("handler panicked", "request_id", info.id, "panic", p, "stack", string(debug.Stack()))
				if rec.status != 0 {
					// Part of the answer is on its way: without a cut the
					// client would take it for all.
					defer panic(http.ErrAbortHandler)
				} else {
					rec.WriteHeader(http.StatusInternalServerError)
				}
			}
			level := slog.LevelDebug
			switch {
			case rec.status == http.StatusServiceUnavailable:
				// The code that refused the request has logged or counted the
				// reason: an outage is one line, not one for each device.
			case rec.status >= 500:
				level = slog.LevelError
			case rec.status >= 400:
				level = slog.LevelInfo
			}
			if !logger.Enabled(r.Context(), level) {
				return
			}
			// The path alone: query parameters may hold what operators put
			// into their enrollment profiles.
			attrs := []slog.Attr{
				slog.String("request_id", info.id), slog.String("method", r.Method), slog.String("path", r.URL.Path),
				slog.Int("status", rec.statusOr200()), slog.Int64("bytes", rec.bytes),
				slog.String("client", info.client), slog.String("peer", r.RemoteAddr), slog.Duration("duration", time.Since(start)),
			}
			if m := info.message.Load(); m != nil {
				attrs = append(attrs, slog.String("enrollment_id", m.enrollment), slog.String("message_type", m.kind))
			}
			if info.traceParent != "" {
				attrs = append(attrs, slog.String("traceparent", info.traceParent))
			}
			logger.LogAttrs(r.Context(), level, "request", attrs...)
		}()
		next.ServeHTTP(rec, r)
	})
}

func describe(r *http.Request, trusted []netip.Prefix) *request {
	info := &request{id: rand.Text(), client: peerAddress(r)}
	hop := TrustedPeer(r, trusted)
	if hop {
		info.client = forwardedFor(r.Header.Values("X-Forwarded-For"), info.client, trusted)
	}
	if hop || len(trusted) == 0 {
		info.traceParent = parseTraceParent(r.Header.Values("Traceparent"))
	}
	return info
}

type recorder struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 {
		r.status = status
	}
	r.ResponseWriter.WriteHeader(status)
}

func (r *recorder) Write(b []byte) (int, error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	n, err := r.ResponseWriter.Write(b)
	r.bytes += int64(n)
	return n, err
}

// Unwrap lets http.ResponseController reach the connection.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

func (r *recorder) statusOr200() int {
	if r.status == 0 {
		return http.StatusOK
	}
	return r.status
}
