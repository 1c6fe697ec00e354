package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
)

// errHelped: help was asked for and given.
var errHelpShown = errors.New("help given")

// command is one row of the table.
type command struct {
	name    string // one or two words
	args    string // the arguments as the help shows them, from which their number is checked
	short   string
	long    string // further sentences for the command's own help
	example string
	// offline commands need no server.
	offline bool
	// prepare adds the command's flags and returns what runs it once they
	// are parsed.
	prepare func(flags *flag.FlagSet) runner
}

// runner does a command's work with the arguments that follow its flags.
type runner func(ctx context.Context, e *env, args []string) error

// dispatch finds the command that args begin with and runs it. Flags may
// stand before, between and after its arguments.
func dispatch(ctx context.Context, e *env, args []string) error {
	table := commands()
	if len(args) == 0 {
		writeHelp(e.err)
		return usage("no command given")
	}
	if slices.Contains([]string{"help", "-h", "-help", "--help"}, args[0]) {
		if len(args) > 1 {
			if c, _ := find(table, args[1:]); c != nil {
				writeCommandHelp(e.out, c, flagsOf(c, e))
				return errHelpShown
			}
		}
		writeHelp(e.out)
		return errHelpShown
	}
	c, rest := find(table, args)
	if c == nil {
		return usage("there is no command %q; nanoctl help lists them", strings.Join(args[:min(2, len(args))], " "))
	}
	flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	e.globalFlags(flags)
	work := c.prepare(flags)
	positional, err := parseAnywhere(flags, rest)
	if errors.Is(err, flag.ErrHelp) {
		writeCommandHelp(e.out, c, flags)
		return errHelpShown
	}
	if err != nil {
		return usage("%s: %w; see nanoctl %s -help", c.name, err, c.name)
	}
	if err := c.checkArity(positional); err != nil {
		return err
	}
	if !slices.Contains([]string{"table", "wide", "json"}, e.format) {
		return usage("-o %s: the formats are table, wide and json", e.format)
	}
	if !c.offline {
		base, key, err := e.credentials()
		if err != nil {
			return err
		}
		e.api = newClient(base, key, e.transport)
		defer e.api.http.CloseIdleConnections()
	}
	return work(ctx, e, positional)
}

func versionCommand() command {
	return command{
		name: "version", short: "Print nanoctl's version, and the server's", example: "nanoctl version",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				var server struct {
					Version string `json:"version"`
				}
				if err := e.api.get(ctx, "/version", nil, &server); err != nil {
					return err
				}
				if e.format == "json" {
					return e.json(map[string]string{"nanoctl": version, "server": server.Version})
				}
				return e.pairs([][2]string{{"nanoctl", version}, {"server", server.Version}})
			}
		},
	}
}

// checkArity compares the number of arguments with the command's args: words
// without brackets are required, and three dots are any number of the word.
func (c *command) checkArity(given []string) error {
	words := strings.Fields(c.args)
	for i, word := range words {
		if i >= len(given) && !strings.HasPrefix(word, "[") {
			return usage("%s: the argument %s is missing: nanoctl %s %s", c.name, strings.TrimSuffix(word, "..."), c.name, c.args)
		}
	}
	if len(given) > len(words) && !strings.Contains(c.args, "...") {
		return usage("%s: unexpected argument %q", c.name, given[len(words)])
	}
	return nil
}

// find returns the command whose words args begin with, and what follows.
func find(table []command, args []string) (*command, []string) {
	for _, words := range []int{2, 1} {
		if len(args) < words {
			continue
		}
		name := strings.Join(args[:words], " ")
		for i := range table {
			if table[i].name == name {
				return &table[i], args[words:]
			}
		}
	}
	return nil, nil
}

// parseAnywhere lets flags follow arguments; -- ends them.
func parseAnywhere(flags *flag.FlagSet, args []string) (positional []string, err error) {
	for {
		if err := flags.Parse(args); err != nil {
			return nil, err
		}
		rest := flags.Args()
		if len(rest) == 0 {
			return positional, nil
		}
		if parsed := len(args) - len(rest); parsed > 0 && args[parsed-1] == "--" {
			return append(positional, rest...), nil
		}
		positional = append(positional, rest[0])
		args = rest[1:]
	}
}

func (e *env) globalFlags(flags *flag.FlagSet) {
	flags.StringVar(&e.url, "url", "", "`address` of the server (NANOMDM_URL)")
	flags.StringVar(&e.keyFile, "key-file", "", "`file` with the API key (or NANOMDM_API)")
	flags.StringVar(&e.format, "o", "table", "output `format`: table, wide or json")
	flags.BoolVar(&e.yes, "yes", false, "go on where the question is yes or no")
	flags.StringVar(&e.confirmation, "confirm", "", "the `words` that have to be typed before what cannot be undone, for scripts")
}

func flagsOf(c *command, e *env) *flag.FlagSet {
	flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
	e.globalFlags(flags)
	c.prepare(flags)
	return flags
}

func writeHelp(w io.Writer) {
	fmt.Fprint(w, `nanoctl steers a NanoMDM server over its HTTP API.

Usage: nanoctl COMMAND [FLAGS] [ARGUMENTS]

`)
	for _, g := range groups() {
		fmt.Fprintln(w, g.title+":")
		for _, c := range g.commands {
			fmt.Fprintf(w, "  %-17s %s\n", c.name, c.short)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprint(w, `nanoctl help COMMAND shows a command's flags and an example.

The server's address and the API key come from NANOMDM_URL and NANOMDM_API, or
from the lines "url = ..." and "key = ..." of nanoctl/config in your
configuration folder (mode 0600). Enrollments are named by id or by serial
number.

Exit codes: 0 done, 1 the server failed or refused, 2 wrong usage, 3 not found,
4 some enrollments failed, 5 not confirmed, 6 a device reported an error, 7 the
API key is wrong or may not do that, 8 no answer in time, 130 interrupted.
`)
}

func writeCommandHelp(w io.Writer, c *command, flags *flag.FlagSet) {
	fmt.Fprintf(w, "%s\n\nUsage: nanoctl %s [FLAGS]", c.short, c.name)
	if c.args != "" {
		fmt.Fprint(w, " "+c.args)
	}
	fmt.Fprintln(w)
	if c.long != "" {
		fmt.Fprintf(w, "\n%s\n", c.long)
	}
	fmt.Fprintf(w, "\nExample:\n  %s\n\nFlags:\n", strings.ReplaceAll(c.example, "\n", "\n  "))
	flags.SetOutput(w)
	flags.PrintDefaults()
}
