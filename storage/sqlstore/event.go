package sqlstore

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
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
}

// outEvent is an event on its way into the outbox.
type outEvent struct {
	storage.Event
	enroll mdm.EnrollID
	facts  facts
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

var eventInsertColumns = [...]string{"event_id", "enrollment_id", "enrollment_type", "parent_id", "topic", "event_seq", "udid",
	"user_enrollment_id", "apns_topic", "request_type", "status", "command_uuid", "tally", "params", "traceparent", "payload", "created_at"}

// insertEvents puts events into the outbox, unnumbered, each with the next
// place in the order of its enrollment. Those of an enrollment that does not
// exist have no order. to holds enrollments that were locked before.
func insertEvents(ctx context.Context, t *tx, events []outEvent, to map[string]*addressee) error {
	if len(events) == 0 {
		return nil
	}
	missing := make(map[string]bool)
	for _, e := range events {
		if to[e.enroll.ID] == nil {
			missing[e.enroll.ID] = true
		}
	}
	more, err := lockAddressees(ctx, t, slices.Sorted(maps.Keys(missing)))
	if err != nil {
		return fmt.Errorf("locking enrollments: %w", err)
	}
	types, err := requestTypes(ctx, t, events)
	if err != nil {
		return err
	}
	raised := make(map[string]int64)
	var args []any
	for _, e := range events {
		var order int64
		var requestType string
		topic := e.facts.topic
		if a := cmp.Or(to[e.enroll.ID], more[e.enroll.ID]); a != nil {
			raised[e.enroll.ID]++
			order = a.eventSeq + raised[e.enroll.ID]
			topic = cmp.Or(topic, a.topic)
		}
		if e.facts.known {
			requestType = types[e.CommandUUID]
		}
		var params []byte
		if len(e.Params) > 0 {
			if params, err = json.Marshal(e.Params); err != nil {
				return fmt.Errorf("encoding an event's parameters: %w", err)
			}
		}
		args = append(args, e.ID, e.enroll.ID, string(e.enroll.Type), e.enroll.ParentID, e.Topic, order, clip(e.UDID),
			clip(e.Enrollment), clip(topic), requestType, clip(e.Status), clip(e.CommandUUID), e.facts.tally,
			params, clip(e.TraceParent), t.sealedEvent(e.Topic, e.ID, e.Raw), micros(e.CreatedAt))
	}
	width := len(eventInsertColumns)
	for rows := range slices.Chunk(args, eventRows*width) {
		if err := t.upsert(ctx, "nano_events", eventInsertColumns[:], []string{"event_id"}, nil, rows); err != nil {
			return fmt.Errorf("storing events: %w", err)
		}
	}
	return raiseOrder(ctx, t, raised)
}

// requestTypes reads those of commands that are known to have been queued.
func requestTypes(ctx context.Context, t *tx, events []outEvent) (map[string]string, error) {
	var uuids []string
	for _, e := range events {
		if e.facts.known && e.CommandUUID != "" {
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

// raiseOrder takes places in the order of events. Enrollments that take as
// many share a statement.
func raiseOrder(ctx context.Context, t *tx, raised map[string]int64) error {
	byCount := make(map[int64][]string)
	for _, id := range slices.Sorted(maps.Keys(raised)) {
		byCount[raised[id]] = append(byCount[raised[id]], id)
	}
	for _, n := range slices.Sorted(maps.Keys(byCount)) {
		is, args := t.among(byCount[n])
		_, err := t.exec(ctx, "UPDATE nano_enrollments SET event_seq = event_seq + ? WHERE id "+is, append([]any{n}, args...)...)
		if err != nil {
			return fmt.Errorf("ordering events: %w", err)
		}
	}
	return nil
}
