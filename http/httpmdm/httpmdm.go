// Package httpmdm is the device side of the HTTP server: it extracts and
// checks the device's identity, decodes the message and hands it to the
// service chain.
//
// The order is fixed: limits, then identity, then parsing. No byte of a body
// is parsed before its sender's certificate is known to chain to the
// configured CA. A device retries whatever is not 2xx and unenrolls at 401,
// so no answer here is 401.
package httpmdm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// Role says which messages a path takes.
type Role int

// The roles.
const (
	Any      Role = iota // both, told apart by content type or body
	Checkins             // check-ins only
	Reports              // reports only
)

// Config holds what is optional.
type Config struct {
	// MaxBody bounds one request's body, in bytes; default 16 MiB.
	MaxBody int64
	// MaxInFlight bounds the bytes of all bodies held at once, beyond the
	// first 16 KiB of each; past it requests get 503 with Retry-After. Polls
	// and most reports are smaller, so that those who send much do not crowd
	// them out. Default 256 MiB, at least MaxBody.
	MaxInFlight int64
	// Refused is called for each request that is not answered by the service
	// chain, with one of Reasons; may be nil.
	Refused func(reason string)
	// Logger; default discards.
	Logger *slog.Logger
}

// The reasons to refuse a request, for counting.
const (
	ReasonMethod       = "method"
	ReasonIdentity     = "identity"                  // none, or not of the CA
	ReasonPeer         = "untrusted_peer"            // certificate header from elsewhere
	ReasonUnusedHeader = "unused_certificate_header" // in a mode without one
	ReasonPin          = "certificate_not_pinned"    // pinned to another enrollment, or retired
	ReasonNotEnrolled  = "not_enrolled"
	ReasonTooLarge     = "too_large"
	ReasonSlow         = "slow_body"
	ReasonMalformed    = "malformed"
	ReasonOverload     = "overload" // -max-in-flight
	ReasonUnavailable  = "unavailable"
	ReasonUnrecognized = "unrecognized_device" // -authenticate-url refused it
	ReasonOther        = "other"               // another middleware's StatusError
	ReasonError        = "error"
)

// Reasons lists them all.
func Reasons() []string {
	return []string{
		ReasonMethod, ReasonIdentity, ReasonPeer, ReasonUnusedHeader, ReasonPin, ReasonNotEnrolled, ReasonTooLarge,
		ReasonSlow, ReasonMalformed, ReasonOverload, ReasonUnavailable, ReasonUnrecognized, ReasonOther, ReasonError,
	}
}

// How long a body may take: some time to begin with, and more as more has
// come, so that large results of slow links get through and a client that
// trickles is cut.
const (
	bodyGrace   = 15 * time.Second
	bodyMinRate = 16 << 10 // bytes per second
	bodyLongest = 90 * time.Second
)

// firstRead is how much of a body is read before more memory is taken, in
// bytes; most messages fit.
const firstRead = 16 << 10

// Handler makes the http.Handlers of the device side.
type Handler struct {
	next     service.Handler
	identity *Identity
	cfg      Config
	budget   *semaphore.Weighted
}

// New makes a Handler. identity tells who sends; next gets what was decoded.
func New(next service.Handler, identity *Identity, cfg Config) *Handler {
	if cfg.MaxBody <= 0 {
		cfg.MaxBody = 16 << 20
	}
	if cfg.MaxInFlight <= 0 {
		cfg.MaxInFlight = 256 << 20
	}
	cfg.MaxInFlight = max(cfg.MaxInFlight, cfg.MaxBody)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Handler{next: next, identity: identity, cfg: cfg, budget: semaphore.NewWeighted(cfg.MaxInFlight)}
}

// errors of the transport itself; the rest comes from identity, mdm, service
// and storage.
var (
	errMethod   = errors.New("method is not PUT")
	errSlow     = &service.StatusError{Status: http.StatusRequestTimeout, Err: errors.New("body came too slowly")}
	errEncoding = errors.New("compressed bodies are not part of the protocol")
	errRole     = errors.New("message does not belong on this path")
	tooLarge    = &service.StatusError{Status: http.StatusRequestEntityTooLarge, Err: errors.New("body is larger than -max-body")}
	errOverload = fmt.Errorf("%w: bodies in flight reach -max-in-flight", storage.ErrBusy)
)

