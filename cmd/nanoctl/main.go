// Command nanoctl is the operator's command line over the server's HTTP API.
//
// Each of its commands is a row of the table in commands.go, from which the
// dispatch, the help and the shell completions are made.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

// Exit codes, for scripts.
const (
	exitFailure  = 1 // the server or the network failed, or refused
	exitUsage    = 2 // the command line, the configuration or what it asks for is wrong
	exitNotFound = 3 // no such enrollment, command or certificate
	exitPartial  = 4 // some enrollments failed, others did not
	exitDeclined = 5 // a question was answered with no, or there was nobody to ask
	exitDevice   = 6 // -wait: a device reported an error, or the command ended another way
	exitAccess   = 7 // the API key is not accepted, or may not do that
	exitTimeout  = 8 // -wait: not all devices have answered in time

	exitInterrupted = 130 // as shells have it
)

// exitError is an error that decides the exit code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

// errInterrupted is for what was waited for when the interruption came.
var errInterrupted = errors.New("interrupted; what was asked of the server last it may have done")

func usage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	e := &env{getenv: os.Getenv, home: os.UserConfigDir, pause: backoff.Sleep}
	e.onTerminals(os.Stdin, os.Stdout, os.Stderr)
	os.Exit(run(ctx, e, os.Args[1:]))
}

// env is what a command works with. The flags that every command has are
// read into it.
type env struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
	home     func() (string, error) // where configuration files are

	url     string
	context string
	keyFile string
	caFile  string
	format  string // table, wide or json
	yes     bool   // answers questions of yes or no
	// confirmation answers questions where words have to be typed.
	confirmation string

	// width is that of the terminal, and 0 if the output is none; colour says
	// whether it has colours. progressOn is the terminal that bars are drawn
	// on, and nil if there is none.
	width      int
	colour     bool
	progressOn io.Writer

	api *client // made before the command runs
	// transport carries requests; nil is the usual one.
	transport http.RoundTripper

	// pause waits, or returns the error of a context that ends before.
	pause func(context.Context, time.Duration) error
}

// run finds the command and maps its error to an exit code.
func run(ctx context.Context, e *env, args []string) int {
	err := dispatch(ctx, e, args)
	if err == nil || errors.Is(err, errHelpShown) {
		return 0
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		err = &exitError{exitInterrupted, errInterrupted}
	}
	fmt.Fprintln(e.err, "nanoctl:", strings.Map(printableInLines, err.Error()))
	var exit *exitError
	if errors.As(err, &exit) {
		return exit.code
	}
	return exitFailure
}
