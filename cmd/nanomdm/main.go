// Command nanomdm is an Apple MDM server. Devices check in and fetch their
// commands over HTTP; operators queue commands and upload push certificates
// through an HTTP API on the same listener.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/nanomdm/nanomdm/release"
)

// Exit codes besides those of server.run.
const (
	exitFailure = 1 // could not start
	exitUsage   = 2 // configuration is wrong
)

// stopTimeout bounds how long one component may take to stop.
const stopTimeout = 15 * time.Second

func main() {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	os.Exit(run(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr, signals))
}

func run(ctx context.Context, args, environ []string, stdout, stderr io.Writer, signals <-chan os.Signal) int {
	o, warnings, err := parseOptions(args, environ, os.Stat)
	switch {
	case errors.Is(err, flag.ErrHelp):
		writeHelp(stdout)
		return 0
	case err != nil:
		fmt.Fprintln(stderr, err)
		return exitUsage
	case o.version:
		fmt.Fprintln(stdout, release.String())
		return 0
	}
	log := newLogger(stderr, o)
	for _, w := range warnings {
		log.Warn(w)
	}
	d, err := wire(o, environ, log, stdout, time.Now)
	if err != nil {
		fmt.Fprintln(stderr, "nanomdm:", err)
		return exitFailure
	}
	return d.run(ctx, signals)
}
