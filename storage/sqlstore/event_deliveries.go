package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// WaitingEnrollments implements storage.Deliveries.
func (s *Store) WaitingEnrollments(ctx context.Context, sink string, limit int) ([]storage.WaitingEnrollment, error) {
	var waiting []storage.WaitingEnrollment
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		waiting = nil
		// Only the first row of an enrollment has a time and attempts.
		err := t.Query(ctx, `SELECT enrollment_id, MIN(seq), MAX(attempts), MAX(next_at) FROM nano_event_deliveries
			WHERE sink = ? AND state = ? GROUP BY enrollment_id ORDER BY MIN(seq) LIMIT ?`, sink, int(storage.DeliveryWaiting), limit).Each(func(row sqldb.Row) error {
			var w storage.WaitingEnrollment
			var next sql.Null[int64]
			if err := row.Scan(&w.Enrollment, &w.First, &w.Attempts, &next); err != nil {
				return err
			}
			w.NextAt = fromMicros(next.V)
			waiting = append(waiting, w)
			return nil
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading what waits for sink %s: %w", sink, err)
	}
	return waiting, nil
}

// WaitingEvents implements storage.Deliveries.
func (s *Store) WaitingEvents(ctx context.Context, sink, enrollment string, limit int) ([]storage.Event, error) {
	return s.deliveries(ctx, `WHERE sink = ? AND state = ? AND enrollment_id = ? ORDER BY seq LIMIT ?`,
		sink, int(storage.DeliveryWaiting), enrollment, limit)
}

// RedeliveredEvents implements storage.Deliveries.
func (s *Store) RedeliveredEvents(ctx context.Context, sink string, limit int) ([]storage.Event, error) {
	return s.deliveries(ctx, `WHERE sink = ? AND state = ? AND next_at <= ? ORDER BY next_at, seq LIMIT ?`,
		sink, int(storage.DeliveryAgain), micros(s.now()), limit)
}

// deliveries reads the events of deliveries, in the order of the deliveries.
func (s *Store) deliveries(ctx context.Context, where string, args ...any) ([]storage.Event, error) {
	var events []storage.Event
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
		events, err = s.eventsOf(ctx, t, batchesOfRows(rows), func(e *storage.Event) bool {
			_, wanted := place[e.Seq]
			return wanted
		})
		if err != nil {
			return err
		}
		slices.SortFunc(events, func(a, b storage.Event) int { return cmp.Compare(place[a.Seq], place[b.Seq]) })
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

func deliveryRecords(ctx context.Context, t *tx, where string, args ...any) ([]deliveryRow, error) {
	return sqldb.Collect(t.Query(ctx, `SELECT seq, batch_id, state, attempts FROM nano_event_deliveries `+where, args...),
		func(row sqldb.Row, r *deliveryRow) error { return row.Scan(&r.seq, &r.batch, &r.state, &r.attempts) })
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

// batchesOfRows returns the ids of the rows' batches, each once.
func batchesOfRows(rows []deliveryRow) []string {
	ids := make([]string, len(rows))
	for i := range rows {
		ids[i] = rows[i].batch
	}
	slices.Sort(ids)
	return slices.Compact(ids)
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

// oldestUnsettled returns the time of the oldest event that is after a sink's
// cursor or waits; zero if there is none.
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
	events, err := sinkEvents(ctx, t, idsOf(list), nil, func(e *storage.Event) bool { return e.Seq >= from })
	if err != nil || len(events) == 0 {
		return time.Time{}, err
	}
	return events[0].CreatedAt, nil
}

// countDeliveries counts the rows of each state, up to storage.MaxCounted.
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
