// Package webhook tells other systems what devices say.
//
// Its Middleware only annotates a request with the event; the store commits
// it with the change, in the outbox. A Deliverer, on whichever replica holds
// the lease, numbers what was committed and sends it to the sinks: at least
// once, and in order for each enrollment. JSON is made when it is sent, in
// MicroMDM's form as NanoMDM has it.
package webhook

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// topicOf names the event of a message; a kind without one has no event.
func topicOf(k mdm.Kind) string {
	switch k {
	case mdm.KindAuthenticate:
		return storage.TopicAuthenticate
	case mdm.KindTokenUpdate:
		return storage.TopicTokenUpdate
	case mdm.KindCheckOut:
		return storage.TopicCheckOut
	case mdm.KindUserAuthenticate:
		return storage.TopicUserAuthenticate
	case mdm.KindSetBootstrapToken:
		return storage.TopicSetBootstrapToken
	case mdm.KindGetBootstrapToken:
		return storage.TopicGetBootstrapToken
	case mdm.KindReport:
		return storage.TopicConnect
	case mdm.KindDeclarativeManagement:
		return storage.TopicDeclarativeManagement
	case mdm.KindGetToken:
		return storage.TopicGetToken
	}
	return ""
}

// Middleware annotates requests with their events, as far as a sink wants
// them: without a sink nothing is written. wake, if not nil, is called after
// an event was committed and must not block.
func Middleware(sinks *Sinks, wake func()) service.Middleware {
	return func(next service.Handler) service.Handler {
		return service.HandlerFunc(func(ctx context.Context, r *service.Request) (*service.Response, error) {
			topic := topicOf(r.Message.Kind())
			if topic == "" || !sinks.any() {
				return next.Handle(ctx, r)
			}
			e := event(r, topic)
			if !sinks.Wants(&e, r.Enroll.Type) {
				return next.Handle(ctx, r)
			}
			e.ID = newID(e.CreatedAt)
			r.Events = append(r.Events, e)
			resp, err := next.Handle(ctx, r)
			if wake != nil && err == nil {
				wake()
			}
			return resp, err
		})
	}
}

// event makes a request's event, but for its ID.
func event(r *service.Request, topic string) storage.Event {
	who := r.Message.Identity()
	e := storage.Event{
		Topic:       topic,
		CreatedAt:   time.Now().UTC(),
		UDID:        short(who.UDID),
		Enrollment:  short(who.EnrollmentID),
		Params:      r.Params,
		TraceParent: r.TraceParent,
		Raw:         r.Message.RawBytes(),
	}
	switch m := r.Message.(type) {
	case *mdm.Report:
		e.Status, e.CommandUUID = short(string(m.Status)), m.CommandUUID
		e.Volatile = m.Status == mdm.StatusIdle
	case *mdm.DeclarativeManagement:
		e.Volatile = len(m.Data) == 0 // a status report has some
	case *mdm.GetBootstrapToken, *mdm.GetToken:
		e.Volatile = true
	}
	return e
}

// maxText is the most characters of a column for a device's words.
const maxText = 255

// short makes a text that a device chose fit a column.
func short(s string) string {
	if strings.IndexByte(s, 0) >= 0 || !utf8.ValidString(s) {
		s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
	}
	if len(s) > maxText && utf8.RuneCountInString(s) > maxText {
		s = string([]rune(s)[:maxText])
	}
	return s
}

// newID makes a UUID of version 7 (RFC 9562): events that come one after the
// other lie beside each other in the database's index.
func newID(at time.Time) string {
	var b [16]byte
	_, _ = rand.Read(b[6:]) // never fails
	ms := at.UnixMilli()
	for i := range 6 {
		b[i] = byte(ms >> (8 * (5 - i)))
	}
	b[6] = b[6]&0x0f | 0x70
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}
