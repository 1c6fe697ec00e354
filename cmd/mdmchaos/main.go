//go:build linux

// Command mdmchaos proves what the daemon promises: it starts replicas behind
// a load balancer on a real database cluster, lets simulated devices and
// operators work on them, breaks things, and compares everything that was
// acknowledged with what remains.
//
// It needs Linux, root and Debian's postgresql, mariadb-server, galera-4,
// pgbouncer and haproxy. `make chaos` installs them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options are what the flags say.
type options struct {
	nanomdm   string
	before    string
	shifted   string
	scenarios string
	seed      uint64
	duration  time.Duration
	settle    time.Duration
	devices   int
	operators int
	replicas  int
	out       string
	keep      bool
	verbose   bool
}

// errViolated is the outcome of a run that found a violation.
var errViolated = errors.New("something that was acknowledged was lost")

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	err := run(ctx, os.Stdout, os.Args[1:])
	stop()
	switch {
	case errors.Is(err, flag.ErrHelp):
	case errors.Is(err, errUsage):
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "mdmchaos:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage")

func parse(args []string) (*options, error) {
	flags := flag.NewFlagSet("mdmchaos", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "usage: mdmchaos [flags]\n\nScenarios:\n")
		for _, s := range scenarios() {
			fmt.Fprintf(flags.Output(), "  %-18s %s\n", s.name, s.about)
		}
		fmt.Fprintf(flags.Output(), "\nFlags:\n")
		flags.PrintDefaults()
	}
	o := &options{}
	flags.StringVar(&o.nanomdm, "nanomdm", "bin/nanomdm", "the daemon's `program`")
	flags.StringVar(&o.before, "before", "", "the `program` of the release before, for the scenario upgrade; empty leaves it out of all")
	flags.StringVar(&o.shifted, "shifted", "", "the `program` of shift-clock.sh, for the scenario clock; empty leaves it out of all")
	flags.StringVar(&o.scenarios, "scenarios", "", "comma-separated `names`; empty is all")
	flags.Uint64Var(&o.seed, "seed", 1, "seed of all choices")
	flags.DurationVar(&o.duration, "duration", 30*time.Second, "how long each scenario breaks things")
	flags.DurationVar(&o.settle, "settle", 2*time.Minute, "how long the system may take to settle afterwards")
	flags.IntVar(&o.devices, "devices", 40, "simulated devices")
	flags.IntVar(&o.operators, "operators", 4, "operators, half of them with idempotency keys")
	flags.IntVar(&o.replicas, "replicas", 3, "replicas of the daemon")
	flags.StringVar(&o.out, "out", "", "write the summary table to this Markdown `file`")
	flags.BoolVar(&o.keep, "keep", false, "keep the working folder with all logs")
	flags.BoolVar(&o.verbose, "v", false, "print each fault as it happens")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, errUsage
	}
	if o.devices < 2 || o.operators < 1 || o.replicas < 1 || o.duration <= 0 {
		fmt.Fprintln(flags.Output(), "mdmchaos: -devices must be 2 or more, -operators, -replicas and -duration positive")
		return nil, errUsage
	}
	for _, program := range []*string{&o.nanomdm, &o.before, &o.shifted} {
		if *program == "" {
			continue
		}
		var err error
		if *program, err = filepath.Abs(*program); err != nil {
			return nil, err
		}
	}
	return o, nil
}

func run(ctx context.Context, out io.Writer, args []string) error {
	o, err := parse(args)
	if err != nil {
		return err
	}
	chosen, err := choose(o)
	if err != nil {
		return err
	}
	fmt.Fprintf(out, "seed %d, %d devices, %d operators, %d replicas, %v of faults in each scenario\n",
		o.seed, o.devices, o.operators, o.replicas, o.duration)
	var outcomes []outcome
	var failed error
	for _, s := range chosen {
		result, err := runScenario(ctx, o, out, s)
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		result.print(out)
		outcomes = append(outcomes, result)
		if len(result.violations) > 0 {
			failed = errViolated
		}
	}
	if o.out != "" {
		if err := writeSummary(o, outcomes); err != nil {
			return err
		}
	}
	return failed
}

// choose returns the named scenarios, or all whose programs are there.
func choose(o *options) ([]scenario, error) {
	all := scenarios()
	lacks := func(s scenario) bool { return s.program != nil && s.program(o) == "" }
	if o.scenarios == "" {
		return slices.DeleteFunc(all, lacks), nil
	}
	var chosen []scenario
	for name := range strings.SplitSeq(o.scenarios, ",") {
		i := slices.IndexFunc(all, func(s scenario) bool { return s.name == name })
		switch {
		case i < 0:
			return nil, fmt.Errorf("no scenario is called %q; mdmchaos -help lists them", name)
		case lacks(all[i]):
			return nil, fmt.Errorf("the scenario %s needs another program: -before or -shifted; see mdmchaos -help", name)
		}
		chosen = append(chosen, all[i])
	}
	return chosen, nil
}
