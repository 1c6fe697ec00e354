package sqlstore

import (
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
	// numberRows is how many batches one statement numbers. Its text grows
	// with it, and the database compares each row with half of them.
	numberRows = 128
	// lookRows is how many events of the log are looked at at once by who
	// takes few of them, and idRows how many ids one statement has.
	lookRows, idRows = 500, 512
	// oldBatches is how many batches are looked through at once for old events.
	oldBatches = 32
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
	var known, found sql.Null[int64]
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.queryRow(ctx, `SELECT (SELECT value FROM nano_event_counters WHERE name = ?),
			(SELECT size FROM nano_event_batches WHERE seq = 0 LIMIT 1)`, seqCounter).Scan(&known, &found)
	})
	if err != nil {
		return 0, 0, fmt.Errorf("looking for events to number: %w", err)
	}
	if !found.Valid {
		return 0, known.V, nil
	}
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		base, err := lockCounter(ctx, t)
		if err != nil {
			return err
		}
		batches, err := unnumbered(ctx, t, limit)
		if err != nil {
			return err
		}
		last, err = giveNumbers(ctx, t, base, batches)
		n = int(last - base)
		return err
	})
	if err != nil {
		return 0, 0, fmt.Errorf("numbering events: %w", err)
	}
	return n, last, nil
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

// unnumberedBatch is one of nano_event_batches.
type unnumberedBatch struct {
	id   string
	size int
}

