package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
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
	// numberRows is how many batches one statement numbers. Its text grows
	// with it, and the database compares each row with half of them.
	numberRows = 128
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
		return t.QueryRow(ctx, `SELECT (SELECT value FROM nano_event_counters WHERE name = ?),
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
	last, err := lastNumber(ctx, t, t.Dialect.ForUpdate())
	if err != nil || last > 0 {
		return last, err
	}
	if _, err := t.Exec(ctx, t.Dialect.Upsert("nano_event_counters", []string{"name", "value"}, []string{"name"}, nil), seqCounter, 0); err != nil {
		return 0, err
	}
	return lastNumber(ctx, t, t.Dialect.ForUpdate())
}

// lastNumber reads the last number, with a lock if one is asked for.
func lastNumber(ctx context.Context, t *tx, lock string) (int64, error) {
	var last int64
	err := t.QueryRow(ctx, `SELECT value FROM nano_event_counters WHERE name = ?`+lock, seqCounter).Scan(&last)
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
	rows, err := t.Query(ctx, `SELECT batch_id, size FROM nano_event_batches WHERE seq = 0 ORDER BY stamp, batch_id LIMIT ?`, limit)
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
func numberStatement(d *sqldb.Dialect, n int) string {
	return `UPDATE nano_event_batches SET seq = CASE batch_id` + strings.Repeat(" WHEN ? THEN "+d.IntPlaceholder(), n) +
		" END WHERE seq = 0 AND batch_id IN " + sqldb.In(n)
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
		_, args := sqldb.InList(ids)
		for len(numbers) < 2*len(args) { // repeats are never reached by CASE
			numbers = append(numbers, ids[len(ids)-1], last)
		}
		done, err := t.Exec(ctx, numberStatement(t.Dialect, len(args)), append(numbers, args...)...)
		if err != nil {
			return 0, err
		}
		if done != int64(len(chunk)) {
			return 0, fmt.Errorf("numbered %d of %d batches: somebody else numbers too", done, len(chunk))
		}
	}
	if last > base {
		_, err = t.Exec(ctx, `UPDATE nano_event_counters SET value = ? WHERE name = ?`, last, seqCounter)
	}
	return last, err
}

// Settle implements storage.Outbox.
func (s *Store) Settle(ctx context.Context, l storage.Lease, k *storage.EventSink, st storage.Settlement) error {
	sink := k.Name
	err := s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		if err := lockSink(ctx, t, k); err != nil {
			return err
		}
		if st.Cursor > 0 {
			if _, err := t.Exec(ctx, `UPDATE nano_event_sinks SET cursor_seq = ? WHERE name = ?`, st.Cursor, sink); err != nil {
				return err
			}
		}
		for chunk := range slices.Chunk(st.Done, deliveryRows) {
			place, args := sqldb.InList(chunk)
			if _, err := t.Exec(ctx, `DELETE FROM nano_event_deliveries WHERE sink = ? AND seq IN `+place, append([]any{sink}, args...)...); err != nil {
				return err
			}
		}
		batches, err := batchesOf(ctx, t, st.Put)
		if err != nil {
			return err
		}
		return putDeliveries(ctx, t, sink, st.Put, batches)
	})
	if err != nil {
		return fmt.Errorf("settling events of sink %s: %w", sink, err)
	}
	return nil
}

// batchesOf finds the batches that deliveries are in, by the numbers of those.
func batchesOf(ctx context.Context, t *tx, deliveries []storage.Delivery) (map[int64]string, error) {
	seqs := make([]int64, len(deliveries))
	for i, d := range deliveries {
		seqs[i] = d.Seq
	}
	slices.Sort(seqs)
	batches := make(map[int64]string, len(seqs))
	for len(seqs) > 0 {
		list, err := batchesAfter(ctx, t, seqs[0]-1, int(min(lookRows, seqs[len(seqs)-1]-seqs[0]+1)))
		if err != nil || len(list) == 0 {
			return batches, err
		}
		for _, b := range list {
			for len(seqs) > 0 && seqs[0] <= b.last {
				if seqs[0] > b.last-b.size {
					batches[seqs[0]] = b.id
				}
				seqs = seqs[1:]
			}
		}
	}
	return batches, nil
}

// GiveUp implements storage.Outbox.
func (s *Store) GiveUp(ctx context.Context, l storage.Lease, k *storage.EventSink, before time.Time, text string, limit int) (int, error) {
	var n int
	err := s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		if err := lockSink(ctx, t, k); err != nil {
			return err
		}
		rows, err := deliveryRecords(ctx, t, `WHERE sink = ? AND state = ? AND created_at < ? ORDER BY seq LIMIT ?`,
			k.Name, int(storage.DeliveryWaiting), micros(before), limit)
		if err != nil {
			return err
		}
		n = len(rows)
		for chunk := range slices.Chunk(numbersOf(rows), deliveryRows) {
			place, args := sqldb.InList(chunk)
			_, err := t.Exec(ctx, `UPDATE nano_event_deliveries SET state = ?, next_at = NULL, last_error = ?, updated_at = ? WHERE sink = ? AND seq IN `+place,
				append([]any{int(storage.DeliveryDead), text, t.Now, k.Name}, args...)...)
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
	deliveryColumns = [...]string{"sink", "seq", "batch_id", "enrollment_id", "created_at", "state", "attempts", "next_at", "last_error", "updated_at"}
	deliverySets    = [...]string{"state", "attempts", "next_at", "last_error", "updated_at"}
)

// putDeliveries stores deliveries of a sink; batches are those of their
// numbers.
func putDeliveries(ctx context.Context, t *tx, sink string, deliveries []storage.Delivery, batches map[int64]string) error {
	for chunk := range slices.Chunk(deliveries, deliveryRows) {
		args := make([]any, 0, len(deliveryColumns)*len(chunk))
		for _, d := range chunk {
			args = append(args, sink, d.Seq, batches[d.Seq], d.Enrollment, micros(d.CreatedAt), int(d.State), d.Attempts, null(micros(d.NextAt)), d.Error, t.Now)
		}
		if err := t.Upsert(ctx, "nano_event_deliveries", deliveryColumns[:], []string{"sink", "seq"}, deliverySets[:], args); err != nil {
			return err
		}
	}
	return nil
}

// WaitingLanes implements storage.Deliveries.
func (s *Store) WaitingLanes(ctx context.Context, sink string, limit int) ([]storage.Lane, error) {
	var lanes []storage.Lane
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		lanes = nil
		// Only the first row of a lane has a time and attempts.
		rows, err := t.Query(ctx, `SELECT enrollment_id, MIN(seq), MAX(attempts), MAX(next_at) FROM nano_event_deliveries
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

// WaitingEvents implements storage.Deliveries.
func (s *Store) WaitingEvents(ctx context.Context, sink, enrollment string, limit int) ([]storage.EventRecord, error) {
	return s.deliveries(ctx, `WHERE sink = ? AND state = ? AND enrollment_id = ? ORDER BY seq LIMIT ?`,
		sink, int(storage.DeliveryWaiting), enrollment, limit)
}

// RedeliveredEvents implements storage.Deliveries.
func (s *Store) RedeliveredEvents(ctx context.Context, sink string, limit int) ([]storage.EventRecord, error) {
	return s.deliveries(ctx, `WHERE sink = ? AND state = ? AND next_at <= ? ORDER BY next_at, seq LIMIT ?`,
		sink, int(storage.DeliveryAgain), micros(s.now()), limit)
}

// deliveries reads the events of deliveries, in the order of those.
func (s *Store) deliveries(ctx context.Context, where string, args ...any) ([]storage.EventRecord, error) {
	var events []storage.EventRecord
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		rows, err := deliveryRecords(ctx, t, where, slices.Clone(args)...)
		if err != nil || len(rows) == 0 {
			events = nil
			return err
		}
		place := make(map[int64]int, len(rows))
		for i := range rows {
			place[rows[i].seq] = i
		}
		events, err = s.eventsOf(ctx, t, batchesOfRows(rows), func(_ *eventDetails, seq int64) bool {
			_, wanted := place[seq]
			return wanted
		})
		if err != nil {
			return err
		}
		slices.SortFunc(events, func(a, b storage.EventRecord) int { return cmp.Compare(place[a.Seq], place[b.Seq]) })
		for i := range events {
			events[i].Attempts = rows[place[events[i].Seq]].attempts
		}
		return s.addApart(ctx, t, events)
	})
	if err != nil {
		return nil, fmt.Errorf("reading deliveries: %w", err)
	}
	return events, nil
}

