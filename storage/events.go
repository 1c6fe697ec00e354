package storage

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// Devices.Apply stores Source.Events in the transaction of the change, after
// taking its locks, as batches without numbers; the Outbox numbers them later.
// Of two batches without numbers, one that was committed before the other was
// begun has the smaller stamp.

// Topics of events about messages of devices. MicroMDM has the same.
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

// Topics of events about findings of the server. They are written and sent only
// if the filter of a sink names them.
const (
	TopicCommandExpired    = "nanomdm.CommandExpired"
	TopicPushFailed        = "nanomdm.PushFailed"
	TopicPushCertExpiring  = "nanomdm.PushCertificateExpiring"
	TopicIdentityExpiring  = "nanomdm.IdentityCertificateExpiring"
	TopicEnrollmentDeleted = "nanomdm.EnrollmentDeleted"
	TopicEventLogFull      = "nanomdm.EventLogFull"
)

const serverTopics = "nanomdm."

// ServerTopic says whether events of the topic are findings of the server.
func ServerTopic(topic string) bool { return strings.HasPrefix(topic, serverTopics) }

// EventTopics lists every topic, those of devices first.
func EventTopics() []string {
	return []string{
		TopicAuthenticate, TopicTokenUpdate, TopicCheckOut, TopicUserAuthenticate, TopicSetBootstrapToken,
		TopicGetBootstrapToken, TopicConnect, TopicDeclarativeManagement, TopicGetToken,
		TopicCommandExpired, TopicPushFailed, TopicPushCertExpiring, TopicIdentityExpiring, TopicEnrollmentDeleted,
		TopicEventLogFull,
	}
}

