package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

var (
	_ storage.EventLog    = (*Store)(nil)
	_ storage.EventSinks  = (*Store)(nil)
	_ storage.Outbox      = (*Store)(nil)
	_ storage.Deliveries  = (*Store)(nil)
	_ storage.Redeliverer = (*Store)(nil)
	_ storage.EventUpkeep = (*Store)(nil)
)

const (
	// smallPayload is the largest payload, in bytes, that comes with a page
	// of events; larger ones are read one at a time.
	smallPayload = 64 << 10
	// numberRows is how many events one statement numbers. Its text grows
	// with it, and the database compares each row with half of them.
	numberRows = 128
	// logWindow is how many numbers one call of ReadEvents looks through when
	// few of them match.
	logWindow = 10_000
	// redeliverRows is how many events one transaction marks.
	redeliverRows = 500
	// deliveryRows is how many deliveries one statement writes.
	deliveryRows = 128
)

// seqCounter is the row of nano_event_counters that holds the last number.
const seqCounter = "seq"

// NumberEvents implements storage.Outbox.
func (s *Store) NumberEvents(ctx context.Context, l storage.Lease, limit int) (n int, last int64, err error) {
	// Most looks find nothing, and a transaction would keep SQLite's writer.
	var found bool
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		var one int
		err := t.queryRow(ctx, `SELECT 1 FROM nano_events WHERE seq IS NULL LIMIT 1`).Scan(&one)
		found = err == nil
		if err != nil && !errors.Is(err, sql.ErrNoRows) {
			return err
		}
		last, err = lastNumber(ctx, t, "")
		return err
	})
	if err != nil {
		return 0, 0, fmt.Errorf("looking for events to number: %w", err)
	}
	if !found {
		return 0, last, nil
	}
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		n = 0
		if err := t.checkLease(ctx, l); err != nil {
			return err
		}
		base, err := lockCounter(ctx, t)
		if err != nil {
			return err
		}
		last = base
		// Going on at the last enrollment gives each its turn, however many
		// events come in.
		ids, next, err := unnumbered(ctx, t, *cmp.Or(s.numberFrom.Load(), new(numberPlace)), limit)
		if err != nil {
			return err
		}
		if len(ids) == 0 {
			if ids, next, err = unnumbered(ctx, t, numberPlace{}, limit); err != nil || len(ids) == 0 {
				return err
			}
		}
		if err := giveNumbers(ctx, t, base, ids); err != nil {
			return err
		}
		s.numberFrom.Store(&next)
		n, last = len(ids), base+int64(len(ids))
		return nil
	})
	if err != nil {
		return 0, 0, fmt.Errorf("numbering events: %w", err)
	}
	return n, last, nil
}

// numberPlace is where numbering goes on: at an enrollment, or behind it.
type numberPlace struct {
	enrollment string
	behind     bool
}

// lockCounter locks the last number and reads it. Its row is made if need be,
// so that there is one to lock.
func lockCounter(ctx context.Context, t *tx) (int64, error) {
	last, err := lastNumber(ctx, t, t.d.forUpdate)
	if err != nil || last > 0 {
		return last, err
	}
	if _, err := t.exec(ctx, t.d.upsert("nano_event_counters", []string{"name", "value"}, []string{"name"}, nil), seqCounter, 0); err != nil {
		return 0, err
	}
	return lastNumber(ctx, t, t.d.forUpdate)
}

// lastNumber reads the last number, with a lock if one is asked for.
func lastNumber(ctx context.Context, t *tx, lock string) (int64, error) {
	var last int64
	err := t.queryRow(ctx, `SELECT value FROM nano_event_counters WHERE name = ?`+lock, seqCounter).Scan(&last)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, nil
	}
	return last, err
}

