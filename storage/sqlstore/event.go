package sqlstore

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// eventRows is how many events one statement inserts.
const eventRows = 256

// facts are what an operation knows for its events.
type facts struct {
	// known: the command of a report was queued for the enrollment.
	known bool
	// repeated: the same report came before and its events with it.
	repeated bool
	topic    string // APNs topic, if the message has one
	tally    int    // TokenUpdate
	// requestType of a known command.
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
func outgoing(batch []*pending) []outEvent {
	var events []outEvent
	for _, p := range batch {
		if p.err != nil || p.facts.repeated {
			continue
		}
		for _, e := range p.src.Events {
			events = append(events, outEvent{Event: e, enroll: p.src.Enroll, facts: p.facts})
		}
	}
	return events
}

var eventInsertColumns = [...]string{"event_id", "enrollment_id", "enrollment_type", "parent_id", "topic", "udid",
	"user_enrollment_id", "apns_topic", "request_type", "status", "command_uuid", "tally", "params", "traceparent", "payload", "created_at"}

// insertEvents puts what operations tell into the outbox, with what the
// database knows of the enrollments and commands that it is of.
func insertEvents(ctx context.Context, t *tx, events []outEvent) error {
	if len(events) == 0 {
		return nil
	}
	ids := make([]string, len(events))
	for i := range events {
		ids[i] = events[i].enroll.ID
	}
	to, err := addressees(ctx, t, ids)
	if err != nil {
		return fmt.Errorf("reading enrollments: %w", err)
	}
	types, err := requestTypes(ctx, t, events)
	if err != nil {
		return err
	}
	for i := range events {
		e := &events[i]
		if a := to[e.enroll.ID]; a != nil {
			e.topic = cmp.Or(e.topic, a.topic)
		}
		if e.known {
			e.requestType = types[e.CommandUUID]
		}
	}
	return putEvents(ctx, t, events)
}

// putEvents inserts events, in batches that are numbered later. It belongs
// behind the locks of what the events tell.
func putEvents(ctx context.Context, t *tx, events []outEvent) error {
	for chunk := range slices.Chunk(events, eventRows) {
		args := make([]any, 0, len(eventInsertColumns)*len(chunk))
		ids := make([]string, len(chunk))
		for i := range chunk {
			e := &chunk[i]
			ids[i] = e.ID
			var params []byte
			if len(e.Params) > 0 {
				var err error
				if params, err = json.Marshal(e.Params); err != nil {
					return fmt.Errorf("encoding an event's parameters: %w", err)
				}
			}
			args = append(args, e.ID, e.enroll.ID, string(e.enroll.Type), e.enroll.ParentID, e.Topic, clip(e.UDID),
				clip(e.Enrollment), clip(e.topic), clip(e.requestType), clip(e.Status), clip(e.CommandUUID), e.tally,
				params, clip(e.TraceParent), t.sealedEvent(e.Topic, e.ID, e.Raw), micros(e.CreatedAt))
		}
		if err := t.upsert(ctx, "nano_events", eventInsertColumns[:], []string{"event_id"}, nil, args); err != nil {
			return fmt.Errorf("storing events: %w", err)
		}
		if err := putBatch(ctx, t, ids); err != nil {
			return fmt.Errorf("storing a batch of events: %w", err)
		}
	}
	return nil
}

// putBatch stores which events there are to number. The stamp is larger than
// those of all that were committed before and wait to be numbered, whatever
// the clocks of replicas say, so that batches are numbered in an order in
// which they could have been committed one after the other.
func putBatch(ctx context.Context, t *tx, ids []string) error {
	list, err := json.Marshal(ids)
	if err != nil {
		return err
	}
	_, err = t.exec(ctx, `INSERT INTO nano_event_batches (batch_id, stamp, size, events)
SELECT ?, `+t.d.greatest+`(`+t.d.number+`, COALESCE(MAX(stamp) + 1, 0)), `+t.d.number+`, ? FROM nano_event_batches WHERE seq = 0`,
		eventID(t.now), t.now, len(ids), string(list))
	return err
}

// requestTypes reads those of commands that are known to have been queued.
func requestTypes(ctx context.Context, t *tx, events []outEvent) (map[string]string, error) {
	var uuids []string
	for _, e := range events {
		if e.known && e.CommandUUID != "" {
			uuids = append(uuids, e.CommandUUID)
		}
	}
	if len(uuids) == 0 {
		return nil, nil
	}
	slices.Sort(uuids)
	is, args := t.among(slices.Compact(uuids))
	rows, err := t.query(ctx, "SELECT command_uuid, request_type FROM nano_commands WHERE command_uuid "+is, args...)
	if err != nil {
		return nil, fmt.Errorf("reading request types: %w", err)
	}
	defer rows.Close()
	types := make(map[string]string, len(uuids))
	for rows.Next() {
		var uuid, requestType string
		if err := rows.Scan(&uuid, &requestType); err != nil {
			return nil, fmt.Errorf("reading request types: %w", err)
		}
		types[uuid] = requestType
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("reading request types: %w", err)
	}
	return types, nil
}
