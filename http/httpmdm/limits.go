package httpmdm

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"net/http"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

var (
	errTypeTooLarge = fmt.Errorf("%w for its type: see -max-checkin and -max-status", tooLarge)
	errByteBudget   = fmt.Errorf("%w: the device has sent -max-hourly-bytes within the hour", storage.ErrBusy)
)

// bodyLimit is the most bytes of a body whose beginning is known, with which the
// reader goes on or not. It only looks for two keys, parses nothing, and is asked
// once more when the message is decoded: see checkSize. Devices send keys in the
// order of the alphabet, so that the data of a declarative management message
// comes before its type.
func (h *Handler) bodyLimit(r *http.Request, role Role, beginning []byte) int64 {
	_, after, typed := bytes.Cut(beginning, []byte("<key>MessageType</key>"))
	status := bytes.Contains(beginning, []byte("<key>Data</key>"))
	if typed {
		value, _, _ := bytes.Cut(after, []byte("</"))
		status = bytes.HasSuffix(value, []byte("<string>"+mdm.KindDeclarativeManagement)) || len(value) == len(after)
	}
	checkin := typed || role == Checkins || role == Any && mediaType(r) == mdm.ContentTypeCheckin
	switch {
	case !checkin:
		return h.cfg.MaxBody
	case status:
		return h.cfg.MaxStatus
	}
	return h.cfg.MaxCheckin
}

// checkSize refuses a message that is larger than its type may be.
func (h *Handler) checkSize(msg mdm.Message) error {
	limit := h.cfg.MaxCheckin
	switch msg.Kind() {
	case mdm.KindReport:
		return nil
	case mdm.KindDeclarativeManagement:
		limit = h.cfg.MaxStatus
	}
	if int64(len(msg.RawBytes())) > limit {
		return errTypeTooLarge
	}
	return nil
}

// countedFrom is the size of bodies that byteBudget does not count.
const countedFrom = 16 << 10

// byteBudget counts what each certificate sends in an hour, in bodies that are
// larger than countedFrom: there are few of these, and polls are always let in.
// Safe for concurrent use.
type byteBudget struct {
	limit int64

	mu    sync.Mutex
	since time.Time
	sent  map[string]int64
}

func newByteBudget(limit int64) *byteBudget {
	return &byteBudget{limit: limit, sent: make(map[string]int64)}
}

// allows says whether a certificate may send a body of n bytes, -1 if its size is
// not known.
func (b *byteBudget) allows(cert *x509.Certificate, n int64) bool {
	if 0 <= n && n <= countedFrom {
		return true
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(time.Now())
	return b.sent[cryptoutil.CertificateHash(cert)] < b.limit
}

// add counts a body whose sender has proven to own the certificate.
func (b *byteBudget) add(cert *x509.Certificate, n int) {
	if n <= countedFrom {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(time.Now())
	b.sent[cryptoutil.CertificateHash(cert)] += int64(n)
}

// turn begins a new hour if the last one is over; the caller holds mu.
func (b *byteBudget) turn(now time.Time) {
	if now.Sub(b.since) >= time.Hour {
		b.since = now
		clear(b.sent)
	}
}