// unnumbered reads the batches that are to be numbered next, in order: with
// up to limit events, or a single one.
func unnumbered(ctx context.Context, t *tx, limit int) (batches []unnumberedBatch, err error) {
	rows, err := t.query(ctx, `SELECT batch_id, size FROM nano_event_batches WHERE seq = 0 ORDER BY stamp, batch_id LIMIT ?`, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for events := 0; rows.Next(); {
		var b unnumberedBatch
		if err := rows.Scan(&b.id, &b.size); err != nil {
			return nil, err
		}
		if events += b.size; events > limit && len(batches) > 0 {
			return batches, rows.Close()
		}
		batches = append(batches, b)
	}
	return batches, rows.Err()
}

// numberStatement numbers n batches: the first n pairs of arguments are their
// ids and numbers, then come the ids.
func (d *dialect) numberStatement(n int) string {
	return `UPDATE nano_event_batches SET seq = CASE batch_id` + strings.Repeat(" WHEN ? THEN "+d.number, n) +
		" END WHERE seq = 0 AND batch_id IN " + in(n)
}

// giveNumbers numbers batches behind base and returns the last number.
func giveNumbers(ctx context.Context, t *tx, base int64, batches []unnumberedBatch) (last int64, err error) {
	last = base
	for chunk := range slices.Chunk(batches, numberRows) {
		ids := make([]string, len(chunk))
		var numbers []any
		for i, b := range chunk {
			last += int64(b.size)
			ids[i] = b.id
			numbers = append(numbers, b.id, last)
		}
		_, args := among(ids)
		for len(numbers) < 2*len(args) { // repeats are never reached by CASE
			numbers = append(numbers, ids[len(ids)-1], last)
		}
		done, err := t.exec(ctx, t.d.numberStatement(len(args)), append(numbers, args...)...)
		if err != nil {
			return 0, err
		}
		if done != int64(len(chunk)) {
			return 0, fmt.Errorf("numbered %d of %d batches: somebody else numbers too", done, len(chunk))
		}
	}
	if last > base {
		_, err = t.exec(ctx, `UPDATE nano_event_counters SET value = ? WHERE name = ?`, last, seqCounter)
	}
	return last, err
}

// entry is an event's place in the log.
type entry struct {
	seq int64
	id  string
}

// entries reads which events come after a number, up to limit of them. There
// are none at the end of the log.
func entries(ctx context.Context, t *tx, after int64, limit int) ([]entry, error) {
	var list []entry
	for len(list) < limit {
		// Where much happens there are some dozens in a batch.
		batches, err := numberedBatches(ctx, t, after, max(1, (limit-len(list))/16))
		if err != nil || len(batches) == 0 {
			return list, err
		}
		for _, batch := range batches {
			for _, e := range batch {
				if e.seq > after && len(list) < limit {
					list = append(list, e)
				}
			}
		}
		after = list[len(list)-1].seq
	}
	return list, nil
}

// numberedBatches reads batches that have events after a number.
func numberedBatches(ctx context.Context, t *tx, after int64, limit int) (batches [][]entry, err error) {
	rows, err := t.query(ctx, `SELECT seq, events FROM nano_event_batches`+t.d.by("nano_event_batches_seq")+
		` WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var last int64
		var text []byte
		if err := rows.Scan(&last, &text); err != nil {
			return nil, err
		}
		var ids []string
		if err := json.Unmarshal(text, &ids); err != nil {
			return nil, fmt.Errorf("the batch of events up to %d: %w", last, err)
		}
		batch := make([]entry, len(ids))
		for i, id := range ids {
			batch[i] = entry{last - int64(len(ids)-1-i), id}
		}
		batches = append(batches, batch)
	}
	return batches, rows.Err()
}

// idsOf finds the events of numbers, which are sorted.
func idsOf(ctx context.Context, t *tx, seqs []int64) (map[int64]string, error) {
	ids := make(map[int64]string)
	for len(seqs) > 0 {
		list, err := entries(ctx, t, seqs[0]-1, int(min(lookRows, seqs[len(seqs)-1]-seqs[0]+1)))
		if err != nil || len(list) == 0 {
			return ids, err
		}
		for _, e := range list {
			ids[e.seq] = e.id
		}
		for len(seqs) > 0 && seqs[0] <= list[len(list)-1].seq {
			seqs = seqs[1:]
		}
	}
	return ids, nil
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
const eventColumns = `e.event_id, e.enrollment_id, e.enrollment_type, e.parent_id, e.topic, e.udid, e.user_enrollment_id, e.apns_topic, e.request_type, e.status,
	e.command_uuid, e.tally, e.params, e.traceparent, e.created_at,
	LENGTH(e.payload), CASE WHEN LENGTH(e.payload) <= 65536 THEN e.payload END`

func (s *Store) scanEvent(t *tx, rows *sql.Rows, more ...any) (storage.EventRecord, error) {
	var r storage.EventRecord
	var params []byte
	var created int64
	var size sql.Null[int64]
	err := rows.Scan(append([]any{&r.ID, &r.Enroll.ID, &r.Enroll.Type, &r.Enroll.ParentID, &r.Topic, &r.UDID, &r.Enrollment, &r.APNsTopic, &r.RequestType, &r.Status,
		&r.CommandUUID, &r.Tally, &params, &r.TraceParent, &created, &size, &r.Raw}, more...)...)
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
		r.Seq, r.Attempts = extra.Seq, extra.Attempts
		events = append(events, r)
	}
	return events, rows.Err()
}

// eventsAt reads events of the log that are left and that fit a condition.
// They are looked up by their keys however small the table was when the
// statement was planned, since it grows fast.
func (s *Store) eventsAt(ctx context.Context, t *tx, list []entry, where string, args []any) ([]storage.EventRecord, error) {
	var events []storage.EventRecord
	for chunk := range slices.Chunk(list, idRows) {
		keys := make([]queueKey, len(chunk))
		for i, e := range chunk {
			keys[i].id = e.id
		}
		ids, err := t.d.pairArgs(keys)
		if err != nil {
			return nil, err
		}
		found, err := s.readEvents(ctx, t, `SELECT `+eventColumns+` FROM `+t.d.pairs+t.d.lookup(false, "nano_events", "e", "e.event_id = r.id")+where,
			append(ids, args...), nil)
		if err != nil {
			return nil, err
		}
		byID := make(map[string]*storage.EventRecord, len(found))
		for i := range found {
			byID[found[i].ID] = &found[i]
		}
		for _, e := range chunk {
			if r := byID[e.id]; r != nil {
				r.Seq = e.seq
				events = append(events, *r)
			}
		}
	}
	return events, nil
}

// amongEntries is among for the ids of entries.
func amongEntries(t *tx, list []entry) (is string, args []any) {
	ids := make([]string, len(list))
	for i, e := range list {
		ids[i] = e.id
	}
	return t.among(ids)
}

// SinkPage implements storage.Outbox.
func (s *Store) SinkPage(ctx context.Context, after int64, limit int) ([]storage.EventRecord, error) {
	var events []storage.EventRecord
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		events = nil
		for after := after; len(events) == 0; { // the first ones may be removed by now
			list, err := entries(ctx, t, after, limit)
			if err != nil || len(list) == 0 {
				return err
			}
			if events, err = s.eventsAt(ctx, t, list, "", nil); err != nil {
				return err
			}
			after = list[len(list)-1].seq
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading events: %w", err)
	}
	return events, nil
}

// ReadEvents implements storage.EventLog.
func (s *Store) ReadEvents(ctx context.Context, scope storage.Scope, q storage.EventQuery) (events []storage.EventRecord, next int64, err error) {
	where, args, step := "", []any(nil), q.Limit
	and := " WHERE "
	for _, list := range []struct {
		column string
		values []string
	}{{"e.topic", q.Topics}, {"e.apns_topic", scope.Topics}} {
		if len(list.values) > 0 {
			place, values := among(list.values)
			where, and = where+and+list.column+" IN "+place, " AND "
			args, step = append(args, values...), max(q.Limit, lookRows)
		}
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		events, next = nil, q.After
		last, err := lastNumber(ctx, t, "")
		if err != nil {
			return err
		}
		for looked := 0; looked < logWindow && len(events) < q.Limit; looked += step {
			list, err := entries(ctx, t, next, step)
			if err != nil {
				return err
			}
			if len(list) == 0 { // what there was up to the last one is removed
				next = max(next, last)
				return nil
			}
			found, err := s.eventsAt(ctx, t, list, where, slices.Clone(args))
			if err != nil {
				return err
			}
			next = list[len(list)-1].seq
			if left := q.Limit - len(events); len(found) >= left {
				found = found[:left]
				next = found[left-1].Seq
			}
			events = append(events, found...)
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
		list, err := entries(ctx, t, seq-1, 1)
		if err != nil {
			return err
		}
		if len(list) == 0 || list[0].seq != seq {
			return sql.ErrNoRows
		}
		err = t.queryRow(ctx, `SELECT payload FROM nano_events WHERE event_id = ?`, list[0].id).Scan(&payload)
		if err == nil {
			payload, err = t.opened(eventColumn, list[0].id, payload)
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
		seqs := make([]int64, len(st.Put))
		for i, d := range st.Put {
			seqs[i] = d.Seq
		}
		slices.Sort(seqs)
		ids, err := idsOf(ctx, t, seqs)
		if err != nil {
			return err
		}
		return putDeliveries(ctx, t, sink, st.Put, ids)
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
		seqs, err := deliveryNumbers(ctx, t, `SELECT d.seq FROM nano_event_deliveries d JOIN nano_events e ON e.event_id = d.event_id
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
	deliveryColumns = [...]string{"sink", "seq", "event_id", "enrollment_id", "state", "attempts", "next_at", "last_error", "updated_at"}
	deliverySets    = [...]string{"state", "attempts", "next_at", "last_error", "updated_at"}
)

// putDeliveries stores deliveries of a sink; ids are the events of their
// numbers.
func putDeliveries(ctx context.Context, t *tx, sink string, deliveries []storage.Delivery, ids map[int64]string) error {
	for chunk := range slices.Chunk(deliveries, deliveryRows) {
		args := make([]any, 0, len(deliveryColumns)*len(chunk))
		for _, d := range chunk {
			args = append(args, sink, d.Seq, ids[d.Seq], d.Enrollment, int(d.State), d.Attempts, null(micros(d.NextAt)), d.Error, t.now)
		}
		if err := t.upsert(ctx, "nano_event_deliveries", deliveryColumns[:], []string{"sink", "seq"}, deliverySets[:], args); err != nil {
			return err
		}
	}
	return nil
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
const deliveryTables = `, d.seq, d.attempts FROM nano_event_deliveries d JOIN nano_events e ON e.event_id = d.event_id `

func deliveryOf(r *storage.EventRecord) []any { return []any{&r.Seq, &r.Attempts} }

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
		events, err = s.readEvents(ctx, t, `SELECT `+eventColumns+deliveryTables+where, slices.Clone(args), deliveryOf)
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
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		n, next = 0, 0
		list, states, err := mayRedeliver(ctx, t, r, after, through)
		if err != nil || len(list) == 0 {
			return err
		}
		events, err := describe(ctx, t, list)
		if err != nil {
			return err
		}
		ids := make(map[int64]string)
		var put []storage.Delivery
		full := func() bool { return r.Limit > 0 && total+int64(len(put)) >= int64(r.Limit) }
		for i := 0; i < len(list) && !full(); i++ {
			seq := list[i].seq
			e, left := events[list[i].id]
			if next = seq; !left || states[seq] == storage.DeliveryWaiting || !sink.Match(&e) {
				continue
			}
			ids[seq] = e.ID
			put = append(put, storage.Delivery{Seq: seq, Enrollment: e.Enroll.ID, State: storage.DeliveryAgain, NextAt: fromMicros(t.now)})
		}
		if len(list) < redeliverRows {
			next = 0
		}
		n = int64(len(put))
		return putDeliveries(ctx, t, r.Sink, put, ids)
	})
	return n, next, err
}

