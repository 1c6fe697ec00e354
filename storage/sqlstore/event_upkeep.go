package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// sweepSettled is sweep for work on events that all sinks have settled, which
// end at the number settled. It returns the result of work.
func (s *Store) sweepSettled(ctx context.Context, l storage.Lease,
	work func(ctx context.Context, t *tx, sinks []storage.EventSink, settled int64) (int, error),
) (n int, err error) {
	sinks, err := s.EventSinks(ctx)
	if err != nil {
		return 0, err
	}
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		settled, err := settledBy(ctx, t, sinks)
		if err != nil {
			return err
		}
		n, err = work(ctx, t, sinks, settled)
		return err
	})
	if err != nil {
		return 0, err
	}
	return n, nil
}

// DropPayloads implements storage.EventUpkeep.
func (s *Store) DropPayloads(ctx context.Context, l storage.Lease, limit int) (int, error) {
	n, err := s.sweepSettled(ctx, l, func(ctx context.Context, t *tx, sinks []storage.EventSink, settled int64) (n int, err error) {
		for _, sink := range sinks {
			if n == limit {
				break
			}
			rows, err := deliveryRecords(ctx, t, `WHERE sink = ? AND state = ? AND seq <= ? LIMIT ?`,
				sink.Name, int(storage.DeliveryDropped), settled, limit-n)
			if err != nil {
				return 0, err
			}
			if len(rows) == 0 {
				continue
			}
			if err := dropPayloads(ctx, t, rows); err != nil {
				return 0, err
			}
			for chunk := range slices.Chunk(rows, deliveryRows) {
				place, args := sqldb.InList(numbersOf(chunk))
				if _, err := t.Exec(ctx, `UPDATE nano_event_deliveries SET state = ? WHERE sink = ? AND seq IN `+place,
					append([]any{int(storage.DeliveryGone), sink.Name}, args...)...); err != nil {
					return 0, err
				}
			}
			n += len(rows)
		}
		return n, nil
	})
	if err != nil {
		return 0, fmt.Errorf("dropping payloads: %w", err)
	}
	return n, nil
}

// dropPayloads rewrites batches without the payloads of some events.
func dropPayloads(ctx context.Context, t *tx, rows []deliveryRow) error {
	drop := make(map[int64]bool, len(rows))
	for _, r := range rows {
		drop[r.seq] = true
	}
	batches, err := readBatches(ctx, t, batchesOfRows(rows), true)
	if err != nil {
		return err
	}
	var apart []string
	for i := range batches {
		b := &batches[i]
		if b.cut {
			continue
		}
		b.addPayloads()
		var kept []byte
		for j := range b.events {
			e := &b.events[j]
			if !drop[e.Seq] {
				kept = append(kept, e.Raw...)
				continue
			}
			if e.RawApart {
				apart = append(apart, e.ID)
			}
			e.RawSize, e.RawApart = -1, false
		}
		details, err := encodeEvents(b.events)
		if err != nil {
			return err
		}
		if err := t.ExecDeferred(ctx, `UPDATE nano_events SET details = ?, payloads = ? WHERE batch_id = ?`, details, compress(kept), b.id); err != nil {
			return err
		}
	}
	return deleteByID(ctx, t, "nano_event_payloads", "event_id", apart)
}

func deleteByID(ctx context.Context, t *tx, table, key string, ids []string) error {
	for chunk := range slices.Chunk(ids, idRows) {
		is, args := t.Among(chunk)
		if _, err := t.Exec(ctx, `DELETE FROM `+table+` WHERE `+key+` `+is, args...); err != nil {
			return err
		}
	}
	return nil
}

// settledBy returns the number up to which every enabled sink has settled
// events: its cursor is not before it, and no event up to it waits to be sent.
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
			err := t.QueryRow(ctx, `SELECT MIN(seq) FROM nano_event_deliveries WHERE sink = ? AND state = ?`, sink.Name, int(state)).Scan(&first)
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
	n, err := s.sweepSettled(ctx, l, func(ctx context.Context, t *tx, sinks []storage.EventSink, settled int64) (int, error) {
		old, events, err := oldBatches(ctx, t, settled, micros(before), limit)
		if err != nil || len(old) == 0 {
			return 0, err
		}
		return events, removeBatches(ctx, t, sinks, old)
	})
	if err != nil {
		return 0, fmt.Errorf("removing events: %w", err)
	}
	return n, nil
}

// removeBatches removes the first batches of the log, with their deliveries.
func removeBatches(ctx context.Context, t *tx, sinks []storage.EventSink, old []numberedBatch) error {
	last := old[len(old)-1].last
	for _, sink := range sinks {
		if _, err := t.Exec(ctx, `DELETE FROM nano_event_deliveries WHERE sink = ? AND seq <= ?`, sink.Name, last); err != nil {
			return err
		}
	}
	if err := deleteBatches(ctx, t, idsOf(old)); err != nil {
		return err
	}
	if _, err := t.Exec(ctx, `DELETE FROM nano_event_batches WHERE seq > 0 AND seq <= ?`, last); err != nil {
		return err
	}
	return countRemoved(ctx, t, old)
}

// deleteBatches deletes batches, with the payloads that are stored apart.
func deleteBatches(ctx context.Context, t *tx, ids []string) error {
	batches, err := readBatches(ctx, t, ids, false)
	if err != nil {
		return err
	}
	var apart []string
	for _, b := range batches {
		for _, e := range b.events {
			if e.RawApart {
				apart = append(apart, e.ID)
			}
		}
	}
	if err := deleteByID(ctx, t, "nano_event_payloads", "event_id", apart); err != nil {
		return err
	}
	return deleteByID(ctx, t, "nano_events", "batch_id", ids)
}

// oldBatches reads the first batches of the log that are old and settled, with
// up to limit events together, or a single one.
func oldBatches(ctx context.Context, t *tx, settled, before int64, limit int) (old []numberedBatch, events int, err error) {
	list, err := batchesAfter(ctx, t, 0, limit)
	if err != nil {
		return nil, 0, err
	}
	for _, b := range list {
		if b.last > settled || b.newest >= before || len(old) > 0 && events+int(b.size) > limit {
			break
		}
		old, events = append(old, b), events+int(b.size)
	}
	return old, events, nil
}
