// Package httpapi is the operator's side of the HTTP server.
//
// Endpoints answer JSON; an error is {"error": "..."}. NanoMDM's endpoints keep
// its paths, statuses and JSON. One helper limits the body, calls the handler,
// maps errors to statuses and encodes the answer.
package httpapi

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/storage"
)

// Config holds what is optional.
type Config struct {
	// MaxBody bounds a request's body, in bytes; default 16 MiB.
	MaxBody int64
	// Refused is called for each request whose key is refused, with one of
	// no_key, wrong_key, slowed, forbidden and cross_origin; may be nil.
	Refused func(reason string)
	// EscrowURL is the service that removes Activation Lock from devices, and
	// EscrowCAs are its roots; default Apple's URL and the system's roots.
	EscrowURL string
	EscrowCAs *x509.CertPool
	// SinkGuard limits the addresses of sinks. The zero value refuses those of
	// private networks.
	SinkGuard callout.Guard
	// SinksChanged is called after a sink was stored or deleted; may be nil.
	SinksChanged func(context.Context) error
	// Draining is closed when the server is about to stop: waiting calls answer
	// then.
	Draining <-chan struct{}
	// ExpiredServed: devices whose pinned certificate has expired are served.
	ExpiredServed bool
	// Version of the server, for statistics.
	Version string
	// Logger; default discards.
	Logger *slog.Logger
	// Now is the clock; default time.Now.
	Now func() time.Time
}

// API makes the handlers of the operator's side.
type API struct {
	key      storage.KeyHash // of the main key
	keys     *keyring
	throttle *throttle
	store    Store
	pusher   Pusher
	cfg      Config
	origins  *http.CrossOriginProtection
	cursors  *cursors
	waits    waits
	log      *logWatch
}

// Store is the part of the storage that the API uses.
type Store interface {
	storage.Enqueuer
	storage.APIKeys
	storage.Resealer
	storage.Audit
	storage.Enrollments
	storage.Tags
	storage.Refusals
	storage.Overview
	storage.Inventories
	storage.EnrollmentSteering
	storage.Secrets
	storage.Queues
	storage.Commands
	storage.Steering
	storage.PushCerts
	storage.EventSinks
	storage.EventLog
	storage.Redeliverer
	storage.Replicas
	EventBacklogs(ctx context.Context) ([]storage.SinkBacklog, error)
	EventLogSize(ctx context.Context) (storage.EventLogSize, error)
}

// New makes the API. Its callers have the main key, which must not be empty,
// or a named key of the store.
func New(key string, store Store, pusher Pusher, cfg Config) (*API, error) {
	if key == "" {
		return nil, errors.New("API key is empty")
	}
	if cfg.MaxBody <= 0 {
		cfg.MaxBody = 16 << 20
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Refused == nil {
		cfg.Refused = func(string) {}
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	c, err := newCursors(key)
	if err != nil {
		return nil, err
	}
	return &API{
		cursors: c, log: newLogWatch(store.LastEvent),
		key: storage.HashKey(key), keys: newKeyring(store, cfg.Now), throttle: newThrottle(cfg.Now),
		store: store, pusher: pusher, cfg: cfg, origins: http.NewCrossOriginProtection(),
	}, nil
}

// Version answers /version as NanoMDM does: any method, without authentication.
func Version(version string) http.Handler {
	body, _ := json.Marshal(map[string]string{"version": version}) // a text never fails
	return closed(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentTypeJSON)
		_, _ = w.Write(body) // as writeJSON
	}))
}

// problem is an error with a status, whose text the caller may read.
type problem struct {
	status int
	text   string
}

func (p *problem) Error() string { return p.text }

func badRequest(format string, args ...any) error {
	return &problem{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

// call handles a request and returns a status and the value to encode.
type call func(ctx context.Context, r *http.Request) (status int, body any, err error)

// endpoint makes an http.Handler of a call.
func (a *API) endpoint(call call) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, a.cfg.MaxBody)
		status, body, err := call(r.Context(), r)
		if err != nil {
			a.fail(w, r, err)
			return
		}
		if raw, ok := body.(attachment); ok {
			w.Header().Set("Content-Type", "application/octet-stream")
			w.Header().Set("Content-Disposition", `attachment; filename="result.plist"`)
			w.WriteHeader(status)
			_, _ = w.Write(raw) // as writeJSON
			return
		}
		if status == http.StatusNoContent {
			w.WriteHeader(status)
			return
		}
		writeJSON(w, status, body)
	})
}

// attachment is an answer with bytes that a device chose. No type that a
// browser renders goes with it.
type attachment []byte

// fail is the one place that maps errors to statuses. An error without a
// mapping goes to the log, and the caller gets the request's id.
func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	var (
		p        *problem
		tooLarge *http.MaxBytesError
	)
	switch {
	case errors.As(err, &p):
		if p.status == http.StatusServiceUnavailable {
			w.Header().Set("Retry-After", "5")
		}
		writeFailure(w, r, p.status, p.text)
	case errors.As(err, &tooLarge):
		writeFailure(w, r, http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is larger than %d bytes, the limit that -max-body sets", tooLarge.Limit))
	case errors.Is(err, storage.ErrPlace):
		writeFailure(w, r, http.StatusBadRequest, "after: that is not a next of this list's")
	case errors.Is(err, storage.ErrConflict):
		writeFailure(w, r, http.StatusConflict, err.Error())
	case errors.Is(err, storage.ErrNotFound):
		writeFailure(w, r, http.StatusNotFound, err.Error())
	case errors.Is(err, storage.ErrUnavailable):
		w.Header().Set("Retry-After", "5")
		writeFailure(w, r, http.StatusServiceUnavailable, "the database does not answer; try again")
	case errors.Is(err, storage.ErrBusy), errors.Is(err, storage.ErrClosed),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		w.Header().Set("Retry-After", "5")
		writeFailure(w, r, http.StatusServiceUnavailable, "the server is busy; try again")
	default:
		id := requestlog.ID(r.Context())
		a.cfg.Logger.ErrorContext(r.Context(), "API request failed", "request_id", id, "path", r.URL.Path, "error", err)
		writeFailure(w, r, http.StatusInternalServerError, "internal error; see the log for request "+id)
	}
}

// contentTypeJSON is NanoMDM's; JSON is UTF-8 without saying so.
const contentTypeJSON = "application/json"

// writeJSON writes v the way NanoMDM does, indented by tabs.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", contentTypeJSON)
	w.WriteHeader(status)
	enc := json.NewEncoder(w)
	enc.SetIndent("", "\t")
	_ = enc.Encode(v) // a caller that is gone gets nothing
}

func readBody(r *http.Request) ([]byte, error) {
	body, err := io.ReadAll(r.Body)
	if tooLarge := (*http.MaxBytesError)(nil); err != nil && !errors.As(err, &tooLarge) {
		return nil, badRequest("reading the body: %v", err)
	}
	return body, err
}

// readJSON reads a request's body, which must be one JSON value without keys
// that into does not have.
func readJSON(r *http.Request, into any) error {
	body, err := readBody(r)
	if err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return badRequest("body: %v", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return badRequest("body: there is more than one JSON value")
	}
	return nil
}

// manyTime bounds a call that concerns many enrollments.
const manyTime = 15 * time.Minute

// slow extends the deadlines of a call to manyTime.
func slow(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		// A ResponseWriter without deadlines needs no extension.
		_ = errors.Join(c.SetReadDeadline(time.Now().Add(manyTime)), c.SetWriteDeadline(time.Now().Add(manyTime)))
		next.ServeHTTP(w, r)
	})
}
