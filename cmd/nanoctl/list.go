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
	"text/tabwriter"
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
}

// table prints items as a table, or as they came, as {"<field>": [...]}. It
// prints as the items come, so that a long list shows at once.
type table[T any] struct {
	e       *env
	field   string
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
	w := tabwriter.NewWriter(t.e.out, 0, 0, 2, ' ', 0)
	if t.printed == 0 && len(items) > 0 {
		headings := make([]string, len(t.columns))
		for i, c := range t.columns {
			headings[i] = c.heading
		}
		fmt.Fprintln(w, strings.Join(headings, "\t"))
	}
	for _, raw := range items {
		item := new(T)
		if err := json.Unmarshal(raw, item); err != nil {
			return fmt.Errorf("the server's list is not what this version of nanoctl expects: %w", err)
		}
		cells := make([]string, len(t.columns))
		for i, c := range t.columns {
			cells[i] = printable(c.cell(item))
		}
		fmt.Fprintln(w, strings.TrimRight(strings.Join(cells, "\t"), "\t"))
		t.printed++
	}
	return w.Flush()
}

// end closes the list.
func (t *table[T]) end() error {
	var err error
	switch {
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
		return raw
	}
	return b.Bytes()
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
	_, err := e.out.Write(b.Bytes())
	return err
}

// pairs prints names and values below each other; empty values are left out.
func pairs(w io.Writer, rows [][2]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, row := range rows {
		if row[1] != "" {
			fmt.Fprintf(t, "%s\t%s\n", row[0], printable(row[1]))
		}
	}
	return t.Flush()
}

// printable keeps what devices chose from steering the terminal.
func printable(s string) string {
	if s == "" {
		return "-"
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r == '\u2028' || r == '\u2029' || r >= '\u202a' && r <= '\u202e' {
			return '?'
		}
		return r
	}, s)
}
