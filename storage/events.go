package storage

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// What a Devices.Apply does with Source.Events, for the Outbox to work: in
// the transaction of the change, behind its locks, it inserts them in batches
// that are not yet numbered. Of two batches that nobody has numbered the one
// that was committed before the other was begun has the smaller stamp. What the
// Event does not have (APNs topic, request type, tally) is the store's to fill.

// Topics of events. Those of a device's messages are MicroMDM's.
const (
	TopicAuthenticate          = "mdm.Authenticate"
	TopicTokenUpdate           = "mdm.TokenUpdate"
	TopicCheckOut              = "mdm.CheckOut"
	TopicUserAuthenticate      = "mdm.UserAuthenticate"
	TopicSetBootstrapToken     = "mdm.SetBootstrapToken"
	TopicGetBootstrapToken     = "mdm.GetBootstrapToken"
	TopicConnect               = "mdm.Connect"
	TopicDeclarativeManagement = "mdm.DeclarativeManagement"
	TopicGetToken              = "mdm.GetToken"
)

// Topics of events that the server finds by itself. They are written and sent
// only where a sink names them.
const (
	TopicCommandExpired    = "nanomdm.CommandExpired"
	TopicPushFailed        = "nanomdm.PushFailed"
	TopicPushCertExpiring  = "nanomdm.PushCertificateExpiring"
	TopicIdentityExpiring  = "nanomdm.IdentityCertificateExpiring"
	TopicEnrollmentDeleted = "nanomdm.EnrollmentDeleted"
)

const serverTopics = "nanomdm."

// ServerTopic says whether the topic is one that the server finds by itself.
func ServerTopic(topic string) bool { return strings.HasPrefix(topic, serverTopics) }

// EventTopics lists every topic, those of devices first.
func EventTopics() []string {
	return []string{
		TopicAuthenticate, TopicTokenUpdate, TopicCheckOut, TopicUserAuthenticate, TopicSetBootstrapToken,
		TopicGetBootstrapToken, TopicConnect, TopicDeclarativeManagement, TopicGetToken,
		TopicCommandExpired, TopicPushFailed, TopicPushCertExpiring, TopicIdentityExpiring, TopicEnrollmentDeleted,
	}
}

// BearsTokens says whether the payload of a topic holds what lets its reader
// act as the device, its user, or the server: push and unlock tokens,
// bootstrap tokens, security tokens, digests of passwords. A topic that is not
// listed as harmless counts as one that does.
func BearsTokens(topic string) bool {
	switch topic {
	case TopicAuthenticate, TopicCheckOut, TopicGetBootstrapToken, TopicConnect, TopicDeclarativeManagement,
		TopicCommandExpired, TopicPushFailed, TopicPushCertExpiring, TopicIdentityExpiring, TopicEnrollmentDeleted:
		return false
	}
	return true
}

// Event reports one change to other systems, and is committed with it. This is
// the store's shape; package webhook has the one that is sent.
//
// The tags name the fields in the stored JSON. A field that is tagged "-" is
// stored in another place, or not at all.
type Event struct {
	// The middleware that makes the event sets these.

	ID        string    `json:"id"`    // UUID, unique
	Topic     string    `json:"topic"` // "mdm.TokenUpdate"
	CreatedAt time.Time `json:"-"`
	// UDID and EnrollmentID are the identifiers in the device's message;
	// EnrollmentID is that of a User Enrollment.
	UDID         string `json:"udid,omitempty"`
	EnrollmentID string `json:"enrollment_id,omitempty"`
	Status       string `json:"status,omitempty"` // reports only
	// CommandUUID is set in reports and in events of commands.
	CommandUUID string            `json:"command_uuid,omitempty"`
	Params      map[string]string `json:"params,omitempty"`
	// TraceParent is the traceparent header of the request, at most 255
	// characters. Receivers get it, too.
	TraceParent string `json:"traceparent,omitempty"`
	Raw         []byte `json:"-"` // the body as it came
	// Volatile marks an event that reports no change (an Idle poll, a Get…):
	// it may be written with the next activity batch, and a crash may lose it.
	Volatile bool `json:"-"`

	// The store sets these when it writes the event.

	Enroll      mdm.EnrollID `json:"-"` // zero for an event that is of no enrollment
	APNsTopic   string       `json:"apns_topic,omitempty"`
	RequestType string       `json:"request_type,omitempty"` // of the event's command, if that is known
	Tally       int          `json:"tally,omitempty"`        // mdm.TokenUpdate: since the last Authenticate
	// RawSize is the size of the payload as stored, in bytes. -1: the event
	// has none, or it was removed because a sink was too far behind.
	RawSize int64 `json:"size"`
	// RawApart says that the payload is stored apart from the event, so that
	// Raw is empty: EventPayload reads it.
	RawApart bool `json:"apart,omitempty"`

	// The store sets these when it reads the event.

	// Seq is the event's number in the log, and the cursor of a reader that
	// got so far. Numbers grow; some are missing.
	Seq int64 `json:"-"`
	// Attempts counts deliveries that failed; WaitingEvents and
	// RedeliveredEvents only.
	Attempts int `json:"-"`
}

