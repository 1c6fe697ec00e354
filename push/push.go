// Package push wakes devices, and sends every push that is owed.
//
// A [Service] pushes on behalf of callers (Push). On the one replica that holds
// the lease it also sends the pushes that are left over (Sweep): those of
// replicas that died, those that APNs could not take, and those to silent
// devices with commands. storage.Pushes keeps which pushes are owed; package
// apns sends them.
//
// A process has one push in flight for each enrollment, however many callers
// ask. Callers that come while it is in flight share the next one, since the
// device may have polled before they queued their command. Replicas avoid
// duplicates by time: the one that queued a command pushes first, the sweep
// takes pushes that are owed for more than 30 seconds. A duplicate push is
// harmless.
package push

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/supervise"
)

// CertificateRefresh bounds the time from the upload of a push certificate until
// every replica uses it.
const CertificateRefresh = 10 * time.Second

const (
	// lookupRows is how many enrollments one query looks up or claims.
	lookupRows = 500
	// maxPending bounds the enrollments that wait for their push. The sweep
	// pushes to the others.
	maxPending = 100_000
	// callerGrace is the time for which the sweeps of all replicas leave a push
	// to the replica whose caller wants it.
	callerGrace = 30 * time.Second
)

// Errors of a Result, for errors.Is.
var (
	// ErrStopped: APNs refuses the topic's certificate, or there is none. A
	// probe every few minutes and a new certificate start the topic again.
	ErrStopped = errors.New("pushes to the topic are stopped: its push certificate is missing or refused")
	// ErrClosed: the Service is closed.
	ErrClosed = errors.New("the push service is closed")
)

// Store is the part of the store that a Service needs.
type Store interface {
	storage.Pushes
	storage.PushCerts
}

// Config holds what is optional about a Service. The zero value works.
type Config struct {
	// APNs configures the sender. Default of its CertificateTTL:
	// CertificateRefresh.
	APNs apns.Config
	// Rate bounds the pushes started per second. Default: unlimited.
	Rate float64
	// Retry lists the pauses between pushes to a silent device with waiting
	// commands. The first one begins when APNs accepts a push; the last one
	// repeats. Default: no retries.
	Retry []time.Duration
	// Wait bounds how long Push waits for outcomes. Default: 10 seconds.
	Wait time.Duration
	// SweepEvery is the interval between two looks of Sweep for due pushes.
	// Default: a second.
	SweepEvery time.Duration
	// Logger receives changes of state. Default: discard.
	Logger *slog.Logger
	// Supervisor runs the goroutines of the service. Default: one that reports
	// nothing but to Logger.
	Supervisor *supervise.Supervisor
	// Now is the clock of retries. Default: time.Now.
	Now func() time.Time
}

// Service pushes. Make it with New and Close it after use. Any number of
// goroutines may call its methods.
type Service struct {
	store    Store
	cfg      Config
	log      *slog.Logger
	certs    *certificates
	client   *apns.Client
	limit    *rate.Limiter
	batch    int           // rows of a look-up or a claim
	slots    chan struct{} // one for each push in flight
	topics   *topics
	outcomes *outcomeWriter
	counter  *outcomeCounter
	swept    atomic.Int64

	ctx      context.Context // of pushes
	cancel   context.CancelFunc
	starting context.Context // of look-ups; ends when Close begins
	quit     context.CancelFunc
	loops    sync.WaitGroup // the dispatcher and the watch
	pushes   sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	inFlight map[string]struct{}     // from the look-up to the outcome
	pending  map[string]*pendingPush // to be pushed next
	queue    []string                // enrollments in pending that are not in flight
	wake     chan struct{}
}

// pendingPush is an enrollment to be pushed and the callers that wait for it.
type pendingPush struct {
	id    string
	calls []*call
	// async: a caller that does not wait wants the push. It is needless once no
	// push is owed.
	async bool
}

