package webhook

import (
	"context"
	"crypto/x509"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
	"github.com/nanomdm/nanomdm/supervise"
)

// leaseName is the lease that the deliverer works under.
const leaseName = "events"

const (
	// numberBatch is about how many events are numbered in one transaction.
	numberBatch = 1024
	// numberPause is the least pause between two such transactions, and
	// gathers events. The pause grows by numberEach with each event, up to
	// mostPause, since commits of devices wait for this one. numberLook is how
	// often events of other replicas are looked for.
	numberPause = 50 * time.Millisecond
	numberEach  = 4 * time.Millisecond
	mostPause   = 250 * time.Millisecond
	numberLook  = 500 * time.Millisecond

	upkeepEvery = 30 * time.Second
	noticeEvery = time.Hour
	// removeBatch is how many events upkeep removes in one transaction, and
	// removePause the pause between two such transactions.
	removeBatch = 500
	removePause = 50 * time.Millisecond
	// storeErrorPause is the pause after an error of the store.
	storeErrorPause = time.Second
)

// Store keeps events, sinks and deliveries for a Deliverer.
type Store interface {
	storage.Leases
	storage.Outbox
	storage.Deliveries
	storage.EventLog
	storage.EventUpkeep
}

// Config holds the optional settings; the zero value works.
type Config struct {
	// Workers is how many events are sent to one sink at once, 32 if zero. A
	// sink that skips sends up to eight times as many while the others have no
	// answer after a second.
	Workers int
	// Timeout bounds one try, 30 seconds if zero.
	Timeout time.Duration
	// MaxAge is how long an event is tried before it becomes a dead letter,
	// three days if zero.
	MaxAge time.Duration
	// MaxBacklog is how many events a sink may be behind, a million if zero.
	// The oldest beyond it become dead letters without payload.
	MaxBacklog int64
	// Retention is how long events stay in the log, a week if zero, for ever
	// if negative, and never less than MaxAge.
	Retention time.Duration
	// MaxLogBytes is how many bytes of events the log may have, 16 GiB if zero.
	// The oldest beyond it are removed; those that a sink is still to get become
	// dead letters first.
	MaxLogBytes int64
	// Notice is how long before its end a certificate is announced, 30 days if
	// zero.
	Notice time.Duration
	// Backoff is the pause after a first failure, 100 milliseconds if zero. It
	// doubles with each further one, up to 5 minutes.
	Backoff time.Duration
	// Now is the clock of stored times, time.Now if nil.
	Now func() time.Time
	// LeaseTTL is how long after a replica died another one takes over, 10
	// seconds if zero; the same on all replicas.
	LeaseTTL time.Duration
	// RootCAs verifies receivers. Default: the system's.
	RootCAs *x509.CertPool
	// Guard limits the addresses of sinks that were made through the API. The
	// zero value keeps them out of private networks.
	Guard callout.Guard
	// Logger takes alarms; nothing is logged if nil.
	Logger *slog.Logger
	// Supervisor runs the goroutines of the deliverer. Default: one that reports
	// nothing but to Logger.
	Supervisor *supervise.Supervisor
}

func (c *Config) setDefaults() {
	or(&c.Workers, 32)
	or(&c.Timeout, 30*time.Second)
	or(&c.MaxAge, 72*time.Hour)
	or(&c.MaxBacklog, 1_000_000)
	or(&c.MaxLogBytes, 16<<30)
	or(&c.Notice, 30*24*time.Hour)
	if c.Retention == 0 {
		c.Retention = 7 * 24 * time.Hour
	}
	if c.Retention > 0 {
		c.Retention = max(c.Retention, c.MaxAge)
	}
	or(&c.Backoff, 100*time.Millisecond)
	or(&c.LeaseTTL, 10*time.Second)
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Supervisor == nil {
		c.Supervisor = supervise.New(supervise.Config{Logger: c.Logger})
	}
}

func or[T int | int64 | time.Duration](v *T, def T) {
	if *v <= 0 {
		*v = def
	}
}

// Deliverer numbers committed events and sends them to the sinks, while its
// replica holds the lease. Any number of replicas run one.
type Deliverer struct {
	store  Store
	sinks  *Sinks
	holder string
	cfg    Config
	send   *sender
	log    *slog.Logger

	woken chan struct{}
	last  atomic.Int64 // the last number, as far as is known here
	bound bound
	dial  dialer // nil but in tests

	mu       sync.Mutex
	running  map[string]*runner
	counters map[string]*counters
}

