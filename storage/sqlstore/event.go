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

// eventInsertColumns are those of an event; the last ones have defaults.
var eventInsertColumns = [...]string{"event_id", "enrollment_id", "enrollment_type", "topic", "created_at",
	"parent_id", "udid", "user_enrollment_id", "apns_topic", "request_type", "status", "command_uuid", "tally", "params", "traceparent", "payload"}

const eventColumnsWithout = 5 // a default

// inUse leaves out the columns of rows that have their default in all of them,
// as half a dozen of a report's: each value of a statement costs.
func inUse(rows [][len(eventInsertColumns)]any) (cols []string, args []any) {
	var used []int
	for c := range eventInsertColumns {
		if c < eventColumnsWithout || slices.ContainsFunc(rows, func(row [len(eventInsertColumns)]any) bool { return !isDefault(row[c]) }) {
			used = append(used, c)
			cols = append(cols, eventInsertColumns[c])
		}
	}
	args = make([]any, 0, len(used)*len(rows))
	for i := range rows {
		for _, c := range used {
			args = append(args, rows[i][c])
		}
	}
	return cols, args
}

func isDefault(value any) bool {
	switch v := value.(type) {
	case string:
		return v == ""
	case int:
		return v == 0
	case []byte:
		return v == nil
	}
	return false
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
		to, err := addressees(ctx, t, ids)
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

// putEvents inserts events, in batches that are numbered later. It belongs
// behind the locks of what the events tell.
func putEvents(ctx context.Context, t *tx, events []outEvent) error {
	for chunk := range slices.Chunk(events, eventRows) {
		rows := make([][len(eventInsertColumns)]any, len(chunk))
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
			rows[i] = [...]any{e.ID, e.enroll.ID, string(e.enroll.Type), e.Topic, micros(e.CreatedAt),
				e.enroll.ParentID, clip(e.UDID), clip(e.Enrollment), clip(e.topic), clip(e.requestType), clip(e.Status), clip(e.CommandUUID),
				e.tally, params, clip(e.TraceParent), t.sealedEvent(e.Topic, e.ID, e.Raw)}
		}
		cols, args := inUse(rows)
		if err := t.upsert(ctx, "nano_events", cols, []string{"event_id"}, nil, args); err != nil {
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
	return t.later(ctx, `INSERT INTO nano_event_batches (batch_id, stamp, size, events)
SELECT ?, `+t.d.greatest+`(`+t.d.number+`, COALESCE(MAX(stamp) + 1, 0)), `+t.d.number+`, ? FROM nano_event_batches WHERE seq = 0`,
		eventID(t.now), t.now, len(ids), string(list))
}
