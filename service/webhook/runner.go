package webhook

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

const (
	// pageRows is how many events are read at once, and probeRows how many
	// from a receiver that is down.
	pageRows  = 256
	probeRows = 8
	// giveUpRows is how many waiting events are given up at once.
	giveUpRows = 512
	// laneRows is how many waiting events of one enrollment are read at once.
	laneRows = 32
	// maxBlocked bounds the enrollments with waiting events that are kept in
	// memory; with more of them the sink reads nothing new.
	maxBlocked = 10_000
	// pagePatience is how long the next page waits for slow lanes of this
	// one. What is left of them then waits in the database.
	pagePatience = 500 * time.Millisecond
	// laneTick gathers what is due again, and saveEvery what was delivered.
	laneTick  = 50 * time.Millisecond
	saveEvery = 500 * time.Millisecond
	// An event that failed quickly is tried again at once, triesInPlace times in
	// all and with pauses of at most pauseInPlace, before its enrollment waits
	// in the database: most failures are passing.
	triesInPlace = 3
	quickly      = time.Second
	pauseInPlace = 400 * time.Millisecond
	// breakAfter failures without a success in between mean that the receiver
	// is down.
	breakAfter = 10
	// maxBackoff and maxProbe bound the pauses of one enrollment and of a
	// receiver that is down.
	maxBackoff = 5 * time.Minute
	maxProbe   = 30 * time.Second
	// lookAgain is how often a runner looks for what it was not told of.
	lookAgain = time.Second
	// againTries is how often a redelivery is tried.
	againTries = 10
	// grace is how long tries under way may go on when the work ends, and
	// finalSave how long storing what became of them.
	grace     = 3 * time.Second
	finalSave = 5 * time.Second
)

// source is where the events of a lane come from.
type source int

const (
	fromPage  source = iota // after the cursor, no rows yet
	fromRows                // they have rows as waiting
	fromAgain               // they have rows to be sent again
)

// lane is one goroutine's work: events of one enrollment, in order.
type lane struct {
	enrollment string
	events     []storage.EventRecord
	from       source
	// more: there may be further rows behind these.
	more bool
}

// result is what became of a lane: the first sent events were delivered, and
// the one after them failed if there is a failure.
type result struct {
	lane    *lane
	sent    int
	failure *failure
	tries   int  // of that one
	cut     bool // it failed since the work ends
}

// blocked is an enrollment whose waiting events have rows.
type blocked struct {
	enrollment string
	nextAt     time.Time
	busy       bool // a lane is under way
	behind     bool // rows were added since the lane was read
}

// page is a stretch of the log that is being delivered.
type page struct {
	through int64
	ready   []*lane
	flying  map[string]*lane
	since   time.Time
}

// runner sends the events of one sink. What is below belongs to its
// goroutine; lanes talk to it by results. The cursor in the database moves
// only behind events that were delivered or have a row, and rows are read
// only when everything that is known of them is stored.
type runner struct {
	d     *Deliverer
	sink  storage.EventSink
	lease func() storage.Lease
	count *counters
	log   *slog.Logger

	news   chan struct{}
	cancel context.CancelFunc
	done   chan struct{}

	results  chan result
	flying   int
	cursor   int64 // as far as pages were read and settled
	saved    int64 // as it stands in the database
	savedAt  time.Time
	rows     map[int64]*storage.Delivery // to be stored; nil: its row is to go
	page     *page
	again    map[string]*lane // redeliveries, until they are settled
	ready    []*lane          // of those, not started
	againAt  time.Time
	blocked  map[string]*blocked
	laneAt   time.Time // when blocked is looked through next
	lookedAt time.Time // and when it was last
	failures int       // without a success in between
	dropping bool      // events, since the last success
	probeAt  time.Time // while down
	probes   int
	pausedTo time.Time // the receiver's Retry-After
}

func newRunner(d *Deliverer, k storage.EventSink, current func() storage.Lease, count *counters) *runner {
	return &runner{
		d: d, sink: k, lease: current, count: count, log: d.log.With("sink", k.Name),
		news: make(chan struct{}, 1), done: make(chan struct{}),
		results: make(chan result, d.cfg.Workers),
		rows:    make(map[int64]*storage.Delivery), blocked: make(map[string]*blocked), again: make(map[string]*lane),
		cursor: k.Cursor, saved: k.Cursor,
	}
}

