package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// event is one of the server's events: the webhook's JSON with its cursor.
type event struct {
	Topic     string     `json:"topic"`
	CreatedAt *time.Time `json:"created_at"`
	Cursor    string     `json:"cursor"`
	Checkin   *struct {
		eventOf
		Tally *int `json:"token_update_tally"`
	} `json:"checkin_event"`
	Acknowledge *struct {
		eventOf
		Status      string `json:"status"`
		CommandUUID string `json:"command_uuid"`
	} `json:"acknowledge_event"`
}

// eventOf says whom an event is about.
type eventOf struct {
	IDs struct {
		ID string `json:"id"`
	} `json:"ids"`
	UDID         string `json:"udid"`
	EnrollmentID string `json:"enrollment_id"`
}

func (o *eventOf) id() string {
	for _, id := range []string{o.IDs.ID, o.UDID, o.EnrollmentID} {
		if id != "" {
			return id
		}
	}
	return ""
}

// sentence is the event on a line.
func (v *event) sentence() string {
	words := []string{"", v.Topic}
	if v.CreatedAt != nil {
		words[0] = v.CreatedAt.Local().Format("2006-01-02 15:04:05")
	}
	switch {
	case v.Checkin != nil:
		words = append(words, v.Checkin.id())
		if v.Checkin.Tally != nil {
			words = append(words, fmt.Sprintf("tally %d", *v.Checkin.Tally))
		}
	case v.Acknowledge != nil:
		words = append(words, v.Acknowledge.id(), v.Acknowledge.Status, v.Acknowledge.CommandUUID)
	}
	return printable(strings.TrimSpace(strings.Join(words, "  ")))
}

func eventsCommand() command {
	return command{
		name: "events", short: "List events, and with -follow go on as they happen",
		long: `With -o json each event is one line: the webhook's JSON with a cursor, from which -after goes on.
Events are logged while there is a sink that takes them; "nanoctl sinks put log -tokens" makes one
that takes all and sends nothing.`,
		example: `nanoctl events -follow
nanoctl events -topic mdm.Connect -follow -o json | jq .acknowledge_event.status`,
		prepare: func(flags *flag.FlagSet) runner {
			follow := flags.Bool("follow", false, "go on as they happen, from now if -after is not given, until interrupted")
			flags.BoolVar(follow, "f", false, "the same as -follow")
			after := flags.String("after", "", "begin after this `cursor`")
			topic := flags.String("topic", "", "only of this event `topic`, such as mdm.TokenUpdate")
			limit := flags.Int("limit", 0, "end after this many; 0 is all")
			return func(ctx context.Context, e *env, args []string) error {
				s := &eventStream{e: e, follow: *follow, left: *limit, query: url.Values{}}
				if *limit == 0 {
					s.left = -1
				}
				if *topic != "" {
					s.query.Set("topic", *topic)
				}
				if *after != "" {
					s.query.Set("after", *after)
				}
				err := s.run(ctx)
				if *follow && ctx.Err() != nil {
					return nil // an interruption is how following ends
				}
				return err
			}
		},
	}
}

// eventStream reads the server's events page by page.
type eventStream struct {
	e      *env
	follow bool
	left   int // how many are still wanted; negative is all
	query  url.Values
}

// How long following waits before it asks again a server that is away.
const (
	firstRetry = time.Second
	lastRetry  = 30 * time.Second
)

func (s *eventStream) run(ctx context.Context) error {
	if s.follow {
		s.query.Set("wait", longPoll.String())
		if !s.query.Has("after") {
			s.query.Set("after", "last")
		}
	}
	retry := firstRetry
	for s.left != 0 {
		more, err := s.page(ctx)
		switch {
		case err == nil:
			retry = firstRetry
			if !more && !s.follow {
				return nil
			}
			continue
		case ctx.Err() != nil || !s.follow || !temporary(err):
			return err
		}
		fmt.Fprintf(s.e.err, "nanoctl: %v; asking again in %v\n", err, retry)
		if err := s.e.pause(ctx, retry); err != nil {
			return err
		}
		retry = min(2*retry, lastRetry)
	}
	return nil
}

