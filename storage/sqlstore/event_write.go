package sqlstore

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"

	"github.com/klauspost/compress/s2"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// eventRows and eventBytes bound a batch of events: how many, and the bytes
	// of the payloads that stand with it, and of the parameters of their URLs.
	eventRows  = 256
	eventBytes = 64 << 10
	// maxInlinePayload is the largest payload, in bytes, that stands with its batch:
	// who wants one event of a batch reads all of it.
	maxInlinePayload = 16 << 10
)

// facts are what an operation knows for its events.
type facts struct {
	// repeated: the same report came before and its events with it.
	repeated bool
	topic    string // APNs topic, as far as it was read or is in the message
	tally    int    // TokenUpdate
	// requestType of a command that was queued for the enrollment.
	requestType string
}

// outEvent is an event on its way into the outbox.
type outEvent struct {
	storage.Event
	enroll mdm.EnrollID
	facts
}

// size is about how much the event takes, in bytes.
func (e *outEvent) size() int { return 512 + len(e.Raw) }

// outgoing returns the events of the operations that were carried out.
func outgoing(batch []*opRun) []outEvent {
	var events []outEvent
	for _, p := range batch {
		if p.err != nil || p.settled || p.facts.repeated {
			continue
		}
		for _, e := range p.src.Events {
			events = append(events, outEvent{Event: e, enroll: p.src.Enroll, facts: p.facts})
		}
	}
	return events
}

// insertEvents puts what operations tell into the outbox, with what the
// database knows of the enrollments that it is of.
func insertEvents(ctx context.Context, t *tx, events []outEvent) error {
	if len(events) == 0 {
		return nil
	}
	var ids []string
	for i := range events {
		if e := &events[i]; e.topic == "" {
			ids = append(ids, e.enroll.ID)
		}
	}
	if len(ids) > 0 {
		to, err := eventEnrollments(ctx, t, ids)
		if err != nil {
			return fmt.Errorf("reading enrollments: %w", err)
		}
		for i := range events {
			e := &events[i]
			if a := to[e.enroll.ID]; a != nil {
				e.topic = cmp.Or(e.topic, a.topic)
			}
		}
	}
	return putEvents(ctx, t, events)
}

// eventDetails is an event as the JSON of its batch has it.
type eventDetails struct {
	ID           string            `json:"id"`
	Enrollment   string            `json:"enrollment"`
	Type         mdm.EnrollType    `json:"type"`
	Parent       string            `json:"parent,omitempty"`
	Topic        string            `json:"topic"`
	UDID         string            `json:"udid,omitempty"`
	EnrollmentID string            `json:"enrollment_id,omitempty"`
	APNsTopic    string            `json:"apns_topic,omitempty"`
	RequestType  string            `json:"request_type,omitempty"`
	Status       string            `json:"status,omitempty"`
	CommandUUID  string            `json:"command_uuid,omitempty"`
	Tally        int               `json:"tally,omitempty"`
	Params       map[string]string `json:"params,omitempty"`
	TraceParent  string            `json:"traceparent,omitempty"`
	CreatedAt    int64             `json:"created_at"`
	// Size is that of the payload as it is stored, -1 if there is none.
	Size int `json:"size"`
	// Apart: the payload has a row of nano_event_payloads.
	Apart bool `json:"apart,omitempty"`
}

func (e *outEvent) details() eventDetails {
	d := eventDetails{
		ID: e.ID, Enrollment: e.enroll.ID, Type: e.enroll.Type, Parent: e.enroll.ParentID,
		Topic: e.Topic, UDID: clip(e.UDID), EnrollmentID: clip(e.EnrollmentID), APNsTopic: clip(e.topic), RequestType: clip(e.requestType),
		Status: clip(e.Status), CommandUUID: clip(e.CommandUUID), Tally: e.tally, Params: e.Params, TraceParent: clip(e.TraceParent),
		CreatedAt: micros(e.CreatedAt), Size: len(e.Raw),
		Apart: len(e.Raw) > maxInlinePayload || len(e.Raw) > 0 && storage.BearsTokens(e.Topic),
	}
	if e.Raw == nil {
		d.Size = -1
	}
	return d
}

