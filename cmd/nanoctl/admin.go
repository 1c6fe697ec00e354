package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// apiKey is a named key in the answers of the server.
type apiKey struct {
	Name      string     `json:"name"`
	Role      string     `json:"role"`
	Topics    []string   `json:"topics"`
	CreatedAt *time.Time `json:"created_at"`
	CreatedBy string     `json:"created_by"`
	Key       string     `json:"key"`
}

var keyColumns = []column[apiKey]{
	{heading: "NAME", cell: func(k *apiKey) string { return k.Name }},
	{heading: "ROLE", cell: func(k *apiKey) string { return k.Role }},
	{heading: "MADE", cell: func(k *apiKey) string { return ago(k.CreatedAt) }},
	{heading: "BY", cell: func(k *apiKey) string { return k.CreatedBy }},
	{heading: "TOPICS", cell: func(k *apiKey) string {
		if len(k.Topics) == 0 {
			return "all"
		}
		return strings.Join(k.Topics, ",")
	}, clip: true},
}

func keysLsCommand() command {
	return command{
		name: "keys ls", short: "List the named API keys", example: "nanoctl keys ls",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				a, err := e.api.do(ctx, http.MethodGet, "/v1/keys", nil, nil)
				return e.printAnswer(a, err, nil, func() error { return showItems(e, a, "keys", keyColumns) })
			}
		},
	}
}

func keysCreateCommand() command {
	return command{
		name: "keys create", args: "NAME",
		short:   "Make a named API key and print it, this once",
		long:    "The key goes to standard output and all else to standard error; the server keeps only a hash of it.",
		example: "nanoctl keys create helpdesk -role push\nnanoctl keys create tenant-a -role enqueue -topic com.apple.mgmt.External.A > tenant-a.key",
		prepare: func(flags *flag.FlagSet) runner {
			role := flags.String("role", "", "`read, push, enqueue or admin`; each includes those before it")
			var topics list
			flags.Var(&topics, "topic", "bind the key to enrollments of this APNs `topic`; may be repeated")
			return func(ctx context.Context, e *env, args []string) error {
				if *role == "" {
					return usage("keys create: -role is missing")
				}
				body := map[string]any{"name": args[0], "role": *role}
				if len(topics) > 0 {
					body["topics"] = topics
				}
				a, err := e.api.do(ctx, http.MethodPost, "/v1/keys", nil, body)
				var k apiKey
				return e.printAnswer(a, err, &k, func() error {
					fmt.Fprintf(e.err, "key %s, role %s; it is not shown again:\n", k.Name, k.Role)
					_, err := fmt.Fprintln(e.out, k.Key)
					return err
				})
			}
		},
	}
}

func keysRmCommand() command {
	return command{
		name: "keys rm", args: "NAME", short: "Revoke a named API key", example: "nanoctl keys rm helpdesk",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				a, err := e.api.do(ctx, http.MethodDelete, "/v1/keys/"+url.PathEscape(args[0]), nil, nil)
				return e.printSentence(a, err, nil, func() string { return "key " + args[0] + " is revoked; other replicas notice within seconds" })
			}
		},
	}
}

// auditRecord is one action of an operator.
type auditRecord struct {
	At      *time.Time `json:"at"`
	Who     string     `json:"who"`
	Action  string     `json:"action"`
	Target  string     `json:"target"`
	Detail  string     `json:"detail"`
	Outcome string     `json:"outcome"`
}

// summary is the detail with targets counted instead of listed.
func (r *auditRecord) summary() string {
	const counted = " enrollments: "
	head, tail, found := strings.Cut(r.Detail, counted)
	if !found {
		return r.Detail
	}
	head += strings.TrimSuffix(counted, ": ")
	if _, more, found := strings.Cut(tail, "; "); found {
		head += "; " + more
	}
	return head
}

