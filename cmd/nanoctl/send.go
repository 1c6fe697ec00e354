package main

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

func sendCommand() command {
	return command{
		name: "send", args: "[REQUEST_TYPE] [ID|SERIAL...]",
		short: "Queue a command, made from flags or read from a plist file",
		long: `The command is compared with Apple's schemas first, and refused if it differs; -force queues it
all the same. Before a command that erases, locks, removes or clears, the serial number has to be
typed, or for several devices a word and their number; -confirm gives that in a script. Before what
interrupts people, and before more than 100 enrollments, it asks; -yes goes on without asking.
DeviceInformation asks for the queries that an inventory needs, unless -query names others.`,
		example: `nanoctl send DeviceInformation -query OSVersion C02XK0AAJG5H -wait
nanoctl send DeviceLock -set PIN=123456 -set "Message=Call 555 0100" C02XK0AAJG5H
nanoctl send -file restart.plist -all -stale 1d`,
		prepare: func(flags *flag.FlagSet) runner {
			var p payload
			var to targets
			var o sending
			p.flags(flags)
			to.flags(flags)
			o.flags(flags)
			file := flags.String("file", "", "plist `file` of the whole command, instead of a request type; - is standard input")
			return func(ctx context.Context, e *env, args []string) error {
				var cmd *mdm.Command
				var err error
				if *file != "" {
					if p.given() {
						return usage("send: -file is a whole command; -uuid, -query, -set, -data and -keys make one")
					}
					cmd, err = e.readCommand(*file)
				} else {
					if len(args) == 0 {
						return usage("send: give a request type, such as DeviceInformation, or -file")
					}
					keys := make(map[string]any)
					if err := p.keys(keys); err != nil {
						return err
					}
					if _, given := keys["Queries"]; !given && args[0] == "DeviceInformation" {
						keys["Queries"] = texts(inventoryQueries)
					}
					cmd, err = plistCommand(args[0], p.uuid, keys)
					args = args[1:]
				}
				if err != nil {
					return err
				}
				return o.send(ctx, e, cmd, &to, args)
			}
		},
	}
}

func installProfileCommand() command {
	return command{
		name: "install-profile", args: "FILE [ID|SERIAL...]",
		short:   "Queue InstallProfile with a .mobileconfig",
		example: "nanoctl install-profile wifi.mobileconfig -all\nnanoctl install-profile wifi.mobileconfig -model MacBookPro18,3 -supersede wifi",
		prepare: func(flags *flag.FlagSet) runner {
			return queueing(flags, func(e *env, uuid string, args []string) (*mdm.Command, error) {
				profile, err := e.readFile(args[0])
				if err != nil {
					return nil, err
				}
				return plistCommand("InstallProfile", uuid, map[string]any{"Payload": data(profile)})
			})
		},
	}
}

func removeProfileCommand() command {
	return command{
		name: "remove-profile", args: "IDENTIFIER [ID|SERIAL...]",
		short:   "Queue RemoveProfile for an identifier of ProfileList",
		example: "nanoctl remove-profile org.example.wifi C02XK0AAJG5H",
		prepare: func(flags *flag.FlagSet) runner {
			return queueing(flags, func(_ *env, uuid string, args []string) (*mdm.Command, error) {
				return plistCommand("RemoveProfile", uuid, map[string]any{"Identifier": args[0]})
			})
		},
	}
}

// queueing queues what compose makes of the first argument, for the
// enrollments that the others name.
func queueing(flags *flag.FlagSet, compose func(e *env, uuid string, args []string) (*mdm.Command, error)) runner {
	var to targets
	var o sending
	to.flags(flags)
	o.flags(flags)
	uuid := flags.String("uuid", "", "CommandUUID; one is made if empty")
	return func(ctx context.Context, e *env, args []string) error {
		cmd, err := compose(e, *uuid, args)
		if err != nil {
			return err
		}
		return o.send(ctx, e, cmd, &to, args[1:])
	}
}

// sending is how a command is queued.
type sending struct {
	noPush    bool
	wait      bool
	timeout   age
	priority  int
	notBefore string
	expires   age
	supersede string
	force     bool
}

func (o *sending) flags(flags *flag.FlagSet) {
	o.timeout = age(5 * time.Minute)
	flags.BoolVar(&o.noPush, "no-push", false, "do not wake the devices")
	flags.BoolVar(&o.wait, "wait", false, "wait until each device has answered, and print the answers")
	flags.Var(&o.timeout, "timeout", "how `long` -wait waits")
	flags.IntVar(&o.priority, "priority", 0, "higher goes first")
	flags.StringVar(&o.notBefore, "not-before", "", "queue it at this `time`: 2026-03-01T22:00:00Z, or 2h for in two hours")
	flags.Var(&o.expires, "expires-after", "give up on devices that have not answered after so `long`, such as 24h or 7d")
	flags.BoolVar(&o.force, "force", false, "queue it even if Apple's schemas say that the devices refuse it")
	flags.StringVar(&o.supersede, "supersede", "", "replace waiting commands with this `key`")
}