// MDM returns the handler of a path that takes messages of one role.
func (h *Handler) MDM(role Role) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodPut {
			w.Header().Set("Allow", http.MethodPut)
			h.fail(w, r, "", &service.StatusError{Status: http.StatusMethodNotAllowed, Err: errMethod})
			return
		}
		id, err := h.identity.fromHeaders(r)
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		body, release, err := h.readBody(w, r)
		defer release()
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		if err := id.verifyBody(body); err != nil {
			h.fail(w, r, "", err)
			return
		}
		req, err := decode(r, role, body)
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		req.Certificate = id.certificate
		resp, err := h.next.Handle(r.Context(), req)
		if err != nil {
			h.fail(w, r, req.Enroll.ID, err)
			return
		}
		reply(w, resp)
	})
}

// Migration returns the handler of /migration: check-ins without a
// certificate, from an exporter that has shown the API key. The caller wraps
// it in that check.
func (h *Handler) Migration(next service.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, release, err := h.readBody(w, r)
		defer release()
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		req, err := decode(r, Checkins, body)
		if err == nil {
			switch req.Message.(type) {
			case *mdm.Authenticate, *mdm.TokenUpdate:
			default:
				err = badRequest(fmt.Errorf("%w: migration takes Authenticate and TokenUpdate", errRole))
			}
		}
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		resp, err := next.Handle(r.Context(), req)
		if err != nil {
			h.fail(w, r, req.Enroll.ID, err)
			return
		}
		reply(w, resp)
	})
}

// readBody reads the whole body. The bytes that it holds beyond firstRead are
// taken from the budget as they arrive, so that a client that announces much
// and sends little costs little. release gives them back and must always be called.
func (h *Handler) readBody(w http.ResponseWriter, r *http.Request) (body []byte, release func(), err error) {
	var held int64
	release = func() { h.budget.Release(held) }
	if enc := r.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return nil, release, badRequest(errEncoding)
	}
	if r.ContentLength > h.cfg.MaxBody {
		return nil, release, tooLarge
	}
	room := int64(firstRead)
	if r.ContentLength >= 0 {
		room = min(room, r.ContentLength+1) // one more, to see the end without growing
	}
	limited := http.MaxBytesReader(w, r.Body, h.cfg.MaxBody)
	control, start := http.NewResponseController(w), time.Now()
	for {
		// A ResponseWriter of tests may have no deadline to set.
		_ = control.SetReadDeadline(start.Add(min(bodyLongest, bodyGrace+time.Duration(room)*time.Second/bodyMinRate)))
		if more := room - firstRead - held; more > 0 {
			if !h.budget.TryAcquire(more) {
				return nil, release, errOverload
			}
			held += more
		}
		body = append(make([]byte, 0, room), body...)
		var n int
		for err == nil && len(body) < cap(body) {
			n, err = limited.Read(body[len(body):cap(body)])
			body = body[:len(body)+n]
		}
		if err != nil {
			break
		}
		room *= 4
		if r.ContentLength >= 0 {
			room = min(room, r.ContentLength+1)
		}
	}
	if errors.Is(err, io.EOF) {
		// The deadline would end the request's context.
		_ = control.SetReadDeadline(time.Time{})
		return body, release, nil
	}
	if over := (*http.MaxBytesError)(nil); errors.As(err, &over) {
		return nil, release, tooLarge
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return nil, release, errSlow
	}
	return nil, release, badRequest(fmt.Errorf("reading body: %w", err))
}

func decode(r *http.Request, role Role, body []byte) (*service.Request, error) {
	mediaType, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	var (
		msg mdm.Message
		err error
	)
	switch strings.ToLower(strings.TrimSpace(mediaType)) {
	case mdm.ContentTypeCheckin:
		msg, err = mdm.DecodeCheckin(body)
	case mdm.ContentTypeCommand:
		var report *mdm.Report
		if report, err = mdm.DecodeReport(body); err == nil {
			msg = report
		}
	default:
		msg, err = mdm.Decode(body)
	}
	if err != nil {
		return nil, badRequest(fmt.Errorf("decoding message: %w", err))
	}
	_, isReport := msg.(*mdm.Report)
	if (role == Checkins && isReport) || (role == Reports && !isReport) {
		return nil, badRequest(errRole)
	}
	enroll, err := msg.Identity().Resolve()
	if err != nil {
		return nil, badRequest(err)
	}
	req := &service.Request{
		ID: requestlog.ID(r.Context()), TraceParent: requestlog.TraceParent(r.Context()), Message: msg, Enroll: enroll,
	}
	if r.URL.RawQuery != "" {
		q := r.URL.Query()
		req.Params = make(map[string]string, len(q))
		for k := range q {
			req.Params[k] = q.Get(k)
		}
	}
	return req, nil
}

