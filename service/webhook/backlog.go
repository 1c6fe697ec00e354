package webhook

import "time"

const (
	// maxBlocked bounds the blocked enrollments in memory; with more of them
	// the sink reads no new events.
	maxBlocked = 10_000
	// scanPause is the least time between two scans of the backlog, and
	// scanEvery the most.
	scanPause = 50 * time.Millisecond
	scanEvery = time.Second
)

// backlog is the blocked enrollments of one sink: those whose events wait in
// the database behind one that failed. It knows when each is due, not its
// events. Each method takes the present, so that tests need no clock. It
// belongs to one goroutine.
type backlog struct {
	enrollments map[string]*blocked
	nextScan    time.Time
	scannedAt   time.Time
}

// blocked is an enrollment of the backlog.
type blocked struct {
	enrollment string
	nextAt     time.Time
	// inFlight: a batch of its events is being sent.
	inFlight bool
	// behind: events were stored behind those of the batch in flight.
	behind bool
	// failures counts those of the receiver at the first event, as far as
	// they are not stored with it.
	failures int
}

func newBacklog() *backlog { return &backlog{enrollments: make(map[string]*blocked)} }

func (b *backlog) len() int { return len(b.enrollments) }

func (b *backlog) full() bool { return len(b.enrollments) >= maxBlocked }

// get returns an enrollment, or nil if it is not blocked.
func (b *backlog) get(enrollment string) *blocked { return b.enrollments[enrollment] }

// block adds an enrollment, or changes when it is due.
func (b *backlog) block(enrollment string, at time.Time) *blocked {
	e := b.enrollments[enrollment]
	if e == nil {
		e = &blocked{enrollment: enrollment}
		b.enrollments[enrollment] = e
	}
	e.nextAt = at
	b.scheduleScan(at)
	return e
}

// release removes an enrollment without waiting events.
func (b *backlog) release(enrollment string) { delete(b.enrollments, enrollment) }

// reserve notes that a batch of the enrollment is in flight.
func (e *blocked) reserve() { e.inFlight, e.behind = true, false }

// finish notes the end of a batch in flight: the enrollment is due again at a
// time.
func (b *backlog) finish(enrollment string, at time.Time) {
	if e := b.enrollments[enrollment]; e != nil {
		e.inFlight = false
		b.block(enrollment, at)
	}
}

// makeDue makes every enrollment due.
func (b *backlog) makeDue(now time.Time) {
	for _, e := range b.enrollments {
		e.nextAt = now
	}
	b.scheduleScan(now)
}

// scheduleScan makes the next scan happen at a time, but not right after the
// last one.
func (b *backlog) scheduleScan(at time.Time) {
	if soonest := b.scannedAt.Add(scanPause); at.Before(soonest) {
		at = soonest
	}
	if at.Before(b.nextScan) {
		b.nextScan = at
	}
}

// due lists up to limit enrollments that are due and not in flight, if it is
// time for a scan.
func (b *backlog) due(now time.Time, limit int) (due []*blocked) {
	if limit <= 0 || now.Before(b.nextScan) {
		return nil
	}
	b.nextScan, b.scannedAt = now.Add(scanEvery), now
	for _, e := range b.enrollments {
		switch {
		case e.inFlight:
		case e.nextAt.After(now):
			b.scheduleScan(e.nextAt)
		default:
			if due = append(due, e); len(due) == limit {
				b.scheduleScan(now) // there may be more
				return due
			}
		}
	}
	return due
}

// earliest is the enrollment that is due first, whether it is due yet or not:
// with it a receiver that is down is probed. It is nil if all are in flight.
func (b *backlog) earliest() *blocked {
	var first *blocked
	for _, e := range b.enrollments {
		if !e.inFlight && (first == nil || e.nextAt.Before(first.nextAt)) {
			first = e
		}
	}
	return first
}