// New starts a Service. The error names what is wrong in cfg.
func New(store Store, cfg Config) (*Service, error) {
	if cfg.Rate < 0 {
		return nil, fmt.Errorf("push: Config.Rate: %v is negative", cfg.Rate)
	}
	for _, d := range cfg.Retry {
		if d <= 0 {
			return nil, fmt.Errorf("push: Config.Retry: %v is not positive", d)
		}
	}
	if cfg.Wait <= 0 {
		cfg.Wait = 10 * time.Second
	}
	if cfg.SweepEvery <= 0 {
		cfg.SweepEvery = time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Supervisor == nil {
		cfg.Supervisor = supervise.New(supervise.Config{Logger: cfg.Logger})
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.APNs.CertificateTTL == 0 {
		cfg.APNs.CertificateTTL = CertificateRefresh
	}
	s := &Service{
		store: store, cfg: cfg, log: cfg.Logger, certs: newCertificates(store), counter: newOutcomeCounter(),
		limit: rate.NewLimiter(rate.Inf, 0), batch: lookupRows,
		wake:     make(chan struct{}, 1),
		inFlight: make(map[string]struct{}), pending: make(map[string]*pendingPush),
	}
	if cfg.Rate > 0 {
		s.limit = rate.NewLimiter(rate.Limit(cfg.Rate), max(1, int(cfg.Rate/10)))
		// A batch is sent within five seconds of its look-up.
		s.batch = max(1, min(lookupRows, int(cfg.Rate*5)))
	}
	var err error
	if s.client, err = apns.New(s.certs, cfg.APNs); err != nil {
		return nil, err
	}
	s.slots = make(chan struct{}, s.client.Concurrency())
	s.topics = newTopics(store, s.certs, cfg.Logger)
	s.outcomes = startOutcomeWriter(store, s.topics.storeDue, cfg.Logger, cfg.Supervisor)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.starting, s.quit = context.WithCancel(s.ctx)
	s.loops.Go(func() { _ = cfg.Supervisor.Run(s.starting, "push dispatcher", s.dispatch) }) // the service is closed
	s.loops.Go(func() {
		_ = cfg.Supervisor.Run(s.ctx, "push topics", func(ctx context.Context) error {
			return s.topics.watch(ctx, cfg.APNs.CertificateTTL)
		}) // the service is closed
	})
	return s, nil
}

// Close ends the service. Pushes that still wait are left to other replicas.
// Close waits for pushes in flight until ctx ends, and stores their outcomes.
func (s *Service) Close(ctx context.Context) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.quit()
	left := s.pending
	s.pending, s.queue = make(map[string]*pendingPush), nil
	s.mu.Unlock()
	for _, p := range left {
		p.resolve(Result{Err: ErrClosed})
	}
	stop := context.AfterFunc(ctx, s.cancel)
	defer stop()
	s.pushes.Wait()
	s.cancel()
	s.loops.Wait()
	s.client.Close()
	return s.outcomes.close(ctx)
}

// CertificateChanged tells the service that the push certificate of a topic has
// been stored or deleted. This process uses it from now on; others find it
// within CertificateRefresh.
func (s *Service) CertificateChanged(topic string) {
	s.client.CertificateChanged(topic)
	s.topics.resume(topic, 0)
}

// dispatch looks up pending enrollments and starts their pushes, until ctx ends.
func (s *Service) dispatch(ctx context.Context) error {
	for {
		batch := s.takeBatch()
		if batch == nil {
			select {
			case <-s.wake:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := s.cfg.Supervisor.Once("push look-up", func() { s.startBatch(batch) })
		for id, p := range batch { // none but after a panic
			s.finish(id)
			p.resolve(Result{Err: err})
		}
		s.pushes.Done() // of takeBatch
	}
}

// takeBatch moves the next enrollments from pending to inFlight. The batch
// counts as a push, so that Close waits for it.
func (s *Service) takeBatch() map[string]*pendingPush {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(len(s.queue), s.batch)
	if n == 0 || s.closed {
		return nil
	}
	s.pushes.Add(1)
	batch := make(map[string]*pendingPush, n)
	for _, id := range s.queue[:n] {
		batch[id] = s.pending[id]
		delete(s.pending, id)
		s.inFlight[id] = struct{}{}
	}
	s.queue = s.queue[n:]
	return batch
}

// startBatch looks a batch up, starts its pushes and takes them out of the batch.
func (s *Service) startBatch(batch map[string]*pendingPush) {
	ids := make([]string, 0, len(batch))
	for id := range batch {
		ids = append(ids, id)
	}
	targets, failed, err := s.store.PushTargets(s.starting, storage.Scope{}, ids)
	if err != nil {
		err = fmt.Errorf("looking the enrollment up: %w", err)
		for id, p := range batch {
			delete(batch, id)
			s.finish(id)
			p.resolve(Result{Err: err})
		}
		return
	}
	for id, err := range failed {
		p := batch[id]
		delete(batch, id)
		s.finish(id)
		p.resolve(Result{Err: err})
	}
	for _, t := range targets {
		p := batch[t.ID]
		delete(batch, t.ID)
		p.checkScope(t.Topic)
		if len(p.calls) == 0 && (!p.async || t.Paid >= t.Owed) {
			s.finish(t.ID)
			continue
		}
		s.startPush(s.starting, t, p)
	}
}

// startPush starts a push to an enrollment in flight once there is room. It
// returns false if ctx ends before.
func (s *Service) startPush(ctx context.Context, t storage.PushTarget, p *pendingPush) bool {
	err := s.limit.Wait(ctx)
	if err == nil {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		s.finish(t.ID)
		p.resolve(Result{Err: ErrClosed})
		return false
	}
	s.pushes.Add(1)
	go func() {
		defer s.pushes.Done()
		defer func() { <-s.slots }()
		var result Result
		if err := s.cfg.Supervisor.Once("push", func() { result = s.send(t) }); err != nil {
			result = Result{Err: err}
		}
		s.finish(t.ID)
		p.resolve(result)
	}()
	return true
}

// send pushes and records the outcome.
func (s *Service) send(t storage.PushTarget) Result {
	at := s.cfg.Now()
	version, ok := s.topics.allow(t.Topic)
	if !ok {
		return Result{Err: ErrStopped}
	}
	o := s.client.Push(s.ctx, apns.Notification{Token: t.Token, Magic: t.Magic, Topic: t.Topic})
	if o.Err != nil && s.ctx.Err() != nil {
		return Result{Err: ErrClosed} // the push is still owed, and APNs did not fail
	}
	counted := t.Topic
	if s.topics.certs.version(t.Topic) == 0 {
		counted = ""
	}
	s.counter.count(counted, o)
	s.topics.observe(t.Topic, version, o)
	s.outcomes.add(s.outcomeRecord(t, at, o))
	if o.Class != apns.Accepted {
		return Result{Err: &Refused{Outcome: o}}
	}
	return Result{APNsID: o.APNsID}
}

// finish ends the push of an enrollment, and queues another one if callers want
// it.
func (s *Service) finish(id string) {
	s.mu.Lock()
	delete(s.inFlight, id)
	_, again := s.pending[id]
	if again {
		s.queue = append(s.queue, id)
	}
	s.mu.Unlock()
	if again {
		s.signal()
	}
}

// signal wakes the dispatcher.
func (s *Service) signal() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