// unnumbered reads the ids of events from a place on, in the order in which
// they are to be numbered. next is where to go on, the beginning if nothing is
// left behind them.
func unnumbered(ctx context.Context, t *tx, from numberPlace, limit int) (ids []string, next numberPlace, err error) {
	compare := ">="
	if from.behind {
		compare = ">"
	}
	rows, err := t.query(ctx, `SELECT event_id, enrollment_id, created_at FROM nano_events
		WHERE seq IS NULL AND enrollment_id `+compare+` ? ORDER BY enrollment_id, event_seq, created_at, event_id LIMIT ?`, from.enrollment, limit)
	if err != nil {
		return nil, next, err
	}
	defer rows.Close()
	type event struct {
		id string
		at int64
	}
	var events []event
	var enrollment string
	var latest int64
	several := false
	for rows.Next() {
		var e event
		var of string
		if err := rows.Scan(&e.id, &of, &e.at); err != nil {
			return nil, next, err
		}
		several = several || len(events) > 0 && of != enrollment
		// The clocks of replicas differ, the order inside an enrollment is
		// the database's.
		if of == enrollment {
			e.at = max(e.at, latest)
		}
		enrollment, latest = of, e.at
		events = append(events, e)
	}
	if err := rows.Err(); err != nil {
		return nil, next, err
	}
	if len(events) == limit {
		next = numberPlace{enrollment: enrollment, behind: !several}
	}
	slices.SortStableFunc(events, func(a, b event) int { return cmp.Compare(a.at, b.at) })
	for _, e := range events {
		ids = append(ids, e.id)
	}
	return ids, next, nil
}

// numberStatement numbers events by their place in a list of 1, 2, 4, ...
// ids, after the counter.
func numberStatement(n int) string {
	var b strings.Builder
	b.WriteString(`UPDATE nano_events SET seq = (SELECT value FROM nano_event_counters WHERE name = '` + seqCounter + `') + CASE event_id`)
	for i := range n {
		b.WriteString(" WHEN ? THEN " + strconv.Itoa(i+1))
	}
	b.WriteString(" END WHERE seq IS NULL AND event_id IN " + in(n))
	return b.String()
}