// deliveryRow is one of nano_event_deliveries.
type deliveryRow struct {
	seq      int64
	batch    string
	state    storage.DeliveryState
	attempts int
}

func deliveryRecords(ctx context.Context, t *tx, where string, args ...any) (list []deliveryRow, err error) {
	rows, err := t.Query(ctx, `SELECT seq, batch_id, state, attempts FROM nano_event_deliveries `+where, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var r deliveryRow
		if err := rows.Scan(&r.seq, &r.batch, &r.state, &r.attempts); err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	return list, rows.Err()
}

func statesOf(rows []deliveryRow) map[int64]storage.DeliveryState {
	states := make(map[int64]storage.DeliveryState, len(rows))
	for _, r := range rows {
		states[r.seq] = r.state
	}
	return states
}

func numbersOf(rows []deliveryRow) []int64 {
	seqs := make([]int64, len(rows))
	for i := range rows {
		seqs[i] = rows[i].seq
	}
	return seqs
}

// batchesOfRows are the ids of their batches, each once.
func batchesOfRows(rows []deliveryRow) []string {
	ids := make([]string, len(rows))
	for i := range rows {
		ids[i] = rows[i].batch
	}
	slices.Sort(ids)
	return slices.Compact(ids)
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

// redeliverSome marks events of the next numbers that there are, up to next,
// which is 0 at the end.
func (s *Store) redeliverSome(ctx context.Context, sink *storage.EventSink, r storage.Redelivery, total, after, through int64) (n, next int64, err error) {
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		n, next = 0, 0
		read := redeliverable
		if r.Dead {
			read = deadLetters
		}
		list, end, err := read(ctx, t, r.Sink, after, through)
		if err != nil {
			return err
		}
		var put []storage.Delivery
		batches := make(map[int64]string)
		for i := 0; i < len(list) && (r.Limit == 0 || total+int64(len(put)) < int64(r.Limit)); i++ {
			e := &list[i]
			gone := e.RawSize < 0 && !storage.ServerTopic(e.Topic)
			if gone || e.state == storage.DeliveryWaiting || !sink.Match(&e.EventRecord) {
				continue
			}
			batches[e.Seq] = e.batch
			put = append(put, storage.Delivery{Seq: e.Seq, Enrollment: e.Enroll.ID, CreatedAt: e.CreatedAt,
				State: storage.DeliveryAgain, NextAt: fromMicros(t.Now)})
		}
		n, next = int64(len(put)), end
		return putDeliveries(ctx, t, r.Sink, put, batches)
	})
	return n, next, err
}

