package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm/schema"
)

const (
	// completeTime is how long a shell waits for completions.
	completeTime = 2 * time.Second
	// completeItems is how many items of the server's lists are looked at.
	completeItems = 1000
)

// completing is the command that the shells' scripts run. It is not in the table,
// and so not in the help.
const completing = "__complete"

// completeCommand prints the words that may stand in place of the last one. The
// shells' scripts run it; it asks the server, and is silent about errors, since
// a shell shows them in the middle of a line.
func completeCommand() command {
	return command{
		name: completing, args: "[WORD...]", offline: true, verbatim: true,
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				if len(args) == 0 {
					return nil
				}
				ctx, cancel := context.WithTimeout(ctx, completeTime)
				defer cancel()
				for _, word := range e.completions(ctx, args) {
					if strings.HasPrefix(word, args[len(args)-1]) && printable(word) == word && !strings.ContainsAny(word, " \t") {
						fmt.Fprintln(e.out, word)
					}
				}
				return nil
			}
		},
	}
}

// completions are the words for the last of args, with any beginning.
func (e *env) completions(ctx context.Context, args []string) []string {
	c, rest := find(commands(), args)
	if c == nil || len(rest) == 0 {
		return nil
	}
	flags := flagsOf(c, new(env))
	flags.SetOutput(io.Discard)
	if len(rest) > 1 {
		if f := flags.Lookup(strings.TrimLeft(rest[len(rest)-2], "-")); f != nil && strings.HasPrefix(rest[len(rest)-2], "-") && !isSwitch(f) {
			if f.Name == "tag" {
				return e.listed(ctx, "/v1/tags", "tags", "tag")
			}
			return flagValues(c.name, f.Name)
		}
	}
	before, err := parseAnywhere(flags, rest[:len(rest)-1])
	if err != nil {
		return nil
	}
	return e.argumentValues(ctx, c, len(before))
}

// isSwitch says whether a flag takes no value.
func isSwitch(f *flag.Flag) bool {
	b, ok := f.Value.(interface{ IsBoolFlag() bool })
	return ok && b.IsBoolFlag()
}

// flagValues are the values that a flag may have.
func flagValues(command, name string) []string {
	switch name {
	case "o":
		return []string{"table", "wide", "json"}
	case "role":
		return []string{"read", "push", "enqueue", "admin"}
	case "enabled", "waiting", "filevault", "supervised":
		return []string{"true", "false"}
	case "request-type":
		return schema.RequestTypes()
	case "state":
		return []string{"scheduled", "queued", "notnow", "acknowledged", "error", "format_error", "cancelled", "expired", "superseded"}
	case "push-status":
		return []string{"owed", "unanswered", "refused", "token_dead", "do_not_retry", "our_fault", "certificate_fault", "retry_later"}
	case "topic":
		if command == "events" || command == "sinks put" {
			return []string{"mdm.Authenticate", "mdm.TokenUpdate", "mdm.CheckOut", "mdm.Connect"}
		}
	}
	return nil
}

// argumentValues are the values of the nth argument, by its word in the help.
func (e *env) argumentValues(ctx context.Context, c *command, n int) []string {
	words := strings.Fields(c.args)
	if len(words) == 0 {
		return nil
	}
	switch word := strings.Trim(words[min(n, len(words)-1)], "[]."); {
	case word == "REQUEST_TYPE":
		return schema.RequestTypes()
	case word == "bash|zsh|fish":
		return strings.Split(word, "|")
	case word == "NAME" && strings.HasPrefix(c.name, "context "):
		list, _ := e.contexts() // silent, as everything here
		var names []string
		for _, context := range list {
			names = append(names, context.Name)
		}
		return names
	case word == "ID|SERIAL":
		return e.listed(ctx, "/v1/enrollments", "enrollments", "serial_number", "id")
	case word == "TAG":
		return e.listed(ctx, "/v1/tags", "tags", "tag")
	case word == "COMMAND_UUID":
		return e.listed(ctx, "/v1/commands", "commands", "command_uuid")
	case word == "SINK", word == "NAME" && strings.HasPrefix(c.name, "sinks "):
		return e.listed(ctx, "/v1/sinks", "sinks", "name")
	case word == "TOPIC":
		return e.listed(ctx, "/v1/pushcerts", "pushcerts", "topic")
	case word == "NAME" && strings.HasPrefix(c.name, "keys "):
		return e.listed(ctx, "/v1/keys", "keys", "name")
	}
	return nil
}

// listed are the first of some fields that each item of a list has.
func (e *env) listed(ctx context.Context, path, field string, names ...string) []string {
	s, err := e.server()
	if err != nil {
		return nil
	}
	if e.api, err = s.client(e.transport); err != nil {
		return nil
	}
	defer e.api.http.CloseIdleConnections()
	query := url.Values{}
	if slices.Contains([]string{"/v1/enrollments", "/v1/commands", "/v1/tags"}, path) {
		query.Set("limit", fmt.Sprint(completeItems))
	}
	var page map[string]json.RawMessage
	var items []map[string]any
	if e.api.get(ctx, path, query, &page) != nil || json.Unmarshal(page[field], &items) != nil {
		return nil
	}
	var words []string
	for _, item := range items {
		for _, name := range names {
			if word, ok := item[name].(string); ok && word != "" {
				words = append(words, word)
				break
			}
		}
	}
	return words
}
