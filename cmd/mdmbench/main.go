// Mdmbench measures the real daemon on real engines with signed requests, and
// in the same run a reference server that only reads, verifies and replies, so
// that its results are ratios that carry over from machine to machine.
//
// Daemon, reference and database are processes of their own; all requests are
// signed before a measurement begins. Engines are those whose test DSN is in
// the environment (see storage/engines/with-engines.sh), and SQLite.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"
)

// options are the flags.
type options struct {
	program, out, profiles string
	engines, only          string
	devices, fleet         int
	history, historyFleet  int
	rounds                 int
	duration, paced        time.Duration
	quick                  bool
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "mdmbench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	if len(args) == 2 && args[0] == referenceCommand {
		return serveReference(ctx, args[1])
	}
	o, err := parseOptions(args)
	if err != nil {
		return err
	}
	reports, failed := measureEngines(ctx, o)
	if len(reports) == 0 {
		return errors.Join(failed, errors.New("no engine was measured"))
	}
	if o.out == "" {
		return errors.Join(failed, write(os.Stdout, o, reports))
	}
	f, err := os.Create(o.out)
	if err != nil {
		return errors.Join(failed, err)
	}
	return errors.Join(failed, write(f, o, reports), f.Close())
}

func parseOptions(args []string) (*options, error) {
	o := &options{}
	flags := flag.NewFlagSet("mdmbench", flag.ContinueOnError)
	flags.StringVar(&o.program, "nanomdm", "bin/nanomdm", "the daemon's `program`")
	flags.StringVar(&o.out, "out", "", "`file` for the results in Markdown; standard output unless given")
	flags.StringVar(&o.profiles, "profiles", "", "`directory` for profiles by perf(1) of the daemon in each measurement")
	flags.StringVar(&o.engines, "engines", "pgsql,mariadb,mysql,sqlite", "the `engines` to measure")
	flags.StringVar(&o.only, "only", "", "the `measurements` to make, of "+strings.Join(measurements(), ",")+"; all unless given")
	flags.IntVar(&o.devices, "devices", 2000, "how many devices")
	flags.IntVar(&o.fleet, "fleet", 200_000, "how many enrollments the large fleet has; 0 leaves it out")
	flags.IntVar(&o.history, "history", 500, "how many finished commands a device has in the end; 0 leaves it out")
	flags.IntVar(&o.historyFleet, "history-devices", 100, "how many devices have that history")
	flags.IntVar(&o.rounds, "rounds", 3, "how often each measurement is made; the median counts")
	flags.DurationVar(&o.duration, "duration", 1500*time.Millisecond, "how long a measurement of idle takes")
	flags.DurationVar(&o.paced, "paced", 8*time.Second, "how long, at least, reports are sent at a steady rate while the webhook's receiver hangs, and half as long before and after, without a webhook")
	flags.BoolVar(&o.quick, "quick", false, "a fraction of everything, in a minute or two for each engine")
	if err := flags.Parse(args); err != nil {
		return nil, err
	}
	if o.quick {
		o.devices, o.fleet, o.history, o.historyFleet = 500, 0, 50, 100
		o.rounds, o.duration = 3, time.Second
	}
	if o.devices < 1 || o.rounds < 1 || o.duration <= 0 || o.paced <= 0 || o.history < 0 || o.fleet < 0 || (o.history > 0 && o.historyFleet < 1) {
		return nil, errors.New("-devices, -rounds, -duration, -paced and -history-devices are above zero, -fleet and -history not below")
	}
	for name := range strings.SplitSeq(o.only, ",") {
		if name != "" && !slices.Contains(measurements(), name) {
			return nil, fmt.Errorf("-only %s is none of %s", name, strings.Join(measurements(), ", "))
		}
	}
	return o, nil
}

// measureEngines measures the chosen engines that are present. An engine that
// fails does not discard the reports of the others.
func measureEngines(ctx context.Context, o *options) (reports []*report, failed error) {
	for _, e := range engines() {
		if !strings.Contains(","+o.engines+",", ","+e.name+",") {
			continue
		}
		if !e.present() {
			fmt.Fprintf(os.Stderr, "without %s: %s is not set\n", e.label, e.variable)
			continue
		}
		r, err := measureEngine(ctx, o, e)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("%s: %w", e.label, err))
			continue
		}
		reports = append(reports, r)
	}
	return reports, failed
}
