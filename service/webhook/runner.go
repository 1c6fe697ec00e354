package webhook

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/supervise"
)

const (
	// pageRows is how many events are read at once, and probeRows how many
	// from a receiver that is down.
	pageRows  = 256
	probeRows = 8
	// deadLetterRows is how many waiting events become dead letters at once.
	deadLetterRows = 512
	// waitingRows is how many waiting events of one enrollment are read at
	// once.
	waitingRows = 32
	// pagePatience is how long the next page waits for slow batches of this
	// one. Their events then wait in the database.
	pagePatience = 500 * time.Millisecond
	// An event that failed quickly is tried again at once, triesInPlace times
	// in all and with pauses of at most pauseInPlace, before its enrollment is
	// blocked: most failures are passing.
	triesInPlace = 3
	quickly      = time.Second
	pauseInPlace = 400 * time.Millisecond
	// pollEvery is how often a runner looks for events and redeliveries that
	// no wake-up announced.
	pollEvery = time.Second
	// maxRedeliveryTries is how often a redelivery is tried.
	maxRedeliveryTries = 10
	// grace is how long tries in flight may go on when the runner stops, and
	// finalStore how long it may take to store their outcomes.
	grace      = 3 * time.Second
	finalStore = 5 * time.Second
)

// source is where the events of a batch come from.
type source int

const (
	fromPage       source = iota // after the cursor; they have no rows yet
	fromBacklog                  // their rows are waiting
	fromRedelivery               // their rows are to be sent again
)

// enrollmentBatch is events of one enrollment that one goroutine sends, in
// order.
type enrollmentBatch struct {
	enrollment string
	events     []storage.Event
	from       source
	more       bool // there may be further rows behind these
	// failures counts those of the receiver at the first event that are not
	// stored with it.
	failures int
}

// result is the outcome of a batch: the first events, sent of them, were
// delivered, and the next one failed if there is a failure.
type result struct {
	batch       *enrollmentBatch
	sent        int
	failure     *failure
	tries       int  // of the event that failed
	interrupted bool // the failure is due to the end of the runner
}

// page is a stretch of the log that is being delivered.
type page struct {
	through  int64
	ready    []*enrollmentBatch
	inFlight map[string]*enrollmentBatch
	since    time.Time
}

// redeliveries are events that an operator wants to be sent again.
type redeliveries struct {
	batches map[string]*enrollmentBatch // until they are settled
	ready   []*enrollmentBatch          // of those, not started
	readAt  time.Time
}

// runner is the loop that sends the events of one sink. The goroutines of
// batches send it results; everything else belongs to the loop's goroutine.
// The cursor in the database moves only behind events that were delivered or
// have a row, and rows are read only when every outcome is stored.
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
	inFlight int
	slow     atomic.Int64 // of those in flight, if the sink skips
	page     *page
	again    redeliveries
	out      *outcomes
	backlog  *backlog
	health   health
	reached  bool      // the receiver, by this runner
	dropping bool      // events over the limit, since the last success
	warnedAt time.Time // of an event that was skipped
	// round is the number of bound up to which waiting events became dead letters.
	round int64
}

func newRunner(d *Deliverer, k storage.EventSink, current func() storage.Lease, count *counters) *runner {
	places := d.cfg.Workers
	if k.OnError == storage.OnErrorSkip {
		places *= slowFactor
	}
	return &runner{
		d: d, sink: k, lease: current, count: count, log: d.log.With("sink", k.Name),
		news: make(chan struct{}, 1), done: make(chan struct{}),
		results: make(chan result, places),
		again:   redeliveries{batches: make(map[string]*enrollmentBatch)},
		out:     newOutcomes(k.Cursor), backlog: newBacklog(), health: health{backoff: backoff.Policy{First: d.cfg.Backoff, Max: maxBackoff}},
	}
}

