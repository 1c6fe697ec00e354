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
	// Owed: storage.Enqueue made the pushes owed. Otherwise Push makes those
	// owed that it does not wait for.
	Owed bool
	// Async: Push does not wait, and reports possible pushes as owed.
	Async bool
}

// Result is the state of one push at the time of the answer.
type Result struct {
	// APNsID is set if APNs accepted the push.
	APNsID string
	// Owed: Push did not wait for the push, which follows.
	Owed bool
	// Err is the reason why nothing was pushed: storage.ErrNotEnrolled,
	// storage.ErrTokenDead, ErrStopped, ErrClosed, a *Refused, or the
	// store's error.
	Err error
}

// Refused is the error of a push that APNs did not accept.
type Refused struct {
	Outcome apns.Outcome
}

// Error returns the answer of APNs, or the reason why there was none.
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

// call is one waiting call of Push.
type call struct {
	scope storage.Scope

	mu       sync.Mutex
	results  map[string]Result
	left     int // results to come
	returned bool
	done     chan struct{}
}

func (c *call) resolve(id string, r Result) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.returned { // the caller owns results now, and uses them without the lock
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

func (p *pendingPush) resolve(r Result) {
	for _, c := range p.calls {
		c.resolve(p.id, r)
	}
}

// checkScope ends the calls whose scope does not have the topic.
func (p *pendingPush) checkScope(topic string) {
	p.calls = slices.DeleteFunc(p.calls, func(c *call) bool {
		if len(c.scope.Topics) == 0 || slices.Contains(c.scope.Topics, topic) {
			return false
		}
		c.resolve(p.id, Result{Err: storage.ErrNotEnrolled})
		return true
	})
}

// Push pushes to enrollments and returns the result of each. It waits no longer
// than Config.Wait. Pushes without an outcome by then, or without room in
// memory, are owed: they go on in the background, and the sweep of another
// replica sends them if this process does not. The error is the store's, or
// that of ctx; the pushes are unknown then.
func (s *Service) Push(ctx context.Context, r Request) (map[string]Result, error) {
	if r.Async {
		return s.pushAsync(ctx, r)
	}
	c := &call{scope: r.Scope, results: make(map[string]Result, len(r.IDs)), done: make(chan struct{})}
	unique := slices.Compact(slices.Sorted(slices.Values(r.IDs)))
	c.left = len(unique)
	if c.left == 0 {
		return c.results, nil
	}
	s.enqueue(unique, c)
	timer := time.NewTimer(s.cfg.Wait)
	defer timer.Stop()
	select {
	case <-c.done:
	case <-timer.C:
	case <-ctx.Done():
	}
	c.mu.Lock()
	c.returned = true
	c.mu.Unlock()
	if c.left > 0 && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return c.results, s.reportRest(ctx, r, unique, c.results)
}

// reportRest makes pushes without a result owed, and reports them so.
func (s *Service) reportRest(ctx context.Context, r Request, ids []string, results map[string]Result) error {
	rest := slices.DeleteFunc(ids, func(id string) bool { _, ok := results[id]; return ok })
	return s.markOwed(ctx, r, rest, results)
}

// markOwed makes pushes owed unless they are, and reports them so.
func (s *Service) markOwed(ctx context.Context, r Request, ids []string, results map[string]Result) error {
	var failed map[string]error
	if !r.Owed && len(ids) > 0 {
		var err error
		if failed, err = s.store.OwePush(ctx, r.Scope, ids, s.cfg.Now().Add(callerGrace)); err != nil {
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

// pushAsync is Push without the wait.
func (s *Service) pushAsync(ctx context.Context, r Request) (map[string]Result, error) {
	unique := slices.Compact(slices.Sorted(slices.Values(r.IDs)))
	results := make(map[string]Result, len(unique))
	if err := s.markOwed(ctx, r, unique, results); err != nil {
		return nil, err
	}
	s.enqueue(slices.DeleteFunc(unique, func(id string) bool { return results[id].Err != nil }), nil)
	return results, nil
}

// enqueue makes enrollments pending, for a call or, if c is nil, for callers
// that do not wait. Enrollments without room get no result.
func (s *Service) enqueue(ids []string, c *call) {
	s.mu.Lock()
	closed := s.closed
	for _, id := range ids {
		if closed {
			break
		}
		p := s.pending[id]
		if p == nil {
			if len(s.pending) >= maxPending {
				continue
			}
			p = &pendingPush{id: id}
			s.pending[id] = p
			if _, inFlight := s.inFlight[id]; !inFlight {
				s.queue = append(s.queue, id)
			}
		}
		if c != nil {
			p.calls = append(p.calls, c)
		} else {
			p.async = true
		}
	}
	s.mu.Unlock()
	if closed && c != nil {
		for _, id := range ids {
			c.resolve(id, Result{Err: ErrClosed})
		}
	}
	s.signal()
}
