package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

const (
	// smallPayload is the largest payload, in bytes, that comes with a page
	// of events; larger ones are read one at a time.
	smallPayload = 64 << 10
	// lookRows bounds the events that a reader with a filter reads at once, and
	// idRows the ids of one statement.
	lookRows, idRows = 500, 512
	// logWindow bounds the numbers that one call of ReadEvents reads when few
	// events match.
	logWindow = 10_000
)

// numberedBatch is a numbered batch of events.
type numberedBatch struct {
	id     string
	last   int64 // number of its last event
	size   int64
	newest int64
	// bytes are those of the batch, through those of all batches up to it; 0
	// if that is not known.
	bytes, through int64
}

// batchesAfter reads the batches with events after a number, until they have
// limit of them.
func batchesAfter(ctx context.Context, t *tx, after int64, limit int) (list []numberedBatch, err error) {
	events := int64(0)
	err = t.Query(ctx, `SELECT batch_id, seq, size, newest, stored_bytes, log_bytes FROM nano_event_batches`+t.Dialect.Index("nano_event_batches_seq")+
		` WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit).Each(func(row sqldb.Row) error {
		var b numberedBatch
		if err := row.Scan(&b.id, &b.last, &b.size, &b.newest, &b.bytes, &b.through); err != nil {
			return err
		}
		list = append(list, b)
		if events += min(b.size, b.last-after); events >= int64(limit) {
			return sqldb.ErrStop
		}
		return nil
	})
	return list, err
}

// eventBatch is a numbered batch with its events.
type eventBatch struct {
	id       string
	last     int64
	events   []storage.Event
	payloads []byte // if they were asked for
	cut      bool   // some payloads, or all events, cannot be read
}

// number returns the number of the event at a place.
func (b *eventBatch) number(at int) int64 { return b.last - int64(len(b.events)-1-at) }

// addPayloads gives the events of a batch the payloads that are stored with it.
// A payload that is lost makes RawSize -1: it must not hold up the others.
func (b *eventBatch) addPayloads() {
	rest := b.payloads
	for i := range b.events {
		e := &b.events[i]
		switch {
		case e.RawApart || e.RawSize < 0:
		case e.RawSize > int64(len(rest)):
			e.RawSize, rest, b.cut = -1, nil, true
		default:
			e.Raw, rest = rest[:e.RawSize:e.RawSize], rest[e.RawSize:]
		}
	}
}

// readBatches reads numbered batches, in order, with or without payloads.
// Removed batches are missing, and damaged ones have no events. The statement
// looks batches up by their keys even if it was planned when the tables were
// small, since they grow fast.
func readBatches(ctx context.Context, t *tx, ids []string, payloads bool) (list []eventBatch, err error) {
	q := `SELECT b.batch_id, b.seq, c.details, NULL FROM `
	if payloads {
		q = `SELECT b.batch_id, b.seq, c.details, c.payloads FROM `
	}
	q += t.Dialect.PairTable("id", "command_uuid") + t.Dialect.Lookup(false, "nano_event_batches", "b", "b.batch_id = r.id") + t.Dialect.Lookup(false, "nano_events", "c", "c.batch_id = r.id")
	for chunk := range slices.Chunk(ids, idRows) {
		keys := make([]keyPair, len(chunk))
		for i, id := range chunk {
			keys[i].ID = id
		}
		args, err := t.Dialect.PairArgs(keys)
		if err != nil {
			return nil, err
		}
		if list, err = scanBatches(ctx, t, list, q, args); err != nil {
			return nil, err
		}
	}
	slices.SortFunc(list, func(a, b eventBatch) int { return cmp.Compare(a.last, b.last) })
	return list, nil
}

func scanBatches(ctx context.Context, t *tx, list []eventBatch, q string, args []any) ([]eventBatch, error) {
	err := t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		var b eventBatch
		var details []byte
		if err := row.Scan(&b.id, &b.last, &details, &b.payloads); err != nil {
			return err
		}
		var err error
		if b.events, err = decodeEvents(details); err != nil {
			b.events, b.cut = nil, true // the batches behind it must not wait for it
		}
		for i := range b.events {
			b.events[i].Seq = b.number(i)
		}
		b.payloads, _ = decompress(b.payloads, eventBytes) // addPayloads notices a lost one
		list = append(list, b)
		return nil
	})
	return list, err
}

// idsOf returns the ids of batches.
func idsOf(list []numberedBatch) []string {
	ids := make([]string, len(list))
	for i := range list {
		ids[i] = list[i].id
	}
	return ids
}

// eventsOf reads the events of batches that fit, in order.
func (s *Store) eventsOf(ctx context.Context, t *tx, ids []string, fits func(e *storage.Event) bool) ([]storage.Event, error) {
	batches, err := readBatches(ctx, t, ids, true)
	if err != nil {
		return nil, err
	}
	var events []storage.Event
	for i := range batches {
		b := &batches[i]
		b.addPayloads()
		for j := range b.events {
			if fits(&b.events[j]) {
				events = append(events, b.events[j])
			}
		}
		if b.cut {
			s.unreadable.Add(1)
			s.log.Error("events or payloads of them cannot be read any more, and are left out", "batch", b.id, "through", b.last)
		}
	}
	return events, nil
}

// addApart reads small payloads that are stored apart.
func (s *Store) addApart(ctx context.Context, t *tx, events []storage.Event) error {
	left := make(map[string][]*storage.Event) // one may be stored twice
	var keys []keyPair
	for i := range events {
		if r := &events[i]; r.RawApart && r.RawSize <= smallPayload {
			left[r.ID] = append(left[r.ID], r)
			keys = append(keys, keyPair{ID: r.ID})
			r.RawSize, r.RawApart = -1, false // unless it is found
		}
	}
	for chunk := range slices.Chunk(keys, idRows) {
		args, err := t.Dialect.PairArgs(chunk)
		if err != nil {
			return err
		}
		if err := s.scanApart(ctx, t, left, args); err != nil {
			return err
		}
	}
	return nil
}

func (s *Store) scanApart(ctx context.Context, t *tx, left map[string][]*storage.Event, args []any) error {
	err := t.Query(ctx, `SELECT p.event_id, p.payload FROM `+t.Dialect.PairTable("id", "command_uuid")+t.Dialect.Lookup(false, "nano_event_payloads", "p", "p.event_id = r.id"), args...).Each(func(row sqldb.Row) error {
		var id string
		var value []byte
		if err := row.Scan(&id, &value); err != nil {
			return err
		}
		raw, err := s.openApart(t, id, value)
		if err != nil {
			return nil // a lost payload must not hold up the others
		}
		for _, r := range left[id] {
			r.Raw, r.RawSize = raw, int64(len(value))
		}
		return nil
	})
	return err
}

// openApart opens a payload that has a row of its own.
func (s *Store) openApart(t *tx, id string, value []byte) ([]byte, error) {
	raw, err := t.opened(eventColumn, id, value)
	if err != nil {
		s.unreadable.Add(1)
		s.log.Error("the payload of an event cannot be read", "event_id", id, "error", err)
	}
	return raw, err
}

// LastEvent implements storage.EventLog.
func (s *Store) LastEvent(ctx context.Context) (int64, error) {
	var last int64
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		var err error
		last, err = lastNumber(ctx, t, "")
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("reading the last event's number: %w", err)
	}
	return last, nil
}

// SinkPage implements storage.Outbox.
func (s *Store) SinkPage(ctx context.Context, after int64, limit int) ([]storage.Event, error) {
	var events []storage.Event
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		events = nil
		for after := after; len(events) == 0; { // the first ones may be removed by now
			list, err := batchesAfter(ctx, t, after, limit)
			if err != nil || len(list) == 0 {
				return err
			}
			events, err = s.eventsOf(ctx, t, idsOf(list), func(e *storage.Event) bool { return e.Seq > after })
			if err != nil {
				return err
			}
			after = list[len(list)-1].last
		}
		events = events[:min(limit, len(events))]
		return s.addApart(ctx, t, events)
	})
	if err != nil {
		return nil, fmt.Errorf("reading events: %w", err)
	}
	return events, nil
}

// ReadEvents implements storage.EventLog.
func (s *Store) ReadEvents(ctx context.Context, scope storage.Scope, q storage.EventQuery) (events []storage.Event, next int64, err error) {
	all := len(q.Topics)+len(scope.Topics) == 0
	match := func(e *storage.Event) bool {
		return (len(q.Topics) == 0 || slices.Contains(q.Topics, e.Topic)) && (len(scope.Topics) == 0 || slices.Contains(scope.Topics, e.APNsTopic))
	}
	step := q.Limit
	if !all {
		step = max(step, lookRows)
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		events, next = nil, q.After
		last, err := lastNumber(ctx, t, "")
		if err != nil {
			return err
		}
		for looked := 0; looked < logWindow && len(events) < q.Limit; looked += step {
			list, err := batchesAfter(ctx, t, next, step)
			if err != nil {
				return err
			}
			if len(list) == 0 { // all events up to the last one are removed
				next = max(next, last)
				break
			}
			ids := idsOf(list)
			if !all { // payloads of events that do not match are not read
				if ids, err = matchingBatches(ctx, t, ids, match); err != nil {
					return err
				}
			}
			found, err := s.eventsOf(ctx, t, ids, func(e *storage.Event) bool { return e.Seq > next && match(e) })
			if err != nil {
				return err
			}
			next = list[len(list)-1].last
			if left := q.Limit - len(events); len(found) >= left {
				found = found[:left]
				next = found[left-1].Seq
			}
			events = append(events, found...)
		}
		return s.addApart(ctx, t, events)
	})
	if err != nil {
		return nil, 0, fmt.Errorf("reading events: %w", err)
	}
	return events, next, nil
}

// matchingBatches returns the batches with an event that matches, and damaged
// ones: the caller's read of them reports the damage.
func matchingBatches(ctx context.Context, t *tx, ids []string, match func(e *storage.Event) bool) (found []string, err error) {
	batches, err := readBatches(ctx, t, ids, false)
	if err != nil {
		return nil, err
	}
	for _, b := range batches {
		if b.cut || slices.ContainsFunc(b.events, func(e storage.Event) bool { return match(&e) }) {
			found = append(found, b.id)
		}
	}
	return found, nil
}

// EventPayload implements storage.EventLog.
func (s *Store) EventPayload(ctx context.Context, seq int64) ([]byte, error) {
	var payload []byte
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		list, err := batchesAfter(ctx, t, seq-1, 1)
		if err != nil {
			return err
		}
		events, err := s.eventsOf(ctx, t, idsOf(list), func(e *storage.Event) bool { return e.Seq == seq })
		if err != nil {
			return err
		}
		if len(events) == 0 {
			return sql.ErrNoRows
		}
		payload = events[0].Raw
		if !events[0].RawApart {
			return nil
		}
		id := events[0].ID
		if err := t.QueryRow(ctx, `SELECT payload FROM nano_event_payloads WHERE event_id = ?`, id).Scan(&payload); err != nil {
			return err
		}
		payload, err = s.openApart(t, id, payload)
		return err
	})
	if errors.Is(err, sql.ErrNoRows) {
		return nil, storage.ErrNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("reading an event's payload: %w", err)
	}
	return payload, nil
}
