package main

import (
	"io"
	"os"
	"strings"

	"golang.org/x/term"
)

// tone is a colour of text on a terminal, as a rune of the private use area
// that terminalWriter replaces. printable removes these runes from texts of
// the server and of devices.
type tone rune

// The tones, and the screen's control.
const (
	plain  tone = 0xE000 + iota
	good        // green
	notice      // yellow
	bad         // red
	strong      // bold
	home        // to the upper left corner
	erase       // to the end of the line
	below       // to the end of the screen
)

// sequence is what a terminal understands.
func (t tone) sequence() string {
	switch t {
	case plain:
		return "\x1b[0m"
	case good:
		return "\x1b[32m"
	case notice:
		return "\x1b[33m"
	case bad:
		return "\x1b[31m"
	case strong:
		return "\x1b[1m"
	case home:
		return "\x1b[H"
	case erase:
		return "\x1b[K"
	case below:
		return "\x1b[J"
	}
	return ""
}

// paint gives a text a tone where the terminal has colours.
func (e *env) paint(t tone, text string) string {
	if !e.colour || t == plain {
		return text
	}
	return string(rune(t)) + text + string(rune(plain))
}

// terminalWriter keeps everything that is written from steering the terminal,
// whoever made it. Line ends, tabs and tones pass.
type terminalWriter struct {
	w io.Writer
}

// Write implements io.Writer. It reports p as written whole.
func (t *terminalWriter) Write(p []byte) (int, error) {
	var b strings.Builder
	for _, r := range string(p) {
		switch sequence := tone(r).sequence(); {
		case sequence != "":
			b.WriteString(sequence)
		case r == '\n' || r == '\t':
			b.WriteRune(r)
		default:
			b.WriteRune(printableRune(r))
		}
	}
	if _, err := io.WriteString(t.w, b.String()); err != nil {
		return 0, err
	}
	return len(p), nil
}

// onTerminals sets the streams up, each according to whether it is a terminal.
func (e *env) onTerminals(in, out, err *os.File) {
	e.in, e.out, e.err = in, out, err
	if term.IsTerminal(int(out.Fd())) {
		e.out = &terminalWriter{out}
		e.colour = e.getenv("NO_COLOR") == "" && e.getenv("TERM") != "dumb"
		e.width = 80
		if width, _, sizeErr := term.GetSize(int(out.Fd())); sizeErr == nil && width > 0 {
			e.width = width
		}
	}
	if term.IsTerminal(int(err.Fd())) {
		e.err = &terminalWriter{err}
		e.progressOn = err
	}
}

// toneOf is the tone of a state's first word.
func toneOf(cell string) tone {
	word := strings.ToLower(cell)
	if i := strings.IndexAny(word, " :,"); i > 0 {
		word = word[:i]
	}
	switch word {
	case "acknowledged", "enabled", "answered", "done", "on", "up":
		return good
	case "notnow", "owed", "retry_later", "cancelled", "superseded", "off", "renew":
		return notice
	case "error", "format_error", "expired", "disabled", "not", "down", "token", "token_dead", "do_not_retry", "our_fault", "certificate_fault":
		return bad
	}
	return plain
}

// toneOfCount is for counts of failures.
func toneOfCount(cell string) tone {
	if cell == "0" {
		return plain
	}
	return bad
}