var auditColumns = []column[auditRecord]{
	{heading: "WHEN", cell: func(r *auditRecord) string {
		if r.At == nil {
			return ""
		}
		return r.At.Local().Format("2006-01-02 15:04")
	}},
	{heading: "WHO", cell: func(r *auditRecord) string { return r.Who }, clip: true},
	{heading: "ACTION", cell: func(r *auditRecord) string { return r.Action }, clip: true},
	{heading: "OUTCOME", cell: func(r *auditRecord) string { return r.Outcome }, clip: true, tone: toneOf},
	{heading: "DETAIL", cell: (*auditRecord).summary, clip: true},
	{heading: "TARGET", cell: func(r *auditRecord) string { return r.Target }, wide: true},
}

func auditCommand() command {
	return command{
		name: "audit", short: "List what operators did, the newest first",
		example: "nanoctl audit -since 7d -action enrollment.delete",
		prepare: func(flags *flag.FlagSet) runner {
			var during timeRange
			who := flags.String("who", "", "only of this key's `name`")
			action := flags.String("action", "", "only this `action`, such as command.cancel")
			target := flags.String("target", "", "only what was done to this `target`")
			during.flags(flags, "done")
			limit := flags.Int("limit", 100, "list no more than this many; 0 is all")
			return func(ctx context.Context, e *env, args []string) error {
				q := url.Values{}
				for name, value := range map[string]string{"who": *who, "action": *action, "target": *target} {
					if value != "" {
						q.Set(name, value)
					}
				}
				during.query(q, "from", "to")
				return showList(ctx, e, "/v1/audit", "audit", q, *limit, auditColumns)
			}
		},
	}
}

func resealCommand() command {
	return command{
		name: "reseal", short: "Seal all secrets in the database with the newest seal key",
		long:    "After a new key was put first in -seal-key-file on every replica. Can be interrupted and run again.",
		example: "nanoctl reseal",
		prepare: func(flags *flag.FlagSet) runner {
			step := flags.Int("step", 500, "how many `rows` each request looks at")
			return func(ctx context.Context, e *env, args []string) error {
				return e.reseal(ctx, *step)
			}
		},
	}
}

func (e *env) reseal(ctx context.Context, step int) error {
	line := e.progress()
	var looked, rewritten, unreadable int
	q := url.Values{"limit": {fmt.Sprint(step)}}
	for {
		a, err := e.api.do(ctx, http.MethodPost, "/v1/reseal", q, nil)
		if err != nil {
			line.end()
			if ctx.Err() != nil {
				return &exitError{exitInterrupted, fmt.Errorf("interrupted after %d values, %d of them sealed again; run it again to go on", looked, rewritten)}
			}
			return err
		}
		var done struct {
			Table                         string
			Looked, Rewritten, Unreadable int
			Next                          string
		}
		if err := a.decode(&done); err != nil {
			return err
		}
		looked, rewritten, unreadable = looked+done.Looked, rewritten+done.Rewritten, unreadable+done.Unreadable
		line.line(fmt.Sprintf("%s: %d looked at, %d sealed again", done.Table, looked, rewritten))
		if done.Next == "" {
			break
		}
		q.Set("after", done.Next)
	}
	line.end()
	if e.format == "json" {
		if err := e.json(map[string]int{"looked": looked, "rewritten": rewritten, "unreadable": unreadable}); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(e.out, "%d values looked at, %d sealed again\n", looked, rewritten)
	}
	if unreadable > 0 {
		return &exitError{exitPartial, fmt.Errorf("%d values cannot be opened with any of the server's keys: put the key that sealed them back into -seal-key-file", unreadable)}
	}
	return nil
}

// showItems prints the array named by field of an answer that has no pages.
func showItems[T any](e *env, a *answer, field string, columns []column[T]) error {
	var page map[string]json.RawMessage
	if err := a.decode(&page); err != nil {
		return err
	}
	var items []json.RawMessage
	if raw, ok := page[field]; ok {
		if err := json.Unmarshal(raw, &items); err != nil {
			return fmt.Errorf("the server's list is not what this version of nanoctl expects: %w", err)
		}
	}
	t := &table[T]{e: e, field: field, columns: columns}
	if err := t.add(items); err != nil {
		return err
	}
	return t.end()
}