// Idle says whether the event is of a poll without a result.
func (e *Event) Idle() bool {
	return e.Topic == TopicConnect && e.Status == string(mdm.StatusIdle)
}

// EventFilter chooses events. An empty list chooses all, but for Topics,
// where empty is all topics of devices.
type EventFilter struct {
	Topics          []string         `json:"topics,omitempty"`
	EnrollmentTypes []mdm.EnrollType `json:"enrollment_types,omitempty"`
	// RequestTypes applies to events of commands; others pass.
	RequestTypes []string `json:"request_types,omitempty"`
	APNsTopics   []string `json:"apns_topics,omitempty"`
	// Idle lets polls without a result through.
	Idle bool `json:"idle,omitempty"`
}

// Wants says whether the filter may let an event through as far as is known
// before the event is written: its Topic, Status and enrollment type.
func (f *EventFilter) Wants(e *Event, typ mdm.EnrollType) bool {
	if len(f.Topics) == 0 {
		if ServerTopic(e.Topic) {
			return false
		}
	} else if !slices.Contains(f.Topics, e.Topic) {
		return false
	}
	if e.Idle() && !f.Idle {
		return false
	}
	return len(f.EnrollmentTypes) == 0 || slices.Contains(f.EnrollmentTypes, typ)
}

// Match says whether the filter lets the event through.
func (f *EventFilter) Match(r *Event) bool {
	if !f.Wants(r, r.Enroll.Type) {
		return false
	}
	if len(f.RequestTypes) > 0 && r.CommandUUID != "" && !slices.Contains(f.RequestTypes, r.RequestType) {
		return false
	}
	return len(f.APNsTopics) == 0 || slices.Contains(f.APNsTopics, r.APNsTopic)
}

// OnError says how a sink treats an event that its receiver has and fails to
// take: it answers an error, or too late, or drops the connection.
type OnError string

// The policies. The empty one is OnErrorHold.
const (
	// OnErrorHold tries the event for as long as a receiver that is down; the
	// later events of its enrollment wait.
	OnErrorHold OnError = "hold"
	// OnErrorSkip makes the event a dead letter after three tries within about
	// a minute, and goes on with the next one.
	OnErrorSkip OnError = "skip"
)

// EventSink is somebody who is told events.
type EventSink struct {
	Name string
	// URL is where events are sent. Without one they are only kept in the
	// log, for readers of ReadEvents.
	URL string
	// Keys sign; the first one alone signs X-Hmac-Signature. They are secret
	// and sealed.
	Keys []string
	// Tokens lets events through that BearsTokens.
	Tokens  bool
	Filter  EventFilter
	OnError OnError
	// Configured: the sink comes from flags or a file, not from the API. It
	// counts while a replica runs that has it there: SeenAt then grows.
	Configured bool
	SeenAt     time.Time
	// Enabled is cleared when a receiver says that it is gone; Reason then
	// says so.
	Enabled bool
	Reason  string
	// Cursor is the number up to which events are settled: delivered, or kept
	// as waiting or dead. The store sets it.
	Cursor    int64
	CreatedAt time.Time
	UpdatedAt time.Time
}

