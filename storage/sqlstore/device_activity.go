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
	// activityRows is how many enrollments one statement and one transaction
	// of a flush take.
	activityRows = 500
	// activityLimit bounds the enrollments that are remembered while the
	// database is away. What is dropped costs a late last-seen time or one
	// push too many.
	activityLimit = 100_000
	// activityBytes bounds the events that are remembered, in bytes.
	activityBytes = 16 << 20
	// answeredAtOnce is how long a device has for an answer to a command before
	// it counts as an offer. Most take a moment, and such offers are never written.
	answeredAtOnce = 5 * time.Second
)

// activity is what a poll or an accepted push leaves behind besides its
// answer. Nothing waits for it to be stored, and a crash may lose it.
type activity struct {
	id   string
	seen int64 // microseconds; 0 is not seen
	// paid is the owed_seq that was read when the debt was paid; 0 is none.
	paid int64
	// setPushAt sets push_at to pushAt (0 is NULL), provided that paid covers
	// what is owed when it is written: a newer debt keeps its own time.
	setPushAt bool
	pushAt    int64
	// planned: push_at is about that, and is written only if something else was
	// to be written before.
	planned bool
	// offered is the command that the device was offered last, and how many
	// times, as long as it says nothing of it. offeredAt is when that began.
	offered   string
	offers    int
	offeredAt int64
}

// merge adds what b knows. Numbers only grow; the push time belongs to the
// greatest payment.
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

// split takes the offers out that began after a time.
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
	quit     chan struct{}
	done     chan struct{}
}

// startActivity begins to write every interval; a negative one leaves the
// writing to flush and stop.
func startActivity(s *Store, every time.Duration) *activityLog {
	a := &activityLog{
		s: s, limit: activityLimit, pending: make(map[string]activity),
		quit: make(chan struct{}), done: make(chan struct{}),
	}
	go a.run(every)
	return a
}

func (a *activityLog) run(every time.Duration) {
	defer close(a.done)
	if every < 0 {
		<-a.quit
		return
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	failing := false
	for {
		select {
		case <-a.quit:
			return
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
	close(a.quit)
	<-a.done
	return a.flush(context.Background(), 0)
}

// note remembers an activity for the next batch. It never waits for the
// database.
func (a *activityLog) note(n activity) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.add(n)
}

// tell remembers events that report no change. It never waits for the
// database either: what finds no room is dropped and counted.
func (a *activityLog) tell(events []storage.Event) {
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

// Flush writes last-seen times, paid pushes and events of polls that are still
// gathered.
func (s *Store) Flush(ctx context.Context) error {
	if s.db.Closed() {
		return storage.ErrClosed
	}
	return s.act.flush(ctx, 0)
}

// flush writes what is pending, in key order, but for offers that are younger
// than an age. What could not be written is kept for the next time.
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

// take empties the log, but for offers that began after a time.
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

// restore puts back what was taken and not written, before what came since.
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
			a.tell(events)
			return fmt.Errorf("storing events: %w", err)
		}
		events = events[n:]
	}
	return nil
}

// store writes one chunk in one transaction, and in another one what devices
// were offered and have not answered yet, which locks queue rows.
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

// offersOf returns the rows that were offered, with how often.
func offersOf(chunk []activity) map[keyPair]int {
	offers := make(map[keyPair]int)
	for _, n := range chunk {
		if n.offers > 0 {
			offers[keyPair{ID: n.id, Item: n.offered}] = n.offers
		}
	}
	return offers
}

// storeOffers counts offers of rows that still wait. It locks all rows before
// the first statement that changes some: several statements have no key order.
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

// storePaid writes the payments. Those that also set the time of the next push
// need a statement of their own, so all rows are locked before: several
// statements have no key order.
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
