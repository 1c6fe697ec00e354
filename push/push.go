// Package push wakes devices, and sees to it that every wake-up that is owed
// is paid.
//
// A [Service] pushes on behalf of callers (Push) and, on the one replica that
// holds the lease, pays what is left over (Sweep): debts of replicas that
// died, pushes that APNs could not take, devices with commands that stay
// silent. What is owed to whom is kept by storage.Pushes; package apns sends.
//
// Of one enrollment there is one push under way in a process, however many
// callers ask: those that come while it is under way share the next one, since
// the device may have polled before they queued their command. Replicas keep
// out of each other's way by time: the one that queued a command pushes first,
// the sweep takes debts that are older than 30 seconds. A push too many does
// no harm.
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
)

// CertificateRefresh bounds how long after its upload a push certificate is
// used by every replica.
const CertificateRefresh = 10 * time.Second

const (
	// lookRows is how many enrollments are looked up, or claimed, at a time.
	lookRows = 500
	// maxWanted bounds the enrollments that wait for their push. Others are
	// left to the sweep.
	maxWanted = 100_000
	// spareTime is how long a push may take before the sweep, on whichever
	// replica, takes over what a caller gave up.
	spareTime = 30 * time.Second
)

// Errors of a Result, to be tested with errors.Is.
var (
	// ErrStopped: APNs refuses the topic's certificate, or there is none. The
	// topic is tried now and then, and again when it has a new certificate.
	ErrStopped = errors.New("pushes to the topic are stopped: its push certificate is missing or refused")
	// ErrClosed: the Service is closed.
	ErrClosed = errors.New("the push service is closed")
)

// Store is what a Service needs to have kept.
type Store interface {
	storage.Pushes
	storage.PushCerts
}

// Config holds what is optional about a Service. The zero value works.
type Config struct {
	// APNs is for the sender. CertificateTTL is CertificateRefresh unless set.
	APNs apns.Config
	// Rate bounds the pushes started per second; 0 does not.
	Rate float64
	// Retry is when a device that stays silent, with commands waiting, is
	// pushed again: the first time so long after a push that APNs took, and so
	// on; the last one repeats. Empty is never.
	Retry []time.Duration
	// Patience is how long Push waits; 10 seconds if zero.
	Patience time.Duration
	// SweepEvery is how often Sweep looks for what is due; a second if zero.
	SweepEvery time.Duration
	// Logger; default discards.
	Logger *slog.Logger
	// Now is the clock of plans; time.Now if nil.
	Now func() time.Time
}

// Service pushes. Make it with New and Close it after use. Its methods may be
// called by any number of goroutines.
type Service struct {
	store  Store
	cfg    Config
	log    *slog.Logger
	certs  *certificates
	client *apns.Client
	limit  *rate.Limiter
	batch  int           // of look-ups and claims
	slots  chan struct{} // one for each push under way
	topics *topics
	book   *book
	tally  *tally
	swept  atomic.Int64

	ctx      context.Context // of pushes
	cancel   context.CancelFunc
	starting context.Context // ends when Close begins
	quit     context.CancelFunc
	wg       sync.WaitGroup // the dispatcher and the watch
	pushes   sync.WaitGroup

	mu     sync.Mutex
	closed bool
	flying map[string]struct{} // under way, from the look-up on
	wanted map[string]*want    // to be pushed next
	queue  []string            // of those in wanted that are not flying
	wake   chan struct{}
}

// want is an enrollment to be pushed and who waits for it.
type want struct {
	id    string
	calls []*call
	// async: somebody does not wait, for whom it need not be pushed if nothing
	// is owed any more.
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
	if cfg.Patience <= 0 {
		cfg.Patience = 10 * time.Second
	}
	if cfg.SweepEvery <= 0 {
		cfg.SweepEvery = time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.APNs.CertificateTTL == 0 {
		cfg.APNs.CertificateTTL = CertificateRefresh
	}
	s := &Service{
		store: store, cfg: cfg, log: cfg.Logger, certs: newCertificates(store), tally: newTally(),
		limit: rate.NewLimiter(rate.Inf, 0), batch: lookRows,
		wake:   make(chan struct{}, 1),
		flying: make(map[string]struct{}), wanted: make(map[string]*want),
	}
	if cfg.Rate > 0 {
		s.limit = rate.NewLimiter(rate.Limit(cfg.Rate), max(1, int(cfg.Rate/10)))
		// What was looked up must not grow old before it is sent.
		s.batch = max(1, min(lookRows, int(cfg.Rate*5)))
	}
	var err error
	if s.client, err = apns.New(s.certs, cfg.APNs); err != nil {
		return nil, err
	}
	s.slots = make(chan struct{}, s.client.Concurrency())
	s.topics = newTopics(store, s.certs, cfg.Logger)
	s.book = startBook(store, s.topics.stampDue, cfg.Logger)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.starting, s.quit = context.WithCancel(s.ctx)
	s.wg.Go(s.dispatch)
	s.wg.Go(func() { s.topics.watch(s.ctx, cfg.APNs.CertificateTTL) })
	return s, nil
}

// Close ends the service: what still waits is left to other replicas, pushes
// under way are waited for until ctx ends, and their outcomes are stored.
func (s *Service) Close(ctx context.Context) error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	s.quit()
	left := s.wanted
	s.wanted, s.queue = make(map[string]*want), nil
	s.mu.Unlock()
	for _, w := range left {
		w.settle(Result{Err: ErrClosed})
	}
	stop := context.AfterFunc(ctx, s.cancel)
	defer stop()
	s.pushes.Wait()
	s.cancel()
	s.wg.Wait()
	s.client.Close()
	return s.book.close(ctx)
}

