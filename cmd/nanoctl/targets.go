package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// targets are whom a command is for.
type targets struct {
	all    bool
	from   string
	filter filter
}

func (t *targets) flags(flags *flag.FlagSet) {
	flags.BoolVar(&t.all, "all", false, "every enabled device")
	flags.StringVar(&t.from, "from", "", "`file` with an id or a serial number on each line; - is standard input")
	t.filter.flags(flags)
}

// selects says whether -all or filters choose enrollments.
func (t *targets) selects() bool { return t.all || len(t.filter.query()) > 0 }

// deviceTypes are the types of device channels.
var deviceTypes = []string{"Device", "User Enrollment (Device)"}

// resolve returns the enrollments that args and -from name, or that -all and
// the filters select. A selection has enabled devices only, unless -enabled or
// -type says otherwise. The command then acts on exactly these enrollments,
// also if more enroll meanwhile.
func (t *targets) resolve(ctx context.Context, e *env, args []string) ([]enrollment, error) {
	query := t.filter.query()
	selects := t.selects()
	if t.from != "" {
		names, err := e.readLines(t.from)
		if err != nil {
			return nil, err
		}
		args = append(slices.Clone(args), names...)
	}
	switch {
	case selects && len(args) > 0:
		return nil, usage("name enrollments, or select them with -all and filters; not both")
	case !selects && len(args) == 0:
		return nil, usage("name an enrollment by id or serial number, or select some with -all or a filter")
	case !selects:
		return e.lookUp(ctx, args)
	}
	if !query.Has("enabled") {
		query.Set("enabled", "true")
	}
	types := deviceTypes
	if query.Has("type") {
		types = query["type"]
	}
	var chosen []enrollment
	for _, kind := range types {
		query.Set("type", kind)
		err := e.pages(ctx, "/v1/enrollments", "enrollments", query, 0, func(items []json.RawMessage) error {
			for _, item := range items {
				var x enrollment
				if err := json.Unmarshal(item, &x); err != nil {
					return fmt.Errorf("the server's list is not what this version of nanoctl expects: %w", err)
				}
				chosen = append(chosen, x)
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	if len(chosen) == 0 {
		return nil, &exitError{exitNotFound, errors.New("no enrollment matches")}
	}
	return chosen, nil
}

func (e *env) lookUp(ctx context.Context, names []string) ([]enrollment, error) {
	var chosen []enrollment
	known := make(map[string]bool)
	for _, name := range names {
		x, err := e.enrollment(ctx, name)
		if exit := (*exitError)(nil); errors.As(err, &exit) && exit.code == exitNotFound {
			return nil, &exitError{exitNotFound, fmt.Errorf("%s: no enrollment has that id or serial number", name)}
		}
		if err != nil {
			return nil, err
		}
		if !known[x.ID] {
			known[x.ID] = true
			chosen = append(chosen, *x)
		}
	}
	return chosen, nil
}

// readLines reads the words of a file, one a line.
func (e *env) readLines(name string) ([]string, error) {
	content, err := e.readFile(name)
	if err != nil {
		return nil, err
	}
	var words []string
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		if word := strings.TrimSpace(lines.Text()); word != "" && !strings.HasPrefix(word, "#") {
			words = append(words, word)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, usage("%s: %w", name, err)
	}
	if len(words) == 0 {
		return nil, usage("%s names no enrollment", name)
	}
	return words, nil
}

func (e *env) readFile(name string) ([]byte, error) {
	var data []byte
	var err error
	if name == "-" {
		data, err = io.ReadAll(e.in)
	} else {
		data, err = os.ReadFile(name)
	}
	if err != nil {
		return nil, &exitError{exitUsage, err}
	}
	return data, nil
}

// summarize names a few and counts many.
func summarize(chosen []enrollment) string {
	if len(chosen) > 3 {
		return fmt.Sprintf("%d enrollments", len(chosen))
	}
	names := make([]string, len(chosen))
	for i := range chosen {
		names[i] = printable(chosen[i].label())
	}
	return strings.Join(names, ", ")
}

// chunk is how many enrollments one call takes, so that there is progress to
// show and a place to stop.
const chunk = 250

// eachChunk works through the chosen with a progress bar. An interruption lets
// the call that is under way end, so that it is known what was done; a second
// one ends the program. done gets the number of enrollments that were worked through, also after
// an interruption or an error that leaves some undone.
func (e *env) eachChunk(ctx context.Context, label string, chosen []enrollment, work func(ctx context.Context, ids []string) error, done func(n int) error) error {
	bar := e.progress()
	n := 0
	var failed error
	for part := range slices.Chunk(chosen, chunk) {
		if ctx.Err() != nil {
			break
		}
		ids := make([]string, len(part))
		for i := range part {
			ids[i] = part[i].ID
		}
		if failed = work(context.WithoutCancel(ctx), ids); failed != nil {
			break
		}
		n += len(part)
		if len(chosen) > chunk {
			bar.bar(label, n, len(chosen), "")
		}
	}
	bar.end()
	left := len(chosen) - n
	switch {
	case failed != nil && n == 0:
		return failed
	case left > 0 && n == 0:
		return &exitError{exitInterrupted, errors.New("interrupted; nothing was done")}
	}
	if err := done(n); err != nil {
		return err
	}
	switch {
	case failed != nil:
		return &exitError{exitPartial, fmt.Errorf("%d of %d enrollments were not reached: %w", left, len(chosen), failed)}
	case left > 0:
		return &exitError{exitInterrupted, fmt.Errorf("interrupted; %d of %d enrollments were not reached", left, len(chosen))}
	}
	return nil
}
