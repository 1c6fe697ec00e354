package sqldb

import (
	"context"
	"fmt"
	"strings"
)

// statement is one that waits to be sent with others.
type statement struct {
	text string
	args []any
	rows *int // gets the number of returned or changed rows, if the dialect counts them; may be nil
}

// name is how the statement begins, for errors.
func (s statement) name() string {
	words := strings.Fields(s.text[:min(len(s.text), 100)])
	return strings.Join(words[:min(len(words), 3)], " ")
}

// maxDeferred is how many statements wait at most.
const maxDeferred = 16

// ExecDeferred runs a statement whose outcome the caller does not look at:
// together with those that follow, at the latest before the next statement
// that returns something or at the end of the transaction. Its error fails the
// transaction. So several statements cost one round trip on engines that have
// batches.
func (t *Tx) ExecDeferred(ctx context.Context, q string, args ...any) error {
	if t.conn == nil || t.Dialect.execBatch == nil {
		_, err := t.Exec(ctx, q, args...)
		return err
	}
	t.deferStatement(q, args, nil)
	if len(t.deferred) < maxDeferred {
		return nil
	}
	return t.flush(ctx)
}

func (t *Tx) deferStatement(q string, args []any, rows *int) {
	t.sent.Add(1)
	t.deferred = append(t.deferred, statement{text: t.Dialect.Rebind(q), args: storedArgs(args), rows: rows})
}

// flush sends the deferred statements.
func (t *Tx) flush(ctx context.Context) error {
	deferred := t.deferred
	if len(deferred) == 0 {
		return nil
	}
	t.deferred, t.begun = nil, true
	return t.Dialect.execBatch(ctx, t.conn, deferred)
}

// BatchQuery is a query and the function that reads each of its rows.
type BatchQuery struct {
	Action string // for errors: "reading enrollments"
	Text   string
	Args   []any
	Read   func(Row) error
}

func (q *BatchQuery) failed(err error) error { return fmt.Errorf("%s: %w", q.Action, err) }

// QueryBatch runs queries, one after the other, behind the deferred
// statements. Where the engine can do it, everything costs one round trip. No
// query may need what one before it read.
func (t *Tx) QueryBatch(ctx context.Context, queries ...BatchQuery) error {
	if t.conn != nil && t.Dialect.queryBatch != nil {
		deferred := t.deferred
		t.deferred, t.begun = nil, true
		for i := range queries {
			q := &queries[i]
			q.Text, q.Args = t.Dialect.Rebind(q.Text), storedArgs(q.Args)
		}
		t.sent.Add(int64(len(queries)))
		return t.Dialect.queryBatch(ctx, t.conn, deferred, queries)
	}
	for _, q := range queries {
		if err := t.Query(ctx, q.Text, q.Args...).Each(q.Read); err != nil {
			return q.failed(err)
		}
	}
	return nil
}