// start runs the loop in a goroutine. After a panic another runner of the same
// sink goes on from what is stored.
func (r *runner) start(ctx context.Context) {
	ctx, r.cancel = context.WithCancel(ctx)
	go func() {
		defer close(r.done)
		_ = r.d.cfg.Supervisor.Run(ctx, "sink "+r.sink.Name, func(ctx context.Context) error {
			next := newRunner(r.d, r.sink, r.lease, r.count)
			next.news = r.news
			next.run(ctx)
			return supervise.ErrDone // ctx ended, or the receiver unsubscribed
		}) // ctx ended
	}()
}

// stop waits until nothing is in flight and the outcomes are stored.
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

// wake says that there may be new events.
func (r *runner) wake() {
	select {
	case r.news <- struct{}{}:
	default:
	}
}

func (r *runner) run(ctx context.Context) {
	sending, interrupt := context.WithCancel(context.WithoutCancel(ctx))
	defer interrupt()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(grace, interrupt) })()
	r.count.down.Store(false)
	for !r.load(ctx) {
		if backoff.Sleep(ctx, storeErrorPause) != nil {
			return
		}
	}
	failing, unsubscribed := false, false
	for ctx.Err() == nil && !unsubscribed {
		err := r.step(ctx, sending)
		switch {
		case err == nil || ctx.Err() != nil:
		case errors.Is(err, errUnsubscribed), errors.Is(err, storage.ErrNotFound):
			unsubscribed = true
			continue
		case !failing && !errors.Is(err, storage.ErrLeaseLost):
			r.log.WarnContext(ctx, "the store holds up the delivery of events", "error", err)
		}
		if failing = err != nil; failing {
			_ = backoff.Sleep(ctx, storeErrorPause)
		}
	}
	r.finish(ctx, unsubscribed)
	r.count.down.Store(false)
}

// errUnsubscribed ends a runner whose receiver wants no more events.
var errUnsubscribed = errors.New("the receiver unsubscribed")

// load reads the sink's cursor and backlog; the list of sinks may be old.
func (r *runner) load(ctx context.Context) bool {
	sinks, err := r.d.sinks.store.EventSinks(ctx)
	if err == nil {
		for _, k := range sinks {
			if k.Name == r.sink.Name {
				r.out = newOutcomes(k.Cursor)
			}
		}
		var waiting []storage.WaitingEnrollment
		waiting, err = r.d.store.WaitingEnrollments(ctx, r.sink.Name, maxBlocked+pageRows)
		for _, e := range waiting {
			r.backlog.block(e.Enrollment, e.NextAt)
		}
	}
	if err != nil && ctx.Err() == nil {
		r.log.WarnContext(ctx, "cannot read the cursor and the backlog of a sink", "error", err)
	}
	return err == nil
}

