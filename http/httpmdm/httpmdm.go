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
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
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
	// Pins finds who sends a report that cannot be read, so that its command
	// ends; nil refuses such reports.
	Pins storage.PinnedEnrollments
	// Refusals keeps which requests were refused; nil keeps them in the log only.
	Refusals storage.Refusals
	// MaxBody bounds one request's body, in bytes; default 16 MiB.
	MaxBody int64
	// MaxCheckin bounds a check-in's, default 256 KiB, and MaxStatus that of a
	// declarative management message, default 4 MiB. Both are at most MaxBody.
	MaxCheckin, MaxStatus int64
	// MaxHourly bounds what one certificate sends to this server in an hour, in
	// bodies of more than 16 KiB, and in smaller ones as much again, each of which
	// counts 1 KiB more than it has; past it they get 503. Default 1 GiB.
	MaxHourly int64
	// MaxInFlight bounds the memory that all bodies and their copies take at
	// once, beyond the first 4 KiB of each; past it requests get 503 with
	// Retry-After. Each byte counts BodyCopies times. Polls and most reports are
	// smaller, so that those who send much do not crowd them out. Default 256
	// MiB, at least LeastInFlight times MaxBody.
	MaxInFlight int64
	// MaxRequests is how many requests the daemon lets in at once. Half of them
	// may be of one client address, or wait for their bodies. Default 4096.
	MaxRequests int
	// Stalled says whether the process stood still since a request came in. Its
	// client may then have given it up. Nil is never.
	Stalled func(arrived time.Time) bool
	// Refused is called for each request that is not answered by the service
	// chain, with one of Reasons; may be nil.
	Refused func(reason string)
	// AuthProxyTransport makes the requests of AuthProxy. Default:
	// http.DefaultTransport.
	AuthProxyTransport http.RoundTripper
	// Logger; default discards.
	Logger *slog.Logger
}

// The reasons to refuse a request, for counting.
const (
	ReasonMethod       = "method"
	ReasonOrigin       = "cross_origin"                  // a web page's
	ReasonIdentity     = "identity"                      // none, or not of the CA
	ReasonPeer         = "untrusted_peer"                // certificate header from elsewhere
	ReasonUnusedHeader = "unused_certificate_header"     // in a mode without one
	ReasonPin          = storage.CauseForeignCertificate // pinned to another enrollment, or retired
	ReasonNotEnrolled  = "not_enrolled"
	ReasonChannels     = "too_many_channels" // of users of one device
	ReasonTopic        = "other_topic"       // than at enrollment
	ReasonTopicCA      = "other_topic_ca"    // the topic is that of other CAs' devices
	ReasonOwnWord      = "old_copy"          // in a migration, of a device that spoke here itself
	ReasonTooLarge     = "too_large"
	ReasonSlow         = "slow_body"
	ReasonMalformed    = "malformed"
	ReasonOverload     = "overload"    // -max-in-flight
	ReasonCrowded      = "crowded"     // too many of one certificate or client
	ReasonByteBudget   = "byte_budget" // -max-hourly-bytes
	ReasonUnavailable  = "unavailable"
	ReasonUnrecognized = "unrecognized_device" // -authenticate-url refused it
	ReasonOther        = "other"               // another middleware's StatusError
	ReasonError        = "error"
)

// Reasons lists them all.
func Reasons() []string {
	return []string{
		ReasonMethod, ReasonOrigin, ReasonIdentity, ReasonPeer, ReasonUnusedHeader, ReasonPin, ReasonNotEnrolled, ReasonTopic, ReasonTopicCA, ReasonOwnWord, ReasonChannels, ReasonTooLarge,
		ReasonSlow, ReasonMalformed, ReasonOverload, ReasonCrowded, ReasonByteBudget, ReasonUnavailable, ReasonUnrecognized, ReasonOther, ReasonError,
	}
}

// Handler makes the http.Handlers of the device side.
type Handler struct {
	next     service.Handler
	identity *Identity
	cfg      Config
	memory   *memory
	places   *places
	refusals *refusals
	bytes    *byteBudget
	origins  *http.CrossOriginProtection
}

