// Command nano2nano moves the enrollments of another MDM server, or of another
// database of this one, into a database of this one, or to a migration endpoint
// over HTTP.
//
// It only reads the source. It can be interrupted at any moment and run again,
// and a second run brings over what changed since the first one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nanomdm/nanomdm/cmd/nano2nano/foreign"
)

// Exit codes, for scripts.
const (
	exitFailure = 1 // the move did not end; run it again
	exitUsage   = 2
	exitPartial = 4 // some rows were left out, or both sides differ
)

// exitError is an error that decides the exit code.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the program at once
	os.Exit(run(ctx, &env{out: os.Stdout, err: os.Stderr, now: time.Now}, os.Args[1:]))
}

// env is what the program has of the process around it.
type env struct {
	out, err io.Writer
	now      func() time.Time
}

func run(ctx context.Context, e *env, args []string) int {
	err := move(ctx, e, args)
	if err == nil || errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if ctx.Err() != nil {
		err = errors.New("interrupted; run the same command again to go on")
	}
	fmt.Fprintln(e.err, "nano2nano:", err)
	var exit *exitError
	if errors.As(err, &exit) {
		return exit.code
	}
	return exitFailure
}

// options are the flags, which include those of NanoMDM's tool of this name.
type options struct {
	source      foreign.Config
	fleetKey    string
	zone        string
	history     string
	to, toDSN   string
	sealKeyFile string
	sealCommand bool
	openKeyFile string
	url, key    string
	dryRun      bool
	check       bool
	compare     bool
	full        bool
	state       string
	problems    string
	version     bool
}

const synopsis = `usage: nano2nano -storage KIND -storage-dsn DSN -to sqlite|pgsql|mysql -to-dsn DSN
       nano2nano -storage KIND -storage-dsn DSN -url URL -key KEY

Move the enrollments of another MDM server, or of another database of this
one, here. The source is only read.
Run the same command again to go on after an interruption, or to bring over
what changed since.

`

func parse(e *env, args []string) (*options, error) {
	o := new(options)
	flags := flag.NewFlagSet("nano2nano", flag.ContinueOnError)
	flags.SetOutput(e.err)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), synopsis)
		flags.PrintDefaults()
	}
	flags.StringVar(&o.source.Kind, "storage", "", "`kind` of the source: "+strings.Join(foreign.Kinds(), ", "))
	flags.StringVar(&o.source.DSN, "storage-dsn", "", "the source: a data source `name`, a directory or a file")
	flags.StringVar(&o.to, "to", "", "`engine` of the target: sqlite, pgsql or mysql")
	flags.StringVar(&o.toDSN, "to-dsn", "", "the target's data source `name`, or file")
	flags.StringVar(&o.sealKeyFile, "seal-key-file", "", "seal secrets in the target with the keys in this `file`, as the daemon does")
	flags.BoolVar(&o.sealCommand, "seal-commands", false, "seal commands, too")
	flags.StringVar(&o.url, "url", "", "migration endpoint to send check-ins to, instead of -to: `URL`")
	flags.StringVar(&o.key, "key", "", "API `key` of -url")
	flags.StringVar(&o.history, "history", "all", "finished commands and results to move: all, none, or those of the last `time`, such as 720h")
	flags.BoolVar(&o.dryRun, "dry-run", false, "write nothing: count, and report what is wrong and what would be left")
	flags.BoolVar(&o.check, "check", false, "write nothing: compare all of the source with the target")
	flags.BoolVar(&o.compare, "compare", true, "compare what was moved at the end")
	flags.BoolVar(&o.full, "full", false, "read everything, not only what changed since the last run")
	flags.StringVar(&o.state, "state", "nano2nano.state", "`file` that remembers how far a run came")
	flags.StringVar(&o.problems, "problems", "", "write rows that were left out to this `file`, not to the terminal")
	flags.StringVar(&o.zone, "source-zone", "", "time `zone` of a PostgreSQL source, if it is not that of its session")
	flags.StringVar(&o.openKeyFile, "source-seal-key-file", "", "open secrets of a source that is this server's with the keys in this `file`")
	flags.StringVar(&o.fleetKey, "fleet-key-file", "", "`file` with Fleet's server private key")
	flags.BoolVar(&o.source.DropRefetch, "drop-refetch", true, "leave out Fleet's REFETCH- commands")
	flags.BoolVar(&o.version, "version", false, "print the version")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, &exitError{exitUsage, err}
	}
	if flags.NArg() > 0 {
		return nil, usage("unexpected argument %q", flags.Arg(0))
	}
	if o.version {
		return o, nil
	}
	return o, o.settle(e)
}

// settle checks the flags and reads the files that they name.
func (o *options) settle(e *env) error {
	o.source.Now = e.now
	switch {
	case o.source.Kind == "" || o.source.DSN == "":
		return usage("-storage and -storage-dsn say what to read")
	case !slices.Contains(foreign.Kinds(), o.source.Kind):
		return usage("-storage %q is none of %s", o.source.Kind, strings.Join(foreign.Kinds(), ", "))
	case (o.to != "") == (o.url != ""):
		return usage("give either -to with -to-dsn, or -url with -key")
	case o.to != "" && o.toDSN == "":
		return usage("-to needs -to-dsn")
	case o.url != "" && o.key == "":
		return usage("-url needs -key")
	case o.check && o.url != "":
		return usage("-check needs -to: an endpoint cannot be read")
	}
	switch o.history {
	case "all":
		o.source.History = -1
	case "none":
	default:
		d, err := time.ParseDuration(o.history)
		if err != nil || d <= 0 {
			return usage("-history is all, none, or a time such as 720h")
		}
		o.source.History = d
	}
	if o.zone != "" {
		zone, err := foreign.ParseZone(o.zone)
		if err != nil {
			return usage("-source-zone: %v", err)
		}
		o.source.Zone = zone
	}
	if o.openKeyFile != "" {
		keys, err := sealKeys(o.openKeyFile)
		if err != nil {
			return usage("-source-seal-key-file: %v", err)
		}
		o.source.Sealer = keys
	}
	if o.fleetKey != "" {
		key, err := os.ReadFile(o.fleetKey)
		if err != nil {
			return usage("-fleet-key-file: %v", err)
		}
		o.source.FleetKey = []byte(strings.TrimSpace(string(key)))
	}
	return nil
}