func (r *runner) start(ctx context.Context) {
	ctx, r.cancel = context.WithCancel(ctx)
	go func() {
		defer close(r.done)
		r.run(ctx)
	}()
}

// stop waits until nothing is sent any more and what was is stored.
func (r *runner) stop() {
	r.cancel()
	<-r.done
}

func (r *runner) ended() bool {
	select {
	case <-r.done:
		return true
	default:
		return false
	}
}

// poke says that there may be something new.
func (r *runner) poke() {
	select {
	case r.news <- struct{}{}:
	default:
	}
}

func (r *runner) run(ctx context.Context) {
	sending, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(grace, cut) })()
	r.count.down.Store(false)
	for !r.load(ctx) {
		if !sleep(ctx, stormPause) {
			return
		}
	}
	failing, gone := false, false
	for ctx.Err() == nil && !gone {
		err := r.step(ctx, sending)
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.Is(err, errGone), errors.Is(err, storage.ErrNotFound):
			gone = true
			continue
		case !failing && !errors.Is(err, storage.ErrLeaseLost):
			r.log.WarnContext(ctx, "delivering events is held up by the store", "error", err)
		}
		if failing = err != nil; failing {
			sleep(ctx, stormPause)
		}
	}
	r.finish(ctx, gone)
	r.count.down.Store(false)
}

// errGone ends a runner whose receiver wants no more.
var errGone = errors.New("the receiver is gone")

// load reads where the sink stands; what the list of sinks says may be old.
func (r *runner) load(ctx context.Context) bool {
	sinks, err := r.d.sinks.store.EventSinks(ctx)
	if err == nil {
		for _, k := range sinks {
			if k.Name == r.sink.Name {
				r.cursor, r.saved = k.Cursor, k.Cursor
			}
		}
		var lanes []storage.Lane
		lanes, err = r.d.store.WaitingLanes(ctx, r.sink.Name, maxBlocked+pageRows)
		for _, l := range lanes {
			r.block(l.Enrollment, l.NextAt)
		}
	}
	if err != nil && ctx.Err() == nil {
		r.log.WarnContext(ctx, "cannot read where the sink stands", "error", err)
	}
	return err == nil
}

// block remembers that an enrollment has waiting events, to be tried at a
// time.
func (r *runner) block(enrollment string, at time.Time) *blocked {
	b := r.blocked[enrollment]
	if b == nil {
		b = &blocked{enrollment: enrollment}
		r.blocked[enrollment] = b
	}
	b.nextAt = at
	r.look(at)
	return b
}

// look sees to it that the blocked enrollments are looked through at a time,
// but not at every turn.
func (r *runner) look(at time.Time) {
	if soonest := r.lookedAt.Add(laneTick); at.Before(soonest) {
		at = soonest
	}
	if at.Before(r.laneAt) {
		r.laneAt = at
	}
}

// step does what can be done now and waits for the next thing to happen.
func (r *runner) step(ctx, sending context.Context) error {
	if err := r.drain(ctx); err != nil {
		return err
	}
	now := time.Now()
	read := false
	if !now.Before(r.pausedTo) {
		probe := r.down() && !now.Before(r.probeAt)
		if probe {
			r.postpone(now)
			if err := r.giveUp(ctx, now); err != nil {
				return err
			}
		}
		var err error
		if read, err = r.feed(ctx, now, probe); err != nil {
			return err
		}
		if err := r.startBlocked(ctx, sending, now, probe); err != nil {
			return err
		}
		r.startReady(sending)
	}
	if err := r.turnPage(ctx, now); err != nil {
		return err
	}
	if read && r.page == nil {
		return nil // a page without anything to send; on to the next
	}
	timer := time.NewTimer(r.nextLook(now))
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case res := <-r.results:
		return r.settle(ctx, res)
	case <-r.news:
	case <-timer.C:
	}
	return nil
}

// drain takes results that are there.
func (r *runner) drain(ctx context.Context) error {
	for {
		select {
		case res := <-r.results:
			if err := r.settle(ctx, res); err != nil {
				return err
			}
		default:
			return nil
		}
	}
}

