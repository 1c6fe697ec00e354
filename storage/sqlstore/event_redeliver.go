package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"strconv"

	"github.com/nanomdm/nanomdm/storage"
)

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
	// Events after the cursor are delivered anyway.
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

// redeliverSome marks events of the next numbers, up to next, which is 0 at the
// end.
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
			if gone || e.state == storage.DeliveryWaiting || !sink.Match(&e.Event) {
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

// sinkEvent is an event of the log and its state at a sink, which is 0 if the
// sink has it.
type sinkEvent struct {
	storage.Event
	batch string
	state storage.DeliveryState
}

// redeliverable reads the next events in a range of the log, up to end, which
// is 0 if there are none.
func redeliverable(ctx context.Context, t *tx, sink string, after, through int64) (list []sinkEvent, end int64, err error) {
	found, err := batchesAfter(ctx, t, after, redeliverRows)
	if err != nil || len(found) == 0 {
		return nil, 0, err
	}
	end = min(through, found[len(found)-1].last)
	rows, err := deliveryRecords(ctx, t, `WHERE sink = ? AND seq > ? AND seq <= ?`, sink, after, end)
	if err != nil {
		return nil, 0, err
	}
	list, err = sinkEvents(ctx, t, idsOf(found), statesOf(rows), func(e *storage.Event) bool { return e.Seq > after && e.Seq <= end })
	return list, end, err
}

// deadLetters reads the next dead letters of a sink, up to end, which is 0 if
// there are no more.
func deadLetters(ctx context.Context, t *tx, sink string, after, through int64) (list []sinkEvent, end int64, err error) {
	rows, err := deliveryRecords(ctx, t, `WHERE sink = ? AND seq > ? AND seq <= ? AND state IN (`+
		strconv.Itoa(int(storage.DeliveryDead))+`, `+strconv.Itoa(int(storage.DeliveryDropped))+`) ORDER BY seq LIMIT ?`, sink, after, through, redeliverRows)
	if err != nil || len(rows) == 0 {
		return nil, 0, err
	}
	if len(rows) == redeliverRows {
		end = rows[len(rows)-1].seq
	}
	states := statesOf(rows)
	list, err = sinkEvents(ctx, t, batchesOfRows(rows), states, func(e *storage.Event) bool { return states[e.Seq] != 0 })
	return list, end, err
}

// sinkEvents reads events of batches without their payloads. states has the
// state of each number.
func sinkEvents(ctx context.Context, t *tx, ids []string, states map[int64]storage.DeliveryState, wanted func(e *storage.Event) bool) (list []sinkEvent, err error) {
	batches, err := readBatches(ctx, t, ids, false)
	if err != nil {
		return nil, err
	}
	for i := range batches {
		b := &batches[i]
		for j := range b.events {
			if e := &b.events[j]; wanted(e) {
				list = append(list, sinkEvent{Event: *e, batch: b.id, state: states[e.Seq]})
			}
		}
	}
	return list, nil
}
