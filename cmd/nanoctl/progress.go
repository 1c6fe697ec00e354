package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// progress shows how far something long is, on a terminal only.
type progress struct {
	w     io.Writer
	shown time.Time
	width int
}

func (e *env) progress() *progress {
	p := &progress{}
	if f, ok := e.err.(*os.File); ok {
		if info, err := f.Stat(); err == nil && info.Mode()&os.ModeCharDevice != 0 {
			p.w = f
		}
	}
	return p
}

// bar shows done of all.
func (p *progress) bar(label string, done, all int) {
	const width = 30
	full := width
	if all > 0 {
		full = width * done / all
	}
	p.line(done >= all, fmt.Sprintf("%s [%s%s] %d of %d", label, strings.Repeat("#", full), strings.Repeat(".", width-full), done, all))
}

// line shows a text in place of the last one, not too often unless it is the
// last.
func (p *progress) line(last bool, text string) {
	if p.w == nil || !last && time.Since(p.shown) < 100*time.Millisecond {
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
