package main

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

// restartPauses space the starts of a background component that fails.
var restartPauses = backoff.Policy{First: time.Second, Max: time.Minute}

const (
	// steadyAfter is how long a component runs before its failures are
	// forgotten.
	steadyAfter = 5 * time.Minute
	// manyFailures in a row make the daemon unready.
	manyFailures = 5
)

// errEnded is the failure of a component that returned without an error.
var errEnded = errors.New("it ended by itself")

// supervise runs a background component until ctx ends. After a panic, an error
// or an early end it starts the component again.
func (s *server) supervise(ctx context.Context, name string, run func(context.Context) error) error {
	failures := 0
	for {
		began := time.Now()
		steady := time.AfterFunc(steadyAfter, func() { s.setFailing(name, false) })
		err := withoutPanic(ctx, run)
		steady.Stop()
		if ctx.Err() != nil {
			return err
		}
		if err == nil {
			err = errEnded
		}
		if time.Since(began) >= steadyAfter {
			failures = 0
		}
		failures++
		pause := restartPauses.Pause(failures)
		s.log.Error("a background component failed and starts again", "component", name, "failures", failures, "error", err, "restart_in", pause)
		if s.restarted != nil {
			s.restarted(name)
		}
		if failures >= manyFailures {
			s.setFailing(name, true)
		}
		if err := backoff.Sleep(ctx, pause); err != nil {
			return err
		}
	}
}

// setFailing reports that a component fails again and again, or no longer.
func (s *server) setFailing(name string, failing bool) {
	if s.failing != nil {
		s.failing(name, failing)
	}
}

// withoutPanic runs a function and returns its panic as an error with the stack.
func withoutPanic(ctx context.Context, run func(context.Context) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v\n%s", p, debug.Stack())
		}
	}()
	return run(ctx)
}