// nextLook is how long nothing can be done but wait for a result.
func (r *runner) nextLook(now time.Time) time.Duration {
	at := now.Add(lookAgain)
	sooner := func(t time.Time) {
		if t.Before(at) {
			at = t
		}
	}
	if r.page != nil {
		sooner(r.page.since.Add(pagePatience))
	}
	if r.cursor > r.saved || len(r.rows) > 0 {
		sooner(r.savedAt.Add(saveEvery))
	}
	switch {
	case r.down():
		sooner(r.probeAt)
	case len(r.blocked) > 0 && r.flying < r.d.cfg.Workers:
		sooner(r.laneAt)
	}
	if r.pausedTo.After(now) && at.Before(r.pausedTo) {
		at = r.pausedTo
		if limit := now.Add(lookAgain); at.After(limit) {
			at = limit
		}
	}
	return max(at.Sub(now), time.Millisecond)
}

func (r *runner) down() bool { return r.count.down.Load() }

// feed reads the next page if there is none, and redeliveries. While the
// receiver is down it does so for a probe only. It says whether it got ahead.
func (r *runner) feed(ctx context.Context, now time.Time, probe bool) (bool, error) {
	if !r.down() && len(r.again) == 0 && now.Sub(r.againAt) >= lookAgain {
		if err := r.readAgain(ctx, now); err != nil {
			return false, err
		}
	}
	last := r.d.last.Load()
	if r.page != nil || len(r.blocked) >= maxBlocked || r.cursor >= last {
		return false, nil
	}
	if excess := last - r.cursor - r.d.cfg.MaxBacklog; excess > 0 {
		if !r.dropping {
			r.dropping = true
			r.log.ErrorContext(ctx, "too many events wait for a webhook receiver; the oldest are dead letters now, without their payload",
				"max_events", r.d.cfg.MaxBacklog)
		}
		return true, r.skip(ctx, min(excess, pageRows), storage.DeliveryDropped)
	}
	if !r.down() {
		return true, r.readPage(ctx, pageRows, now)
	}
	if !probe {
		return false, nil
	}
	if old, err := r.tooOld(ctx, now); err != nil || old {
		return old, err
	}
	return true, r.readPage(ctx, probeRows, now)
}

const tooLong = "given up: the receiver was away for too long"

// giveUp gives up waiting events that got too old while the receiver was down,
// of which few are tried. They get some more time than others, so that what
// stands behind one that is refused for ever is tried before.
func (r *runner) giveUp(ctx context.Context, now time.Time) error {
	if err := r.save(ctx); err != nil {
		return err
	}
	n, err := r.d.store.GiveUp(ctx, r.lease(), &r.sink, now.Add(-r.d.cfg.MaxAge-2*maxBackoff), tooLong, giveUpRows)
	r.count.dead.Add(int64(n))
	return err
}

// tooOld gives up what got too old while the receiver was down.
func (r *runner) tooOld(ctx context.Context, now time.Time) (bool, error) {
	first, err := r.d.store.SinkPage(ctx, r.cursor, 1)
	if err != nil || len(first) == 0 || now.Sub(first[0].CreatedAt) <= r.d.cfg.MaxAge {
		return false, err
	}
	r.probeAt = now // there may be more of them
	return true, r.skip(ctx, pageRows, storage.DeliveryDead)
}

// skip makes events after the cursor dead letters: as many as said or, if
// they are too old, as many as are.
func (r *runner) skip(ctx context.Context, rows int64, state storage.DeliveryState) error {
	events, err := r.d.store.SinkPage(ctx, r.cursor, int(rows))
	if err != nil {
		return err
	}
	if len(events) == 0 {
		r.cursor = r.d.last.Load()
	}
	for i := range events {
		e := &events[i]
		if state == storage.DeliveryDead && time.Since(e.CreatedAt) <= r.d.cfg.MaxAge {
			break
		}
		r.cursor = e.Seq
		if !r.sink.Match(e) {
			continue
		}
		text := tooLong
		if state == storage.DeliveryDropped {
			text = "given up: too many events waited"
			r.count.dropped.Add(1)
		} else {
			r.count.dead.Add(1)
		}
		r.rows[e.Seq] = &storage.Delivery{Seq: e.Seq, Enrollment: e.Enroll.ID, CreatedAt: e.CreatedAt, State: state, Error: text}
	}
	return r.save(ctx)
}

