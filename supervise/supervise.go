// Package supervise keeps background work running. It recovers panics, starts
// again what failed, counts that, and reports what fails again and again.
//
// Every goroutine that serves no request runs by way of it: a panic there would
// end the process, with all that others are doing.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

// pauses space the starts of work that fails.
var pauses = backoff.Policy{First: time.Second, Max: time.Minute}

const (
	// SteadyAfter is how long work runs before its failures are forgotten.
	SteadyAfter = 5 * time.Minute
	// ManyFailures in a row are reported as failing.
	ManyFailures = 5
)

// ErrDone is returned by work of Run that has come to its end.
var ErrDone = errors.New("done")

// ErrPanicked is what Once returns for a panic; the log has its value and stack.
var ErrPanicked = errors.New("internal error: it panicked, see the log")

// errEnded is the failure of work that returned without an error.
var errEnded = errors.New("it ended by itself")

// Config holds what is optional.
type Config struct {
	// Logger takes failures; nothing is logged if nil.
	Logger *slog.Logger
	// Failed is called for each failure, Failing when work has failed
	// ManyFailures times in a row, and when it works again. Both may be nil.
	Failed  func(name string)
	Failing func(name string, failing bool)
}

// Supervisor is made by New. Any number of goroutines may call its methods.
type Supervisor struct {
	cfg Config

	failed atomic.Bool // any of Once since its last success
	mu     sync.Mutex
	inARow map[string]int // of Once
}

// New makes a Supervisor.
func New(cfg Config) *Supervisor {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Supervisor{cfg: cfg, inARow: make(map[string]int)}
}

// Run runs work until ctx ends, and returns its error then. After a panic, an
// error or an early end it starts the work again, after a pause that grows. Work
// that returns ErrDone has ended: Run returns nil.
func (s *Supervisor) Run(ctx context.Context, name string, work func(context.Context) error) error {
	failures := 0
	for {
		began := time.Now()
		reported := failures >= ManyFailures
		steady := time.AfterFunc(SteadyAfter, func() {
			if reported {
				s.setFailing(name, false)
			}
		})
		err := Recovered(func() error { return work(ctx) })
		steady.Stop()
		switch {
		case ctx.Err() != nil:
			if reported { // of a term of a lease that another replica has now
				s.setFailing(name, false)
			}
			return err
		case errors.Is(err, ErrDone):
			if reported {
				s.setFailing(name, false)
			}
			return nil
		case err == nil:
			err = errEnded
		}
		if time.Since(began) >= SteadyAfter {
			failures = 0
		}
		failures++
		pause := pauses.Pause(failures)
		s.cfg.Logger.Error("background work failed and starts again", "component", name, "failures", failures, "error", err, "restart_in", pause)
		s.note(name, failures)
		if err := backoff.Sleep(ctx, pause); err != nil {
			if failures >= ManyFailures {
				s.setFailing(name, false)
			}
			return err
		}
	}
}

// Once runs a piece of work of which there are many, such as one push, and
// returns ErrPanicked if it panicked. Its owner goes on with the next one.
func (s *Supervisor) Once(name string, work func()) error {
	err := Recovered(func() error { work(); return nil })
	if err == nil {
		if s.failed.Load() {
			s.succeeded(name)
		}
		return nil
	}
	s.mu.Lock()
	s.failed.Store(true)
	s.inARow[name]++
	failures := s.inARow[name]
	s.mu.Unlock()
	s.cfg.Logger.Error("a piece of background work failed", "component", name, "failures", failures, "error", err)
	s.note(name, failures)
	return ErrPanicked
}

// succeeded forgets the failures of work of Once.
func (s *Supervisor) succeeded(name string) {
	s.mu.Lock()
	failures := s.inARow[name]
	delete(s.inARow, name)
	s.failed.Store(len(s.inARow) > 0)
	s.mu.Unlock()
	if failures >= ManyFailures {
		s.setFailing(name, false)
	}
}

// note counts a failure.
func (s *Supervisor) note(name string, failures int) {
	if s.cfg.Failed != nil {
		s.cfg.Failed(name)
	}
	if failures >= ManyFailures {
		s.setFailing(name, true)
	}
}

func (s *Supervisor) setFailing(name string, failing bool) {
	if s.cfg.Failing != nil {
		s.cfg.Failing(name, failing)
	}
}

// Panic is a panic as an error.
type Panic struct {
	Value any
	Stack []byte
}

func (p *Panic) Error() string { return fmt.Sprintf("panic: %v\n%s", p.Value, p.Stack) }

// Recovered runs work and returns its panic as a *Panic.
func Recovered(work func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = &Panic{Value: v, Stack: debug.Stack()}
		}
	}()
	return work()
}
