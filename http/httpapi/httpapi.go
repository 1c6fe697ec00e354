// Package httpapi is the operator's side of the HTTP server.
//
// Endpoints answer JSON. Those that NanoMDM has keep its paths, statuses and
// JSON; an error is {"error": "..."}. One helper decodes, calls, maps errors
// to statuses and encodes.
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
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/storage"
)

// Config holds what is optional.
type Config struct {
	// MaxBody bounds a request's body, in bytes; default 16 MiB.
	MaxBody int64
	// Refused is called for each request that is refused for its key, with
	// one of no_key, wrong_key, slowed and forbidden; may be nil.
	Refused func(reason string)
	// EscrowURL is where Apple takes Activation Lock off devices, and
	// EscrowCAs are whom to trust there; default Apple's, and the system's.
	EscrowURL string
	EscrowCAs *x509.CertPool
	// SinksChanged is called after a sink was stored or deleted; default
	// nothing.
	SinksChanged func(context.Context) error
	// Draining is closed when the server is about to stop: calls that wait for
	// something to happen answer then.
	Draining <-chan struct{}
	// Version is the server's, for statistics.
	Version string
	// Logger; default discards.
	Logger *slog.Logger
	// Now is the clock of failed logins and of copied keys; default time.Now.
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
	waits    atomic.Int64 // calls that wait for a command
}

// Store is what the API needs to have kept.
type Store interface {
	storage.Enqueuer
	storage.APIKeys
	storage.Resealer
	storage.Audit
	storage.Enrollments
	storage.Inventory
	storage.EnrollmentSteering
	storage.Secrets
	storage.Queues
	storage.Commands
	storage.Steering
	storage.PushCerts
	storage.EventSinks
	storage.EventLog
	storage.Redeliverer
	EventBacklogs(ctx context.Context) ([]storage.SinkBacklog, error)
}

// New makes the API behind the main key, which must not be empty, and behind
// the named keys of the store.
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
	return &API{
		key: storage.HashKey(key), keys: newKeyring(store, cfg.Now), throttle: newThrottle(cfg.Now),
		store: store, pusher: pusher, cfg: cfg,
	}, nil
}

// Version answers GET /version, without authentication.
func Version(version string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		writeJSON(w, http.StatusOK, struct {
			Version string `json:"version"`
		}{version})
	})
}

// problem is an error whose text is for the caller.
type problem struct {
	status int
	text   string
}

func (p *problem) Error() string { return p.text }

func badRequest(format string, args ...any) error {
	return &problem{http.StatusBadRequest, fmt.Sprintf(format, args...)}
}

type errorBody struct {
	Error string `json:"error"`
}

// call answers a request with a status and what to encode.
type call func(ctx context.Context, r *http.Request) (status int, body any, err error)

// endpoint is the one JSON helper.
func (a *API) endpoint(call call) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		r.Body = http.MaxBytesReader(w, r.Body, a.cfg.MaxBody)
		status, body, err := call(r.Context(), r)
		if err != nil {
			a.fail(w, r, err)
			return
		}
		if raw, ok := body.(rawBody); ok {
			w.Header().Set("Content-Type", raw.contentType)
			w.WriteHeader(status)
			_, _ = w.Write(raw.data) // as writeJSON
			return
		}
		writeJSON(w, status, body)
	})
}

// rawBody is an answer that is not JSON.
type rawBody struct {
	contentType string
	data        []byte
}

// fail is the one place that maps errors to statuses. The text of an error
// that is not mapped stays in the log; the caller gets the request's id.
func (a *API) fail(w http.ResponseWriter, r *http.Request, err error) {
	var (
		p        *problem
		tooLarge *http.MaxBytesError
	)
	switch {
	case errors.As(err, &p):
		writeJSON(w, p.status, errorBody{p.text})
	case errors.As(err, &tooLarge):
		writeJSON(w, http.StatusRequestEntityTooLarge, errorBody{fmt.Sprintf("body is larger than %d bytes", tooLarge.Limit)})
	case errors.Is(err, storage.ErrPlace):
		writeJSON(w, http.StatusBadRequest, errorBody{"after: that is not a next of this list's"})
	case errors.Is(err, storage.ErrConflict):
		writeJSON(w, http.StatusConflict, errorBody{err.Error()})
	case errors.Is(err, storage.ErrNotFound):
		writeJSON(w, http.StatusNotFound, errorBody{err.Error()})
	case errors.Is(err, storage.ErrUnavailable), errors.Is(err, storage.ErrBusy), errors.Is(err, storage.ErrClosed),
		errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		w.Header().Set("Retry-After", "5")
		writeJSON(w, http.StatusServiceUnavailable, errorBody{"the server is busy; try again"})
	default:
		id := requestlog.ID(r.Context())
		a.cfg.Logger.ErrorContext(r.Context(), "API request failed", "request_id", id, "path", r.URL.Path, "error", err)
		writeJSON(w, http.StatusInternalServerError, errorBody{"internal error; see the log for request " + id})
	}
}

// writeJSON writes v the way NanoMDM does, indented by tabs.
func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
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

// readJSON reads a request's body, which must be one JSON value and have
// nothing that into has not.
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

// slowTime is how long a call may take that is about many enrollments.
const slowTime = 15 * time.Minute

// slow gives a call more time than the server gives others.
func slow(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := http.NewResponseController(w)
		// One that cannot be told has no deadline either.
		_ = errors.Join(c.SetReadDeadline(time.Now().Add(slowTime)), c.SetWriteDeadline(time.Now().Add(slowTime)))
		next.ServeHTTP(w, r)
	})
}