// readPage makes lanes of the next events.
func (r *runner) readPage(ctx context.Context, rows int, now time.Time) error {
	events, err := r.d.store.SinkPage(ctx, r.cursor, rows)
	if err != nil {
		return err
	}
	p := &page{through: r.cursor, flying: make(map[string]*lane), since: now}
	lanes := make(map[string]*lane)
	for i := range events {
		e := &events[i]
		p.through = e.Seq
		if !r.sink.Match(e) {
			continue
		}
		id := e.Enroll.ID
		if b := r.blocked[id]; b != nil {
			b.behind = true
			r.wait(e, 0, time.Time{}, "")
			continue
		}
		l := lanes[id]
		if l == nil {
			l = &lane{enrollment: id}
			lanes[id] = l
			p.ready = append(p.ready, l)
		}
		l.events = append(l.events, *e)
	}
	if len(events) == 0 {
		// The numbers up to the last one were removed.
		p.through = max(p.through, r.d.last.Load())
	}
	r.page = p
	return nil
}

// readAgain makes lanes of what is to be sent again.
func (r *runner) readAgain(ctx context.Context, now time.Time) error {
	if err := r.save(ctx); err != nil {
		return err
	}
	events, err := r.d.store.RedeliveredEvents(ctx, r.sink.Name, pageRows)
	if err != nil {
		return err
	}
	if len(events) < pageRows {
		r.againAt = now
	}
	for _, e := range events {
		l := r.again[e.Enroll.ID]
		if l == nil {
			l = &lane{enrollment: e.Enroll.ID, from: fromAgain}
			r.again[e.Enroll.ID] = l
			r.ready = append(r.ready, l)
		}
		l.events = append(l.events, e)
	}
	return nil
}

// startBlocked reads and starts lanes that are due, or, to probe a receiver
// that is down, the one that is due first.
func (r *runner) startBlocked(ctx, sending context.Context, now time.Time, probe bool) error {
	free := r.d.cfg.Workers - r.flying
	switch {
	case free <= 0, r.down() && (!probe || r.flying > 0), !r.down() && now.Before(r.laneAt):
		return nil
	}
	due := r.dueLanes(now, free)
	if len(due) == 0 {
		return nil
	}
	if err := r.save(ctx); err != nil {
		return err
	}
	for _, b := range due {
		events, err := r.d.store.WaitingEvents(ctx, r.sink.Name, b.enrollment, laneRows)
		if err != nil {
			return err
		}
		if len(events) == 0 {
			delete(r.blocked, b.enrollment)
			continue
		}
		b.busy, b.behind = true, false
		r.launch(sending, &lane{enrollment: b.enrollment, events: events, from: fromRows, more: len(events) == laneRows})
	}
	return nil
}

// dueLanes looks blocked enrollments through for some that are due.
func (r *runner) dueLanes(now time.Time, limit int) (due []*blocked) {
	r.laneAt, r.lookedAt = now.Add(lookAgain), now
	if r.down() {
		var first *blocked
		for _, b := range r.blocked {
			if !b.busy && (first == nil || b.nextAt.Before(first.nextAt)) {
				first = b
			}
		}
		if first != nil {
			due = append(due, first)
		}
		return due
	}
	for _, b := range r.blocked {
		switch {
		case b.busy:
		case b.nextAt.After(now):
			r.look(b.nextAt)
		default:
			if due = append(due, b); len(due) == limit {
				r.look(now) // there may be more
				return due
			}
		}
	}
	return due
}

// startReady starts lanes of the page, and redeliveries.
func (r *runner) startReady(sending context.Context) {
	workers := r.d.cfg.Workers
	if p := r.page; p != nil {
		for len(p.ready) > 0 && r.flying < workers {
			l := p.ready[0]
			p.ready = p.ready[1:]
			p.flying[l.enrollment] = l
			r.launch(sending, l)
		}
	}
	for len(r.ready) > 0 && r.flying < workers && !r.down() {
		l := r.ready[0]
		r.ready = r.ready[1:]
		r.launch(sending, l)
	}
}

// launch sends a lane's events one after the other in a goroutine. Those that
// the sink does not take, since its filter has changed, count as sent.
func (r *runner) launch(sending context.Context, l *lane) {
	r.flying++
	go func() {
		res := result{lane: l}
		for i := range l.events {
			e := &l.events[i]
			if !r.sink.Match(e) {
				res.sent++
				continue
			}
			if res.failure, res.tries = r.send(sending, e); res.failure != nil {
				res.cut = sending.Err() != nil
				break
			}
			e.Raw = nil
			r.count.delivered.Add(1)
			res.sent++
		}
		r.results <- res // has room for each worker
	}()
}

