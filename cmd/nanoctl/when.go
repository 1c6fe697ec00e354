package main

import (
	"flag"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// parseAge reads a duration that may have weeks and days: 7d, 1d12h, 2w, 90m.
func parseAge(text string) (time.Duration, error) {
	rest, total := text, time.Duration(0)
	for _, unit := range []struct {
		letter string
		length time.Duration
	}{{"w", 7 * 24 * time.Hour}, {"d", 24 * time.Hour}} {
		number, after, found := strings.Cut(rest, unit.letter)
		if !found {
			continue
		}
		n, err := strconv.Atoi(number)
		if err != nil || n < 0 || n > 100_000 {
			return 0, badAge(text)
		}
		total += time.Duration(n) * unit.length
		rest = after
	}
	if rest == "" && text != "" {
		return total, nil
	}
	d, err := time.ParseDuration(rest)
	if err != nil || d < 0 {
		return 0, badAge(text)
	}
	return total + d, nil
}

func badAge(text string) error {
	return fmt.Errorf("%q is no length of time such as 7d, 12h or 1d12h", text)
}

// age is a flag of parseAge's form.
type age time.Duration

func (a *age) String() string {
	if *a == 0 {
		return ""
	}
	return time.Duration(*a).String()
}

func (a *age) Set(text string) error {
	d, err := parseAge(text)
	*a = age(d)
	return err
}

// moment is a flag that is a time, a date, or an age: so long ago.
type moment struct{ time.Time }

func (m *moment) String() string {
	if m == nil || m.IsZero() {
		return ""
	}
	return m.Format(time.RFC3339)
}

func (m *moment) Set(text string) error {
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04", time.DateOnly} {
		if at, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			m.Time = at
			return nil
		}
	}
	d, err := parseAge(text)
	if err != nil {
		return fmt.Errorf("%q is no time such as 2026-03-01, 2026-03-01T12:00:00Z, or 7d for seven days ago", text)
	}
	m.Time = time.Now().Add(-d)
	return nil
}

// set sets a parameter to the time, if there is one.
func (m *moment) set(q url.Values, name string) {
	if !m.IsZero() {
		q.Set(name, m.UTC().Format(time.RFC3339))
	}
}

// timeRange is the pair of flags -since and -before.
type timeRange struct{ since, before moment }

// flags adds both; what is the participle that the help puts before the time.
func (r *timeRange) flags(flags *flag.FlagSet, what string) {
	flags.Var(&r.since, "since", what+" at this `time` or later")
	flags.Var(&r.before, "before", what+" before this `time`")
}

// query sets the range's parameters under the server's names.
func (r *timeRange) query(q url.Values, from, to string) {
	r.since.set(q, from)
	r.before.set(q, to)
}

// ago is a time relative to now.
func ago(t *time.Time) string {
	if t == nil || t.IsZero() {
		return "never"
	}
	d := time.Since(*t)
	switch {
	case d < -2*time.Second:
		return "in " + shortDuration(-d)
	case d < 2*time.Second:
		return "now"
	}
	return shortDuration(d) + " ago"
}

// stamp is ago with the time itself beside it; empty if there is none.
func stamp(t *time.Time) string {
	if t == nil || t.IsZero() {
		return ""
	}
	return t.Local().Format("2006-01-02 15:04:05") + " (" + ago(t) + ")"
}

func shortDuration(d time.Duration) string {
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
