package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf16"
	"unicode/utf8"
)

// pageSize is how many items one request of a list asks for.
const pageSize = 500

// pages walks a list of the server's: the array named by field, page after
// page, up to limit items (0 is all). each gets one page.
func (e *env) pages(ctx context.Context, path, field string, query url.Values, limit int, each func([]json.RawMessage) error) error {
	q := url.Values{}
	for name, values := range query {
		q[name] = values
	}
	for seen := 0; limit == 0 || seen < limit; {
		size := pageSize
		if limit > 0 {
			size = min(size, limit-seen)
		}
		q.Set("limit", strconv.Itoa(size))
		var page map[string]json.RawMessage
		if err := e.api.get(ctx, path, q, &page); err != nil {
			return err
		}
		var items []json.RawMessage
		if raw, ok := page[field]; ok {
			if err := json.Unmarshal(raw, &items); err != nil {
				return fmt.Errorf("the server's list is not what this version of nanoctl expects: %w", err)
			}
		}
		if err := each(items); err != nil {
			return err
		}
		seen += len(items)
		var next string
		if raw, ok := page["next"]; ok {
			if err := json.Unmarshal(raw, &next); err != nil {
				return fmt.Errorf("the server's list is not what this version of nanoctl expects: %w", err)
			}
		}
		if next == "" {
			return nil
		}
		q.Set("after", next)
	}
	return nil
}

// column is one column of a table of Ts.
type column[T any] struct {
	heading string
	cell    func(*T) string
	// wide columns stand only where there is room for them, or with -o wide.
	wide bool
	// clip columns may be cut to fit the terminal.
	clip bool
	// tone is the column's colour on a terminal; nil is none.
	tone func(cell string) tone
}

// table prints items as a table, or as they came, as {"<field>": [...]}. It
// prints as the items come, so that a long list shows at once.
type table[T any] struct {
	e       *env
	field   string // in JSON, and what an empty list has none of
	columns []column[T]
	printed int
}

// add prints some more items.
func (t *table[T]) add(items []json.RawMessage) error {
	if t.e.format == "json" {
		for _, item := range items {
			separator := ","
			if t.printed == 0 {
				separator = fmt.Sprintf("{%q:[", t.field)
			}
			if _, err := fmt.Fprintf(t.e.out, "%s\n%s", separator, compact(item)); err != nil {
				return err
			}
			t.printed++
		}
		return nil
	}
	if len(items) == 0 {
		return nil
	}
	var rows [][]string
	for _, raw := range items {
		item := new(T)
		if err := json.Unmarshal(raw, item); err != nil {
			return fmt.Errorf("the server's list is not what this version of nanoctl expects: %w", err)
		}
		cells := make([]string, len(t.columns))
		for i, c := range t.columns {
			cells[i] = printable(c.cell(item))
		}
		rows = append(rows, cells)
	}
	first := t.printed == 0
	t.printed += len(rows)
	_, err := io.WriteString(t.e.out, t.render(rows, first))
	return err
}

// gap is what stands between two columns.
const gap = "  "

// leastClipped is the width that a column which may be cut keeps.
const leastClipped = 8

// render sets rows below each other, with the headings first if they are
// wanted.
func (t *table[T]) render(rows [][]string, headings bool) string {
	widths := t.fit(rows)
	var b strings.Builder
	line := func(cell func(i int) (text string, color tone)) {
		row, pending := "", 0
		for i, width := range widths {
			if width == 0 {
				continue
			}
			text, color := cell(i)
			text = clipped(text, width)
			if row != "" {
				row += strings.Repeat(" ", pending) + gap
			}
			row += t.e.paint(color, text)
			pending = width - utf8.RuneCountInString(text)
		}
		b.WriteString(row + "\n")
	}
	if headings {
		line(func(i int) (string, tone) { return t.columns[i].heading, plain })
	}
	for _, cells := range rows {
		line(func(i int) (string, tone) {
			if t.columns[i].tone == nil {
				return cells[i], plain
			}
			return cells[i], t.columns[i].tone(cells[i])
		})
	}
	return b.String()
}

// fit chooses the width of each column; 0 leaves it out. Without a terminal
// nothing is left out and nothing is cut.
func (t *table[T]) fit(rows [][]string) []int {
	widths := make([]int, len(t.columns))
	total := -len(gap)
	for i, c := range t.columns {
		widths[i] = utf8.RuneCountInString(c.heading)
		for _, cells := range rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(cells[i]))
		}
		total += widths[i] + len(gap)
	}
	if t.e.width == 0 || t.e.format == "wide" {
		return widths
	}
	for i := len(widths) - 1; i >= 0 && total > t.e.width; i-- {
		if t.columns[i].wide {
			total -= widths[i] + len(gap)
			widths[i] = 0
		}
	}
	for total > t.e.width {
		widest := -1
		for i, c := range t.columns {
			if c.clip && widths[i] > leastClipped && (widest < 0 || widths[i] > widths[widest]) {
				widest = i
			}
		}
		if widest < 0 {
			break
		}
		widths[widest]--
		total--
	}
	return widths
}