// mayRedeliver reads what comes next in a range of the log, or of the sink's
// dead letters, and how it stands with the sink.
func mayRedeliver(ctx context.Context, t *tx, r storage.Redelivery, after, through int64) (list []entry, states map[int64]storage.DeliveryState, err error) {
	where, args := "", []any{r.Sink, after, through}
	if r.Dead {
		where = ` AND state IN (` + strconv.Itoa(int(storage.DeliveryDead)) + `, ` + strconv.Itoa(int(storage.DeliveryDropped)) + `)`
	} else {
		if list, err = entries(ctx, t, after, redeliverRows); err != nil {
			return nil, nil, err
		}
		list = slices.DeleteFunc(list, func(e entry) bool { return e.seq > through })
		if len(list) == 0 {
			return nil, nil, nil
		}
		args[2] = list[len(list)-1].seq
	}
	rows, err := t.query(ctx, `SELECT seq, event_id, state FROM nano_event_deliveries WHERE sink = ? AND seq > ? AND seq <= ?`+where+
		` ORDER BY seq LIMIT ?`, append(args, redeliverRows)...)
	if err != nil {
		return nil, nil, err
	}
	defer rows.Close()
	states = make(map[int64]storage.DeliveryState)
	for rows.Next() {
		var e entry
		var state storage.DeliveryState
		if err := rows.Scan(&e.seq, &e.id, &state); err != nil {
			return nil, nil, err
		}
		if states[e.seq] = state; r.Dead {
			list = append(list, e)
		}
	}
	return list, states, rows.Err()
}

