package sqlstore

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// Rows of nano_event_counters: the bytes of all batches that were ever
// numbered, and of those that were removed. The log has the difference.
const (
	logBytesCounter     = "log_bytes"
	removedBytesCounter = "removed_bytes"
)

// byteCounts reads the counters of bytes.
func byteCounts(ctx context.Context, t *tx) (numbered, removed int64, err error) {
	err = t.Query(ctx, `SELECT name, value FROM nano_event_counters WHERE name IN (?, ?)`, logBytesCounter, removedBytesCounter).Each(func(row sqldb.Row) error {
		var name string
		var value int64
		if err := row.Scan(&name, &value); err != nil {
			return err
		}
		if name == logBytesCounter {
			numbered = value
		} else {
			removed = value
		}
		return nil
	})
	return numbered, removed, err
}

func setCounter(ctx context.Context, t *tx, name string, value int64) error {
	return t.Upsert(ctx, "nano_event_counters", []string{"name", "value"}, []string{"name"}, []string{"value"}, []any{name, value})
}

// countBytes adds batches that get numbers. The last one notes the sum, so that
// batches that a replica of an older release numbers, which does not count,
// make no lasting difference.
func countBytes(ctx context.Context, t *tx, batches []unnumberedBatch) error {
	if len(batches) == 0 {
		return nil
	}
	numbered, _, err := byteCounts(ctx, t)
	if err != nil {
		return err
	}
	for _, b := range batches {
		numbered += b.bytes
	}
	if _, err := t.Exec(ctx, `UPDATE nano_event_batches SET log_bytes = ? WHERE batch_id = ?`, numbered, batches[len(batches)-1].id); err != nil {
		return err
	}
	return setCounter(ctx, t, logBytesCounter, numbered)
}

// countRemoved adds the first batches of the log, which are removed.
func countRemoved(ctx context.Context, t *tx, old []numberedBatch) error {
	_, removed, err := byteCounts(ctx, t)
	if err != nil {
		return err
	}
	for _, b := range old {
		removed += b.bytes
		if b.through > 0 {
			removed = b.through
		}
	}
	return setCounter(ctx, t, removedBytesCounter, removed)
}

// EventLogSize implements storage.EventUpkeep.
func (s *Store) EventLogSize(ctx context.Context) (storage.EventLogSize, error) {
	var size storage.EventLogSize
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		size = storage.EventLogSize{}
		numbered, removed, err := byteCounts(ctx, t)
		if err != nil {
			return err
		}
		size.Bytes = max(0, numbered-removed)
		first, err := batchesAfter(ctx, t, 0, 1)
		if err != nil || len(first) == 0 {
			return err
		}
		last, err := lastNumber(ctx, t, "")
		size.Events = last - first[0].last + first[0].size
		return err
	})
	if err != nil {
		return storage.EventLogSize{}, fmt.Errorf("reading the size of the event log: %w", err)
	}
	return size, nil
}

// TrimEvents implements storage.EventUpkeep.
func (s *Store) TrimEvents(ctx context.Context, l storage.Lease, most int64, limit int) (int, error) {
	n, err := s.sweepSettled(ctx, l, func(ctx context.Context, t *tx, sinks []storage.EventSink, settled int64) (int, error) {
		numbered, removed, err := byteCounts(ctx, t)
		if err != nil || numbered-removed <= most {
			return 0, err
		}
		if err := announceFull(ctx, t, most); err != nil {
			return 0, err
		}
		old, _, err := oldBatches(ctx, t, settled, math.MaxInt64, limit)
		if err != nil || len(old) == 0 {
			return 0, err
		}
		events, excess := 0, numbered-removed-most
		for i, b := range old {
			events += int(b.size)
			if excess -= b.bytes; excess <= 0 {
				old = old[:i+1]
				break
			}
		}
		return events, removeBatches(ctx, t, sinks, old)
	})
	if err != nil {
		return 0, fmt.Errorf("trimming the event log: %w", err)
	}
	return n, nil
}

// announceFull announces, once a day, that the log is trimmed to most bytes.
func announceFull(ctx context.Context, t *tx, most int64) error {
	want, err := announced(ctx, t, storage.TopicEventLogFull)
	if err != nil || !want {
		return err
	}
	fresh, err := notice(ctx, t, "event log full "+fromMicros(t.Now).Format(time.DateOnly))
	if err != nil || !fresh {
		return err
	}
	return announce(ctx, t, []announcement{{topic: storage.TopicEventLogFull, detail: map[string]string{"max_bytes": strconv.FormatInt(most, 10)}}})
}

// EventExcess implements storage.EventUpkeep.
func (s *Store) EventExcess(ctx context.Context, most int64) (through int64, newest time.Time, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		through, newest = 0, time.Time{}
		numbered, removed, err := byteCounts(ctx, t)
		if err != nil || numbered-removed <= most {
			return err
		}
		list, err := batchesAfter(ctx, t, 0, logWindow)
		if err != nil {
			return err
		}
		excess := numbered - removed - most
		for _, b := range list {
			through = b.last
			if at := fromMicros(b.newest); at.After(newest) {
				newest = at
			}
			if excess -= b.bytes; excess <= 0 {
				break
			}
		}
		return nil
	})
	if err != nil {
		return 0, time.Time{}, fmt.Errorf("measuring the event log: %w", err)
	}
	return through, newest, nil
}