func (o *sending) options() (map[string]any, error) {
	options := make(map[string]any)
	if o.notBefore != "" {
		at, err := time.Parse(time.RFC3339, o.notBefore)
		if err != nil {
			d, ageErr := parseAge(o.notBefore)
			if ageErr != nil {
				return nil, usage("-not-before: %q is no time such as 2026-03-01T22:00:00Z, or 2h for in two hours", o.notBefore)
			}
			at = time.Now().Add(d)
		}
		options["not_before"] = at.UTC().Truncate(time.Second)
	}
	if o.priority != 0 {
		options["priority"] = o.priority
	}
	if o.expires > 0 {
		options["expires_after"] = time.Duration(o.expires).String()
	}
	if o.supersede != "" {
		options["supersede_key"] = o.supersede
	}
	if o.noPush {
		options["no_push"] = true
	}
	return options, nil
}

// enqueued is the server's answer.
type enqueued struct {
	Status map[string]struct {
		CommandError string `json:"command_error"`
		PushError    string `json:"push_error"`
	} `json:"status"`
	CommandError string `json:"command_error"`
	PushError    string `json:"push_error"`
}

// readCommand reads a whole command.
func (e *env) readCommand(file string) (*mdm.Command, error) {
	raw, err := e.readFile(file)
	if err != nil {
		return nil, err
	}
	cmd, err := mdm.DecodeCommand(raw)
	if err != nil {
		return nil, usage("the command in %s: %w", file, err)
	}
	return cmd, nil
}

func (o *sending) send(ctx context.Context, e *env, cmd *mdm.Command, to *targets, names []string) error {
	options, err := o.options()
	if err != nil {
		return err
	}
	chosen, err := to.resolve(ctx, e, names)
	if err != nil {
		return err
	}
	if !o.force {
		if err := checkCommand(cmd, chosen); err != nil {
			return err
		}
	}
	if err := e.confirmCommand(cmd, chosen); err != nil {
		return err
	}
	query := url.Values{}
	if len(chosen) > askAbove {
		query.Set("push", "async") // the server goes on waking them by itself
	}
	failed := make(map[string]string)
	return e.eachChunk(ctx, "queueing", chosen, func(ctx context.Context, ids []string) error {
		a, err := e.api.do(ctx, http.MethodPost, "/v1/enqueue", query, map[string]any{"ids": ids, "plist": cmd.Raw, "options": options})
		return o.outcome(e, a, err, failed)
	}, func(n int) error {
		return o.queued(ctx, e, cmd, n, failed)
	})
}

// outcome notes what failed of one call.
func (o *sending) outcome(e *env, a *answer, err error, failed map[string]string) error {
	said, err := resultOf(a, err)
	if err != nil {
		return err
	}
	if said.PushError != "" {
		fmt.Fprintf(e.err, "nanoctl: queued, but not woken: %s\n", printable(said.PushError))
	}
	for _, id := range sortedIDs(said.Status) {
		switch s := said.Status[id]; {
		case s.CommandError != "":
			failed[id] = s.CommandError
		case s.PushError != "":
			fmt.Fprintf(e.err, "nanoctl: %s: queued, but not woken: %s\n", printable(id), printable(s.PushError))
		}
	}
	return nil
}

// resultOf reads the answer to an enqueue or a push. NanoMDM's statuses are
// 207 if some ids failed and 500 if all did; then it is a result like any
// other.
func resultOf(a *answer, err error) (*enqueued, error) {
	if a == nil || err != nil && a.status != http.StatusInternalServerError {
		return nil, err
	}
	said := new(enqueued)
	if decodeErr := a.decode(said); decodeErr != nil && err == nil {
		return nil, decodeErr
	}
	if err != nil && len(said.Status) == 0 {
		return nil, err
	}
	return said, nil
}

func sortedIDs[T any](byID map[string]T) []string { return slices.Sorted(maps.Keys(byID)) }

// queued reports how a command was queued for n enrollments less those that
// failed, and waits for their answers if asked to.
func (o *sending) queued(ctx context.Context, e *env, cmd *mdm.Command, n int, failed map[string]string) error {
	for _, id := range sortedIDs(failed) {
		fmt.Fprintf(e.err, "nanoctl: %s: %s\n", printable(id), printable(failed[id]))
	}
	if len(failed) == n {
		return fmt.Errorf("%s was queued for none of %d", cmd.RequestType, n)
	}
	var err error
	switch {
	case o.wait && ctx.Err() == nil:
		err = e.awaitAnswers(ctx, cmd.CommandUUID, time.Duration(o.timeout))
	case e.format == "json":
		err = e.json(map[string]any{
			"command_uuid": cmd.CommandUUID, "request_type": cmd.RequestType, "queued": n - len(failed), "failed": failed,
		})
	default:
		_, err = fmt.Fprintf(e.out, "%s %s queued for %d\n", cmd.RequestType, cmd.CommandUUID, n-len(failed))
	}
	if err == nil && len(failed) > 0 {
		err = &exitError{exitPartial, fmt.Errorf("%d of %d enrollments did not take it", len(failed), n)}
	}
	return err
}