func giveNumbers(ctx context.Context, t *tx, base int64, ids []string) error {
	for chunk := range slices.Chunk(ids, numberRows) {
		// A place that repeats the last id is never reached by CASE.
		place, args := among(chunk)
		n := strings.Count(place, "?")
		done, err := t.exec(ctx, numberStatement(n), append(slices.Clone(args), args...)...)
		if err != nil {
			return err
		}
		if done != int64(len(chunk)) {
			return fmt.Errorf("numbered %d of %d events: somebody else numbers too", done, len(chunk))
		}
		base += int64(len(chunk))
		if _, err := t.exec(ctx, `UPDATE nano_event_counters SET value = ? WHERE name = ?`, base, seqCounter); err != nil {
			return err
		}
	}
	return nil
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

// eventColumns are those of scanEvent; e is nano_events.
const eventColumns = `e.seq, e.event_id, e.enrollment_id, e.enrollment_type, e.parent_id, e.topic, e.event_seq,
	e.udid, e.user_enrollment_id, e.apns_topic, e.request_type, e.status, e.command_uuid, e.tally, e.params, e.traceparent, e.created_at,
	LENGTH(e.payload), CASE WHEN LENGTH(e.payload) <= 65536 THEN e.payload END`

func (s *Store) scanEvent(t *tx, rows *sql.Rows, more ...any) (storage.EventRecord, error) {
	var r storage.EventRecord
	var params []byte
	var created int64
	var size sql.Null[int64]
	err := rows.Scan(append([]any{&r.Seq, &r.ID, &r.Enroll.ID, &r.Enroll.Type, &r.Enroll.ParentID, &r.Topic, &r.EnrollSeq,
		&r.UDID, &r.Enrollment, &r.APNsTopic, &r.RequestType, &r.Status, &r.CommandUUID, &r.Tally, &params, &r.TraceParent, &created,
		&size, &r.Raw}, more...)...)
	if err != nil {
		return r, err
	}
	r.CreatedAt = fromMicros(created)
	r.RawSize = -1
	if size.Valid {
		r.RawSize = size.V
		r.RawLeft = size.V > smallPayload
	}
	if raw, err := t.opened(eventColumn, r.ID, r.Raw); err == nil {
		r.Raw = raw
	} else {
		// One that is lost must not hold up the others.
		s.log.Error("the payload of an event is lost", "event_id", r.ID, "error", err)
		r.Raw, r.RawSize, r.RawLeft = nil, -1, false
	}
	if len(params) > 0 {
		if err := json.Unmarshal(params, &r.Params); err != nil {
			return r, fmt.Errorf("reading the parameters of event %s: %w", r.ID, err)
		}
	}
	return r, nil
}

// readEvents runs a query that begins with eventColumns. more are further
// columns for each record.
func (s *Store) readEvents(ctx context.Context, t *tx, query string, args []any, more func(r *storage.EventRecord) []any) ([]storage.EventRecord, error) {
	rows, err := t.query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var events []storage.EventRecord
	for rows.Next() {
		var extra storage.EventRecord
		var columns []any
		if more != nil {
			columns = more(&extra)
		}
		r, err := s.scanEvent(t, rows, columns...)
		if err != nil {
			return nil, err
		}
		r.Attempts = extra.Attempts
		events = append(events, r)
	}
	return events, rows.Err()
}

// SinkPage implements storage.Outbox.
func (s *Store) SinkPage(ctx context.Context, after int64, limit int) ([]storage.EventRecord, error) {
	var events []storage.EventRecord
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		var err error
		events, err = s.readEvents(ctx, t, `SELECT `+eventColumns+` FROM nano_events e WHERE e.seq > ? ORDER BY e.seq LIMIT ?`,
			[]any{after, limit}, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading events: %w", err)
	}
	return events, nil
}

// ReadEvents implements storage.EventLog.
func (s *Store) ReadEvents(ctx context.Context, scope storage.Scope, q storage.EventQuery) (events []storage.EventRecord, next int64, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		last, err := lastNumber(ctx, t, "")
		if err != nil {
			return err
		}
		var first sql.Null[int64]
		if err := t.queryRow(ctx, `SELECT MIN(seq) FROM nano_events WHERE seq > ?`, q.After).Scan(&first); err != nil {
			return err
		}
		after := q.After
		if !first.Valid { // nothing is left of what there was
			events, next = nil, max(after, last)
			return nil
		}
		after = max(after, first.V-1)
		through := min(last, after+logWindow)
		where, args := "e.seq > ? AND e.seq <= ?", []any{after, through}
		for _, list := range []struct {
			column string
			values []string
		}{{"e.topic", q.Topics}, {"e.apns_topic", scope.Topics}} {
			if len(list.values) > 0 {
				place, values := among(list.values)
				where += " AND " + list.column + " IN " + place
				args = append(args, values...)
			}
		}
		events, err = s.readEvents(ctx, t, `SELECT `+eventColumns+` FROM nano_events e WHERE `+where+` ORDER BY e.seq LIMIT ?`,
			append(args, q.Limit), nil)
		if err != nil {
			return err
		}
		next = max(q.After, through)
		if len(events) == q.Limit && len(events) > 0 {
			next = events[len(events)-1].Seq
		}
		return nil
	})
	if err != nil {
		return nil, 0, fmt.Errorf("reading events: %w", err)
	}
	return events, next, nil
}