// counters count for one sink since the process started.
type counters struct {
	delivered, failures, dead, dropped, refused atomic.Int64
	down                                        atomic.Bool
}

// SinkStats counts the deliveries of this replica to a sink.
type SinkStats struct {
	Sink string
	// Delivered events, failed tries, and dead letters: of events older than
	// MaxAge, of too many events, and of events that the receiver failed to
	// take.
	Delivered, Failures, Dead, Dropped, Refused int64
	// Down: the receiver failed again and again, and is probed.
	Down bool
}

// NewDeliverer makes a deliverer; Run does the work. holder must differ
// between all replicas and starts.
func NewDeliverer(store Store, sinks *Sinks, holder string, cfg Config) *Deliverer {
	cfg.setDefaults()
	return &Deliverer{
		store: store, sinks: sinks, holder: holder, cfg: cfg, log: cfg.Logger,
		woken:    make(chan struct{}, 1),
		running:  make(map[string]*runner),
		counters: make(map[string]*counters),
	}
}

// Wake says that this replica committed an event. Without it the deliverer
// finds the event half a second later.
func (d *Deliverer) Wake() {
	select {
	case d.woken <- struct{}{}:
	default:
	}
}

// Stats returns the counters by the name of the sink.
func (d *Deliverer) Stats() []SinkStats {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []SinkStats
	for _, name := range slices.Sorted(maps.Keys(d.counters)) {
		c := d.counters[name]
		out = append(out, SinkStats{Sink: name, Delivered: c.delivered.Load(), Failures: c.failures.Load(),
			Dead: c.dead.Load(), Dropped: c.dropped.Load(), Refused: c.refused.Load(), Down: c.down.Load()})
	}
	return out
}

// Run delivers events whenever this replica holds the lease, until ctx ends.
// It then waits a moment for tries in flight, stores the outcomes and gives the
// lease back.
func (d *Deliverer) Run(ctx context.Context) error {
	return lease.Hold(ctx, d.store, leaseName, d.holder, d.cfg.LeaseTTL, d.log, d.work)
}

// work is one term of the lease.
func (d *Deliverer) work(ctx context.Context, current func() storage.Lease) error {
	d.send = newSender(d.store, d.cfg.Timeout, d.cfg.Workers, d.cfg.RootCAs, d.cfg.Guard, d.dial)
	defer d.send.close()
	var wg sync.WaitGroup
	for name, run := range map[string]func(context.Context, func() storage.Lease) error{
		"event numbers": d.number, "event upkeep": d.upkeep, "event runners": d.runSinks, // waits for the runners
	} {
		wg.Go(func() {
			_ = d.cfg.Supervisor.Run(ctx, name, func(ctx context.Context) error { return run(ctx, current) }) // the term ended
		})
	}
	wg.Wait()
	return ctx.Err()
}

