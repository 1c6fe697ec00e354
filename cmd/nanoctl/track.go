package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// commandInfo is a command with the states that it is in.
type commandInfo struct {
	CommandUUID string         `json:"command_uuid"`
	RequestType string         `json:"request_type"`
	CreatedAt   *time.Time     `json:"created_at"`
	States      map[string]int `json:"states"`
	Counted     int            `json:"counted,omitempty"` // how many were counted if there are more
	Done        bool           `json:"done"`
}

// counts is "3 queued, 2 acknowledged".
func (c *commandInfo) counts() string {
	var parts []string
	for _, state := range slices.Sorted(maps.Keys(c.States)) {
		if n := c.States[state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
	}
	if c.Counted > 0 {
		parts = append(parts, "and more")
	}
	return strings.Join(parts, ", ")
}

// waiting is how many enrollments have not ended it.
func (c *commandInfo) waiting() int {
	return c.States["scheduled"] + c.States["queued"] + c.States["notnow"]
}

func (c *commandInfo) total() int {
	n := 0
	for _, count := range c.States {
		n += count
	}
	return n
}

func commandPath(uuid string, rest ...string) string {
	return "/v1/commands/" + strings.Join(append([]string{url.PathEscape(uuid)}, rest...), "/")
}

// failed is how many enrollments ended it otherwise than by acknowledging it.
func (c *commandInfo) failed() int { return c.total() - c.waiting() - c.States["acknowledged"] }

var commandColumns = []column[commandInfo]{
	{heading: "REQUEST TYPE", cell: func(c *commandInfo) string { return c.RequestType }, clip: true},
	{heading: "MADE", cell: func(c *commandInfo) string { return ago(c.CreatedAt) }},
	{heading: "WAIT", cell: func(c *commandInfo) string { return strconv.Itoa(c.waiting()) }},
	{heading: "DONE", cell: func(c *commandInfo) string { return strconv.Itoa(c.States["acknowledged"]) }},
	{heading: "FAIL", cell: func(c *commandInfo) string { return strconv.Itoa(c.failed()) }, tone: toneOfCount},
	{heading: "COMMAND", cell: func(c *commandInfo) string { return c.CommandUUID }},
	{heading: "STATES", cell: (*commandInfo).counts, wide: true},
}

func commandsLsCommand() command {
	return command{
		name: "commands ls", short: "List commands, the newest first",
		example: "nanoctl commands ls -request-type InstallProfile -since 2d",
		prepare: func(flags *flag.FlagSet) runner {
			var created timeRange
			requestType := flags.String("request-type", "", "only of this request `type`")
			state := flags.String("state", "", "only those that are in this `state` for an enrollment")
			created.flags(flags, "made")
			limit := flags.Int("limit", 100, "list no more than this many; 0 is all")
			return func(ctx context.Context, e *env, args []string) error {
				q := url.Values{}
				for name, value := range map[string]string{"request_type": *requestType, "state": *state} {
					if value != "" {
						q.Set(name, value)
					}
				}
				created.query(q, "created_after", "created_before")
				return showList(ctx, e, "/v1/commands", "commands", q, *limit, commandColumns)
			}
		},
	}
}

var commandQueueColumns = []column[queueItem]{
	{heading: "SERIAL", cell: (*queueItem).handle, clip: true},
	{heading: "NAME", cell: func(q *queueItem) string { return q.DeviceName }, clip: true},
	{heading: "STATE", cell: (*queueItem).stateText, tone: toneOf},
	{heading: "ENDED", cell: func(q *queueItem) string { return agoOrEmpty(q.FinishedAt) }},
	{heading: "ENROLLMENT", cell: func(q *queueItem) string { return q.EnrollmentID }, wide: true},
}

// handle is what people name the device by.
func (q *queueItem) handle() string {
	if q.Serial != "" {
		return q.Serial
	}
	return q.EnrollmentID
}

func statusCommand() command {
	return command{
		name: "status", args: "COMMAND_UUID",
		short:   "Show where a command stands, for each of its enrollments",
		example: "nanoctl status 5F0C3A3E-4C5B-4B0E-9E6C-0C4C2F1D7B11 -wait",
		prepare: func(flags *flag.FlagSet) runner {
			state := flags.String("state", "", "list only enrollments for which it is in this `state`")
			limit := flags.Int("limit", 0, "list no more than this many enrollments; 0 is all")
			wait := flags.Bool("wait", false, "wait until it has ended for all, and print the answers")
			timeout := age(5 * time.Minute)
			flags.Var(&timeout, "timeout", "how `long` -wait waits")
			return func(ctx context.Context, e *env, args []string) error {
				if *wait {
					return e.awaitAnswers(ctx, args[0], time.Duration(timeout))
				}
				var c commandInfo
				if err := e.api.get(ctx, commandPath(args[0]), url.Values{"limit": {"1"}}, &c); err != nil {
					return naming(args[0], err)
				}
				q := url.Values{}
				if *state != "" {
					q.Set("state", *state)
				}
				if e.format == "json" {
					items := []json.RawMessage{}
					err := e.pages(ctx, commandPath(args[0]), "enrollments", q, *limit, func(page []json.RawMessage) error {
						items = append(items, page...)
						return nil
					})
					if err != nil {
						return err
					}
					return e.json(struct {
						commandInfo
						Enrollments []json.RawMessage `json:"enrollments"`
					}{c, items})
				}
				fmt.Fprintf(e.out, "%s, made %s: %s\n\n", printable(c.RequestType), ago(c.CreatedAt), c.counts())
				return showList(ctx, e, commandPath(args[0]), "enrollments", q, *limit, commandQueueColumns)
			}
		},
	}
}

func resultCommand() command {
	return command{
		name: "result", args: "COMMAND_UUID ID|SERIAL",
		short:   "Print what a device answered",
		example: "nanoctl result 5F0C3A3E-4C5B-4B0E-9E6C-0C4C2F1D7B11 C02XK0AAJG5H -o json",
		prepare: func(flags *flag.FlagSet) runner {
			raw := flags.Bool("raw", false, "the plist, as the device sent it")
			return func(ctx context.Context, e *env, args []string) error {
				x, err := e.enrollment(ctx, args[1])
				if err != nil {
					return err
				}
				q := url.Values{}
				if *raw {
					q.Set("raw", "1")
				}
				a, err := e.api.do(ctx, http.MethodGet, commandPath(args[0], "results", url.PathEscape(x.ID)), q, nil)
				if err != nil {
					return err
				}
				switch {
				case *raw:
					return e.bytes(a.body)
				case e.format == "json":
					return e.json(a.body)
				}
				var r result
				if err := a.decode(&r); err != nil {
					return err
				}
				return e.showResult(&r)
			}
		},
	}
}

// result is what a device answered to a command.
type result struct {
	EnrollmentID string          `json:"enrollment_id"`
	State        string          `json:"state"`
	Status       string          `json:"status"`
	Late         bool            `json:"late,omitempty"`
	Result       json.RawMessage `json:"result,omitempty"`
	LeftOut      string          `json:"left_out,omitempty"`
}

func (e *env) showResult(r *result) error {
	late := ""
	if r.Late {
		late = ", too late"
	}
	fmt.Fprintf(e.out, "%s: %s%s\n", printable(r.EnrollmentID), printable(r.Status), late)
	if r.LeftOut != "" {
		fmt.Fprintln(e.out, "  "+printable(r.LeftOut))
	}
	v, err := decodeJSON(string(r.Result))
	keys, ok := v.(map[string]any)
	if err != nil || !ok {
		return nil // there is none
	}
	// Keys of every report, which are printed already.
	for _, name := range []string{"UDID", "EnrollmentID", "EnrollmentUserID", "UserID", "UserShortName", "UserLongName", "CommandUUID", "Status"} {
		delete(keys, name)
	}
	e.showValue("  ", keys)
	return nil
}

// showValue prints a dict or a list for people, each item on lines of its own
// behind head: spaces, or "- " for the first of a list's item.
func (e *env) showValue(head string, v any) {
	rest := strings.Repeat(" ", len(head))
	switch v := v.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			e.showItem(head, printable(name)+":", v[name])
			head = rest
		}
	case []any:
		for _, item := range v {
			switch item.(type) {
			case map[string]any, []any:
				e.showValue(head+"- ", item)
			default:
				e.showItem(head, "-", item)
			}
			head = rest
		}
	}
}

