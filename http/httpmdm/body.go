package httpmdm

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// How long a body may take: little until its first byte, then some time to begin
// with, and more as more has come, so that large results of slow links get
// through and a client that trickles is cut.
const (
	bodyFirst   = 5 * time.Second
	bodyGrace   = 15 * time.Second
	bodyMinRate = 16 << 10 // bytes per second
	bodyLongest = 90 * time.Second
)

// readBody takes a place for the request, of cert unless that is nil, and reads
// the whole body. The bytes that it holds beyond freeBytes are taken from the
// budget as they arrive, so that a client that announces much and sends little
// costs little. limit, if not nil, says from a beginning how long the whole may be.
// release gives place and bytes back and must always be called.
func (h *Handler) readBody(w http.ResponseWriter, r *http.Request, cert *x509.Certificate, limit func(beginning []byte) int64) (body []byte, release func(), err error) {
	if enc := r.Header.Get("Content-Encoding"); enc != "" && !strings.EqualFold(enc, "identity") {
		return nil, func() {}, badRequest(errEncoding)
	}
	if r.ContentLength > h.cfg.MaxBody {
		return nil, func() {}, tooLarge
	}
	place, err := h.places.enter(r, cert)
	if err != nil {
		return nil, func() {}, err
	}
	in := &bodyReader{
		handler: h, place: place, control: http.NewResponseController(w), start: time.Now(), size: r.ContentLength,
		body: http.MaxBytesReader(w, r.Body, h.cfg.MaxBody), limitOf: limit,
	}
	release = func() {
		h.memory.reading.Release(in.held)
		place.leave()
	}
	place.awaitBody(in.cut)
	body, err = in.readAll()
	evicted := place.bodyRead()
	over := (*http.MaxBytesError)(nil)
	switch {
	case err == nil:
		// The deadline would end the request's context.
		_ = in.control.SetReadDeadline(time.Time{})
		return body, release, nil
	case errors.As(err, &over):
		err = tooLarge
	case evicted:
		err = errCrowded
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = errSlow
	case !errors.Is(err, errOverload) && !errors.Is(err, errCrowded) && !errors.Is(err, errTypeTooLarge):
		err = badRequest(fmt.Errorf("reading body: %w", err))
	}
	return nil, release, err
}

// bodyReader reads one body within bounds of time and memory.
type bodyReader struct {
	handler *Handler
	place   *place
	control *http.ResponseController
	start   time.Time
	body    io.Reader
	size    int64 // as announced; -1: not
	held    int64 // of the budget
	limitOf func(beginning []byte) int64
}

// cut makes a reading that is under way fail.
func (b *bodyReader) cut() { _ = b.control.SetReadDeadline(time.Unix(1, 0)) }

// until sets the time at which reading fails. A ResponseWriter of tests may have
// no deadline to set.
func (b *bodyReader) until(after time.Duration) error {
	_ = b.control.SetReadDeadline(b.start.Add(after))
	if b.place.isEvicted() { // it may have been cut before
		return errCrowded
	}
	return nil
}

// take counts that the reader holds room bytes, and held those that it grew out of.
func (b *bodyReader) take(room int64) error {
	more := (room-freeBytes)*readCopies - b.held
	switch {
	case more <= 0:
		return nil
	case !b.place.grow(more):
		return errCrowded
	case !b.handler.memory.reading.TryAcquire(more):
		return errOverload
	}
	b.held += more
	return nil
}

// room is how many bytes to read before the next look at the bounds: all that
// was announced if that is less, and one more to see the end without growing.
func (b *bodyReader) room(want int64) int64 {
	if b.size >= 0 {
		return min(want, b.size+1)
	}
	return want
}

func (b *bodyReader) readAll() (body []byte, err error) {
	var limit time.Duration
	for room := b.room(freeBytes); ; room = b.room(4 * room) {
		if b.limitOf != nil && len(body) > 0 {
			limit := b.limitOf(body)
			if max(int64(len(body)), b.size) > limit {
				return nil, errTypeTooLarge
			}
			room = min(room, limit+1)
		}
		if err := b.take(room); err != nil {
			return nil, err
		}
		body = append(make([]byte, 0, room), body...)
		for len(body) < cap(body) {
			if next := b.limit(len(body), room); next != limit && int64(len(body)) != b.size {
				if err := b.until(next); err != nil {
					return nil, err
				}
				limit = next
			}
			n, err := b.body.Read(body[len(body):cap(body)])
			body = body[:len(body)+n]
			if errors.Is(err, io.EOF) {
				return body, nil
			}
			if err != nil {
				return nil, err
			}
		}
	}
}

// limit is how long it may take until room bytes are there, if have are.
func (b *bodyReader) limit(have int, room int64) time.Duration {
	if have == 0 {
		return bodyFirst
	}
	return min(bodyLongest, bodyGrace+time.Duration(room)*time.Second/bodyMinRate)
}