// EventPayload implements storage.EventLog.
func (s *Store) EventPayload(ctx context.Context, seq int64) ([]byte, error) {
	var payload []byte
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		var id string
		err := t.queryRow(ctx, `SELECT event_id, payload FROM nano_events WHERE seq = ?`, seq).Scan(&id, &payload)
		if err == nil {
			payload, err = t.opened(eventColumn, id, payload)
		}
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

// Settle implements storage.Outbox.
func (s *Store) Settle(ctx context.Context, l storage.Lease, k *storage.EventSink, st storage.Settlement) error {
	sink := k.Name
	err := s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		if err := lockSink(ctx, t, k); err != nil {
			return err
		}
		if st.Cursor > 0 {
			if _, err := t.exec(ctx, `UPDATE nano_event_sinks SET cursor_seq = ? WHERE name = ?`, st.Cursor, sink); err != nil {
				return err
			}
		}
		for chunk := range slices.Chunk(st.Done, deliveryRows) {
			place, args := amongNumbers(chunk)
			if _, err := t.exec(ctx, `DELETE FROM nano_event_deliveries WHERE sink = ? AND seq IN `+place, append([]any{sink}, args...)...); err != nil {
				return err
			}
		}
		for chunk := range slices.Chunk(st.Put, deliveryRows) {
			if err := putDeliveries(ctx, t, sink, chunk); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("settling events of sink %s: %w", sink, err)
	}
	return nil
}

// GiveUp implements storage.Outbox.
func (s *Store) GiveUp(ctx context.Context, l storage.Lease, k *storage.EventSink, before time.Time, text string, limit int) (int, error) {
	var n int
	err := s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		if err := lockSink(ctx, t, k); err != nil {
			return err
		}
		seqs, err := deliveryNumbers(ctx, t, `SELECT d.seq FROM nano_event_deliveries d JOIN nano_events e ON e.seq = d.seq
			WHERE d.sink = ? AND d.state = ? AND e.created_at < ? ORDER BY d.seq LIMIT ?`,
			k.Name, int(storage.DeliveryWaiting), micros(before), limit)
		if err != nil {
			return err
		}
		n = len(seqs)
		for chunk := range slices.Chunk(seqs, deliveryRows) {
			place, args := amongNumbers(chunk)
			_, err := t.exec(ctx, `UPDATE nano_event_deliveries SET state = ?, next_at = NULL, last_error = ?, updated_at = ? WHERE sink = ? AND seq IN `+place,
				append([]any{int(storage.DeliveryDead), text, t.now, k.Name}, args...)...)
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("giving events of sink %s up: %w", k.Name, err)
	}
	return n, nil
}

var (
	deliveryColumns = [...]string{"sink", "seq", "enrollment_id", "state", "attempts", "next_at", "last_error", "updated_at"}
	deliverySets    = [...]string{"state", "attempts", "next_at", "last_error", "updated_at"}
)

func putDeliveries(ctx context.Context, t *tx, sink string, deliveries []storage.Delivery) error {
	args := make([]any, 0, len(deliveryColumns)*len(deliveries))
	for _, d := range deliveries {
		args = append(args, sink, d.Seq, d.Enrollment, int(d.State), d.Attempts, null(micros(d.NextAt)), d.Error, t.now)
	}
	return t.upsert(ctx, "nano_event_deliveries", deliveryColumns[:], []string{"sink", "seq"}, deliverySets[:], args)
}

// amongNumbers is among for numbers.
func amongNumbers(numbers []int64) (place string, args []any) {
	n := 1
	for n < len(numbers) {
		n *= 2
	}
	args = make([]any, n)
	for i := range args {
		args[i] = numbers[min(i, len(numbers)-1)]
	}
	return in(n), args
}

// WaitingLanes implements storage.Deliveries.
func (s *Store) WaitingLanes(ctx context.Context, sink string, limit int) ([]storage.Lane, error) {
	var lanes []storage.Lane
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		lanes = nil
		// Only the first row of a lane has a time and attempts.
		rows, err := t.query(ctx, `SELECT enrollment_id, MIN(seq), MAX(attempts), MAX(next_at) FROM nano_event_deliveries
			WHERE sink = ? AND state = ? GROUP BY enrollment_id ORDER BY MIN(seq) LIMIT ?`, sink, int(storage.DeliveryWaiting), limit)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var lane storage.Lane
			var next sql.Null[int64]
			if err := rows.Scan(&lane.Enrollment, &lane.First, &lane.Attempts, &next); err != nil {
				return err
			}
			lane.NextAt = fromMicros(next.V)
			lanes = append(lanes, lane)
		}
		return rows.Err()
	})
	if err != nil {
		return nil, fmt.Errorf("reading what waits for sink %s: %w", sink, err)
	}
	return lanes, nil
}