// clipped cuts a text to a width.
func clipped(text string, width int) string {
	runes := []rune(text)
	if len(runes) <= width {
		return text
	}
	return string(runes[:width-1]) + "\u2026"
}

// end closes the list.
func (t *table[T]) end() error {
	var err error
	switch {
	case t.e.format != "json" && t.printed == 0:
		_, err = fmt.Fprintf(t.e.err, "no %s\n", t.field)
	case t.e.format != "json":
	case t.printed == 0:
		_, err = fmt.Fprintf(t.e.out, "{%q:[]}\n", t.field)
	default:
		_, err = fmt.Fprintln(t.e.out, "\n]}")
	}
	return err
}

// showList walks a list of the server's and prints it.
func showList[T any](ctx context.Context, e *env, path, field string, query url.Values, limit int, columns []column[T]) error {
	t := &table[T]{e: e, field: field, columns: columns}
	if err := e.pages(ctx, path, field, query, limit, t.add); err != nil {
		return err
	}
	return t.end()
}

// compact puts an item on a line of its own.
func compact(raw json.RawMessage) []byte {
	var b bytes.Buffer
	if json.Compact(&b, raw) != nil {
		return escaped(raw)
	}
	return escaped(b.Bytes())
}

// escaped is JSON with the characters escaped that could steer a terminal, which
// JSON itself allows in texts.
func escaped(text []byte) []byte {
	b := make([]byte, 0, len(text))
	for _, r := range string(text) {
		if r != '\n' && printableRune(r) != r {
			for _, unit := range utf16.Encode([]rune{r}) {
				b = fmt.Appendf(b, `\u%04x`, unit)
			}
			continue
		}
		b = utf8.AppendRune(b, r)
	}
	return b
}

// bytes writes what a device or another server said as it is, but on a terminal
// without what could steer that.
func (e *env) bytes(said []byte) error {
	if e.width > 0 {
		said = bytes.Map(printableInLines, said)
	}
	_, err := e.out.Write(said)
	return err
}

// json prints v, or what the server said if it is its answer, for programs.
func (e *env) json(v any) error {
	raw, ok := v.([]byte)
	if !ok {
		var err error
		if raw, err = json.Marshal(v); err != nil {
			return err
		}
	}
	var b bytes.Buffer
	if err := json.Indent(&b, bytes.TrimSpace(raw), "", "  "); err != nil {
		return fmt.Errorf("the server's answer is no JSON: %w", err)
	}
	b.WriteByte('\n')
	_, err := e.out.Write(escaped(b.Bytes()))
	return err
}

// pairs prints names and values below each other; empty values are left out.
func (e *env) pairs(rows [][2]string) error {
	names := 0
	for _, row := range rows {
		if row[1] != "" {
			names = max(names, utf8.RuneCountInString(row[0]))
		}
	}
	indent := strings.Repeat(" ", names) + gap
	var b strings.Builder
	for _, row := range rows {
		if row[1] == "" {
			continue
		}
		for i, line := range e.wrap(printable(row[1]), len(indent)) {
			head := indent
			if i == 0 {
				head = fmt.Sprintf("%-*s", len(indent), row[0])
			}
			b.WriteString(head + line + "\n")
		}
	}
	_, err := io.WriteString(e.out, b.String())
	return err
}

// wrap sets a text in lines that fit the terminal behind an indent; without a
// terminal it is one line.
func (e *env) wrap(text string, indent int) []string {
	if e.width == 0 || e.format == "wide" {
		return []string{text}
	}
	room := max(20, e.width-indent)
	var lines []string
	for rest := []rune(text); ; {
		if len(rest) <= room {
			return append(lines, string(rest))
		}
		end := room
		for i := room; i > 0; i-- {
			if rest[i] == ' ' {
				end = i
				break
			}
		}
		lines = append(lines, string(rest[:end]))
		rest = rest[end:]
		for len(rest) > 0 && rest[0] == ' ' {
			rest = rest[1:]
		}
	}
}

// printable is a text of the server or of a device that cannot steer the
// terminal: control characters, C1 ones included, and those that change the
// direction of writing become question marks.
func printable(s string) string {
	if s == "" {
		return "-"
	}
	return strings.Map(printableRune, s)
}

// printableInLines is printableRune for a text of several lines.
func printableInLines(r rune) rune {
	if r == '\n' || r == '\t' {
		return r
	}
	return printableRune(r)
}

func printableRune(r rune) rune {
	switch {
	case r == '\u200c' || r == '\u200d': // join letters and emoji
		return r
	case r == utf8.RuneError || unicode.IsControl(r) || unicode.In(r, unicode.Cf, unicode.Co, unicode.Zl, unicode.Zp):
		return '?'
	}
	return r
}
