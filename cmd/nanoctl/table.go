package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/mdm/schema"
	"github.com/nanomdm/nanomdm/release"
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
	// verbatim commands have no flags; whatever follows is an argument.
	verbatim bool
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
			c, _ := find(table, args[1:])
			if c == nil {
				return unknownCommand(table, args[1:])
			}
			writeCommandHelp(e.out, c, flagsOf(c, e))
			return errHelpShown
		}
		writeHelp(e.out)
		return errHelpShown
	}
	if slices.Contains([]string{"-version", "--version"}, args[0]) {
		_, err := fmt.Fprintln(e.out, release.String())
		return err
	}
	c, rest := find(table, args)
	if c == nil {
		return unknownCommand(table, args)
	}
	flags := flag.NewFlagSet(c.name, flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	e.globalFlags(flags)
	work := c.prepare(flags)
	if c.verbatim {
		return work(ctx, e, rest)
	}
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
		s, err := e.server()
		if err != nil {
			return err
		}
		if e.api, err = s.client(e.transport); err != nil {
			return err
		}
		defer e.api.http.CloseIdleConnections()
	}
	return work(ctx, e, positional)
}

// unknownCommand says which command may have been meant, or lists those that
// begin with a word that several have.
func unknownCommand(table []command, args []string) error {
	first, second := words(table)
	if list := second[args[0]]; len(list) > 0 {
		if len(args) == 1 {
			return usage("%s: which one? %s", args[0], strings.Join(list, ", "))
		}
		return usage("there is no command %q%s", args[0]+" "+args[1], suggestion(args[1], list))
	}
	return usage("there is no command %q%s", args[0], suggestion(args[0], append(first, "help")))
}

// suggestion is a word that may have been meant, or where to find all.
func suggestion(given string, known []string) string {
	if meant := schema.Closest(given, known); meant != "" {
		return "; did you mean " + meant + "?"
	}
	switch {
	case len(known) == 0:
		return "; there is none"
	case len(known) <= 10:
		return "; there is " + strings.Join(known, ", ")
	}
	return "; nanoctl help lists them"
}

func versionCommand() command {
	return command{
		name: "version", offline: true, short: "Print the versions of nanoctl and of the server", example: "nanoctl version",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, _ []string) error {
				theirs := e.serverVersion(ctx)
				if e.format == "json" {
					return e.json(map[string]string{"nanoctl": release.String(), "server": theirs})
				}
				return e.pairs([][2]string{{"nanoctl", release.String()}, {"server", theirs}})
			}
		},
	}
}

// serverVersion is the version of the server, why it is not known, or empty if
// no server is configured.
func (e *env) serverVersion(ctx context.Context) string {
	s, err := e.server()
	if missing := (*missingServer)(nil); errors.As(err, &missing) && missing.address == "" {
		return ""
	} else if errors.As(err, &missing) { // the version needs no key
		if s.base, err = parseServer(missing.address); err != nil {
			return err.Error()
		}
	} else if err != nil {
		return err.Error()
	}
	c, err := s.client(e.transport)
	if err != nil {
		return err.Error()
	}
	defer c.http.CloseIdleConnections()
	var said struct {
		Version string `json:"version"`
	}
	if err := c.get(ctx, "/version", nil, &said); err != nil {
		return err.Error()
	}
	return said.Version
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
	if len(args) > 0 && args[0] == completing {
		c := completeCommand()
		return &c, args[1:]
	}
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
	flags.StringVar(&e.url, "url", "", "`address` of the server (NANOCTL_URL or NANOMDM_URL)")
	flags.StringVar(&e.context, "context", "", "`name` of a server that nanoctl context add kept")
	flags.StringVar(&e.keyFile, "key-file", "", "`file` with the API key (or NANOCTL_API or NANOMDM_API)")
	flags.StringVar(&e.caFile, "ca-file", "", "`file` with the CA of the server's certificate (NANOCTL_CA_FILE)")
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

The server's address and the API key come from NANOCTL_URL and NANOCTL_API, from
what nanoctl context add keeps, or from the lines "url = ..." and "key = ..." of
nanoctl/config in your configuration folder (mode 0600). Enrollments are named
by id or by serial number.

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