// temporary says whether an error may be gone the next time: the server is away
// or busy.
func temporary(err error) bool {
	if said := (*statusError)(nil); errors.As(err, &said) {
		return said.status >= 500
	}
	exit := (*exitError)(nil)
	return !errors.As(err, &exit)
}

// page prints one page of events and says whether there may be more. A page
// without events may have passed over others.
func (s *eventStream) page(ctx context.Context) (more bool, err error) {
	size := pageSize
	if s.left > 0 {
		size = min(size, s.left)
	}
	s.query.Set("limit", strconv.Itoa(size))
	var page struct {
		Events []json.RawMessage `json:"events"`
		Next   string            `json:"next"`
	}
	if err := s.e.api.get(ctx, "/v1/events", s.query, &page); err != nil {
		return false, err
	}
	for _, raw := range page.Events {
		line := string(compact(raw))
		if s.e.format != "json" {
			var v event
			if err := json.Unmarshal(raw, &v); err != nil {
				return false, fmt.Errorf("the server's events are not what this version of nanoctl expects: %w", err)
			}
			line = v.sentence()
			if s.e.width > 0 && s.e.format != "wide" {
				line = clipped(line, s.e.width)
			}
		}
		if _, err := fmt.Fprintln(s.e.out, line); err != nil {
			return false, err
		}
	}
	if s.left > 0 {
		s.left -= len(page.Events)
	}
	if page.Next == "" {
		return false, nil
	}
	more = len(page.Events) > 0 || page.Next != s.query.Get("after")
	s.query.Set("after", page.Next)
	return more, nil
}

// sink is where events go, in the answers of the server.
type sink struct {
	Name       string      `json:"name"`
	URL        string      `json:"url"`
	Filter     eventFilter `json:"filter"`
	Disabled   bool        `json:"disabled"`
	Reason     string      `json:"reason"`
	Configured bool        `json:"configured"`
	Backlog    *struct {
		Behind, Waiting, Again, Dead, Dropped int
		OldestAt                              *time.Time `json:"oldest_at"`
	} `json:"backlog"`
}

// eventFilter chooses the events of a sink.
type eventFilter struct {
	Topics       []string `json:"topics,omitempty"`
	RequestTypes []string `json:"request_types,omitempty"`
	APNsTopics   []string `json:"apns_topics,omitempty"`
	Idle         bool     `json:"idle,omitempty"`
}

func (s *sink) state() string {
	switch {
	case s.Disabled && s.Reason != "":
		return "off: " + s.Reason
	case s.Disabled:
		return "off"
	case s.Configured:
		return "on, configured"
	}
	return "on"
}

func (s *sink) backlog() string {
	b := s.Backlog
	if b == nil {
		return ""
	}
	text := fmt.Sprintf("%d behind, %d waiting, %d dead", b.Behind, b.Waiting+b.Again, b.Dead+b.Dropped)
	if b.OldestAt != nil {
		text += ", oldest " + ago(b.OldestAt)
	}
	return text
}

var sinkColumns = []column[sink]{
	{heading: "NAME", cell: func(s *sink) string { return s.Name }},
	{heading: "STATE", cell: (*sink).state, clip: true, tone: toneOf},
	{heading: "BACKLOG", cell: (*sink).backlog},
	{heading: "URL", cell: func(s *sink) string {
		if s.URL == "" {
			return "log only"
		}
		return s.URL
	}, clip: true},
	{heading: "TOPICS", cell: func(s *sink) string { return strings.Join(s.Filter.Topics, ",") }, wide: true},
}

func sinksLsCommand() command {
	return command{
		name: "sinks ls", short: "List where events are sent", example: "nanoctl sinks ls",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				a, err := e.api.do(ctx, http.MethodGet, "/v1/sinks", nil, nil)
				return e.printAnswer(a, err, nil, func() error { return showItems(e, a, "sinks", sinkColumns) })
			}
		},
	}
}