// Wants says whether the sink may take an event, as EventFilter.Wants does.
func (s *EventSink) Wants(e *Event, typ mdm.EnrollType) bool {
	return s.Enabled && (s.Tokens || !BearsTokens(e.Topic)) && s.Filter.Wants(e, typ)
}

// Match says whether the sink takes the event.
func (s *EventSink) Match(r *Event) bool {
	return s.Enabled && (s.Tokens || !BearsTokens(r.Topic)) && s.Filter.Match(r)
}

// EventSinks keeps who is told events. Without an enabled sink no event is
// to be written.
type EventSinks interface {
	// EventSinks lists all by name.
	EventSinks(ctx context.Context) ([]EventSink, error)
	// PutEventSink stores or replaces a sink. A new one begins behind the
	// last event that is numbered, one that is there goes on where it was.
	// ErrConflict if a sink of that name is configured and s is not, or the
	// other way round.
	PutEventSink(ctx context.Context, s EventSink) error
	// DeleteEventSink removes a sink and what waits for it, or fails with
	// ErrNotFound.
	DeleteEventSink(ctx context.Context, name string) error
	// SeeEventSinks sets SeenAt of configured sinks to the present. Names that
	// are not there are left out.
	SeeEventSinks(ctx context.Context, names []string) error
}

// EventQuery asks for events of the log.
type EventQuery struct {
	After  int64 // exclusive; 0 is from the beginning
	Limit  int
	Topics []string // empty: all
}

// EventLog reads what was numbered. A number is only given to events that are
// committed, and larger numbers are committed later: a reader that goes on
// after the last number it saw misses nothing.
type EventLog interface {
	// ReadEvents returns events in order and where to go on: behind the last
	// one that was looked at, which may be one that the Scope or the topics
	// leave out.
	ReadEvents(ctx context.Context, scope Scope, q EventQuery) (events []Event, next int64, err error)
	// EventPayload reads one payload, or fails with ErrNotFound.
	EventPayload(ctx context.Context, seq int64) ([]byte, error)
	// LastEvent returns the last number that was given, 0 if none.
	LastEvent(ctx context.Context) (int64, error)
}

// Redelivery asks for events to be sent to a sink again: those after After up
// to Through, or the dead letters among them.
type Redelivery struct {
	Sink    string
	After   int64
	Through int64 // 0: up to the sink's cursor
	Dead    bool
	Limit   int // at most; 0: none
}

// DeliveryState is how an event stands with a sink that has not got it.
type DeliveryState int

// The states. Numbers are stored.
const (
	// DeliveryWaiting: it failed, or stands behind one of the same enrollment
	// that did.
	DeliveryWaiting DeliveryState = 1
	// DeliveryAgain: it was asked to be sent again. Nothing stands behind it.
	DeliveryAgain DeliveryState = 2
	// DeliveryDead: given up, kept with its payload.
	DeliveryDead DeliveryState = 3
	// DeliveryDropped: given up because too much waited; the payload goes
	// once no sink needs it, and then it is DeliveryGone.
	DeliveryDropped DeliveryState = 4
	DeliveryGone    DeliveryState = 5
)

// Delivery is a row for an event that a sink has not got.
type Delivery struct {
	Seq        int64
	Enrollment string
	CreatedAt  time.Time // of the event
	State      DeliveryState
	Attempts   int
	NextAt     time.Time // waiting heads and DeliveryAgain
	Error      string
}

// WaitingEnrollment is an enrollment with waiting events at a sink.
type WaitingEnrollment struct {
	Enrollment string
	First      int64 // number of its first waiting event
	Attempts   int   // of that one
	NextAt     time.Time
}

// Settlement is what a deliverer has to keep, in one transaction.
type Settlement struct {
	Cursor int64      // the sink's new one; 0 leaves it
	Put    []Delivery // rows to insert or to replace
	Done   []int64    // numbers whose rows are to go: delivered
}

