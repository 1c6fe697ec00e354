// Command mdmsim simulates Apple devices against an MDM server: a
// demonstration on one's own machine, and a load test to size a deployment.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, streams{out: os.Stdout, err: os.Stderr, env: os.Getenv}, os.Args[1:])
	stop()
	os.Exit(code)
}

// streams is what a command has of the process around it.
type streams struct {
	out, err io.Writer
	env      func(string) string
}

// errUsage is a mistake in the arguments that was explained already.
var errUsage = errors.New("usage")

type subcommand struct {
	name, summary string
	run           func(context.Context, streams, []string) error
}

func subcommands() []subcommand {
	return []subcommand{
		{"demo", "start a server, enroll three devices, send them commands, show what they did", runDemo},
		{"load", "enroll and poll with many devices, and measure", runLoad},
		{"apns", "run a fake APNs whose pushes wake simulated devices, and time it", runAPNs},
		{"ca", "make a certificate authority for simulated devices", runCA},
	}
}

// run returns the exit code: 0, 1 for a failure, 2 for wrong arguments.
func run(ctx context.Context, s streams, args []string) int {
	if len(args) == 0 {
		usage(s.err)
		return 2
	}
	switch args[0] {
	case "help", "-h", "-help", "--help":
		usage(s.out)
		return 0
	}
	for _, sub := range subcommands() {
		if sub.name != args[0] {
			continue
		}
		err := sub.run(ctx, s, args[1:])
		switch {
		case err == nil, errors.Is(err, flag.ErrHelp):
			return 0
		case errors.Is(err, errUsage):
			return 2
		}
		fmt.Fprintf(s.err, "mdmsim %s: %v\n", sub.name, err)
		return 1
	}
	fmt.Fprintf(s.err, "mdmsim: there is no command %q\n\n", args[0])
	usage(s.err)
	return 2
}

func usage(w io.Writer) {
	fmt.Fprint(w, "mdmsim simulates Apple devices against an MDM server.\n\n")
	for _, sub := range subcommands() {
		fmt.Fprintf(w, "  mdmsim %-5s %s\n", sub.name, sub.summary)
	}
	fmt.Fprint(w, "\nmdmsim COMMAND -help lists a command's flags.\n")
}

// newFlags makes a flag set that explains itself.
func newFlags(s streams, name, synopsis, about string) *flag.FlagSet {
	flags := flag.NewFlagSet("mdmsim "+name, flag.ContinueOnError)
	flags.SetOutput(s.err)
	flags.Usage = func() {
		fmt.Fprintf(flags.Output(), "usage: mdmsim %s %s\n\n%s\n\n", name, synopsis, strings.TrimSpace(about))
		flags.PrintDefaults()
	}
	return flags
}

// parse reads the arguments; none may be left over.
func parse(s streams, flags *flag.FlagSet, args []string) error {
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return err
		}
		return errUsage // flag has printed it
	}
	if flags.NArg() > 0 {
		return badUsage(s, "unexpected argument %q", flags.Arg(0))
	}
	return nil
}

func badUsage(s streams, format string, args ...any) error {
	fmt.Fprintf(s.err, "mdmsim: "+format+"\n", args...)
	return errUsage
}
