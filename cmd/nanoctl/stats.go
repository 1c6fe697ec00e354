package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"
)

// stats is what GET /v1/stats counts.
type stats struct {
	Version     string `json:"version"`
	Enrollments struct {
		ByType      map[string]int `json:"by_type"`
		Enabled     int            `json:"enabled"`
		Disabled    int            `json:"disabled"`
		NotEnrolled int            `json:"not_enrolled"`
	} `json:"enrollments"`
	Queue struct {
		ByState         map[string]int `json:"by_state"`
		Limit           int            `json:"limit"`
		OldestWaitingAt *time.Time     `json:"oldest_waiting_at"`
	} `json:"queue"`
	Push struct {
		Owed       int        `json:"owed"`
		Unanswered int        `json:"unanswered"`
		Topics     []pushCert `json:"topics"`
	} `json:"push"`
	Replicas []replica `json:"replicas"`
	Events   *struct {
		Waiting         int        `json:"waiting"`
		Dead            int        `json:"dead"`
		OldestWaitingAt *time.Time `json:"oldest_waiting_at"`
		Logged          int        `json:"logged"`
		LogBytes        int64      `json:"log_bytes"`
		Sinks           []struct {
			Name            string     `json:"name"`
			Waiting         int        `json:"waiting"`
			Dead            int        `json:"dead"`
			Dropped         int        `json:"dropped"`
			OldestWaitingAt *time.Time `json:"oldest_waiting_at"`
		} `json:"sinks"`
	} `json:"events"`
}

func statsCommand() command {
	return command{
		name: "stats", short: "Show counts of enrollments, queues, pushes and events", example: "nanoctl stats",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, args []string) error {
				a, err := e.api.do(ctx, http.MethodGet, "/v1/stats", nil, nil)
				var s stats
				return e.printAnswer(a, err, &s, func() error {
					_, err := io.WriteString(e.out, s.page(e))
					return err
				})
			}
		},
	}
}

// page sets the counts as a page for people.
func (s *stats) page(e *env) string {
	p := &page{e: e}
	n := &s.Enrollments
	p.section("Enrollments")
	p.line(plain, "%d take commands", n.Enabled)
	p.count(notice, n.Disabled, "disabled by an operator")
	p.count(notice, n.NotEnrolled, "not enrolled, or not any more")
	for _, kind := range slices.Sorted(maps.Keys(n.ByType)) {
		p.line(plain, "%d of type %s", n.ByType[kind], kind)
	}
	s.queueSection(p)
	s.pushSection(p)
	if s.Events != nil {
		s.eventSection(p)
	}
	p.section("Servers")
	for i := range s.Replicas {
		r := &s.Replicas[i]
		p.line(toneOf(r.state()), "%s, %s, version %s, %s", r.Name, r.state(), r.Version, r.Listen)
	}
	if len(s.Replicas) == 0 {
		p.line(plain, "version %s", s.Version)
	}
	return p.text.String()
}

func (s *stats) queueSection(p *page) {
	p.section("Commands")
	states := s.Queue.ByState
	waiting := states["scheduled"] + states["queued"] + states["notnow"]
	if waiting == 0 {
		p.line(good, "none wait")
	}
	p.count(plain, states["queued"], "queued")
	p.count(notice, states["notnow"], "put off by the device (NotNow)")
	p.count(plain, states["scheduled"], "scheduled for later")
	if s.Queue.OldestWaitingAt != nil && waiting > 0 {
		p.line(plain, "the oldest waits since %s", ago(s.Queue.OldestWaitingAt))
	}
	var ended []string
	for _, state := range slices.Sorted(maps.Keys(states)) {
		if states[state] > 0 && !slices.Contains([]string{"scheduled", "queued", "notnow"}, state) {
			ended = append(ended, fmt.Sprintf("%d %s", states[state], state))
		}
	}
	if len(ended) > 0 {
		p.line(plain, "ended: %s", strings.Join(ended, ", "))
	}
	for _, n := range states {
		if s.Queue.Limit > 0 && n >= s.Queue.Limit {
			p.line(plain, "counting stops at %d for each state", s.Queue.Limit)
			break
		}
	}
}

func (s *stats) pushSection(p *page) {
	p.section("Pushes")
	p.line(plain, "%d owed, %d accepted by APNs and not answered by the device", s.Push.Owed, s.Push.Unanswered)
	for i := range s.Push.Topics {
		t := &s.Push.Topics[i]
		last := ""
		if t.LastClass != "" {
			last = ", last push " + t.lastPush()
		}
		p.line(plain, "%s", t.Topic)
		p.line(max(toneOf(t.expiry()), toneOf(t.LastClass)), "%d enrollments%s; expires: %s", t.Enrollments, last, t.expiry())
	}
	if len(s.Push.Topics) == 0 {
		p.line(bad, "there is no push certificate: nanoctl pushcert put FILE")
	}
}

func (s *stats) eventSection(p *page) {
	p.section("Events")
	if s.Events.Logged > 0 {
		p.line(plain, "%d in the log, %d MB", s.Events.Logged, s.Events.LogBytes>>20)
	}
	if len(s.Events.Sinks) == 0 {
		p.line(plain, "nobody receives them")
		return
	}
	p.line(plain, "%d wait for their receivers", s.Events.Waiting)
	p.count(bad, s.Events.Dead, "given up: nanoctl redeliver SINK -dead")
	for _, sink := range s.Events.Sinks {
		text := fmt.Sprintf("%s: %d waiting, %d given up", sink.Name, sink.Waiting, sink.Dead+sink.Dropped)
		if sink.OldestWaitingAt != nil {
			text += ", the oldest " + ago(sink.OldestWaitingAt)
		}
		p.line(plain, "%s", text)
	}
}

// page is text in sections.
type page struct {
	e    *env
	text strings.Builder
}

func (p *page) section(title string) {
	if p.text.Len() > 0 {
		p.text.WriteByte('\n')
	}
	p.text.WriteString(p.e.paint(strong, title) + "\n")
}

func (p *page) line(t tone, format string, args ...any) {
	text := printable(fmt.Sprintf(format, args...))
	if p.e.width > 0 {
		text = clipped(text, p.e.width-len(gap))
	}
	p.text.WriteString("  " + p.e.paint(t, text) + "\n")
}

// count is a line about a number, left out if it is zero.
func (p *page) count(t tone, n int, what string) {
	if n > 0 {
		p.line(t, "%d %s", n, what)
	}
}