// number gives events their numbers and wakes the runners.
func (d *Deliverer) number(ctx context.Context, current func() storage.Lease) error {
	failing := false
	for {
		n, last, err := d.store.NumberEvents(ctx, current(), numberBatch)
		wait := numberLook
		switch {
		case err != nil:
			if !failing && ctx.Err() == nil && !errors.Is(err, storage.ErrLeaseLost) {
				d.log.WarnContext(ctx, "cannot number events", "error", err)
			}
			wait = storeErrorPause
		default:
			if d.last.Swap(last) != last || n > 0 {
				d.announce()
			}
		}
		failing = err != nil
		if n > numberBatch/2 { // there may be more
			continue
		}
		if err := backoff.Sleep(ctx, min(max(numberPause, time.Duration(n)*numberEach), mostPause)); err != nil {
			return err
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-d.woken:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// announce wakes the runners: there may be events to read.
func (d *Deliverer) announce() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, r := range d.running {
		r.wake()
	}
}

// runSinks runs a runner for each sink and restarts those whose sink changed.
func (d *Deliverer) runSinks(ctx context.Context, current func() storage.Lease) error {
	for {
		d.adjust(ctx, current)
		select {
		case <-ctx.Done():
			// They end at once, not one after the other.
			for _, r := range d.runners() {
				<-r.done
			}
			d.mu.Lock()
			clear(d.running)
			d.mu.Unlock()
			return ctx.Err()
		case <-d.sinks.changed:
		case <-time.After(refreshEvery): // a runner may have ended
		}
	}
}

func (d *Deliverer) runners() []*runner {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Collect(maps.Values(d.running))
}

func (d *Deliverer) adjust(ctx context.Context, current func() storage.Lease) {
	wanted := make(map[string]storage.EventSink)
	for _, k := range d.sinks.deliverable() {
		wanted[k.Name] = k
	}
	for _, r := range d.runners() {
		k, ok := wanted[r.sink.Name]
		if ok && same(&k, &r.sink) && !r.ended() {
			delete(wanted, r.sink.Name)
			continue
		}
		r.stop()
		d.mu.Lock()
		delete(d.running, r.sink.Name)
		d.mu.Unlock()
	}
	d.mu.Lock()
	maps.DeleteFunc(d.counters, func(name string, _ *counters) bool {
		return !slices.ContainsFunc(d.sinks.all(), func(k storage.EventSink) bool { return k.Name == name })
	})
	d.mu.Unlock()
	for name, k := range wanted {
		if ctx.Err() != nil {
			return
		}
		d.mu.Lock()
		if d.counters[name] == nil {
			d.counters[name] = new(counters)
		}
		r := newRunner(d, k, current, d.counters[name])
		d.running[name] = r
		d.mu.Unlock()
		r.start(ctx)
	}
}

// same says whether a runner of one state of a sink may go on with another.
func same(a, b *storage.EventSink) bool {
	return a.URL == b.URL && a.Tokens == b.Tokens && a.OnError == b.OnError && slices.Equal(a.Keys, b.Keys) && a.CreatedAt.Equal(b.CreatedAt) &&
		slices.Equal(a.Filter.Topics, b.Filter.Topics) && slices.Equal(a.Filter.EnrollmentTypes, b.Filter.EnrollmentTypes) &&
		slices.Equal(a.Filter.RequestTypes, b.Filter.RequestTypes) && slices.Equal(a.Filter.APNsTopics, b.Filter.APNsTopics) &&
		a.Filter.Idle == b.Filter.Idle
}

// upkeep removes old events, warns of backlogs and writes events of
// certificates near their end.
func (d *Deliverer) upkeep(ctx context.Context, current func() storage.Lease) error {
	alarmed := make(map[string]bool)
	var noticed time.Time
	for {
		if time.Since(noticed) >= noticeEvery {
			if d.batches(ctx, "announcing certificates near their end", func() (int, error) {
				return d.store.NoteExpiring(ctx, current(), d.cfg.Now().Add(d.cfg.Notice), removeBatch/5)
			}) {
				noticed = time.Now()
			}
		}
		d.batches(ctx, "dropping payloads", func() (int, error) {
			return d.store.DropPayloads(ctx, current(), removeBatch)
		})
		if d.cfg.Retention > 0 {
			d.batches(ctx, "removing old events", func() (int, error) {
				return d.store.RemoveEvents(ctx, current(), d.cfg.Now().Add(-d.cfg.Retention), removeBatch)
			})
		}
		d.boundLog(ctx, current)
		d.batches(ctx, "forgetting sinks", func() (int, error) {
			return d.store.ForgetEventSinks(ctx, current(), d.cfg.Now().Add(-d.cfg.MaxAge))
		})
		d.watch(ctx, alarmed)
		pause := upkeepEvery
		if d.bound.through.Load() > 0 {
			pause = boundEvery
		}
		if err := backoff.Sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// batches repeats a small transaction until it finds nothing to do.
func (d *Deliverer) batches(ctx context.Context, what string, step func() (int, error)) bool {
	for {
		n, err := step()
		if err != nil {
			if ctx.Err() == nil && !errors.Is(err, storage.ErrLeaseLost) {
				d.log.WarnContext(ctx, "upkeep of events failed", "work", what, "error", err)
			}
			return false
		}
		if n == 0 {
			return true
		}
		if backoff.Sleep(ctx, removePause) != nil {
			return false
		}
	}
}

// watch raises an alarm, once, when a sink comes near a bound.
func (d *Deliverer) watch(ctx context.Context, alarmed map[string]bool) {
	backlogs, err := d.store.EventBacklogs(ctx)
	if err != nil {
		return // the other work of upkeep logs that the store fails
	}
	for _, b := range backlogs {
		var age time.Duration
		if !b.Oldest.IsZero() {
			age = time.Since(b.Oldest)
		}
		near := b.Behind > d.cfg.MaxBacklog/5*4 || age > d.cfg.MaxAge/2
		if near && !alarmed[b.Sink] {
			d.log.ErrorContext(ctx, "a webhook receiver is far behind; its oldest events will become dead letters",
				"sink", b.Sink, "events", b.Behind, "max_events", d.cfg.MaxBacklog, "age", age.Round(time.Second), "max_age", d.cfg.MaxAge)
		}
		alarmed[b.Sink] = near
	}
}
