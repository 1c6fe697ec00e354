package httpmdm

import (
	"context"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// refusalInterval is how often refusals are stored, and how long refusalLines
	// are for.
	refusalInterval = 10 * time.Second
	// refusalLines is how many lines of one cause the log gets in an interval.
	refusalLines = 10
	// refusalLimit bounds the refusals that wait to be stored.
	refusalLimit = 4096
	// refusalTimeout is how long storing them may take when the server stops.
	refusalTimeout = 5 * time.Second
)

// speaker is who sent a request, as far as that is known.
type speaker struct {
	certificate *x509.Certificate
	// chained: the certificate is one of the CA's.
	chained bool
	// enrollment is the id that the message names.
	enrollment string
}

// named is the speaker of a body that names an enrollment. Bodies that were
// refused are looked through for one.
func (s speaker) named(body []byte) speaker {
	if id, err := mdm.Unreadable(body).Identity().Resolve(); err == nil {
		s.enrollment = id.ID
	}
	return s
}

// refusals gathers refused requests, for the log and for the store. Safe for
// concurrent use.
type refusals struct {
	log *slog.Logger

	mu      sync.Mutex
	causes  map[string]*causeLines
	pending map[refusalKey]*storage.DeviceRefusal
}

// causeLines counts the lines that the log gets of one cause.
type causeLines struct {
	since       time.Time
	lines, more int
}

type refusalKey struct{ certificate, enrollment, cause string }

func newRefusals(log *slog.Logger) *refusals {
	return &refusals{log: log, causes: make(map[string]*causeLines), pending: make(map[refusalKey]*storage.DeviceRefusal)}
}

// admit says whether the log gets a line about a refusal, and how many of that
// cause it did not get since the last one.
func (f *refusals) admit(cause string, now time.Time) (more int, ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	c := f.causes[cause]
	if c == nil {
		c = &causeLines{since: now}
		f.causes[cause] = c
	}
	if now.Sub(c.since) >= refusalInterval {
		more = c.more
		*c = causeLines{since: now}
	}
	if c.lines >= refusalLines {
		c.more++
		return 0, false
	}
	c.lines++
	return more, true
}

// write logs a refusal in one line.
func (f *refusals) write(r *http.Request, level slog.Level, cause string, status int, who speaker, err error) {
	more, ok := f.admit(cause, time.Now())
	if !ok {
		return
	}
	attrs := []slog.Attr{
		slog.String("request_id", requestlog.ID(r.Context())), slog.Int("status", status), slog.String("cause", cause),
		slog.String("enrollment_id", who.enrollment), slog.String("peer", r.RemoteAddr), slog.String("client", requestlog.Client(r.Context())),
	}
	if c := who.certificate; c != nil {
		attrs = append(attrs, slog.String("certificate_subject", c.Subject.String()), slog.String("certificate_issuer", c.Issuer.String()))
	}
	if more > 0 {
		attrs = append(attrs, slog.Int("not_logged_before", more))
	}
	f.log.LogAttrs(r.Context(), level, "device request refused", append(attrs, slog.Any("error", err))...)
}

// count keeps a refusal until it is stored. It leaves out certificates of other
// CAs, which belong to no device, and refusals because the server is busy or
// without its database, which concern every device.
func (f *refusals) count(cause string, who speaker, err error) {
	if !who.chained || cause == ReasonUnavailable || cause == ReasonOverload {
		return
	}
	k := refusalKey{cryptoutil.CertificateHash(who.certificate), who.enrollment, cause}
	f.mu.Lock()
	defer f.mu.Unlock()
	p := f.pending[k]
	if p == nil {
		if len(f.pending) >= refusalLimit {
			return
		}
		p = &storage.DeviceRefusal{Certificate: k.certificate, Enrollment: k.enrollment, Cause: cause, First: time.Now()}
		f.pending[k] = p
	}
	p.Count++
	p.Last, p.Detail = time.Now(), err.Error()
}

// take returns what waits to be stored, and how many lines of each cause the log
// did not get in an interval that is over.
func (f *refusals) take(now time.Time) (waiting []storage.DeviceRefusal, unlogged map[string]int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pending {
		waiting = append(waiting, *p)
	}
	clear(f.pending)
	unlogged = make(map[string]int)
	for cause, c := range f.causes {
		if c.more > 0 && now.Sub(c.since) >= refusalInterval {
			unlogged[cause] = c.more
			delete(f.causes, cause)
		}
	}
	return waiting, unlogged
}

// RecordRefusals stores the requests that are refused, some seconds later, until
// ctx ends. Without Config.Refusals it only completes the log.
func (h *Handler) RecordRefusals(ctx context.Context) error {
	ticker := time.NewTicker(refusalInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			last, cancel := context.WithTimeout(context.WithoutCancel(ctx), refusalTimeout)
			defer cancel()
			h.storeRefusals(last)
			return ctx.Err()
		case <-ticker.C:
			h.storeRefusals(ctx)
		}
	}
}

// storeRefusals loses what cannot be stored: the log has it.
func (h *Handler) storeRefusals(ctx context.Context) {
	waiting, unlogged := h.refusals.take(time.Now())
	for cause, n := range unlogged {
		h.cfg.Logger.WarnContext(ctx, "more device requests refused", "cause", cause, "not_logged_before", n)
	}
	if h.cfg.Refusals == nil || len(waiting) == 0 {
		return
	}
	if err := h.cfg.Refusals.RecordRefusals(ctx, waiting); err != nil {
		h.cfg.Logger.WarnContext(ctx, "cannot record refused requests", "error", fmt.Errorf("%d kinds: %w", len(waiting), err))
	}
}
