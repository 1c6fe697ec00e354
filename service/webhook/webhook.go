// Package webhook sends events to other systems: the messages of devices, and
// what the server finds by itself.
//
// Its Middleware only annotates a request with the event; the store commits
// the event with the change, in the outbox. A Deliverer, on whichever replica
// holds the lease, numbers committed events and sends them to the sinks: at
// least once, and in order for each enrollment. The JSON is made when an event
// is sent, in MicroMDM's form with NanoMDM's additions.
package webhook

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// topicOf names the event of a message; "" means that the kind has none.
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

// Middleware annotates requests with the events that a sink wants. Without a
// sink nothing is written. secretParams names query parameters of enrollment
// URLs whose values are secret, such as tickets: events have their hashes.
// now is the store's clock. wake is called after an event was committed, unless it is nil, and must not
// block.
func Middleware(sinks *Sinks, secretParams []string, now func() time.Time, wake func()) service.Middleware {
	return func(next service.Handler) service.Handler {
		return service.HandlerFunc(func(ctx context.Context, r *service.Request) (*service.Response, error) {
			topic := topicOf(r.Message.Kind())
			if topic == "" || !sinks.any() {
				return next.Handle(ctx, r)
			}
			e := event(r, topic, now().UTC())
			if len(r.Params) > 0 && len(secretParams) > 0 {
				e.Params = hashParams(r.Params, secretParams)
			}
			if !sinks.Wants(&e, r.Enroll.Type) {
				return next.Handle(ctx, r)
			}
			// Events of about the same time lie beside each other in the
			// database's index.
			e.ID = uuid.Must(uuid.NewV7()).String()
			r.Events = append(r.Events, e)
			resp, err := next.Handle(ctx, r)
			if wake != nil && err == nil {
				wake()
			}
			return resp, err
		})
	}
}

// event makes a request's event without its ID.
func event(r *service.Request, topic string, at time.Time) storage.Event {
	who := r.Message.Identity()
	e := storage.Event{
		Topic:        topic,
		CreatedAt:    at,
		UDID:         short(who.UDID),
		EnrollmentID: short(who.EnrollmentID),
		Params:       r.Params,
		TraceParent:  r.TraceParent,
		Raw:          r.Message.RawBytes(),
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

// hashPrefix begins the value of a secret parameter in an event.
const hashPrefix = "sha256:"

// hashParams returns parameters with the named ones hashed, so that a receiver
// that knows a ticket recognizes it, and no reader of the log learns it. The
// request keeps its own: the authenticate hook gets them as they are.
func hashParams(params map[string]string, secret []string) map[string]string {
	hashed := make(map[string]string, len(params))
	for name, value := range params {
		if slices.ContainsFunc(secret, func(s string) bool { return strings.EqualFold(s, name) }) {
			sum := sha256.Sum256([]byte(value))
			value = hashPrefix + hex.EncodeToString(sum[:])
		}
		hashed[name] = value
	}
	return hashed
}

// maxText is the most characters that a column has for a device's text.
const maxText = 255

// short makes a device's text fit its column.
func short(s string) string {
	if strings.IndexByte(s, 0) >= 0 || !utf8.ValidString(s) {
		s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
	}
	if len(s) > maxText && utf8.RuneCountInString(s) > maxText {
		s = string([]rune(s)[:maxText])
	}
	return s
}