func (e *env) showItem(head, name string, v any) {
	inner := strings.Repeat(" ", len(head)) + "  "
	switch v := v.(type) {
	case map[string]any:
		if len(v) > 0 {
			fmt.Fprintln(e.out, head+name)
			e.showValue(inner, v)
			return
		}
	case []any:
		if len(v) > 0 {
			fmt.Fprintln(e.out, head+name)
			e.showValue(inner, v)
			return
		}
	default:
		fmt.Fprintln(e.out, head+name, printable(fmt.Sprint(v)))
		return
	}
	fmt.Fprintln(e.out, head+name, "none")
}

// maxAnswers is up to how many answers are fetched and printed in full.
const maxAnswers = 20

// answers fetches where a command stands for each enrollment and, if there
// are few, what each said.
func (e *env) answers(ctx context.Context, uuid string) ([]result, error) {
	var answers []result
	err := e.pages(ctx, commandPath(uuid), "enrollments", nil, 0, func(items []json.RawMessage) error {
		for _, item := range items {
			var q queueItem
			if err := json.Unmarshal(item, &q); err != nil {
				return err
			}
			answers = append(answers, result{EnrollmentID: q.EnrollmentID, State: q.State})
		}
		return nil
	})
	if err != nil || len(answers) > maxAnswers {
		return answers, err
	}
	for i := range answers {
		err := e.api.get(ctx, commandPath(uuid, "results", url.PathEscape(answers[i].EnrollmentID)), nil, &answers[i])
		if exit := (*exitError)(nil); errors.As(err, &exit) && exit.code == exitNotFound {
			continue // none yet, or it ended without one
		}
		if err != nil {
			return nil, err
		}
	}
	return answers, nil
}

