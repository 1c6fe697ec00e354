package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

func topCommand() command {
	return command{
		name: "top", short: "Show the counts live, with rates, until interrupted",
		long:    "On a terminal the page is drawn again in place; in a pipe pages follow each other.",
		example: "nanoctl top\nnanoctl top -every 10s",
		prepare: func(flags *flag.FlagSet) runner {
			every := age(2 * time.Second)
			flags.Var(&every, "every", "how `long` between two looks, at least 1s")
			count := flags.Int("count", 0, "end after this many pages; 0 is never")
			return func(ctx context.Context, e *env, _ []string) error {
				if time.Duration(every) < time.Second {
					return usage("top: -every: at least 1s is needed")
				}
				err := e.top(ctx, time.Duration(every), *count)
				if ctx.Err() != nil {
					return nil // an interruption is how it ends
				}
				return err
			}
		},
	}
}

func (e *env) top(ctx context.Context, every time.Duration, count int) error {
	var before *stats
	var beforeAt time.Time
	for n := 1; ; n++ {
		a, err := e.api.do(ctx, http.MethodGet, "/v1/stats", nil, nil)
		now := time.Now()
		switch {
		case err != nil && !temporary(err):
			return err
		case err != nil: // it may be back the next time
			if err := e.screen("nanoctl: " + printable(err.Error()) + "\n"); err != nil {
				return err
			}
		case e.format == "json":
			if err := e.json(a.body); err != nil {
				return err
			}
		default:
			s := new(stats)
			if err := a.decode(s); err != nil {
				return err
			}
			head := now.Local().Format(time.TimeOnly)
			if before != nil {
				head += "  " + s.rates(before, now.Sub(beforeAt))
			}
			if err := e.screen(head + "\n\n" + s.page(e)); err != nil {
				return err
			}
			before, beforeAt = s, now
		}
		if n == count {
			return nil
		}
		if err := e.pause(ctx, every); err != nil {
			return err
		}
	}
}

// screen draws a text in place of the last one, or below it in a pipe.
func (e *env) screen(text string) error {
	if e.width > 0 {
		eol := string(rune(erase)) + "\n"
		text = string(rune(home)) + strings.ReplaceAll(text, "\n", eol) + string(rune(below))
	}
	_, err := io.WriteString(e.out, text)
	return err
}

// rates are the changes of the counts each second.
func (s *stats) rates(before *stats, d time.Duration) string {
	rate := func(now, then int) string { return fmt.Sprintf("%+.1f/s", float64(now-then)/d.Seconds()) }
	ended := func(s *stats) int {
		n := 0
		for state, count := range s.Queue.ByState {
			switch state {
			case "scheduled", "queued", "notnow":
			default:
				n += count
			}
		}
		return n
	}
	waiting := func(s *stats) int {
		return s.Queue.ByState["scheduled"] + s.Queue.ByState["queued"] + s.Queue.ByState["notnow"]
	}
	text := "answers " + rate(ended(s), ended(before)) + ", waiting " + rate(waiting(s), waiting(before)) + ", pushes owed " + rate(s.Push.Owed, before.Push.Owed)
	if s.Events != nil && before.Events != nil {
		text += ", events waiting " + rate(s.Events.Waiting, before.Events.Waiting)
	}
	return text
}
