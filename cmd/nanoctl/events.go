package main

import (
	"cmp"
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

	"github.com/nanomdm/nanomdm/backoff"
)

// event is one of the server's events: the webhook's JSON with its cursor.
type event struct {
	Topic       string     `json:"topic"`
	CreatedAt   *time.Time `json:"created_at"`
	Cursor      string     `json:"cursor"`
	Serial      string     `json:"serial_number"`
	RequestType string     `json:"request_type"`
	Checkin     *struct {
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

// sentence is the event on a line: when, topic, device, and what came of it.
func (v *event) sentence() string {
	when, device, status := "", v.Serial, ""
	if v.CreatedAt != nil {
		when = v.CreatedAt.Local().Format("01-02 15:04:05")
	}
	if of := v.of(); of != nil && device == "" {
		device = of.id()
	}
	switch {
	case v.Checkin != nil && v.Checkin.Tally != nil:
		status = fmt.Sprintf("tally %d", *v.Checkin.Tally)
	case v.Acknowledge != nil:
		status = v.Acknowledge.Status
	}
	line := fmt.Sprintf("%-14s  %-18s  %-12s", when, v.Topic, device)
	for _, word := range []string{status, v.RequestType} {
		if word != "" {
			line += gap + word
		}
	}
	return printable(strings.TrimSpace(line))
}

// of is whom the event is about; nil for an event of the server's.
func (v *event) of() *eventOf {
	switch {
	case v.Checkin != nil:
		return &v.Checkin.eventOf
	case v.Acknowledge != nil:
		return &v.Acknowledge.eventOf
	}
	return nil
}

// defaultEvents is how many of the newest events are listed.
const defaultEvents = 20

func eventsCommand() command {
	return command{
		name: "events", short: "List the newest events, and with -follow go on",
		long: `With -o json each event is one line: the webhook's JSON with a cursor, from which -after goes on;
payloads are in it only with -after. Events are logged while there is a sink that takes them;
"nanoctl sinks put log -tokens" makes one that takes all and sends nothing.`,
		example: `nanoctl events -device C02XK0AAJG5H -since 2h
nanoctl events -topic mdm.Connect -follow -o json | jq .acknowledge_event.status`,
		prepare: func(flags *flag.FlagSet) runner {
			s := &eventStream{query: url.Values{}}
			var since moment
			flags.BoolVar(&s.follow, "follow", false, "go on as they happen, until interrupted")
			flags.BoolVar(&s.follow, "f", false, "the same as -follow")
			after := flags.String("after", "", "all after this `cursor`, instead of the newest")
			topic := flags.String("topic", "", "only of this event `topic`, such as mdm.TokenUpdate")
			device := flags.String("device", "", "only of this enrollment, by `ID or SERIAL`")
			flags.Var(&since, "since", "only of this `time` or later")
			limit := flags.Int("limit", 0, "no more than this many: 20 of the newest, or all with -after, if 0; at most 1000 of the newest")
			return func(ctx context.Context, e *env, args []string) error {
				s.e, s.since, s.left = e, since.Time, *limit
				if *topic != "" {
					s.query.Set("topic", *topic)
				}
				if *device != "" {
					x, err := e.enrollment(ctx, *device)
					if err != nil {
						return err
					}
					s.device = x.ID
				}
				err := s.run(ctx, *after)
				if s.follow && ctx.Err() != nil {
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
	device string // id of the only one that is wanted; empty is all
	since  time.Time
}

// followPolicy is how long following waits before it asks again a server that is
// away.
var followPolicy = backoff.Policy{First: time.Second, Max: 30 * time.Second}

// run prints the newest events, or those after a cursor, and goes on if it
// follows.
func (s *eventStream) run(ctx context.Context, after string) error {
	if after != "" {
		s.query.Set("after", after)
		if s.left == 0 {
			s.left = -1
		}
	} else {
		if err := s.newest(ctx); err != nil || !s.follow {
			return err
		}
		s.left = -1
	}
	if s.follow {
		s.query.Set("wait", longPoll.String())
	}
	for failures := 0; s.left != 0; {
		more, err := s.page(ctx)
		switch {
		case err == nil:
			failures = 0
			if !more && !s.follow {
				return nil
			}
			continue
		case ctx.Err() != nil || !s.follow || !temporary(err):
			return err
		}
		failures++
		pause := followPolicy.Pause(failures)
		fmt.Fprintf(s.e.err, "nanoctl: %v; asking again in %v\n", err, pause.Round(time.Second))
		if err := s.e.pause(ctx, pause); err != nil {
			return err
		}
	}
	return nil
}

// newest prints the newest events, and has the next page go on behind them.
func (s *eventStream) newest(ctx context.Context) error {
	query := url.Values{"newest": {strconv.Itoa(cmp.Or(s.left, defaultEvents))}}
	for name, values := range s.query {
		query[name] = values
	}
	if s.device != "" {
		query.Set("id", s.device)
	}
	(&moment{s.since}).set(query, "since")
	var page eventPage
	if err := s.e.api.get(ctx, "/v1/events", query, &page); err != nil {
		return err
	}
	s.query.Set("after", page.Next)
	for _, raw := range page.Events {
		if err := s.print(raw); err != nil {
			return err
		}
	}
	if len(page.Events) == 0 && !s.follow && s.e.format != "json" {
		fmt.Fprintln(s.e.err, "no events")
	}
	return nil
}

// eventPage is a page of the server's log.
type eventPage struct {
	Events []json.RawMessage `json:"events"`
	Next   string            `json:"next"`
}

// print prints an event, unless it is of another device or too old.
func (s *eventStream) print(raw json.RawMessage) error {
	var v event
	if err := json.Unmarshal(raw, &v); err != nil {
		return fmt.Errorf("the server's events are not what this version of nanoctl expects: %w", err)
	}
	of := v.of()
	if s.device != "" && (of == nil || of.id() != s.device) || v.CreatedAt != nil && v.CreatedAt.Before(s.since) {
		return nil
	}
	line := string(compact(raw))
	if s.e.format != "json" {
		line = v.sentence()
		if s.e.width > 0 && s.e.format != "wide" {
			line = clipped(line, s.e.width)
		}
	}
	_, err := fmt.Fprintln(s.e.out, line)
	return err
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
	var page eventPage
	if err := s.e.api.get(ctx, "/v1/events", s.query, &page); err != nil {
		return false, err
	}
	for _, raw := range page.Events {
		if err := s.print(raw); err != nil {
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
	DownSince  *time.Time  `json:"down_since"`
	DownError  string      `json:"down_error"`
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
	case s.DownSince != nil:
		return "down for " + shortDuration(time.Since(*s.DownSince)) + ": " + s.DownError
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