// New makes a Handler. identity finds the sender of a request; next gets the
// decoded message.
func New(next service.Handler, identity *Identity, cfg Config) *Handler {
	if cfg.MaxBody <= 0 {
		cfg.MaxBody = 16 << 20
	}
	if cfg.MaxInFlight <= 0 {
		cfg.MaxInFlight = 256 << 20
	}
	cfg.MaxInFlight = max(cfg.MaxInFlight, LeastInFlight*cfg.MaxBody)
	cfg.MaxCheckin = min(cmp.Or(cfg.MaxCheckin, 256<<10), cfg.MaxBody)
	cfg.MaxStatus = min(cmp.Or(cfg.MaxStatus, 4<<20), cfg.MaxBody)
	cfg.MaxHourly = cmp.Or(cfg.MaxHourly, 1<<30)
	if cfg.MaxRequests <= 0 {
		cfg.MaxRequests = 4096
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Handler{
		next: next, identity: identity, cfg: cfg, memory: newMemory(cfg.MaxInFlight),
		places: newPlaces(newPlaceLimits(cfg)), refusals: newRefusals(cfg.Logger), bytes: newByteBudget(cfg.MaxHourly),
		origins: http.NewCrossOriginProtection(),
	}
}

// errors of the transport itself; the rest comes from identity, mdm, service
// and storage.
var (
	errMethod   = &service.StatusError{Status: http.StatusMethodNotAllowed, Err: errors.New("a request without a message, whose method is neither PUT nor POST")}
	errOrigin   = &service.StatusError{Status: http.StatusForbidden, Err: errors.New("a web page's request")}
	errSlow     = &service.StatusError{Status: http.StatusRequestTimeout, Err: errors.New("body came too slowly")}
	errEncoding = errors.New("compressed bodies are not part of the protocol")
	errRole     = errors.New("message does not belong on this path")
	tooLarge    = &service.StatusError{Status: http.StatusRequestEntityTooLarge, Err: errors.New("body is larger than -max-body")}
	errOverload = fmt.Errorf("%w: bodies and their copies reach -max-in-flight", storage.ErrBusy)
)

// MDM returns the handler of a path that takes messages of one role.
func (h *Handler) MDM(role Role) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		arrived := time.Now()
		if err := h.checkMethod(r); err != nil {
			if errors.Is(err, errMethod) {
				w.Header().Set("Allow", http.MethodPut+", "+http.MethodPost)
			}
			h.fail(w, r, speaker{}, err)
			return
		}
		id, err := h.identity.fromHeaders(r)
		if err != nil {
			h.fail(w, r, id.speaker, err)
			return
		}
		if !h.bytes.allows(id.certificate, r.ContentLength) {
			h.fail(w, r, id.speaker, errByteBudget)
			return
		}
		body, release, err := h.readBody(w, r, id.certificate, func(beginning []byte) int64 { return h.bodyLimit(r, role, beginning) })
		defer release()
		if err != nil {
			h.fail(w, r, id.speaker, err)
			return
		}
		if err := id.verifyBody(body); err != nil {
			h.fail(w, r, id.speaker, err)
			return
		}
		h.bytes.add(id.certificate, len(body)+len(r.URL.RawQuery))
		done, err := h.memory.work(r.Context(), body)
		if err != nil {
			h.fail(w, r, id.speaker, err)
			return
		}
		defer done()
		req, err := h.request(r, role, body, id.certificate)
		if err != nil {
			h.fail(w, r, id.named(body), err)
			return
		}
		req.GivenUp = h.givenUp(r.Context(), arrived)
		requestlog.SetMessage(r.Context(), req.Enroll.ID, string(req.Message.Kind()))
		resp, err := h.next.Handle(r.Context(), req)
		if err != nil {
			id.enrollment = req.Enroll.ID
			h.fail(w, r, id.speaker, err)
			return
		}
		reply(w, resp)
	})
}

// checkMethod takes every method with a body, as NanoMDM does, but nothing from a
// web page, since a browser may show the device's certificate for it.
func (h *Handler) checkMethod(r *http.Request) error {
	if r.ContentLength == 0 && r.Method != http.MethodPut && r.Method != http.MethodPost {
		return errMethod
	}
	writing := *r
	writing.Method = http.MethodPost // the check lets GET pass
	if err := h.origins.Check(&writing); err != nil {
		return errOrigin
	}
	return nil
}

// patience is how long after its arrival a check-in may still be carried out:
// less than devices and proxies commonly wait for an answer.
const patience = 20 * time.Second

// givenUp says whether the client of a request may have given it up.
func (h *Handler) givenUp(ctx context.Context, arrived time.Time) func() bool {
	return func() bool {
		return ctx.Err() != nil || time.Since(arrived) > patience || h.cfg.Stalled != nil && h.cfg.Stalled(arrived)
	}
}

// request makes the request of a device's body. A report that cannot be read
// becomes one of status Unreadable, if the certificate identifies its device:
// the device would otherwise repeat it for ever, and get no other command.
func (h *Handler) request(r *http.Request, role Role, body []byte, cert *x509.Certificate) (*service.Request, error) {
	msg, err := decode(r, role, body)
	if err == nil {
		if err := h.checkSize(msg); err != nil {
			return nil, err
		}
	}
	var req *service.Request
	if err == nil {
		req, err = resolve(r, msg)
	}
	if err != nil && h.cfg.Pins != nil && isReport(r, role, body, msg) {
		req, err = h.unreadable(r, body, cert, err)
	}
	if err != nil {
		return nil, err
	}
	req.Certificate = cert
	return req, nil
}

// isReport reports whether a body that was refused is one of the command
// connection. msg is nil if it could not be decoded.
func isReport(r *http.Request, role Role, body []byte, msg mdm.Message) bool {
	switch {
	case msg != nil:
		// An identity that is there and wrong is never taken for the sender's own.
		who := msg.Identity()
		return msg.Kind() == mdm.KindReport && role != Checkins && who.UDID == "" && who.EnrollmentID == ""
	case bytes.Contains(body, []byte("<key>MessageType</key>")):
		return false
	}
	return role == Reports && mediaType(r) != mdm.ContentTypeCheckin || role == Any && mediaType(r) == mdm.ContentTypeCommand
}