// BearsTokens says whether payloads of a topic hold secrets: push, unlock,
// bootstrap and security tokens or digests of passwords, with which a reader
// can act as the device, its user, or the server. A topic counts as one that
// does unless it is listed as harmless.
func BearsTokens(topic string) bool {
	switch topic {
	case TopicAuthenticate, TopicCheckOut, TopicGetBootstrapToken, TopicConnect, TopicDeclarativeManagement,
		TopicCommandExpired, TopicPushFailed, TopicPushCertExpiring, TopicIdentityExpiring, TopicEnrollmentDeleted, TopicEventLogFull:
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

// Idle says whether the event reports a poll without a result.
func (e *Event) Idle() bool {
	return e.Topic == TopicConnect && e.Status == string(mdm.StatusIdle)
}

// EventFilter chooses events. An empty list chooses all; an empty Topics chooses
// all topics of devices.
type EventFilter struct {
	Topics          []string         `json:"topics,omitempty"`
	EnrollmentTypes []mdm.EnrollType `json:"enrollment_types,omitempty"`
	// RequestTypes applies to events of commands; the filter lets others through.
	RequestTypes []string `json:"request_types,omitempty"`
	APNsTopics   []string `json:"apns_topics,omitempty"`
	// Idle lets polls without a result through.
	Idle bool `json:"idle,omitempty"`
}

// Wants says whether the filter may let an event through, by the fields that are
// known before the event is written: Topic, Status and enrollment type.
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

// OnError is the policy for an event that reached the receiver and failed: the
// receiver answered an error or too late, or dropped the connection.
type OnError string

// The policies. The empty one is OnErrorHold.
const (
	// OnErrorHold retries the event as long as if the receiver were down; the
	// later events of its enrollment wait.
	OnErrorHold OnError = "hold"
	// OnErrorSkip makes the event a dead letter after three tries within about
	// a minute, and goes on with the next one.
	OnErrorSkip OnError = "skip"
)

// EventForm is the form in which a sink gets events.
type EventForm string

// The forms.
const (
	// FormEvent is the event as JSON, by POST, signed.
	FormEvent EventForm = ""
	// FormCheckin is the device's check-in as it came, by PUT, as a migration
	// endpoint takes it. The first key is the password of the user nanomdm.
	FormCheckin EventForm = "checkin"
)

// EventSink is a receiver of events.
type EventSink struct {
	Name string
	Form EventForm
	// URL is the address to which events are sent. Without one, events are only
	// kept in the log, for ReadEvents.
	URL string
	// Keys sign; the first one alone signs X-Hmac-Signature. They are secret
	// and sealed.
	Keys []string
	// Tokens lets events through that BearsTokens.
	Tokens  bool
	Filter  EventFilter
	OnError OnError
	// Configured: the sink comes from flags or a file, not from the API. It
	// exists as long as a replica with that configuration runs, which updates
	// SeenAt.
	Configured bool
	SeenAt     time.Time
	// Enabled is cleared when the receiver answers that it is gone; Reason then
	// says so.
	Enabled bool
	Reason  string
	// DownSince is when the receiver began to fail, and DownError how; zero while
	// it takes events. Settle sets them.
	DownSince time.Time
	DownError string
	// Cursor is the number up to which events are delivered, or stored as
	// waiting or dead. The store sets it.
	Cursor    int64
	CreatedAt time.Time
	UpdatedAt time.Time
}

// Wants says whether the sink may get an event, as EventFilter.Wants does.
func (s *EventSink) Wants(e *Event, typ mdm.EnrollType) bool {
	return s.Enabled && (s.Tokens || !BearsTokens(e.Topic)) && s.Filter.Wants(e, typ)
}

// Match says whether the sink gets the event.
func (s *EventSink) Match(r *Event) bool {
	return s.Enabled && (s.Tokens || !BearsTokens(r.Topic)) && s.Filter.Match(r)
}

// EventSinks keeps the sinks. Without an enabled sink no event is written.
type EventSinks interface {
	// EventSinks lists all by name.
	EventSinks(ctx context.Context) ([]EventSink, error)
	// PutEventSink stores or replaces a sink. A new one begins after the last
	// numbered event; an existing one keeps its cursor. ErrConflict if a sink of
	// that name is configured and s is not, or the other way round.
	PutEventSink(ctx context.Context, s EventSink) error
	// DeleteEventSink removes a sink and its deliveries, or fails with
	// ErrNotFound.
	DeleteEventSink(ctx context.Context, name string) error
	// SeeEventSinks sets SeenAt of configured sinks to the present, and ignores
	// unknown names.
	SeeEventSinks(ctx context.Context, names []string) error
}

// EventQuery chooses events of the log.
type EventQuery struct {
	After  int64 // exclusive; 0 is from the beginning
	Limit  int
	Topics []string // empty: all
}

// EventLog reads numbered events. Only committed events get a number, and a later
// number is a later commit: a reader that continues after the last number that
// it read misses nothing.
type EventLog interface {
	// ReadEvents returns events in order, and the number to continue after. That
	// may be the number of an event that the Scope or the topics leave out.
	ReadEvents(ctx context.Context, scope Scope, q EventQuery) (events []Event, next int64, err error)
	// EventPayload reads one payload, or fails with ErrNotFound.
	EventPayload(ctx context.Context, seq int64) ([]byte, error)
	// LastEvent returns the last number that was given, 0 if none.
	LastEvent(ctx context.Context) (int64, error)
}

// Redelivery chooses the events to send to a sink again: those after After up to
// Through, or the dead letters among them.
type Redelivery struct {
	Sink    string
	After   int64
	Through int64 // 0: up to the sink's cursor
	Dead    bool
	Limit   int // at most; 0: none
}

// DeliveryState is the state of an event at a sink that has not got it.
type DeliveryState int

// The states. Numbers are stored.
const (
	// DeliveryWaiting: the event failed, or comes after one of the same
	// enrollment that did.
	DeliveryWaiting DeliveryState = 1
	// DeliveryAgain: an operator asked for another delivery. No event waits for
	// it.
	DeliveryAgain DeliveryState = 2
	// DeliveryDead: a dead letter, kept with its payload.
	DeliveryDead DeliveryState = 3
	// DeliveryDropped: a dead letter because too many events waited. Its payload
	// is removed once no sink needs it, and the state is then DeliveryGone.
	DeliveryDropped DeliveryState = 4
	DeliveryGone    DeliveryState = 5
)

// Delivery is a row for an event that a sink has not got.
type Delivery struct {
	Seq        int64
	Enrollment string    // its id
	CreatedAt  time.Time // of the event
	State      DeliveryState
	Attempts   int
	NextAt     time.Time // of an enrollment's first waiting event, and of DeliveryAgain
	Error      string
}

// WaitingEnrollment is an enrollment with waiting events at a sink.
type WaitingEnrollment struct {
	Enrollment string // its id
	First      int64  // number of its first waiting event
	Attempts   int    // of that one
	NextAt     time.Time
}

// Settlement is the progress of a deliverer at a sink, written in one
// transaction.
type Settlement struct {
	Cursor int64      // the sink's new one; 0 leaves it
	Put    []Delivery // rows to insert or to replace
	Done   []int64    // numbers of delivered events, whose rows are removed
	// Receiver is the receiver's new state; nil: as it was.
	Receiver *ReceiverState
}

// ReceiverState says whether a sink's receiver takes events.
type ReceiverState struct {
	Down  bool
	Error string // of its last failure
}

// MaxCounted is the number at which EventBacklogs stops counting rows: counting
// millions keeps the database busy, and operators do not need the exact number.
const MaxCounted = 100_000

// SinkBacklog counts the events that a sink has not got.
type SinkBacklog struct {
	Sink    string
	Behind  int64     // numbers between its cursor and the last one
	Oldest  time.Time // of those and of the waiting ones; zero: none
	Waiting int64     // rows, by state, up to MaxCounted each
	Again   int64
	Dead    int64
	Dropped int64
}

// Outbox is the deliverer's interface to the events. One replica at a time uses
// it, under a lease. Every write that takes a Lease checks it (ErrLeaseLost).
type Outbox interface {
	// NumberEvents gives the next numbers to committed events, in the order of
	// their commits: to up to limit, or to all of one commit. It returns how
	// many, and the last number that was given.
	NumberEvents(ctx context.Context, l Lease, limit int) (n int, last int64, err error)
	// SinkPage reads up to limit events after a number, for any sink, without
	// payloads over 64 KiB (RawApart).
	SinkPage(ctx context.Context, after int64, limit int) ([]Event, error)
	// Settle writes the progress at a sink. It fails with ErrNotFound, and
	// writes nothing, if the sink was deleted since the caller read it, also if
	// there is a new one of the same name.
	Settle(ctx context.Context, l Lease, sink *EventSink, s Settlement) error
	// GiveUp makes up to limit waiting events of a sink from before a time dead
	// letters, and returns how many.
	GiveUp(ctx context.Context, l Lease, sink *EventSink, before time.Time, text string, limit int) (int, error)
	// TurnOffEventSink disables a sink, for a reason, unless its URL has changed
	// since the caller read it.
	TurnOffEventSink(ctx context.Context, l Lease, sink *EventSink, reason string) error
}

// Deliveries reads the events that a sink has not got.
type Deliveries interface {
	// WaitingEnrollments reads up to limit enrollments with waiting events, the
	// earliest number first.
	WaitingEnrollments(ctx context.Context, sink string, limit int) ([]WaitingEnrollment, error)
	// WaitingEvents reads an enrollment's first waiting events, in order, as
	// SinkPage does.
	WaitingEvents(ctx context.Context, sink, enrollment string, limit int) ([]Event, error)
	// RedeliveredEvents reads up to limit events that are due to be sent again,
	// in order.
	RedeliveredEvents(ctx context.Context, sink string, limit int) ([]Event, error)
	// EventBacklogs counts the events of each enabled sink with a URL, by name.
	EventBacklogs(ctx context.Context) ([]SinkBacklog, error)
}

// Redeliverer has events sent again.
type Redeliverer interface {
	// Redeliver marks events that match the sink as DeliveryAgain, in chunks of
	// one transaction each, and returns how many. ErrNotFound if there is no
	// such sink. Repeating the call is safe. Waiting events, and events whose
	// payload was removed, stay as they are.
	Redeliver(ctx context.Context, r Redelivery) (int64, error)
}

// EventLogSize is the size of the numbered events.
type EventLogSize struct {
	Events int64
	// Bytes is about what they took in the database when they were written.
	// Payloads that were dropped since still count, events of releases that did
	// not count do not.
	Bytes int64
}

// EventUpkeep keeps the log small and writes events that come due by the clock.
// Each call is one small transaction under a lease; the caller paces them.
type EventUpkeep interface {
	// DropPayloads removes payloads of events that a sink dropped, once every
	// enabled sink is done with them. It returns how many.
	DropPayloads(ctx context.Context, l Lease, limit int) (int, error)
	// RemoveEvents removes the oldest events from before a time, with their
	// deliveries: up to limit, or all of one commit. It returns how many. An
	// event that an enabled sink has not settled stays, with all of its commit.
	RemoveEvents(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
	// TrimEvents removes the oldest events that every enabled sink has settled,
	// while the log has more than most bytes: up to limit, or all of one commit.
	// It returns how many. If there are too many bytes it also writes an event,
	// once a day, if a sink names the topic.
	TrimEvents(ctx context.Context, l Lease, most int64, limit int) (int, error)
	// EventExcess returns the number and the time of the last of the oldest
	// events without which the log would have at most that many bytes; zero if
	// it has. It looks at the oldest 10000 events.
	EventExcess(ctx context.Context, most int64) (through int64, newest time.Time, err error)
	// EventLogSize returns the size of the log.
	EventLogSize(ctx context.Context) (EventLogSize, error)
	// NoteExpiring writes an event for each push certificate and each live
	// identity certificate that expires before a time, once for each, if a sink
	// names the topic. It writes up to limit events of each kind and returns
	// how many.
	NoteExpiring(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
	// ForgetEventSinks removes configured sinks that no replica has had in its
	// configuration since a time, with their deliveries, and returns how many.
	ForgetEventSinks(ctx context.Context, l Lease, before time.Time) (int, error)
}