// record is the event without its payload, which is left if it is apart.
func (d *eventDetails) record(seq int64) storage.EventRecord {
	return storage.EventRecord{
		Event: storage.Event{
			ID: d.ID, Topic: d.Topic, CreatedAt: fromMicros(d.CreatedAt), UDID: d.UDID, EnrollmentID: d.EnrollmentID,
			Status: d.Status, CommandUUID: d.CommandUUID, Params: d.Params, TraceParent: d.TraceParent,
		},
		Seq: seq, Enroll: mdm.EnrollID{Type: d.Type, ID: d.Enrollment, ParentID: d.Parent},
		APNsTopic: d.APNsTopic, RequestType: d.RequestType, Tally: d.Tally,
		RawSize: int64(d.Size), RawLeft: d.Apart,
	}
}

// putEvents inserts events, in batches that are numbered later. It belongs
// behind the locks of what the events tell.
func putEvents(ctx context.Context, t *tx, events []outEvent) error {
	for len(events) > 0 {
		n, err := putBatch(ctx, t, events)
		if err != nil {
			return fmt.Errorf("storing events: %w", err)
		}
		events = events[n:]
	}
	return nil
}

// putBatch inserts the first n events as a batch.
func putBatch(ctx context.Context, t *tx, events []outEvent) (n int, err error) {
	var details []eventDetails
	var payloads []byte
	var apart []any
	var newest int64
	params := 0
	for n < len(events) && n < eventRows {
		e := &events[n]
		d := e.details()
		for k, v := range e.Params {
			params += len(k) + len(v)
		}
		if n > 0 && (params > eventBytes || !d.Apart && len(payloads)+len(e.Raw) > eventBytes) {
			break
		}
		if d.Apart {
			value := t.sealedEvent(e.Topic, e.ID, e.Raw)
			d.Size = len(value)
			apart = append(apart, e.ID, e.Topic, value)
		} else {
			payloads = append(payloads, e.Raw...)
		}
		details, newest = append(details, d), max(newest, d.CreatedAt)
		n++
	}
	return n, storeBatch(ctx, t, details, payloads, apart, newest)
}

// storeBatch inserts a batch. Its stamp is larger than those of all that were
// committed before and wait to be numbered, whatever the clocks of replicas
// say, so that batches are numbered in an order in which they could have been
// committed one after the other.
func storeBatch(ctx context.Context, t *tx, details []eventDetails, payloads []byte, apart []any, newest int64) error {
	text, err := json.Marshal(details)
	if err != nil {
		return err
	}
	if len(apart) > 0 {
		// They may be there: events without a change are stored again if nothing
		// is known of the commit.
		if err := t.Upsert(ctx, "nano_event_payloads", []string{"event_id", "topic", "payload"}, []string{"event_id"}, nil, apart); err != nil {
			return err
		}
	}
	id := eventID(t.Now)
	if err := t.ExecDeferred(ctx, "INSERT INTO nano_events (batch_id, details, payloads) VALUES (?, ?, ?)", id, compress(text), compress(payloads)); err != nil {
		return err
	}
	return t.ExecDeferred(ctx, `INSERT INTO nano_event_batches (batch_id, stamp, size, newest)
SELECT ?, `+t.Dialect.Greatest()+`(`+t.Dialect.IntPlaceholder()+`, COALESCE(MAX(stamp) + 1, 0)), `+t.Dialect.IntPlaceholder()+`, `+t.Dialect.IntPlaceholder()+` FROM nano_event_batches WHERE seq = 0`,
		id, t.Now, len(details), newest)
}

// maxBatchSize bounds what is made room for when details of a batch are read, in
// bytes. As JSON, eventRows of them with all that their columns may have, and the
// longest parameters that fit into a request, take less than half of it.
const maxBatchSize = 16 << 20

// compress compresses what a batch has, as a block of S2. JSON and property lists,
// and those of the reports of one batch above all, are mostly repetition, and bytes
// cost databases, their logs and their disks more than this does; DEFLATE makes them
// a tenth to a quarter smaller for seven to fourteen times the time, which reports
// wait for.
func compress(value []byte) []byte {
	if len(value) == 0 {
		return nil
	}
	return s2.Encode(nil, value)
}

// decompress returns what was compressed. What it says of its size is no reason to
// make room for more than most.
func decompress(value []byte, most int) ([]byte, error) {
	if len(value) == 0 {
		return nil, nil
	}
	size, err := s2.DecodedLen(value)
	if err != nil {
		return nil, err
	}
	if size > most {
		return nil, fmt.Errorf("%d bytes, more than a batch of events has", size)
	}
	return s2.Decode(nil, value)
}

// decompressDetails reads the events of a batch.
func decompressDetails(value []byte) (events []eventDetails, err error) {
	text, err := decompress(value, maxBatchSize)
	if err != nil {
		return nil, err
	}
	err = json.Unmarshal(text, &events)
	return events, err
}