// unreadable makes the request of a report that cannot be read, for cause.
func (h *Handler) unreadable(r *http.Request, body []byte, cert *x509.Certificate, cause error) (*service.Request, error) {
	device, err := h.cfg.Pins.EnrollmentByCertificate(r.Context(), cryptoutil.CertificateHash(cert))
	if errors.Is(err, storage.ErrNotFound) {
		return nil, cause
	} else if err != nil {
		return nil, err
	}
	report := mdm.Unreadable(body)
	req, err := resolve(r, report)
	if err != nil || req.Enroll.DeviceID() != device {
		report.Enrollment = mdm.Enrollment{UDID: device}
		if req, err = resolve(r, report); err != nil {
			return nil, err
		}
	}
	h.cfg.Logger.WarnContext(r.Context(), "unreadable report", "request_id", req.ID, "enrollment_id", req.Enroll.ID,
		"command_uuid", report.CommandUUID, "bytes", len(body), "error", cause)
	h.refusals.count(storage.CauseUnreadable, speaker{cert, true, req.Enroll.ID}, cause)
	return req, nil
}

// mediaType is that of the request, without parameters and in lower case.
func mediaType(r *http.Request) string {
	media, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	return strings.ToLower(strings.TrimSpace(media))
}

// decode decodes a message that belongs on a path of that role.
func decode(r *http.Request, role Role, body []byte) (mdm.Message, error) {
	var (
		msg mdm.Message
		err error
	)
	switch mediaType(r) {
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
	return msg, nil
}

// resolve makes a request of a message, whose identity keys it resolves.
func resolve(r *http.Request, msg mdm.Message) (*service.Request, error) {
	enroll, err := msg.Identity().Resolve()
	if err != nil {
		return nil, badRequest(err)
	}
	req := &service.Request{
		ID: requestlog.ID(r.Context()), TraceParent: requestlog.TraceParent(r.Context()), Client: requestlog.Client(r.Context()),
		Message: msg, Enroll: enroll,
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

// retryNextHour is the Retry-After of a device over its hourly limit, in
// seconds.
const retryNextHour = "600"

// fail answers a device: a status and no text but Apple's own.
func (h *Handler) fail(w http.ResponseWriter, r *http.Request, who speaker, err error) {
	status := h.note(w, r, who, err)
	var se *service.StatusError
	errors.As(err, &se)
	reply(w, refusal(status, se))
}

// note is the one place that maps errors to statuses. It counts the refusal, logs
// it, remembers it for the enrollment, and sets the headers that belong to the status.
func (h *Handler) note(w http.ResponseWriter, r *http.Request, who speaker, err error) int {
	status, level := http.StatusInternalServerError, slog.LevelError
	var se *service.StatusError
	switch {
	case errors.As(err, &se):
		status, level = se.Status, slog.LevelWarn
	case errors.Is(err, errIdentity), errors.Is(err, storage.ErrIdentity), errors.Is(err, storage.ErrNotEnrolled), errors.Is(err, storage.ErrTopic),
		errors.Is(err, storage.ErrTopicCA), errors.Is(err, storage.ErrTooManyChannels):
		status, level = http.StatusBadRequest, slog.LevelWarn
	case errors.Is(err, storage.ErrOwnWord):
		status, level = http.StatusConflict, slog.LevelWarn
	case unavailable(err):
		status, level = http.StatusServiceUnavailable, slog.LevelWarn
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", retryAfter)
	}
	why := reason(err)
	if why == ReasonByteBudget {
		w.Header().Set("Retry-After", retryNextHour)
	}
	if h.cfg.Refused != nil {
		h.cfg.Refused(why)
	}
	switch why {
	case ReasonMethod, ReasonOrigin, ReasonIdentity, ReasonPeer, ReasonUnusedHeader, ReasonTooLarge, ReasonSlow, ReasonOverload, ReasonCrowded, ReasonByteBudget:
		w.Header().Set("Connection", "close") // the body was not read, and is not waited for
	}
	h.refusals.write(r, level, why, status, who, err)
	h.refusals.count(why, who, err)
	return status
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
	case errors.Is(err, errOrigin):
		return ReasonOrigin
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
	case errors.Is(err, storage.ErrTooManyChannels):
		return ReasonChannels
	case errors.Is(err, storage.ErrTopic):
		return ReasonTopic
	case errors.Is(err, storage.ErrTopicCA):
		return ReasonTopicCA
	case errors.Is(err, storage.ErrOwnWord):
		return ReasonOwnWord
	case errors.Is(err, tooLarge):
		return ReasonTooLarge
	case errors.Is(err, errSlow):
		return ReasonSlow
	case errors.Is(err, errOverload):
		return ReasonOverload
	case errors.Is(err, errCrowded):
		return ReasonCrowded
	case errors.Is(err, errByteBudget):
		return ReasonByteBudget
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
		errors.Is(err, storage.ErrGivenUp) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

func badRequest(err error) error {
	return &service.StatusError{Status: http.StatusBadRequest, Err: err}
}