// deliveryTables joins the events of deliveries.
const deliveryTables = `, d.attempts FROM nano_event_deliveries d JOIN nano_events e ON e.seq = d.seq `

func attemptsOf(r *storage.EventRecord) []any { return []any{&r.Attempts} }

// WaitingEvents implements storage.Deliveries.
func (s *Store) WaitingEvents(ctx context.Context, sink, enrollment string, limit int) ([]storage.EventRecord, error) {
	return s.deliveries(ctx, `WHERE d.sink = ? AND d.state = ? AND d.enrollment_id = ? ORDER BY d.seq LIMIT ?`,
		sink, int(storage.DeliveryWaiting), enrollment, limit)
}

// RedeliveredEvents implements storage.Deliveries.
func (s *Store) RedeliveredEvents(ctx context.Context, sink string, limit int) ([]storage.EventRecord, error) {
	return s.deliveries(ctx, `WHERE d.sink = ? AND d.state = ? AND d.next_at <= ? ORDER BY d.next_at, d.seq LIMIT ?`,
		sink, int(storage.DeliveryAgain), micros(s.now()), limit)
}

func (s *Store) deliveries(ctx context.Context, where string, args ...any) ([]storage.EventRecord, error) {
	var events []storage.EventRecord
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		var err error
		events, err = s.readEvents(ctx, t, `SELECT `+eventColumns+deliveryTables+where, slices.Clone(args), attemptsOf)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading deliveries: %w", err)
	}
	return events, nil
}

// Redeliver implements storage.Redeliverer.
func (s *Store) Redeliver(ctx context.Context, r storage.Redelivery) (int64, error) {
	sinks, err := s.EventSinks(ctx)
	if err != nil {
		return 0, err
	}
	i := slices.IndexFunc(sinks, func(k storage.EventSink) bool { return k.Name == r.Sink })
	if i < 0 {
		return 0, fmt.Errorf("sink %s: %w", r.Sink, storage.ErrNotFound)
	}
	sink := &sinks[i]
	// What is behind the cursor comes by itself.
	through := sink.Cursor
	if r.Through > 0 {
		through = min(through, r.Through)
	}
	var total int64
	for after := r.After; after < through; {
		n, next, err := s.redeliverSome(ctx, sink, r, total, after, through)
		if err != nil {
			return total, fmt.Errorf("asking for events again: %w", err)
		}
		total += n
		if next == 0 || r.Limit > 0 && total >= int64(r.Limit) {
			break
		}
		after = next
	}
	return total, nil
}

// redeliverSome marks events of the next numbers that there are. next is 0 at
// the end.
func (s *Store) redeliverSome(ctx context.Context, sink *storage.EventSink, r storage.Redelivery, total, after, through int64) (n, next int64, err error) {
	table, where, column := `nano_events e LEFT JOIN nano_event_deliveries d ON d.sink = ? AND d.seq = e.seq`, ``, "e.seq"
	if r.Dead {
		table = `nano_event_deliveries d JOIN nano_events e ON e.seq = d.seq`
		where = `d.sink = ? AND d.state IN (` + strconv.Itoa(int(storage.DeliveryDead)) + `, ` + strconv.Itoa(int(storage.DeliveryDropped)) + `) AND `
		column = "d.seq"
	}
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		n, next = 0, 0
		rows, err := t.query(ctx, `SELECT e.seq, e.enrollment_id, e.enrollment_type, e.topic, e.apns_topic, e.request_type, e.status, e.command_uuid,
			d.state, e.payload IS NULL FROM `+table+` WHERE `+where+column+` > ? AND `+column+` <= ? ORDER BY `+column+` LIMIT ?`,
			r.Sink, after, through, redeliverRows)
		if err != nil {
			return err
		}
		defer rows.Close()
		var put []storage.Delivery
		read := 0
		for rows.Next() && (r.Limit == 0 || total+int64(len(put)) < int64(r.Limit)) {
			var e storage.EventRecord
			var state sql.Null[storage.DeliveryState]
			var bare bool
			if err := rows.Scan(&e.Seq, &e.Enroll.ID, &e.Enroll.Type, &e.Topic, &e.APNsTopic, &e.RequestType, &e.Status, &e.CommandUUID, &state, &bare); err != nil {
				return err
			}
			read, next = read+1, e.Seq
			if state.V == storage.DeliveryWaiting || bare && !storage.ServerTopic(e.Topic) || !sink.Match(&e) {
				continue
			}
			put = append(put, storage.Delivery{Seq: e.Seq, Enrollment: e.Enroll.ID, State: storage.DeliveryAgain, NextAt: fromMicros(t.now)})
		}
		if err := rows.Err(); err != nil {
			return err
		}
		rows.Close()
		if read < redeliverRows {
			next = 0
		}
		n = int64(len(put))
		for chunk := range slices.Chunk(put, deliveryRows) {
			if err := putDeliveries(ctx, t, r.Sink, chunk); err != nil {
				return err
			}
		}
		return nil
	})
	return n, next, err
}