// loggedEvent is an event of the log, and how it stands with a sink: state is
// 0 if that has it.
type loggedEvent struct {
	storage.EventRecord
	batch string
	state storage.DeliveryState
}

// redeliverable reads what comes next in a range of the log, up to end, which
// is 0 if there is nothing.
func redeliverable(ctx context.Context, t *tx, sink string, after, through int64) (list []loggedEvent, end int64, err error) {
	found, err := batchesAfter(ctx, t, after, redeliverRows)
	if err != nil || len(found) == 0 {
		return nil, 0, err
	}
	end = min(through, found[len(found)-1].last)
	rows, err := deliveryRecords(ctx, t, `WHERE sink = ? AND seq > ? AND seq <= ?`, sink, after, end)
	if err != nil {
		return nil, 0, err
	}
	list, err = loggedEvents(ctx, t, idsOf(found), statesOf(rows), func(seq int64) bool { return seq > after && seq <= end })
	return list, end, err
}

// deadLetters reads those of a sink that come next, up to end, which is 0 if
// there are no more.
func deadLetters(ctx context.Context, t *tx, sink string, after, through int64) (list []loggedEvent, end int64, err error) {
	rows, err := deliveryRecords(ctx, t, `WHERE sink = ? AND seq > ? AND seq <= ? AND state IN (`+
		strconv.Itoa(int(storage.DeliveryDead))+`, `+strconv.Itoa(int(storage.DeliveryDropped))+`) ORDER BY seq LIMIT ?`, sink, after, through, redeliverRows)
	if err != nil || len(rows) == 0 {
		return nil, 0, err
	}
	if len(rows) == redeliverRows {
		end = rows[len(rows)-1].seq
	}
	states := statesOf(rows)
	list, err = loggedEvents(ctx, t, batchesOfRows(rows), states, func(seq int64) bool { return states[seq] != 0 })
	return list, end, err
}

// loggedEvents reads events of batches without their payloads. states are by
// their numbers.
func loggedEvents(ctx context.Context, t *tx, ids []string, states map[int64]storage.DeliveryState, wanted func(seq int64) bool) (list []loggedEvent, err error) {
	batches, err := readBatches(ctx, t, ids, false)
	if err != nil {
		return nil, err
	}
	for i := range batches {
		b := &batches[i]
		for at := range b.events {
			if seq := b.number(at); wanted(seq) {
				list = append(list, loggedEvent{EventRecord: b.events[at].record(seq), batch: b.id, state: states[seq]})
			}
		}
	}
	return list, nil
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
	var first sql.Null[int64]
	err := t.QueryRow(ctx, `SELECT MIN(seq) FROM nano_event_deliveries WHERE sink = ? AND state = ?`, sink.Name, int(storage.DeliveryWaiting)).Scan(&first)
	if err != nil {
		return time.Time{}, err
	}
	from := sink.Cursor + 1
	if first.Valid {
		from = min(from, first.V)
	}
	list, err := batchesAfter(ctx, t, from-1, 1)
	if err != nil || len(list) == 0 {
		return time.Time{}, err
	}
	events, err := loggedEvents(ctx, t, idsOf(list), nil, func(seq int64) bool { return seq >= from })
	if err != nil || len(events) == 0 {
		return time.Time{}, err
	}
	return events[0].CreatedAt, nil
}

// countDeliveries counts the rows of each state, as far as it is worth it.
func countDeliveries(ctx context.Context, t *tx, b *storage.SinkBacklog) error {
	for state, into := range map[storage.DeliveryState]*int64{
		storage.DeliveryWaiting: &b.Waiting, storage.DeliveryAgain: &b.Again, storage.DeliveryDead: &b.Dead,
		storage.DeliveryDropped: &b.Dropped, storage.DeliveryGone: &b.Dropped,
	} {
		var n int64
		err := t.QueryRow(ctx, `SELECT COUNT(*) FROM (SELECT 1 AS one FROM nano_event_deliveries WHERE sink = ? AND state = ? LIMIT ?) AS counted`,
			b.Sink, int(state), storage.MaxCounted).Scan(&n)
		if err != nil {
			return err
		}
		*into = min(*into+n, storage.MaxCounted)
	}
	return nil
}