// dispatch looks up what is wanted and starts the pushes, until the service
// is closed.
func (s *Service) dispatch() {
	for {
		batch := s.take()
		if batch == nil {
			select {
			case <-s.wake:
				continue
			case <-s.starting.Done():
				return
			}
		}
		s.start(batch)
		s.pushes.Done() // of take
	}
}

// take moves the next of what is wanted to flying. It counts as a push, so
// that Close waits for it.
func (s *Service) take() map[string]*want {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(len(s.queue), s.batch)
	if n == 0 || s.closed {
		return nil
	}
	s.pushes.Add(1)
	batch := make(map[string]*want, n)
	for _, id := range s.queue[:n] {
		batch[id] = s.wanted[id]
		delete(s.wanted, id)
		s.flying[id] = struct{}{}
	}
	s.queue = s.queue[n:]
	return batch
}

// start looks a batch up and sends it on its way.
func (s *Service) start(batch map[string]*want) {
	ids := make([]string, 0, len(batch))
	for id := range batch {
		ids = append(ids, id)
	}
	targets, failed, err := s.store.PushTargets(s.starting, storage.Scope{}, ids)
	if err != nil {
		err = fmt.Errorf("looking the enrollment up: %w", err)
		for id, w := range batch {
			s.land(id)
			w.settle(Result{Err: err})
		}
		return
	}
	for id, err := range failed {
		s.land(id)
		batch[id].settle(Result{Err: err})
	}
	for _, t := range targets {
		w := batch[t.ID]
		w.admit(t.Topic)
		if len(w.calls) == 0 && (!w.async || t.Paid >= t.Owed) {
			s.land(t.ID)
			continue
		}
		s.launch(s.starting, t, w)
	}
}

// launch starts a push to an enrollment that is flying, once there is room. It
// reports whether it did, which it does not when ctx ends before.
func (s *Service) launch(ctx context.Context, t storage.PushTarget, w *want) bool {
	err := s.limit.Wait(ctx)
	if err == nil {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	if err != nil {
		s.land(t.ID)
		w.settle(Result{Err: ErrClosed})
		return false
	}
	s.pushes.Add(1)
	go func() {
		defer s.pushes.Done()
		defer func() { <-s.slots }()
		result := s.send(t)
		s.land(t.ID)
		w.settle(result)
	}()
	return true
}

// send pushes and notes the outcome.
func (s *Service) send(t storage.PushTarget) Result {
	at := s.cfg.Now()
	version, ok := s.topics.pass(t.Topic)
	if !ok {
		return Result{Err: ErrStopped}
	}
	o := s.client.Push(s.ctx, apns.Notification{Token: t.Token, Magic: t.Magic, Topic: t.Topic})
	if o.Err != nil && s.ctx.Err() != nil {
		return Result{Err: ErrClosed} // still owed, and not APNs' fault
	}
	counted := t.Topic
	if s.topics.certs.version(t.Topic) == 0 {
		counted = ""
	}
	s.tally.count(counted, o)
	s.topics.note(t.Topic, version, o)
	s.book.note(s.record(t, at, o))
	if o.Class != apns.Accepted {
		return Result{Err: &Refused{Outcome: o}}
	}
	return Result{APNsID: o.APNsID}
}

// land ends the flight of an enrollment, and queues what was wanted of it
// meanwhile.
func (s *Service) land(id string) {
	s.mu.Lock()
	delete(s.flying, id)
	_, again := s.wanted[id]
	if again {
		s.queue = append(s.queue, id)
	}
	s.mu.Unlock()
	if again {
		s.nudge()
	}
}

func (s *Service) nudge() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}