func reply(w http.ResponseWriter, resp *service.Response) {
	header := w.Header()
	if resp.ContentType != "" {
		header.Set("Content-Type", resp.ContentType)
	}
	header.Set("Content-Length", strconv.Itoa(len(resp.Body)))
	status := resp.Status
	if status == 0 {
		status = http.StatusOK
	}
	w.WriteHeader(status)
	_, _ = w.Write(resp.Body) // a device that is gone asks again
}

// retryAfter is what an overloaded server asks of devices, in seconds.
const retryAfter = "5"

// fail is the one place that maps errors to what a device sees: a status and
// no text but Apple's own. The cause goes to the log.
func (h *Handler) fail(w http.ResponseWriter, r *http.Request, enrollID string, err error) {
	status, level := http.StatusInternalServerError, slog.LevelError
	var se *service.StatusError
	switch {
	case errors.As(err, &se):
		status, level = se.Status, slog.LevelWarn
	case errors.Is(err, errIdentity), errors.Is(err, storage.ErrIdentity), errors.Is(err, storage.ErrNotEnrolled):
		status, level = http.StatusBadRequest, slog.LevelWarn
	case unavailable(err):
		status, level = http.StatusServiceUnavailable, slog.LevelWarn
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", retryAfter)
	}
	why := reason(err)
	if h.cfg.Refused != nil {
		h.cfg.Refused(why)
	}
	switch why {
	case ReasonMethod, ReasonIdentity, ReasonPeer, ReasonUnusedHeader, ReasonTooLarge, ReasonSlow, ReasonOverload:
		w.Header().Set("Connection", "close") // the body was not read, and is not waited for
	}
	h.cfg.Logger.Log(r.Context(), level, "device request refused", "request_id", requestlog.ID(r.Context()),
		"status", status, "enrollment_id", enrollID, "error", err)
	reply(w, refusal(status, se))
}

// refusal is the reply to what failed: a status, and Apple's document where
// there is one.
func refusal(status int, se *service.StatusError) *service.Response {
	resp := &service.Response{Status: status}
	if se == nil || se.Document == nil {
		return resp
	}
	if body, err := se.Document.Encode(); err == nil {
		resp.ContentType, resp.Body = mdm.ContentTypeErrorDocument, body
	}
	return resp
}

// reason is the word under which a refusal is counted.
func reason(err error) string {
	var se *service.StatusError
	switch {
	case errors.Is(err, errMethod):
		return ReasonMethod
	case errors.Is(err, errPeer):
		return ReasonPeer
	case errors.Is(err, errUnusedHeader):
		return ReasonUnusedHeader
	case errors.Is(err, errIdentity):
		return ReasonIdentity
	case errors.Is(err, storage.ErrIdentity):
		return ReasonPin
	case errors.Is(err, storage.ErrNotEnrolled):
		return ReasonNotEnrolled
	case errors.Is(err, tooLarge):
		return ReasonTooLarge
	case errors.Is(err, errSlow):
		return ReasonSlow
	case errors.Is(err, errOverload):
		return ReasonOverload
	case errors.As(err, &se):
		switch {
		case se.Document != nil && se.Document.Code == mdm.CodeUnrecognizedDevice:
			return ReasonUnrecognized
		case se.Status == http.StatusBadRequest:
			return ReasonMalformed
		case se.Status == http.StatusServiceUnavailable:
			return ReasonUnavailable
		}
		return ReasonOther
	case unavailable(err):
		return ReasonUnavailable
	}
	return ReasonError
}

// unavailable: the same request may well succeed a little later.
func unavailable(err error) bool {
	return errors.Is(err, storage.ErrUnavailable) || errors.Is(err, storage.ErrBusy) || errors.Is(err, storage.ErrClosed) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

func badRequest(err error) error {
	return &service.StatusError{Status: http.StatusBadRequest, Err: err}
}