// describe reads what sinks choose events by, without their payloads, of
// those that can be sent again.
func describe(ctx context.Context, t *tx, list []entry) (map[string]storage.EventRecord, error) {
	is, args := amongEntries(t, list)
	rows, err := t.query(ctx, `SELECT event_id, enrollment_id, enrollment_type, topic, apns_topic, request_type, status, command_uuid, payload IS NULL
		FROM nano_events WHERE event_id `+is, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	events := make(map[string]storage.EventRecord, len(list))
	for rows.Next() {
		var e storage.EventRecord
		var bare bool
		if err := rows.Scan(&e.ID, &e.Enroll.ID, &e.Enroll.Type, &e.Topic, &e.APNsTopic, &e.RequestType, &e.Status, &e.CommandUUID, &bare); err != nil {
			return nil, err
		}
		if !bare || storage.ServerTopic(e.Topic) {
			events[e.ID] = e
		}
	}
	return events, rows.Err()
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
				_, err := t.exec(ctx, `UPDATE nano_events SET payload = NULL WHERE event_id IN
					(SELECT event_id FROM nano_event_deliveries WHERE sink = ? AND seq IN `+place+`)`, append([]any{sink.Name}, args...)...)
				if err != nil {
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
		last, old, err := oldEvents(ctx, t, settled, micros(before), limit)
		if err != nil || len(old) == 0 {
			return err
		}
		for _, sink := range sinks {
			if _, err := t.exec(ctx, `DELETE FROM nano_event_deliveries WHERE sink = ? AND seq <= ?`, sink.Name, last); err != nil {
				return err
			}
		}
		for chunk := range slices.Chunk(old, idRows) {
			is, args := amongEntries(t, chunk)
			if _, err := t.exec(ctx, `DELETE FROM nano_events WHERE event_id `+is, args...); err != nil {
				return err
			}
		}
		_, err = t.exec(ctx, `DELETE FROM nano_event_batches WHERE seq > 0 AND seq <= ?`, last)
		n = len(old)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("removing events: %w", err)
	}
	return n, nil
}

// oldEvents reads the first batches of the log that are old and settled: with
// up to limit events, or a single one. last is where they end.
func oldEvents(ctx context.Context, t *tx, settled, before int64, limit int) (last int64, old []entry, err error) {
	for {
		batches, err := numberedBatches(ctx, t, last, oldBatches)
		if err != nil || len(batches) == 0 {
			return last, old, err
		}
		young, err := youngEvents(ctx, t, slices.Concat(batches...), before)
		if err != nil {
			return 0, nil, err
		}
		for _, batch := range batches {
			end := batch[len(batch)-1].seq
			if end > settled || len(old) > 0 && len(old)+len(batch) > limit ||
				slices.ContainsFunc(batch, func(e entry) bool { return young[e.id] }) {
				return last, old, nil
			}
			last, old = end, append(old, batch...)
		}
	}
}

// youngEvents says which events are not from before a time.
func youngEvents(ctx context.Context, t *tx, list []entry, before int64) (map[string]bool, error) {
	is, args := amongEntries(t, list)
	rows, err := t.query(ctx, `SELECT event_id FROM nano_events WHERE created_at >= ? AND event_id `+is, append([]any{before}, args...)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	young := make(map[string]bool)
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, err
		}
		young[id] = true
	}
	return young, rows.Err()
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
	list, err := entries(ctx, t, from-1, 1)
	if err != nil || len(list) == 0 {
		return time.Time{}, err
	}
	err = t.queryRow(ctx, `SELECT created_at FROM nano_events WHERE event_id = ?`, list[0].id).Scan(&created)
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
