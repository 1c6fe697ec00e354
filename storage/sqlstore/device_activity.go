package sqlstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

const (
	// activityRows bounds the enrollments of one statement and one transaction
	// of a flush.
	activityRows = 500
	// activityLimit bounds the activities that are kept while the database is
	// away. A dropped one costs a late last-seen time or a needless push.
	activityLimit = 100_000
	// activityBytes bounds the events that are kept, in bytes.
	activityBytes = 16 << 20
	// answeredAtOnce is the time after which a command without an answer counts
	// as an offer. Most devices answer earlier, and those offers are never
	// written.
	answeredAtOnce = 5 * time.Second
)

// activity is the change of a poll or an accepted push that is written later,
// in a batch. Nothing waits for it, and a crash may lose it.
type activity struct {
	id   string
	seen int64 // microseconds; 0 is not seen
	// paid is the new paid_seq: the owed_seq that the poll or push read; 0 is
	// none.
	paid int64
	// setPushAt sets push_at to pushAt (0 is NULL), unless the owed_seq at the
	// time of the write is greater than paid: a newer push owed keeps its own
	// time.
	setPushAt bool
	pushAt    int64
	// planned: push_at already is about pushAt, and is written only if a merged
	// activity sets it.
	planned bool
	// offered is the last command that the device was offered and has not
	// answered, offers the number of offers, and offeredAt the time of the
	// first.
	offered   string
	offers    int
	offeredAt int64
}

// merge adds a later activity. Numbers only grow; the push time is the one with
// the greatest paid.
func (a activity) merge(b activity) activity {
	a.seen = max(a.seen, b.seen)
	if b.paid > a.paid || b.paid == a.paid && b.setPushAt {
		a.planned = b.planned && (a.planned || !a.setPushAt)
		a.paid, a.setPushAt, a.pushAt = b.paid, b.setPushAt, b.pushAt
	}
	switch {
	case b.seen == 0 && b.offers == 0: // not of the device
	case b.offered == a.offered:
		a.offers += b.offers
	default: // it has gone on, or has none
		a.offered, a.offers, a.offeredAt = b.offered, b.offers, b.offeredAt
	}
	return a
}

// split separates the offers that began after a time.
func (a activity) split(after int64) (now, later activity) {
	if a.offers == 0 || a.offeredAt <= after {
		return a, activity{}
	}
	later = activity{id: a.id, offered: a.offered, offers: a.offers, offeredAt: a.offeredAt}
	a.offered, a.offers = "", 0
	return a, later
}

// activityLog gathers activities, and events that report no change, and writes
// them in batches.
type activityLog struct {
	s             *Store
	limit         int
	dropped       atomic.Int64
	eventsDropped atomic.Int64

	mu         sync.Mutex
	pending    map[string]activity
	events     []storage.Event
	eventBytes int

	flushing sync.Mutex // one flush at a time
	quit     context.CancelFunc
	done     chan struct{}
}

// startActivity starts to write at each interval; with a negative one only
// flush and stop write.
func startActivity(s *Store, every time.Duration) *activityLog {
	a := &activityLog{
		s: s, limit: activityLimit, pending: make(map[string]activity),
		quit: func() {}, done: make(chan struct{}),
	}
	if every < 0 {
		close(a.done)
		return a
	}
	var ctx context.Context
	ctx, a.quit = context.WithCancel(context.Background())
	go func() {
		defer close(a.done)
		_ = s.cfg.Supervisor.Run(ctx, "activity", func(ctx context.Context) error { return a.run(ctx, every) }) // ctx ended
	}()
	return a
}

func (a *activityLog) run(ctx context.Context, every time.Duration) error {
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		err := a.flush(context.Background(), answeredAtOnce)
		if err != nil && !failing { // once for each outage
			a.s.log.Warn("cannot record activity", "error", err)
		}
		failing = err != nil
	}
}

// stop ends the goroutine and writes what is left.
func (a *activityLog) stop() error {
	a.quit()
	<-a.done
	return a.flush(context.Background(), 0)
}

// note adds an activity to the next batch. It never waits for the database.
func (a *activityLog) note(n activity) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.add(n)
}

// addEvents adds events that report no change to the next batch. It never waits
// for the database: events that find no room are dropped and counted.
func (a *activityLog) addEvents(events []storage.Event) {
	if len(events) == 0 {
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range events {
		size := eventSize(&events[i])
		if a.eventBytes+size > activityBytes {
			a.eventsDropped.Add(1)
			continue
		}
		a.eventBytes += size
		a.events = append(a.events, events[i])
	}
}

// add merges n; the caller holds mu.
func (a *activityLog) add(n activity) {
	was, ok := a.pending[n.id]
	if !ok {
		if len(a.pending) >= a.limit {
			a.dropped.Add(1)
			return
		}
		a.pending[n.id] = n
		return
	}
	a.pending[n.id] = was.merge(n)
}

// Flush writes the last-seen times, paid pushes and events of polls of the next
// batch.
func (s *Store) Flush(ctx context.Context) error {
	if s.db.Closed() {
		return storage.ErrClosed
	}
	return s.act.flush(ctx, 0)
}

// flush writes all activities, in key order, except offers that are younger
// than an age. Activities that cannot be written are kept for the next flush.
func (a *activityLog) flush(ctx context.Context, offerAge time.Duration) error {
	a.flushing.Lock()
	defer a.flushing.Unlock()
	after := int64(math.MaxInt64) // all, whatever the clock says
	if offerAge > 0 {
		after = micros(a.s.now().Add(-offerAge))
	}
	rows, events := a.take(after)
	return errors.Join(a.flushRows(ctx, rows), a.flushEvents(ctx, events))
}

// take empties the log, except offers that began after a time.
func (a *activityLog) take(after int64) (rows []activity, events []storage.Event) {
	a.mu.Lock()
	defer a.mu.Unlock()
	pending := make(map[string]activity, len(a.pending))
	for id, n := range a.pending {
		now, later := n.split(after)
		if later.offers > 0 {
			pending[id] = later
		}
		if now != (activity{id: id}) {
			rows = append(rows, now)
		}
	}
	events = a.events
	a.pending, a.events, a.eventBytes = pending, nil, 0
	return rows, events
}

// restore puts back activities that were not written, before those that came
// since.
func (a *activityLog) restore(rows []activity) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, n := range rows {
		if since, ok := a.pending[n.id]; ok {
			a.pending[n.id] = n.merge(since)
		} else {
			a.add(n)
		}
	}
}