// MaxCounted is where EventBacklogs stops counting rows: an operator need not
// know which million it is, and counting them all keeps the database busy.
const MaxCounted = 100_000

// SinkBacklog is how much a sink has before it.
type SinkBacklog struct {
	Sink    string
	Behind  int64     // numbers behind the last one
	Oldest  time.Time // of those and of the waiting ones; zero: none
	Waiting int64     // rows, by state, up to MaxCounted each
	Again   int64
	Dead    int64
	Dropped int64
}

// Outbox is the deliverer's side of the events: one replica at a time works
// it, under a lease. Every write that takes a Lease checks it (ErrLeaseLost).
type Outbox interface {
	// NumberEvents gives the next numbers to committed events, in the order in
	// which they were committed: to up to limit, or to all that were committed
	// together. It returns how many, and the last number there is.
	NumberEvents(ctx context.Context, l Lease, limit int) (n int, last int64, err error)
	// SinkPage reads up to limit events after a number, for any sink. Payloads
	// over 64 KiB are left (RawApart).
	SinkPage(ctx context.Context, after int64, limit int) ([]Event, error)
	// Settle writes what a deliverer did for a sink as it read it. It fails
	// with ErrNotFound, and writes nothing, if that was deleted, also if there
	// is a new one of its name.
	Settle(ctx context.Context, l Lease, sink *EventSink, s Settlement) error
	// GiveUp makes up to limit waiting events of a sink, that are from before a
	// time, dead letters, and returns how many.
	GiveUp(ctx context.Context, l Lease, sink *EventSink, before time.Time, text string, limit int) (int, error)
	// TurnOffEventSink disables a sink, for a reason, unless it has another
	// URL by now than the one that the caller read.
	TurnOffEventSink(ctx context.Context, l Lease, sink *EventSink, reason string) error
}

// Deliveries reads what a sink has not got.
type Deliveries interface {
	// WaitingEnrollments reads up to limit enrollments with waiting events, the
	// earliest number first.
	WaitingEnrollments(ctx context.Context, sink string, limit int) ([]WaitingEnrollment, error)
	// WaitingEvents reads an enrollment's first waiting events, in order, as
	// SinkPage does.
	WaitingEvents(ctx context.Context, sink, enrollment string, limit int) ([]Event, error)
	// RedeliveredEvents reads up to limit of those that are to be sent again
	// and are due, in order.
	RedeliveredEvents(ctx context.Context, sink string, limit int) ([]Event, error)
	// EventBacklogs counts, for each enabled sink with a URL, by name.
	EventBacklogs(ctx context.Context) ([]SinkBacklog, error)
}

// Redeliverer asks for events again.
type Redeliverer interface {
	// Redeliver marks events that a sink takes as DeliveryAgain and returns
	// how many, in chunks of a transaction each. ErrNotFound if there is no
	// such sink. Repeating it is safe. Events that wait already, and those
	// whose payload was removed, stay as they are.
	Redeliver(ctx context.Context, r Redelivery) (int64, error)
}

// EventUpkeep keeps the log small and tells what nobody else tells. Each call
// is one small transaction under a lease; the caller paces them.
type EventUpkeep interface {
	// DropPayloads removes payloads of events that a sink dropped, once every
	// enabled sink is done with them. It returns how many.
	DropPayloads(ctx context.Context, l Lease, limit int) (int, error)
	// RemoveEvents removes the oldest events that are from before a time, with
	// their deliveries: up to limit, or all that were committed together. It
	// returns how many. What an enabled sink is not done with stays, and what
	// was committed with it.
	RemoveEvents(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
	// NoteExpiring writes an event for each push certificate and each live
	// identity certificate that ends before a time, once for each, as far as
	// a sink names the topic. Up to limit of each kind are taken; it returns
	// how many.
	NoteExpiring(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
	// ForgetEventSinks removes configured sinks, with their deliveries, that
	// no replica had in its configuration since a time, and returns how many.
	ForgetEventSinks(ctx context.Context, l Lease, before time.Time) (int, error)
}
