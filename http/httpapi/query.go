package httpapi

import (
	"context"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// The default and the largest number of items of a page.
const (
	pageItems    = 100
	maxPageItems = 1000
)

// query reads the parameters of a request. Each method reads one of them and
// keeps the first error; done returns that, or refuses unknown parameters.
type query struct {
	values  url.Values
	known   map[string]bool
	err     error
	request *http.Request
	cursors *cursors
	// cursorName is the parameter with the cursor.
	cursorName string
}

func (a *API) queryOf(r *http.Request) *query { return newQuery(r, a.cursors) }

func newQuery(r *http.Request, c *cursors) *query {
	values, err := url.ParseQuery(r.URL.RawQuery)
	q := &query{values: values, known: make(map[string]bool), request: r, cursors: c, cursorName: "after"}
	if err != nil {
		q.fail("the query cannot be read: %v", err)
	}
	return q
}

func (q *query) fail(format string, args ...any) {
	if q.err == nil {
		q.err = badRequest(format, args...)
	}
}

// texts reads a parameter that may be repeated.
func (q *query) texts(name string) []string {
	q.known[name] = true
	values := q.values[name]
	for _, value := range values {
		if why := textFault(value); why != "" {
			q.fail("%s: %s", name, why)
		}
	}
	return values
}

// textFault explains why the store cannot look for a text; empty if it can.
func textFault(text string) string {
	switch {
	case text == "":
		return "it is empty; leave it out"
	case !utf8.ValidString(text) || strings.ContainsRune(text, 0):
		return "it is not text"
	}
	return ""
}

// text reads a parameter that may be given once; empty if it is missing.
func (q *query) text(name string) string {
	values := q.texts(name)
	switch len(values) {
	case 0:
		return ""
	case 1:
		return values[0]
	}
	q.fail("%s: it is given twice", name)
	return ""
}

// word is text for a parameter with an enumeration.
func (q *query) word(name string, words ...string) string {
	text := q.text(name)
	if text != "" && !slices.Contains(words, text) {
		q.fail("%s: use %s", name, orList(words))
	}
	return text
}

// flag reads true or false; nil if the parameter is missing.
func (q *query) flag(name string) *bool {
	switch q.word(name, "true", "false") {
	case "true":
		return new(true)
	case "false":
		return new(false)
	}
	return nil
}

// number reads a number within bounds; usual if the parameter is missing.
func (q *query) number(name string, usual, least, most int) int {
	text := q.text(name)
	if text == "" {
		return usual
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		q.fail("%s: a number from %d to %d is wanted", name, least, most)
		return usual
	}
	return n
}

// limit reads the number of items of a page.
func (q *query) limit() int { return q.number("limit", pageItems, 1, maxPageItems) }

// cursor reads a cursor of this list into place and reports whether it was
// given.
func (q *query) cursor(place any) bool {
	text := q.text(q.cursorName)
	if text == "" {
		return false
	}
	if !q.cursors.open(q.request, text, place) {
		q.failCursor()
	}
	return true
}

func (q *query) failCursor() { q.fail("%s: that is not a next of this list's", q.cursorName) }

// time reads a time; zero if the parameter is missing.
func (q *query) time(name string) time.Time {
	text := q.text(name)
	if text == "" {
		return time.Time{}
	}
	at, err := time.Parse(time.RFC3339, text)
	if err != nil {
		q.fail("%s: %q is not a time such as 2026-03-01T12:00:00Z", name, text)
	}
	return at.UTC()
}

// done returns the first error.
func (q *query) done() error {
	if q.err != nil {
		return q.err
	}
	for _, name := range slices.Sorted(maps.Keys(q.values)) {
		if !q.known[name] {
			if len(q.known) == 0 {
				return badRequest("%s: there are no query parameters here", name)
			}
			return badRequest("%s: there is no such query parameter here; there is %s", name, andList(slices.Sorted(maps.Keys(q.known))))
		}
	}
	return nil
}

// noQuery refuses query parameters.
func noQuery(next call) call {
	return func(ctx context.Context, r *http.Request) (int, any, error) {
		if err := newQuery(r, nil).done(); err != nil {
			return 0, nil, err
		}
		return next(ctx, r)
	}
}

func orList(words []string) string  { return list(words, " or ") }
func andList(words []string) string { return list(words, " and ") }

func list(words []string, last string) string {
	if len(words) < 2 {
		return strings.Join(words, "")
	}
	n := len(words) - 1
	return strings.Join(words[:n], ", ") + last + words[n]
}