func (e *env) showAnswers(c *commandInfo, answers []result) error {
	if e.format == "json" {
		return e.json(map[string]any{
			"command_uuid": c.CommandUUID, "request_type": c.RequestType, "states": c.States, "enrollments": answers,
		})
	}
	if len(answers) > maxAnswers {
		fmt.Fprintf(e.out, "%s %s: %s\n", printable(c.RequestType), printable(c.CommandUUID), c.counts())
		return nil
	}
	for i := range answers {
		if answers[i].Status == "" {
			fmt.Fprintf(e.out, "%s: %s\n", printable(answers[i].EnrollmentID), answers[i].State)
			continue
		}
		if err := e.showResult(&answers[i]); err != nil {
			return err
		}
	}
	return nil
}

func cancelCommand() command {
	return command{
		name: "cancel", args: "COMMAND_UUID [ID|SERIAL...]",
		short:   "Cancel a command where it waits, or for some enrollments",
		example: "nanoctl cancel 5F0C3A3E-4C5B-4B0E-9E6C-0C4C2F1D7B11",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				if len(args) > 1 {
					return e.changeItems(ctx, http.MethodDelete, args, "", "cancelled")
				}
				var c commandInfo
				if err := e.api.get(ctx, commandPath(args[0]), url.Values{"limit": {"1"}}, &c); err != nil {
					return naming(args[0], err)
				}
				if err := e.confirmMany(c.waiting(), fmt.Sprintf("%s %s is cancelled for", printable(c.RequestType), printable(args[0]))); err != nil {
					return err
				}
				a, err := e.api.do(ctx, http.MethodDelete, commandPath(args[0]), nil, nil)
				var done struct{ Cancelled, Finished int }
				return e.printSentence(a, err, &done, func() string {
					return fmt.Sprintf("cancelled for %d; %d had ended before", done.Cancelled, done.Finished)
				})
			}
		},
	}
}

func requeueCommand() command {
	return command{
		name: "requeue", args: "COMMAND_UUID ID|SERIAL...",
		short:   "Queue a command again that failed, expired or was cancelled",
		example: "nanoctl requeue 5F0C3A3E-4C5B-4B0E-9E6C-0C4C2F1D7B11 C02XK0AAJG5H",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				return e.changeItems(ctx, http.MethodPost, args, "requeue", "queued again")
			}
		},
	}
}

// changeItems cancels or requeues a command, the first argument, for the
// enrollments that the others name.
func (e *env) changeItems(ctx context.Context, method string, args []string, verb, done string) error {
	chosen, err := e.lookUp(ctx, args[1:])
	if err != nil {
		return err
	}
	if err := e.confirmMany(len(chosen), printable(args[0])+" is "+done+" for"); err != nil {
		return err
	}
	return e.changeEach(ctx, chosen, done, func(ctx context.Context, x *enrollment) error {
		rest := []string{"enrollments", url.PathEscape(x.ID)}
		if verb != "" {
			rest = append(rest, verb)
		}
		_, err := e.api.do(ctx, method, commandPath(args[0], rest...), nil, nil)
		return err
	})
}

// changeEach changes single enrollments, one call each. A failure is printed,
// and the others go on. An interruption ends it between two calls.
func (e *env) changeEach(ctx context.Context, chosen []enrollment, done string, change func(context.Context, *enrollment) error) error {
	var failed error
	n, errs := 0, 0
	for i := range chosen {
		if ctx.Err() != nil {
			break
		}
		if err := change(context.WithoutCancel(ctx), &chosen[i]); err != nil {
			failed = err
			errs++
			if len(chosen) > 1 {
				fmt.Fprintf(e.err, "nanoctl: %s: %s\n", printable(chosen[i].label()), printable(err.Error()))
			}
			continue
		}
		n++
		if e.format != "json" {
			fmt.Fprintf(e.out, "%s: %s\n", printable(chosen[i].label()), done)
		}
	}
	if failed != nil && len(chosen) == 1 {
		return failed
	}
	if e.format == "json" {
		if err := e.json(map[string]any{"done": n, "failed": errs}); err != nil {
			return err
		}
	}
	switch left := len(chosen) - n - errs; {
	case left > 0:
		return &exitError{exitInterrupted, fmt.Errorf("interrupted; %d of %d enrollments were not reached", left, len(chosen))}
	case errs > 0:
		return &exitError{exitPartial, fmt.Errorf("%d of %d failed", errs, len(chosen))}
	}
	return nil
}
