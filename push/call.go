package push

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/storage"
)

// Request asks for pushes.
type Request struct {
	Scope storage.Scope
	// IDs of enrollments; repeated ones count once.
	IDs []string
	// Owed says that the pushes are owed already, by storage.Enqueue; else
	// those that are not waited for are made owed.
	Owed bool
	// Async does not wait: what can be pushed is reported as owed.
	Async bool
}

// Result is what became of one push by the time of the answer.
type Result struct {
	// APNsID is set if APNs took it.
	APNsID string
	// Owed: it was not waited for, and will be paid.
	Owed bool
	// Err is why it was not pushed: storage.ErrNotEnrolled,
	// storage.ErrTokenDead, ErrStopped, ErrClosed, a *Refused, or the
	// store's error.
	Err error
}

// Refused is the error of a push that APNs did not take.
type Refused struct {
	Outcome apns.Outcome
}

// Error says what APNs said, or why it could not be asked.
func (r *Refused) Error() string {
	switch o := r.Outcome; {
	case o.Reason != "":
		return fmt.Sprintf("APNs: %s (%d, %s)", o.Reason, o.Status, o.Class)
	case o.Status != 0:
		return fmt.Sprintf("APNs: status %d (%s)", o.Status, o.Class)
	case errors.Is(o.Err, apns.ErrNoCertificate):
		return "no push certificate for the enrollment's topic"
	default:
		return fmt.Sprintf("APNs did not answer (%s): %v", o.Class, o.Err)
	}
}

// Unwrap returns the error of the transport.
func (r *Refused) Unwrap() error { return r.Outcome.Err }

// call is one caller of Push who waits.
type call struct {
	scope storage.Scope

	mu      sync.Mutex
	results map[string]Result
	left    int // results to come
	over    bool
	done    chan struct{}
}

func (c *call) settle(id string, r Result) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.over { // the results are the caller's now, who reads and adds without the lock
		return
	}
	if _, ok := c.results[id]; ok {
		return
	}
	c.results[id] = r
	if c.left--; c.left == 0 {
		close(c.done)
	}
}

func (w *want) settle(r Result) {
	for _, c := range w.calls {
		c.settle(w.id, r)
	}
}

// admit turns away the callers whose scope does not have the topic.
func (w *want) admit(topic string) {
	w.calls = slices.DeleteFunc(w.calls, func(c *call) bool {
		if len(c.scope.Topics) == 0 || slices.Contains(c.scope.Topics, topic) {
			return false
		}
		c.settle(w.id, Result{Err: storage.ErrNotEnrolled})
		return true
	})
}

// Push pushes to enrollments and returns what became of each. It waits no
// longer than Config.Patience; what is not settled by then, or finds no room
// in memory, is owed: it goes on in the background, and if this process does
// not get to it, another replica's sweep does. The error is the store's, or
// that of ctx: then nothing is known of the pushes.
func (s *Service) Push(ctx context.Context, r Request) (map[string]Result, error) {
	if r.Async {
		return s.later(ctx, r)
	}
	c := &call{scope: r.Scope, results: make(map[string]Result, len(r.IDs)), done: make(chan struct{})}
	unique := slices.Compact(slices.Sorted(slices.Values(r.IDs)))
	c.left = len(unique)
	if c.left == 0 {
		return c.results, nil
	}
	s.want(unique, c)
	timer := time.NewTimer(s.cfg.Patience)
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
	case <-ctx.Done():
	}
	c.mu.Lock()
	c.over = true
	c.mu.Unlock()
	if c.left > 0 && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return c.results, s.settleRest(ctx, r, unique, c.results)
}

// settleRest reports as owed what has no result, and sees to it that it is.
func (s *Service) settleRest(ctx context.Context, r Request, ids []string, results map[string]Result) error {
	rest := slices.DeleteFunc(ids, func(id string) bool { _, ok := results[id]; return ok })
	return s.owe(ctx, r, rest, results)
}

// owe makes pushes owed that are not, and reports them so.
func (s *Service) owe(ctx context.Context, r Request, ids []string, results map[string]Result) error {
	var failed map[string]error
	if !r.Owed && len(ids) > 0 {
		var err error
		if failed, err = s.store.OwePush(ctx, r.Scope, ids, s.cfg.Now().Add(spareTime)); err != nil {
			return err
		}
	}
	for _, id := range ids {
		if err := failed[id]; err != nil {
			results[id] = Result{Err: err}
		} else {
			results[id] = Result{Owed: true}
		}
	}
	return nil
}

// later is Push that does not wait.
func (s *Service) later(ctx context.Context, r Request) (map[string]Result, error) {
	unique := slices.Compact(slices.Sorted(slices.Values(r.IDs)))
	results := make(map[string]Result, len(unique))
	if err := s.owe(ctx, r, unique, results); err != nil {
		return nil, err
	}
	s.want(slices.DeleteFunc(unique, func(id string) bool { return results[id].Err != nil }), nil)
	return results, nil
}

// want queues enrollments for a caller, or for nobody. Those that find no room
// are left without a result.
func (s *Service) want(ids []string, c *call) {
	s.mu.Lock()
	closed := s.closed
	for _, id := range ids {
		if closed {
			break
		}
		w := s.wanted[id]
		if w == nil {
			if len(s.wanted) >= maxWanted {
				continue
			}
			w = &want{id: id}
			s.wanted[id] = w
			if _, flying := s.flying[id]; !flying {
				s.queue = append(s.queue, id)
			}
		}
		if c != nil {
			w.calls = append(w.calls, c)
		} else {
			w.async = true
		}
	}
	s.mu.Unlock()
	if closed && c != nil {
		for _, id := range ids {
			c.settle(id, Result{Err: ErrClosed})
		}
	}
	s.nudge()
}