func (a *activityLog) flushRows(ctx context.Context, rows []activity) error {
	slices.SortFunc(rows, func(x, y activity) int { return cmp.Compare(x.id, y.id) })
	var errs error
	for chunk := range slices.Chunk(rows, activityRows) {
		if errs == nil {
			errs = a.store(ctx, chunk)
			if errs == nil {
				continue
			}
		}
		a.restore(chunk)
	}
	return errs
}

// flushEvents writes events in chunks of one transaction each.
func (a *activityLog) flushEvents(ctx context.Context, events []storage.Event) error {
	for len(events) > 0 {
		n, bytes := 0, 0
		for n < len(events) && n < eventRows && (n == 0 || bytes+eventSize(&events[n]) <= batchBytes) {
			bytes += eventSize(&events[n])
			n++
		}
		chunk := events[:n]
		err := a.s.write(ctx, func(ctx context.Context, t *tx) error {
			return insertEvents(ctx, t, chunk)
		})
		if err != nil {
			a.addEvents(events)
			return fmt.Errorf("storing events: %w", err)
		}
		events = events[n:]
	}
	return nil
}

// store writes a chunk in one transaction, and its offers, which lock queue
// rows, in another.
func (a *activityLog) store(ctx context.Context, chunk []activity) error {
	err := a.s.write(ctx, func(ctx context.Context, t *tx) error {
		if err := storeSeen(ctx, t, chunk); err != nil {
			return err
		}
		return storePaid(ctx, t, chunk)
	})
	offers := offersOf(chunk)
	if err != nil || len(offers) == 0 {
		return err
	}
	return a.s.write(ctx, func(ctx context.Context, t *tx) error { return storeOffers(ctx, t, offers) })
}

// offersOf returns the rows that were offered, with the number of offers.
func offersOf(chunk []activity) map[keyPair]int {
	offers := make(map[keyPair]int)
	for _, n := range chunk {
		if n.offers > 0 {
			offers[keyPair{ID: n.id, Item: n.offered}] = n.offers
		}
	}
	return offers
}

// storeOffers counts offers of waiting rows. It locks all rows before the first
// statement that changes some: several statements have no common key order.
func storeOffers(ctx context.Context, t *tx, offers map[keyPair]int) error {
	waiting, err := lockKeys(ctx, t, slices.Collect(maps.Keys(offers)), stillWaits)
	if err != nil {
		return fmt.Errorf("locking commands that were offered: %w", err)
	}
	byTimes := make(map[int][]keyPair)
	for _, k := range waiting {
		byTimes[offers[k]] = append(byTimes[offers[k]], k)
	}
	for times, keys := range byTimes {
		q, args := queueRows.UpdateLockedText(t.Tx, "attempts = attempts + ?", keys)
		if _, err := t.Exec(ctx, q, append([]any{times}, args...)...); err != nil {
			return fmt.Errorf("counting offers: %w", err)
		}
	}
	return nil
}

func storeSeen(ctx context.Context, t *tx, chunk []activity) error {
	var args []any
	for _, n := range chunk {
		if n.seen > 0 {
			args = append(args, n.id, n.seen)
		}
	}
	if len(args) == 0 {
		return nil
	}
	const table = "nano_enrollment_activity"
	return t.Upsert(ctx, table, []string{"id", "last_seen_at"}, []string{"id"},
		[]string{"last_seen_at = " + t.Dialect.Greatest() + "(" + table + ".last_seen_at, new.last_seen_at)"}, args)
}

// storePaid writes paid_seq. Rows with a new time of the next push need a
// statement of their own; all rows are locked first, since several statements
// have no common key order.
func storePaid(ctx context.Context, t *tx, chunk []activity) error {
	var plain, planning []any
	var ids []string
	for _, n := range chunk {
		switch {
		case n.setPushAt && !n.planned:
			planning = append(planning, n.id, n.paid, null(n.pushAt))
		case !n.setPushAt && n.paid != 0:
			plain = append(plain, n.id, n.paid)
		default:
			continue
		}
		ids = append(ids, n.id)
	}
	const table = "nano_enrollment_push"
	if len(plain) > 0 && len(planning) > 0 {
		if _, err := lock(ctx, t, table, ids); err != nil {
			return err
		}
	}
	pay := "paid_seq = " + t.Dialect.Greatest() + "(" + table + ".paid_seq, new.paid_seq)"
	if len(plain) > 0 {
		if err := t.Upsert(ctx, table, []string{"id", "paid_seq"}, []string{"id"}, []string{pay}, plain); err != nil {
			return err
		}
	}
	if len(planning) == 0 {
		return nil
	}
	// Before paid_seq, and without reading it: MySQL assigns in order.
	plan := "push_at = CASE WHEN new.paid_seq >= " + table + ".owed_seq THEN new.push_at ELSE " + table + ".push_at END"
	return t.Upsert(ctx, table, []string{"id", "paid_seq", "push_at"}, []string{"id"}, []string{plan, pay}, planning)
}