// send tries an event, more than once if that may help soon.
func (r *runner) send(sending context.Context, e *storage.EventRecord) (f *failure, tries int) {
	for {
		begun := time.Now()
		f = r.d.send.send(sending, &r.sink, e)
		tries++
		pause := r.pause(e.Attempts + tries)
		switch {
		case f == nil, sending.Err() != nil, f.gone || f.unfit || f.after > 0, r.down(),
			tries == triesInPlace, time.Since(begun) > quickly, pause > pauseInPlace:
			return f, tries
		}
		r.count.failures.Add(1)
		if !sleep(sending, jitter(pause)) {
			return f, tries
		}
	}
}

// wait puts an event behind what waits.
func (r *runner) wait(e *storage.EventRecord, attempts int, at time.Time, text string) {
	r.rows[e.Seq] = &storage.Delivery{Seq: e.Seq, Enrollment: e.Enroll.ID, CreatedAt: e.CreatedAt, State: storage.DeliveryWaiting,
		Attempts: attempts, NextAt: at, Error: text}
}

// settle takes a lane's result.
func (r *runner) settle(ctx context.Context, res result) error {
	r.flying--
	now := time.Now()
	l := res.lane
	if res.sent > 0 {
		r.worked(ctx, now)
	}
	if l.from == fromPage {
		delete(r.page.flying, l.enrollment)
	} else {
		for i := range res.sent {
			r.rows[l.events[i].Seq] = nil
		}
	}
	if l.from == fromAgain {
		delete(r.again, l.enrollment)
	}
	switch {
	case res.failure == nil:
		r.laneEnded(l, now)
		return nil
	case res.cut:
		if l.from == fromPage {
			r.leave(l.events[res.sent:], l.enrollment, now)
		}
		return nil
	}
	r.count.failures.Add(1)
	if res.failure.after > 0 && now.Add(res.failure.after).After(r.pausedTo) {
		r.pausedTo = now.Add(res.failure.after)
	}
	r.laneFailed(l, res, now)
	if res.failure.gone {
		return r.turnOff(ctx)
	}
	r.failed(ctx, res.failure, now)
	return nil
}

// laneEnded goes on with an enrollment, all of whose events were delivered.
func (r *runner) laneEnded(l *lane, now time.Time) {
	b := r.blocked[l.enrollment]
	if l.from != fromRows || b == nil {
		return
	}
	if !l.more && !b.behind {
		delete(r.blocked, l.enrollment)
		return
	}
	b.busy = false
	r.block(l.enrollment, now)
}

// laneFailed keeps what a lane could not deliver.
func (r *runner) laneFailed(l *lane, res result, now time.Time) {
	e := &l.events[res.sent]
	attempts := e.Attempts + res.tries
	next := now.Add(jitter(r.pause(attempts)))
	if next.Before(r.pausedTo) {
		next = r.pausedTo
	}
	d := storage.Delivery{Seq: e.Seq, Enrollment: e.Enroll.ID, CreatedAt: e.CreatedAt, State: storage.DeliveryWaiting, Attempts: attempts, NextAt: next, Error: res.failure.text}
	dead := now.Sub(e.CreatedAt) > r.d.cfg.MaxAge
	if l.from == fromAgain {
		d.State, dead = storage.DeliveryAgain, attempts >= againTries
	}
	if dead || res.failure.unfit {
		d.State, d.NextAt = storage.DeliveryDead, time.Time{}
		next = now // the next one is not to blame
		r.count.dead.Add(1)
	}
	r.rows[e.Seq] = &d
	switch l.from {
	case fromPage:
		r.leave(l.events[res.sent+1:], l.enrollment, next)
	case fromRows:
		r.blocked[l.enrollment].busy = false
		r.block(l.enrollment, next)
	}
}

// leave makes events of the page, which were not tried, and the enrollment
// wait in the database.
func (r *runner) leave(events []storage.EventRecord, enrollment string, next time.Time) {
	r.block(enrollment, next)
	for i := range events {
		r.wait(&events[i], 0, time.Time{}, "")
	}
}

// pause is the back-off after so many failures.
func (r *runner) pause(attempts int) time.Duration {
	p := r.d.cfg.Backoff
	for range attempts - 1 {
		if p *= 2; p >= maxBackoff {
			return maxBackoff
		}
	}
	return p
}

// jitter takes up to half of a pause away.
func jitter(p time.Duration) time.Duration { return p - rand.N(p/2+1) }

