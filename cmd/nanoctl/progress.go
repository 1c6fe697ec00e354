package main

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// progress shows how far something long is, on a terminal only.
type progress struct {
	w     io.Writer
	shown time.Time
	width int
}

func (e *env) progress() *progress { return &progress{w: e.progressOn} }

// bar shows done of all, and a text behind it; not too often unless it is
// full.
func (p *progress) bar(label string, done, all int, text string) {
	if done < all && time.Since(p.shown) < 100*time.Millisecond {
		return
	}
	p.line(barLine(label, done, all, text))
}

// barLine is a bar as text.
func barLine(label string, done, all int, text string) string {
	const width = 20
	full := width
	if all > 0 {
		full = width * done / all
	}
	line := fmt.Sprintf("%s [%s%s] %d of %d", label, strings.Repeat("#", full), strings.Repeat(".", width-full), done, all)
	if text != "" {
		line += ", " + text
	}
	return line
}

// line shows a text in place of the last one.
func (p *progress) line(text string) {
	if p.w == nil {
		return
	}
	p.shown = time.Now()
	fmt.Fprintf(p.w, "\r%-*s", p.width, text)
	p.width = len(text)
}

// end goes to a line of its own.
func (p *progress) end() {
	if p.w != nil && !p.shown.IsZero() {
		fmt.Fprintln(p.w)
	}
}