// DropPayloads implements storage.EventUpkeep.
func (s *Store) DropPayloads(ctx context.Context, l storage.Lease, limit int) (int, error) {
	sinks, err := s.EventSinks(ctx)
	if err != nil {
		return 0, err
	}
	var n int
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		n = 0
		if err := t.checkLease(ctx, l); err != nil {
			return err
		}
		settled, err := settledBy(ctx, t, sinks)
		if err != nil {
			return err
		}
		for _, sink := range sinks {
			seqs, err := deliveryNumbers(ctx, t, `SELECT seq FROM nano_event_deliveries WHERE sink = ? AND state = ? AND seq <= ? LIMIT ?`,
				sink.Name, int(storage.DeliveryDropped), settled, limit-n)
			if err != nil {
				return err
			}
			for chunk := range slices.Chunk(seqs, deliveryRows) {
				place, args := amongNumbers(chunk)
				if _, err := t.exec(ctx, `UPDATE nano_events SET payload = NULL WHERE seq IN `+place, slices.Clone(args)...); err != nil {
					return err
				}
				if _, err := t.exec(ctx, `UPDATE nano_event_deliveries SET state = ? WHERE sink = ? AND seq IN `+place,
					append([]any{int(storage.DeliveryGone), sink.Name}, args...)...); err != nil {
					return err
				}
			}
			if n += len(seqs); n >= limit {
				break
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("dropping payloads: %w", err)
	}
	return n, nil
}

func deliveryNumbers(ctx context.Context, t *tx, query string, args ...any) (seqs []int64, err error) {
	rows, err := t.query(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var seq int64
		if err := rows.Scan(&seq); err != nil {
			return nil, err
		}
		seqs = append(seqs, seq)
	}
	return seqs, rows.Err()
}

// settledBy returns the number up to which every enabled sink is done: its
// cursor is behind it and nothing before it waits to be sent.
func settledBy(ctx context.Context, t *tx, sinks []storage.EventSink) (int64, error) {
	settled, err := lastNumber(ctx, t, "")
	if err != nil {
		return 0, err
	}
	for _, sink := range sinks {
		if !sink.Enabled || sink.URL == "" {
			continue
		}
		settled = min(settled, sink.Cursor)
		for _, state := range []storage.DeliveryState{storage.DeliveryWaiting, storage.DeliveryAgain} {
			var first sql.Null[int64]
			err := t.queryRow(ctx, `SELECT MIN(seq) FROM nano_event_deliveries WHERE sink = ? AND state = ?`, sink.Name, int(state)).Scan(&first)
			if err != nil {
				return 0, err
			}
			if first.Valid {
				settled = min(settled, first.V-1)
			}
		}
	}
	return settled, nil
}

// RemoveEvents implements storage.EventUpkeep.
func (s *Store) RemoveEvents(ctx context.Context, l storage.Lease, before time.Time, limit int) (int, error) {
	sinks, err := s.EventSinks(ctx)
	if err != nil {
		return 0, err
	}
	var n int
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		n = 0
		if err := t.checkLease(ctx, l); err != nil {
			return err
		}
		settled, err := settledBy(ctx, t, sinks)
		if err != nil {
			return err
		}
		last, count, err := oldEvents(ctx, t, settled, micros(before), limit)
		if err != nil || count == 0 {
			return err
		}
		for _, sink := range sinks {
			if _, err := t.exec(ctx, `DELETE FROM nano_event_deliveries WHERE sink = ? AND seq <= ?`, sink.Name, last); err != nil {
				return err
			}
		}
		_, err = t.exec(ctx, `DELETE FROM nano_events WHERE seq <= ?`, last)
		n = count
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("removing events: %w", err)
	}
	return n, nil
}