// worked notes a success: a receiver that was down is back, and everything
// that waits is due.
func (r *runner) worked(ctx context.Context, now time.Time) {
	r.failures, r.dropping = 0, false
	if !r.down() {
		return
	}
	r.count.down.Store(false)
	r.log.InfoContext(ctx, "the webhook receiver is back")
	for _, b := range r.blocked {
		b.nextAt = now
	}
	r.look(now)
}

// failed notes a failure. Too many in a row mean that the receiver is down:
// what is left of the page waits, and only now and then something is tried.
func (r *runner) failed(ctx context.Context, f *failure, now time.Time) {
	if r.failures++; r.failures < breakAfter || r.down() {
		return
	}
	r.count.down.Store(true)
	r.probes = 0
	r.postpone(now)
	r.log.ErrorContext(ctx, "the webhook receiver is down; events wait in the database", "error", f.text)
	r.park(now)
}

// postpone plans the next probe.
func (r *runner) postpone(now time.Time) {
	r.probes++
	r.probeAt = now.Add(min(jitter(r.pause(r.probes)), maxProbe))
}

// park leaves lanes of the page that were not started to the database.
func (r *runner) park(now time.Time) {
	if r.page == nil {
		return
	}
	for _, l := range r.page.ready {
		r.leave(l.events, l.enrollment, now)
	}
	r.page.ready = nil
}

// detach leaves the lanes of the page that take long to themselves: their
// events get rows, and the result says which of those may go.
func (r *runner) detach(now time.Time) {
	for id, l := range r.page.flying {
		l.from = fromRows
		r.leave(l.events, id, now)
		r.blocked[id].busy = true
	}
	clear(r.page.flying)
}

// turnPage moves the cursor behind a page that is done, and stores what there
// is to store when it is time for it.
func (r *runner) turnPage(ctx context.Context, now time.Time) error {
	if p := r.page; p != nil {
		if len(p.ready) == 0 && len(p.flying) > 0 && now.Sub(p.since) >= pagePatience {
			r.detach(now)
		}
		if len(p.ready)+len(p.flying) == 0 {
			r.cursor, r.page = p.through, nil
			r.poke() // there may be more
		}
	}
	due := r.cursor > r.saved || len(r.rows) > 0
	if due && (now.Sub(r.savedAt) >= saveEvery || len(r.rows) >= pageRows) {
		return r.save(ctx)
	}
	return nil
}

// save stores what is known. The cursor never passes a page that is not done.
func (r *runner) save(ctx context.Context) error {
	var s storage.Settlement
	if r.cursor > r.saved {
		s.Cursor = r.cursor
	}
	for _, seq := range slices.Sorted(maps.Keys(r.rows)) {
		if d := r.rows[seq]; d != nil {
			s.Put = append(s.Put, *d)
		} else {
			s.Done = append(s.Done, seq)
		}
	}
	if s.Cursor == 0 && len(r.rows) == 0 {
		return nil
	}
	if err := r.d.store.Settle(ctx, r.lease(), &r.sink, s); err != nil {
		return err
	}
	r.saved, r.savedAt = r.cursor, time.Now()
	clear(r.rows)
	return nil
}

// turnOff ends the sink, as its receiver asked.
func (r *runner) turnOff(ctx context.Context) error {
	if err := r.d.store.TurnOffEventSink(ctx, r.lease(), &r.sink, "the receiver answered 410 Gone"); err != nil {
		return err
	}
	r.log.ErrorContext(ctx, "a webhook receiver answered 410: its sink is off until it is turned on again")
	return errGone
}

// finish waits for what is under way and stores the rest.
func (r *runner) finish(ctx context.Context, gone bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace+r.d.cfg.Timeout+finalSave)
	defer cancel()
	for r.flying > 0 {
		if err := r.settle(ctx, <-r.results); err != nil && !errors.Is(err, errGone) {
			r.log.DebugContext(ctx, "could not settle on the way out", "error", err)
		}
	}
	if r.page != nil {
		r.park(time.Now())
		r.cursor, r.page = r.page.through, nil
	}
	err := r.save(ctx)
	if err != nil && !errors.Is(err, storage.ErrLeaseLost) && !errors.Is(err, storage.ErrNotFound) {
		r.log.WarnContext(ctx, "could not store what was delivered; it will be sent again", "error", err)
	}
	if gone {
		if err := r.d.sinks.Refresh(ctx); err != nil {
			r.log.DebugContext(ctx, "cannot read the event sinks", "error", err)
		}
	}
}