// step does what can be done now and waits for the next thing to happen.
func (r *runner) step(ctx, sending context.Context) error {
	if err := r.settleResults(ctx); err != nil {
		return err
	}
	now := time.Now()
	read := false
	if !r.health.paused(now) {
		var err error
		if read, err = r.advance(ctx, sending, now); err != nil {
			return err
		}
	}
	if err := r.turnPage(ctx, now); err != nil {
		return err
	}
	if read && r.page == nil {
		return nil // no event of the page is for this sink; on to the next page
	}
	timer := time.NewTimer(r.untilNextStep(now))
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

// settleResults settles the results that are there.
func (r *runner) settleResults(ctx context.Context) error {
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

// advance reads and starts batches. It reports whether it read events.
func (r *runner) advance(ctx, sending context.Context, now time.Time) (read bool, err error) {
	probe := r.health.probe(now)
	if probe || r.round != r.d.bound.through.Load() {
		if err := r.deadLetterWaiting(ctx, now); err != nil {
			return false, err
		}
	}
	if read, err = r.read(ctx, now, probe); err != nil {
		return false, err
	}
	if err := r.startBlocked(ctx, sending, now, probe); err != nil {
		return false, err
	}
	r.startReady(sending)
	return read, nil
}

// untilNextStep is the time in which only a result or a wake-up can change
// anything.
func (r *runner) untilNextStep(now time.Time) time.Duration {
	at := now.Add(pollEvery)
	sooner := func(t time.Time) {
		if t.Before(at) {
			at = t
		}
	}
	if r.page != nil {
		sooner(r.page.since.Add(pagePatience))
	}
	if r.out.pending() {
		sooner(r.out.storedAt.Add(storeEvery))
	}
	switch {
	case r.health.down:
		sooner(r.health.probeAt)
	case r.backlog.len() > 0 && r.free() > 0:
		sooner(r.backlog.nextScan)
	}
	if until := r.health.pausedUntil; until.After(now) && at.Before(until) {
		at = until
		if limit := now.Add(pollEvery); at.After(limit) {
			at = limit
		}
	}
	return max(at.Sub(now), time.Millisecond)
}

// read reads the next page if there is none, and redeliveries. While the
// receiver is down it does so for a probe only. It reports whether it moved
// ahead in the log.
func (r *runner) read(ctx context.Context, now time.Time, probe bool) (bool, error) {
	if !r.health.down && len(r.again.batches) == 0 && now.Sub(r.again.readAt) >= pollEvery {
		if err := r.readRedeliveries(ctx, now); err != nil {
			return false, err
		}
	}
	// The last number is read before the page: an empty page says nothing of
	// numbers that are given after it was read.
	last := r.d.last.Load()
	if r.page != nil || r.backlog.full() || r.out.cursor >= last {
		return false, nil
	}
	full := r.d.bound.through.Load() // events up to it have to go
	if excess := max(last-r.out.cursor-r.d.cfg.MaxBacklog, full-r.out.cursor); excess > 0 {
		if !r.dropping {
			r.dropping = true
			r.log.ErrorContext(ctx, "too many events wait for a webhook receiver; the oldest are dead letters now, without their payload",
				"max_events", r.d.cfg.MaxBacklog, "max_bytes", r.d.cfg.MaxLogBytes)
		}
		return true, r.skip(ctx, min(excess, pageRows), last, storage.DeliveryDropped)
	}
	if !r.health.down {
		return true, r.readPage(ctx, pageRows, last, now)
	}
	if !probe {
		return false, nil
	}
	if old, err := r.skipTooOld(ctx, last, now); err != nil || old {
		return old, err
	}
	return true, r.readPage(ctx, probeRows, last, now)
}

const (
	textTooLong = "given up: the receiver was away for too long"
	textTooMany = "given up: too many events waited"
)

// deadLetterWaiting makes waiting events dead letters that got too old while
// the receiver was down, when few are tried. They get some more time than
// others, so that events behind one that is refused for ever are tried before.
func (r *runner) deadLetterWaiting(ctx context.Context, now time.Time) error {
	if err := r.store(ctx); err != nil {
		return err
	}
	round, before := r.d.bound.round()
	if tooOld := now.Add(-r.d.cfg.MaxAge - 2*maxBackoff); before.Before(tooOld) {
		before = tooOld
	}
	n, err := r.d.store.GiveUp(ctx, r.lease(), &r.sink, before, textTooLong, deadLetterRows)
	r.count.dead.Add(int64(n))
	if err == nil && n < deadLetterRows {
		r.round = round
	}
	return err
}

// skipTooOld makes the next events dead letters if they got too old while the
// receiver was down.
func (r *runner) skipTooOld(ctx context.Context, last int64, now time.Time) (bool, error) {
	first, err := r.d.store.SinkPage(ctx, r.out.cursor, 1)
	if err != nil || len(first) == 0 || r.d.cfg.Now().Sub(first[0].CreatedAt) <= r.d.cfg.MaxAge {
		return false, err
	}
	r.health.probeAgain(now) // there may be more of them
	return true, r.skip(ctx, pageRows, last, storage.DeliveryDead)
}

// skip makes events after the cursor dead letters: up to rows of them, and
// with DeliveryDead those alone that are too old. last is a number that was
// given before.
func (r *runner) skip(ctx context.Context, rows, last int64, state storage.DeliveryState) error {
	events, err := r.d.store.SinkPage(ctx, r.out.cursor, int(rows))
	if err != nil {
		return err
	}
	if len(events) == 0 {
		r.out.cursor = last
	}
	for i := range events {
		e := &events[i]
		if state == storage.DeliveryDead && r.d.cfg.Now().Sub(e.CreatedAt) <= r.d.cfg.MaxAge {
			break
		}
		r.out.cursor = e.Seq
		if !r.sink.Match(e) {
			continue
		}
		row := rowOf(e, state)
		if state == storage.DeliveryDropped {
			row.Error = textTooMany
			r.count.dropped.Add(1)
		} else {
			row.Error = textTooLong
			r.count.dead.Add(1)
		}
		r.out.put(row)
	}
	return r.store(ctx)
}

// readPage makes batches of the next events. last is a number that was given
// before.
func (r *runner) readPage(ctx context.Context, rows int, last int64, now time.Time) error {
	events, err := r.d.store.SinkPage(ctx, r.out.cursor, rows)
	if err != nil {
		return err
	}
	p := &page{through: r.out.cursor, inFlight: make(map[string]*enrollmentBatch), since: now}
	batches := make(map[string]*enrollmentBatch)
	for i := range events {
		e := &events[i]
		p.through = e.Seq
		if !r.sink.Match(e) {
			continue
		}
		id := e.Enroll.ID
		if b := r.backlog.get(id); b != nil {
			b.behind = true
			r.out.wait(e)
			continue
		}
		b := batches[id]
		if b == nil {
			b = &enrollmentBatch{enrollment: id}
			batches[id] = b
			p.ready = append(p.ready, b)
		}
		b.events = append(b.events, *e)
	}
	if len(events) == 0 {
		p.through = max(p.through, last) // these numbers were removed
	}
	r.page = p
	return nil
}

// readRedeliveries makes batches of the events that are to be sent again.
func (r *runner) readRedeliveries(ctx context.Context, now time.Time) error {
	if err := r.store(ctx); err != nil {
		return err
	}
	events, err := r.d.store.RedeliveredEvents(ctx, r.sink.Name, pageRows)
	if err != nil {
		return err
	}
	if len(events) < pageRows {
		r.again.readAt = now
	}
	for _, e := range events {
		b := r.again.batches[e.Enroll.ID]
		if b == nil {
			b = &enrollmentBatch{enrollment: e.Enroll.ID, from: fromRedelivery}
			r.again.batches[e.Enroll.ID] = b
			r.again.ready = append(r.again.ready, b)
		}
		b.events = append(b.events, e)
	}
	return nil
}

// startBlocked reads and starts blocked enrollments that are due, or, as a
// probe of a receiver that is down, the one that is due first.
func (r *runner) startBlocked(ctx, sending context.Context, now time.Time, probe bool) error {
	var due []*blocked
	switch {
	case !r.health.down:
		due = r.backlog.due(now, r.free())
	case probe && r.inFlight == 0:
		if e := r.backlog.earliest(); e != nil {
			due = append(due, e)
		}
	}
	if len(due) == 0 {
		return nil
	}
	if err := r.store(ctx); err != nil {
		return err
	}
	for _, e := range due {
		events, err := r.d.store.WaitingEvents(ctx, r.sink.Name, e.enrollment, waitingRows)
		if err != nil {
			return err
		}
		if len(events) == 0 {
			r.backlog.release(e.enrollment)
			continue
		}
		e.reserve()
		r.launch(sending, &enrollmentBatch{enrollment: e.enrollment, events: events, from: fromBacklog,
			more: len(events) == waitingRows, failures: e.failures})
	}
	return nil
}

// free is how many batches may be started. Of a sink that skips, batches that
// wait long for an answer leave their places to others, up to a bound: it must
// not depend on how long the receiver takes for others' events.
func (r *runner) free() int {
	slow := int(max(0, r.slow.Load()))
	return min(r.d.cfg.Workers+slow, cap(r.results)) - r.inFlight
}

// startReady starts batches of the page, and redeliveries.
func (r *runner) startReady(sending context.Context) {
	if p := r.page; p != nil {
		for len(p.ready) > 0 && r.free() > 0 {
			b := p.ready[0]
			p.ready = p.ready[1:]
			p.inFlight[b.enrollment] = b
			r.launch(sending, b)
		}
	}
	for len(r.again.ready) > 0 && r.free() > 0 && !r.health.down {
		b := r.again.ready[0]
		r.again.ready = r.again.ready[1:]
		r.launch(sending, b)
	}
}

// launch sends a batch's events one after the other in a goroutine. Events
// that the sink does not take, since its filter has changed, count as sent. An
// event whose sending panics becomes a dead letter.
func (r *runner) launch(sending context.Context, b *enrollmentBatch) {
	r.inFlight++
	from, failures := b.from, b.failures // the loop may change them meanwhile
	go func() {
		res := result{batch: b}
		if err := r.d.cfg.Supervisor.Once("webhook delivery", func() { r.sendAll(sending, &res, from, failures) }); err != nil {
			res.failure, res.tries = &failure{text: err.Error(), permanent: true}, 1
		}
		r.results <- res // has room for each worker
	}()
}

// sendAll sends the events of a batch up to the first that fails. It runs in the
// goroutine of the batch.
func (r *runner) sendAll(sending context.Context, res *result, from source, failures int) {
	for i := range res.batch.events {
		e := &res.batch.events[i]
		if !r.sink.Match(e) {
			res.sent++
			continue
		}
		before := e.Attempts
		switch {
		case from == fromRedelivery:
			before++ // it was sent before
		case i == 0:
			before += failures
		}
		if res.failure, res.tries = r.send(sending, e, before); res.failure != nil {
			res.interrupted = sending.Err() != nil
			return
		}
		e.Raw = nil
		r.count.delivered.Add(1)
		res.sent++
	}
}

// send tries an event, more than once if that may help soon. before is how
// often it was tried. It runs in the goroutine of a batch.
func (r *runner) send(sending context.Context, e *storage.Event, before int) (f *failure, tries int) {
	for {
		begun := time.Now()
		f = r.trySend(sending, e, before+tries+1)
		tries++
		pause := r.health.backoff.Pause(before + tries) // the policy does not change
		switch {
		case f == nil, sending.Err() != nil, f.unsubscribed || f.permanent || f.after > 0, r.count.down.Load(),
			f.received && r.skips(), tries == triesInPlace, time.Since(begun) > quickly, pause > pauseInPlace:
			return f, tries
		}
		r.count.failures.Add(1)
		if backoff.Sleep(sending, pause) != nil {
			return f, tries
		}
	}
}

func (r *runner) skips() bool { return r.sink.OnError == storage.OnErrorSkip }

// trySend tries once and counts the try while it is slow.
func (r *runner) trySend(sending context.Context, e *storage.Event, attempt int) *failure {
	if !r.skips() {
		return r.d.send.send(sending, &r.sink, e, attempt)
	}
	slow := time.AfterFunc(slowAfter, func() {
		r.slow.Add(1)
		r.wake()
	})
	f := r.d.send.send(sending, &r.sink, e, attempt)
	if !slow.Stop() {
		r.slow.Add(-1)
	}
	return f
}

// settle takes the result of a batch.
func (r *runner) settle(ctx context.Context, res result) error {
	r.inFlight--
	now := time.Now()
	b := res.batch
	if res.sent > 0 {
		r.succeeded(ctx, now)
	}
	if b.from == fromPage {
		delete(r.page.inFlight, b.enrollment)
	} else {
		for i := range res.sent {
			r.out.delivered(b.events[i].Seq)
		}
	}
	if b.from == fromRedelivery {
		delete(r.again.batches, b.enrollment)
	}
	switch {
	case res.failure == nil:
		r.batchDelivered(b, now)
		return nil
	case res.interrupted:
		r.batchInterrupted(b, res, now)
		return nil
	}
	r.count.failures.Add(1)
	ofReceiver := r.batchFailed(ctx, b, res, now)
	switch {
	case res.failure.unsubscribed:
		return r.unsubscribe(ctx)
	case ofReceiver:
		r.failed(ctx, res.failure, now)
	case res.failure.answered:
		r.succeeded(ctx, now) // the receiver is there
	}
	return nil
}

// batchDelivered goes on with an enrollment after all events of a batch were
// delivered.
func (r *runner) batchDelivered(b *enrollmentBatch, now time.Time) {
	e := r.backlog.get(b.enrollment)
	if b.from != fromBacklog || e == nil {
		return
	}
	if !b.more && !e.behind {
		r.backlog.release(b.enrollment)
		return
	}
	r.backlog.finish(b.enrollment, now)
}

// batchInterrupted stores the event that was being sent when the runner
// stopped, and the events behind it. The try may have reached the receiver, so
// that it counts.
func (r *runner) batchInterrupted(b *enrollmentBatch, res result, now time.Time) {
	switch b.from {
	case fromPage:
		r.persistWaiting(b.events[res.sent:], b.enrollment, now)
	case fromRedelivery:
		return
	}
	e := &b.events[res.sent]
	row := rowOf(e, storage.DeliveryWaiting)
	row.Attempts, row.NextAt = e.Attempts+1, now
	r.out.put(row)
}

// batchFailed stores the event that failed and the events behind it. It
// reports whether the failure is the receiver's.
func (r *runner) batchFailed(ctx context.Context, b *enrollmentBatch, res result, now time.Time) (ofReceiver bool) {
	e := &b.events[res.sent]
	before := 0
	if res.sent == 0 {
		before = b.failures
	}
	v := assess(r.sink.OnError, e, res.failure, res.tries, before, r.health.backoff)
	dead := v.dead || e.Seq <= r.d.bound.through.Load() || r.d.cfg.Now().Sub(e.CreatedAt) > r.d.cfg.MaxAge
	row := rowOf(e, storage.DeliveryWaiting)
	if b.from == fromRedelivery {
		row.State = storage.DeliveryAgain
		v.attempts = e.Attempts + res.tries
		dead = v.dead || v.attempts >= maxRedeliveryTries
	}
	if v.ofReceiver && res.failure.after > 0 {
		r.health.pause(now.Add(res.failure.after))
	}
	next := now.Add(v.pause)
	if r.health.paused(next) {
		next = r.health.pausedUntil
	}
	row.Attempts, row.NextAt, row.Error = v.attempts, next, res.failure.text
	failures := before + res.tries
	if dead {
		row.State, row.NextAt = storage.DeliveryDead, time.Time{}
		next, failures = now, 0 // the event behind it is not to blame
		r.deadLetter(ctx, e, res.failure, v, now)
	}
	r.out.put(row)
	switch b.from {
	case fromPage:
		r.persistWaiting(b.events[res.sent+1:], b.enrollment, next)
	case fromBacklog:
		r.backlog.finish(b.enrollment, next)
	}
	if blocked := r.backlog.get(b.enrollment); blocked != nil && b.from != fromRedelivery {
		blocked.failures = 0
		if r.skips() && v.ofReceiver {
			blocked.failures = failures
		}
	}
	return v.ofReceiver
}

// warnEvery is the least time between two warnings of skipped events.
const warnEvery = time.Minute

// deadLetter counts a dead letter, and warns of one that the receiver failed
// to take.
func (r *runner) deadLetter(ctx context.Context, e *storage.Event, f *failure, v verdict, now time.Time) {
	if !v.refused {
		r.count.dead.Add(1)
		return
	}
	r.count.refused.Add(1)
	if now.Sub(r.warnedAt) < warnEvery {
		return
	}
	r.warnedAt = now
	r.log.WarnContext(ctx, "a webhook receiver failed to take an event, which is a dead letter now; the next ones are not logged for a minute",
		"event_id", e.ID, "topic", e.Topic, "tries", v.attempts, "error", f.text)
}

// persistWaiting blocks an enrollment and stores events of the page that were
// not tried.
func (r *runner) persistWaiting(events []storage.Event, enrollment string, next time.Time) {
	r.backlog.block(enrollment, next)
	for i := range events {
		r.out.wait(&events[i])
	}
}

// persistUnstarted stores the batches of the page that were not started.
func (r *runner) persistUnstarted(now time.Time) {
	if r.page == nil {
		return
	}
	for _, b := range r.page.ready {
		r.persistWaiting(b.events, b.enrollment, now)
	}
	r.page.ready = nil
}

// persistSlow takes the batches in flight out of the page: their events get
// rows, and the result says which of those are to be removed.
func (r *runner) persistSlow(now time.Time) {
	for id, b := range r.page.inFlight {
		b.from = fromBacklog
		r.persistWaiting(b.events, id, now)
		r.backlog.get(id).inFlight = true
	}
	clear(r.page.inFlight)
}

// succeeded notes a success. If the receiver was down, everything that waits
// is due.
func (r *runner) succeeded(ctx context.Context, now time.Time) {
	r.dropping = false
	recovered := r.health.succeeded()
	if recovered || !r.reached { // the stored state may be a former runner's
		r.reached, r.out.receiver = true, &storage.ReceiverState{}
	}
	if !recovered {
		return
	}
	r.count.down.Store(false)
	r.log.InfoContext(ctx, "the webhook receiver is back")
	r.backlog.makeDue(now)
}

// failed notes a failure of the receiver. If the receiver is down from now on,
// the rest of the page waits in the database.
func (r *runner) failed(ctx context.Context, f *failure, now time.Time) {
	if !r.health.failed(now) {
		return
	}
	r.count.down.Store(true)
	r.out.receiver = &storage.ReceiverState{Down: true, Error: f.text}
	r.log.ErrorContext(ctx, "the webhook receiver is down; events wait in the database", "error", f.text)
	r.persistUnstarted(now)
}

// turnPage moves the cursor behind a page that is done, and stores outcomes
// when it is time for it.
func (r *runner) turnPage(ctx context.Context, now time.Time) error {
	if p := r.page; p != nil {
		if len(p.ready) == 0 && len(p.inFlight) > 0 && now.Sub(p.since) >= pagePatience {
			r.persistSlow(now)
		}
		if len(p.ready)+len(p.inFlight) == 0 {
			r.out.cursor, r.page = p.through, nil
			r.wake() // there may be more
		}
	}
	if r.out.due(now) {
		return r.store(ctx)
	}
	return nil
}

// store stores the pending outcomes. The cursor never passes a page that is
// not done.
func (r *runner) store(ctx context.Context) error {
	if !r.out.pending() {
		return nil
	}
	if err := r.d.store.Settle(ctx, r.lease(), &r.sink, r.out.settlement()); err != nil {
		return err
	}
	r.out.stored(time.Now())
	return nil
}

// unsubscribe turns the sink off, as its receiver asked.
func (r *runner) unsubscribe(ctx context.Context) error {
	if err := r.d.store.TurnOffEventSink(ctx, r.lease(), &r.sink, "the receiver answered 410 Gone"); err != nil {
		return err
	}
	r.log.ErrorContext(ctx, "a webhook receiver answered 410: its sink is off until it is turned on again")
	return errUnsubscribed
}

// finish waits for the batches in flight and stores the remaining outcomes.
func (r *runner) finish(ctx context.Context, unsubscribed bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace+r.d.cfg.Timeout+finalStore)
	defer cancel()
	for r.inFlight > 0 {
		if err := r.settle(ctx, <-r.results); err != nil && !errors.Is(err, errUnsubscribed) {
			r.log.DebugContext(ctx, "cannot settle a result while stopping", "error", err)
		}
	}
	if r.page != nil {
		r.persistUnstarted(time.Now())
		r.out.cursor, r.page = r.page.through, nil
	}
	err := r.store(ctx)
	if err != nil && !errors.Is(err, storage.ErrLeaseLost) && !errors.Is(err, storage.ErrNotFound) {
		r.log.WarnContext(ctx, "cannot store which events were delivered; they will be sent again", "error", err)
	}
	if unsubscribed {
		if err := r.d.sinks.Refresh(ctx); err != nil {
			r.log.DebugContext(ctx, "cannot read the event sinks", "error", err)
		}
	}
}