// oldEvents looks how far the log goes that is old and settled.
func oldEvents(ctx context.Context, t *tx, settled, before int64, limit int) (last int64, n int, err error) {
	rows, err := t.query(ctx, `SELECT seq, created_at FROM nano_events WHERE seq > 0 AND seq <= ? ORDER BY seq LIMIT ?`, settled, limit)
	if err != nil {
		return 0, 0, err
	}
	defer rows.Close()
	for rows.Next() {
		var seq, created int64
		if err := rows.Scan(&seq, &created); err != nil {
			return 0, 0, err
		}
		if created >= before {
			break
		}
		last, n = seq, n+1
	}
	return last, n, rows.Err()
}

// EventBacklogs implements storage.Deliveries.
func (s *Store) EventBacklogs(ctx context.Context) ([]storage.SinkBacklog, error) {
	sinks, err := s.EventSinks(ctx)
	if err != nil {
		return nil, err
	}
	var backlogs []storage.SinkBacklog
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		backlogs = nil
		last, err := lastNumber(ctx, t, "")
		if err != nil {
			return err
		}
		for _, sink := range sinks {
			if sink.URL == "" || !sink.Enabled {
				continue
			}
			b := storage.SinkBacklog{Sink: sink.Name, Behind: max(0, last-sink.Cursor)}
			if b.Oldest, err = oldestUnsettled(ctx, t, &sink); err != nil {
				return err
			}
			if err := countDeliveries(ctx, t, &b); err != nil {
				return err
			}
			backlogs = append(backlogs, b)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("counting what waits for sinks: %w", err)
	}
	return backlogs, nil
}

// oldestUnsettled is when the oldest event that a sink has before it, or that
// waits for it, came in; zero if there is none.
func oldestUnsettled(ctx context.Context, t *tx, sink *storage.EventSink) (time.Time, error) {
	var first, created sql.Null[int64]
	err := t.queryRow(ctx, `SELECT MIN(seq) FROM nano_event_deliveries WHERE sink = ? AND state = ?`, sink.Name, int(storage.DeliveryWaiting)).Scan(&first)
	if err != nil {
		return time.Time{}, err
	}
	from := sink.Cursor + 1
	if first.Valid {
		from = min(from, first.V)
	}
	err = t.queryRow(ctx, `SELECT created_at FROM nano_events WHERE seq >= ? ORDER BY seq LIMIT 1`, from).Scan(&created)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, err
	}
	return fromMicros(created.V), nil
}

// countDeliveries counts the rows of each state, as far as it is worth it.
func countDeliveries(ctx context.Context, t *tx, b *storage.SinkBacklog) error {
	for state, into := range map[storage.DeliveryState]*int64{
		storage.DeliveryWaiting: &b.Waiting, storage.DeliveryAgain: &b.Again, storage.DeliveryDead: &b.Dead,
		storage.DeliveryDropped: &b.Dropped, storage.DeliveryGone: &b.Dropped,
	} {
		var n int64
		err := t.queryRow(ctx, `SELECT COUNT(*) FROM (SELECT 1 AS one FROM nano_event_deliveries WHERE sink = ? AND state = ? LIMIT ?) AS counted`,
			b.Sink, int(state), storage.MaxCounted).Scan(&n)
		if err != nil {
			return err
		}
		*into = min(*into+n, storage.MaxCounted)
	}
	return nil
}
