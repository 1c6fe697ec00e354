package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
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
	// numberRows bounds the batches that one statement numbers. The text grows
	// with them, and the database compares each row with half of them.
	numberRows = 128
	// redeliverRows bounds the events that one transaction marks.
	redeliverRows = 500
	// deliveryRows bounds the deliveries that one statement writes.
	deliveryRows = 128
)

// seqCounter is the row of nano_event_counters that holds the last number.
const seqCounter = "seq"

// NumberEvents implements storage.Outbox.
func (s *Store) NumberEvents(ctx context.Context, l storage.Lease, limit int) (n int, last int64, err error) {
	// Most calls find nothing, and a transaction would keep SQLite's writer.
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
		if err != nil {
			return err
		}
		return countBytes(ctx, t, batches)
	})
	if err != nil {
		return 0, 0, fmt.Errorf("numbering events: %w", err)
	}
	return n, last, nil
}

// lockCounter locks the last number and reads it. It inserts the row if there
// is none to lock.
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
	id    string
	size  int
	bytes int64
}

// unnumbered reads the next batches without numbers, in order: with up to limit
// events together, or a single one.
func unnumbered(ctx context.Context, t *tx, limit int) (batches []unnumberedBatch, err error) {
	events := 0
	err = t.Query(ctx, `SELECT batch_id, size, stored_bytes FROM nano_event_batches WHERE seq = 0 ORDER BY stamp, batch_id LIMIT ?`, limit).Each(func(row sqldb.Row) error {
		var b unnumberedBatch
		if err := row.Scan(&b.id, &b.size, &b.bytes); err != nil {
			return err
		}
		if events += b.size; events > limit && len(batches) > 0 {
			return sqldb.ErrStop
		}
		batches = append(batches, b)
		return nil
	})
	return batches, err
}

// numberStatement numbers n batches: the first n pairs of arguments are their
// ids and numbers, then come the ids.
func numberStatement(d *sqldb.Dialect, n int) string {
	return `UPDATE nano_event_batches SET seq = CASE batch_id` + strings.Repeat(" WHEN ? THEN "+d.IntPlaceholder(), n) +
		" END WHERE seq = 0 AND batch_id IN " + sqldb.In(n)
}

// giveNumbers numbers batches from base + 1 on and returns the last number.
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
		if err := setReceiver(ctx, t, sink, st.Receiver); err != nil {
			return err
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

// setReceiver stores the state of a sink's receiver. One that stays down, as another
// replica found it, keeps the time at which it began to fail.
func setReceiver(ctx context.Context, t *tx, sink string, state *storage.ReceiverState) error {
	set, args := "down_since = NULL, down_error = NULL", []any(nil)
	switch {
	case state == nil:
		return nil
	case state.Down:
		set, args = "down_since = CASE WHEN down_since IS NULL THEN ? ELSE down_since END, down_error = ?", []any{t.Now, clip(state.Error)}
	}
	_, err := t.Exec(ctx, "UPDATE nano_event_sinks SET "+set+" WHERE name = ?", append(args, sink)...)
	return err
}

// batchesOf finds the batches of deliveries, by the numbers of their events.
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

// putDeliveries stores deliveries of a sink; batches has the batch of each
// number.
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
