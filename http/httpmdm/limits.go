package httpmdm

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"hash/maphash"
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

const (
	// largeFrom is the size of bodies beyond which each certificate has a count of
	// its own. There are few of these.
	largeFrom = 16 << 10
	// smallCounts is the number of counts for smaller bodies, which certificates
	// share by chance, and smallExtra what such a request counts besides its bytes:
	// its event takes less in the database than both.
	smallCounts = 1 << 16
	smallExtra  = 1 << 10
)

// byteBudget counts what each certificate sends in an hour. A device that has used
// its budget up with large bodies still sends small ones, such as polls, which have
// a budget of the same size. Safe for concurrent use.
type byteBudget struct {
	limit int64
	seed  maphash.Seed

	mu    sync.Mutex
	since time.Time
	large map[string]int64
	small [smallCounts]int64
}

func newByteBudget(limit int64) *byteBudget {
	return &byteBudget{limit: limit, seed: maphash.MakeSeed(), large: make(map[string]int64)}
}

// smallOf returns the count for small bodies of a certificate; the caller holds mu.
func (b *byteBudget) smallOf(hash string) *int64 {
	return &b.small[maphash.String(b.seed, hash)%smallCounts]
}

// allows says whether a certificate may send a body of n bytes, -1 if its size is
// not known.
func (b *byteBudget) allows(cert *x509.Certificate, n int64) bool {
	hash := cryptoutil.CertificateHash(cert)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(time.Now())
	if *b.smallOf(hash) >= b.limit {
		return false
	}
	return 0 <= n && n <= largeFrom || b.large[hash] < b.limit
}

// add counts a request of n bytes in body and query, whose sender has proven to own
// the certificate.
func (b *byteBudget) add(cert *x509.Certificate, n int) {
	hash := cryptoutil.CertificateHash(cert)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.turn(time.Now())
	if n > largeFrom {
		b.large[hash] += int64(n)
	} else {
		*b.smallOf(hash) += int64(n + smallExtra)
	}
}

// turn begins a new hour if the last one is over; the caller holds mu.
func (b *byteBudget) turn(now time.Time) {
	if now.Sub(b.since) >= time.Hour {
		b.since = now
		clear(b.large)
		clear(b.small[:])
	}
}
