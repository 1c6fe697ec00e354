package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// askAbove is how many enrollments a change may touch before nanoctl asks.
const askAbove = 100

var errDeclined = &exitError{exitDeclined, errors.New("not confirmed; nothing was done")}

// confirm asks before something that cannot be undone. Without a person at
// the terminal it declines, unless -yes was given.
func (e *env) confirm(format string, args ...any) error {
	if e.yes {
		return nil
	}
	line, err := e.prompt(fmt.Sprintf(format, args...) + " Go on? [y/N] ")
	if err != nil {
		return err
	}
	switch strings.ToLower(line) {
	case "y", "yes":
		return nil
	}
	return errDeclined
}

// confirmName asks for a name to be typed again.
func (e *env) confirmName(name, what string) error {
	if e.yes {
		return nil
	}
	line, err := e.prompt(what + "\nType " + printable(name) + " to go on: ")
	if err != nil {
		return err
	}
	if line != name {
		return errDeclined
	}
	return nil
}

func (e *env) prompt(question string) (string, error) {
	fmt.Fprint(e.err, question)
	line, err := bufio.NewReader(e.in).ReadString('\n')
	if err != nil && line == "" {
		fmt.Fprintln(e.err)
		return "", &exitError{exitDeclined, errors.New("nobody answered, and nothing was done; -yes goes on without asking")}
	}
	return strings.TrimSpace(line), nil
}

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