func sinksPutCommand() command {
	return command{
		name: "sinks put", args: "NAME [FILE]",
		short: "Make a sink of events, or change it",
		long: `From flags, or from a FILE with the JSON of PUT /v1/sinks/NAME; - is standard input. A sink
without a URL keeps events in the log alone. Keys that are not given stay as they are; all else is
as the flags or the file say.`,
		example: "nanoctl sinks put siem -to https://siem.example.org/hook -hmac-key-file siem.key\nnanoctl sinks put log\nnanoctl sinks put siem sink.json",
		prepare: func(flags *flag.FlagSet) runner {
			var request struct {
				URL      string      `json:"url,omitempty"`
				Keys     []string    `json:"keys,omitempty"`
				Tokens   bool        `json:"tokens,omitempty"`
				OnError  string      `json:"on_error,omitempty"`
				Filter   eventFilter `json:"filter"`
				Disabled bool        `json:"disabled,omitempty"`
			}
			flags.StringVar(&request.URL, "to", "", "`URL` where events are sent")
			keyFile := flags.String("hmac-key-file", "", "`file` with the key that signs")
			flags.BoolVar(&request.Tokens, "tokens", false, "send events that hold tokens, too")
			flags.StringVar(&request.OnError, "on-error", "", "`POLICY` for an event that the receiver fails to take: hold (the default) or skip")
			flags.BoolVar(&request.Filter.Idle, "idle", false, "send polls without a result, too")
			flags.BoolVar(&request.Disabled, "off", false, "keep it, and send it nothing")
			flags.Var((*list)(&request.Filter.Topics), "topic", "only events of this `topic`, such as mdm.Connect; may be repeated")
			flags.Var((*list)(&request.Filter.RequestTypes), "request-type", "of commands' events only those of this `type`; may be repeated")
			flags.Var((*list)(&request.Filter.APNsTopics), "apns-topic", "only enrollments of this APNs `topic`; may be repeated")
			return func(ctx context.Context, e *env, args []string) error {
				var body any = request
				switch {
				case len(args) == 2:
					content, err := e.readFile(args[1])
					if err != nil {
						return err
					}
					if !json.Valid(content) {
						return usage("sinks put: %s is no JSON", args[1])
					}
					body = json.RawMessage(content)
				case *keyFile != "":
					key, err := e.readFile(*keyFile)
					if err != nil {
						return err
					}
					request.Keys = []string{strings.TrimSpace(string(key))}
					body = request
				}
				a, err := e.api.do(ctx, http.MethodPut, "/v1/sinks/"+url.PathEscape(args[0]), nil, body)
				return e.printSentence(a, err, nil, func() string { return "sink " + args[0] + " is stored" })
			}
		},
	}
}

func sinksRmCommand() command {
	return command{
		name: "sinks rm", args: "NAME", short: "Remove a sink", example: "nanoctl sinks rm siem",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				if err := e.confirm("Sink %s is removed, with what it was not sent yet.", printable(args[0])); err != nil {
					return err
				}
				a, err := e.api.do(ctx, http.MethodDelete, "/v1/sinks/"+url.PathEscape(args[0]), nil, nil)
				return e.printSentence(a, err, nil, func() string { return "sink " + args[0] + " is removed" })
			}
		},
	}
}

func redeliverCommand() command {
	return command{
		name: "redeliver", args: "SINK",
		short:   "Send events to a sink again: a range, or the dead letters",
		example: "nanoctl redeliver siem -dead\nnanoctl redeliver siem -after 1200 -through 1300",
		prepare: func(flags *flag.FlagSet) runner {
			after := flags.String("after", "", "begin after this `cursor`")
			through := flags.String("through", "", "end with this `cursor`")
			dead := flags.Bool("dead", false, "those that were given up")
			return func(ctx context.Context, e *env, args []string) error {
				if *dead == (*after != "" || *through != "") {
					return usage("redeliver: give -dead, or a range by -after and -through")
				}
				body := map[string]any{"sink": args[0]}
				if *dead {
					body["dead"] = true
				}
				for name, value := range map[string]string{"after": *after, "through": *through} {
					if value != "" {
						body[name] = value
					}
				}
				a, err := e.api.do(ctx, http.MethodPost, "/v1/events/redeliver", nil, body)
				var done struct{ Redelivering int }
				return e.printSentence(a, err, &done, func() string { return fmt.Sprintf("%d events go to %s again", done.Redelivering, args[0]) })
			}
		},
	}
}
