package sqlstore

import (
	"context"
	"database/sql"
	"regexp"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// WriteForTest runs fn in a transaction as the package's own writes do.
func (s *Store) WriteForTest(ctx context.Context, fn func(exec func(q string, args ...any) (int64, error)) error) error {
	return s.write(ctx, func(ctx context.Context, t *tx) error {
		return fn(func(q string, args ...any) (int64, error) { return t.Exec(ctx, q, args...) })
	})
}

// LaterForTest runs fn in a transaction, with what runs a statement later and
// what reads a number.
func (s *Store) LaterForTest(ctx context.Context, fn func(later func(q string, args ...any) error, number func(q string) (int, error)) error) error {
	return s.write(ctx, func(ctx context.Context, t *tx) error {
		return fn(func(q string, args ...any) error { return t.ExecDeferred(ctx, q, args...) }, func(q string) (n int, err error) {
			return n, t.QueryRow(ctx, q).Scan(&n)
		})
	})
}

// SettingForTest reads one value on a connection of the pool.
func (s *Store) SettingForTest(ctx context.Context, q string) (value string, err error) {
	err = s.db.Writer().QueryRowContext(ctx, q).Scan(&value)
	return value, err
}

// ExecForTest runs a statement outside of transactions, for as long as it takes.
func (s *Store) ExecForTest(ctx context.Context, q string) error {
	_, err := s.db.Writer().ExecContext(ctx, q)
	return err
}

// IndexesForTest are the statements that drop all indexes of the schema but
// primary keys, and those that make them again.
func (s *Store) IndexesForTest() (drop, create []string) {
	statements, err := migrations().Statements(s.db.Dialect())
	if err != nil {
		panic(err)
	}
	for _, statement := range statements {
		found := indexStatement.FindStringSubmatch(statement)
		if found == nil {
			continue
		}
		q := "DROP INDEX " + found[1]
		if s.db.Dialect().Index("x") != "" { // MySQL and MariaDB, whose indexes are named within their tables
			q += " ON " + found[2]
		}
		drop, create = append(drop, q), append(create, statement)
	}
	return drop, create
}

var indexStatement = regexp.MustCompile(`^CREATE (?:UNIQUE )?INDEX (?:IF NOT EXISTS )?(\w+) ON (\w+)`)

// FilterQueryForTest is the statement that finds the candidates of a filter,
// and the indexes that it is meant to be answered by.
func (s *Store) FilterQueryForTest(scope storage.Scope, f storage.EnrollmentFilter) (indexes []string, q string, args []any) {
	src := sourceOf(scope, f)
	for _, p := range src.parts {
		indexes = append(indexes, p.index)
	}
	q, args = src.query(s.db.Dialect(), storage.EnrollmentKey{By: src.index, At: time.UnixMicro(1), Key: "D"}, 100)
	return indexes, q, args
}

// ListQueryForTest is a statement by which commands or queues are listed, and
// the index that it is meant to be answered by, as a regular expression.
type ListQueryForTest struct {
	Name, Index, Query string
	Args               []any
}

// byCommand are the two indexes that have a command's rows together: engines
// may prefer the primary key for a command with few rows of other states.
const byCommand = `nano_enrollment_queue_(command_uuid|pkey)`

// ListQueriesForTest are all of them.
func (s *Store) ListQueriesForTest() (list []ListQueryForTest) {
	at := time.UnixMicro(50)
	add := func(name, index string, q string, args []any) {
		list = append(list, ListQueryForTest{name, index, q, args})
	}
	key := storage.CommandKey{At: at, UUID: "C"}
	for name, f := range map[string]storage.CommandFilter{
		"commands": {}, "commands by time": {CreatedAfter: time.UnixMicro(1), CreatedBefore: at},
	} {
		q, args := commandsQuery(s.db.Dialect(), f, nil, key, 100)
		add(name, "nano_commands_created_at", q, args)
	}
	q, args := commandsQuery(s.db.Dialect(), storage.CommandFilter{RequestType: "rare"}, nil, key, 100)
	add("commands by type", "nano_commands_request_type", q, args)
	add("commands in a state", "nano_enrollment_queue_command_uuid",
		"SELECT c.command_uuid FROM nano_commands c WHERE "+chooseAll(s.db.Dialect(), storage.Queued)+" AND c.command_uuid IN (?, ?)", []any{"C1", "C2"})
	add("commands of a rare state", "nano_enrollment_queue_command_uuid", rareQuery(s.db.Dialect(), storage.Queued), []any{rareRows + 1, rareCommands + 1})
	q, args = itemsQuery(s.db.Dialect(), storage.Scope{}, "C1", 0, "D", 100)
	add("a command's enrollments", byCommand, q, args)
	q, args = itemsQuery(s.db.Dialect(), storage.Scope{}, "C1", storage.Queued, "D", 100)
	add("a command's enrollments of a state", byCommand, q, args)
	from, args := commandRows(s.db.Dialect(), storage.Scope{}, "C1")
	add("counts of a command", byCommand, "SELECT q.state, COUNT(*) FROM "+from+" AND q.state IN ("+everyState()+") GROUP BY q.state", args)
	q, args = queueQuery(s.db.Dialect(), storage.Scope{}, "D000007", 0, storage.QueueKey{Priority: 0, Seq: 1}, 100)
	add("a queue", "nano_enrollment_queue_next", q, args)
	q, args = queueQuery(s.db.Dialect(), storage.Scope{}, "D000007", storage.Acknowledged, storage.QueueKey{}, 100)
	add("a queue by state", "nano_enrollment_queue_next", q, args)
	for _, state := range storage.States() {
		add("rows in state "+state.String(), "nano_enrollment_queue_(next|finished_at|command_uuid)", rowsInState(s.db.Dialect(), "q.created_at", state), []any{countLimit})
	}
	return list
}

// ExplainForTest is what the engine says of how it would run a statement.
func (s *Store) ExplainForTest(ctx context.Context, q string, args ...any) (string, error) {
	explain := map[string]string{
		"sqlite": "EXPLAIN QUERY PLAN ", "pgsql": "EXPLAIN ", "mysql": "EXPLAIN FORMAT=JSON ", "mariadb": "EXPLAIN FORMAT=JSON ",
	}[s.db.Dialect().Name()]
	rows, err := s.db.Writer().QueryContext(ctx, s.db.Dialect().Rebind(explain+q), args...)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for rows.Next() {
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(sql.NullString)
		}
		if err := rows.Scan(values...); err != nil {
			return "", err
		}
		// The last column is the plan, or a line of it.
		text.WriteString(values[len(values)-1].(*sql.NullString).String + "\n")
	}
	return text.String(), rows.Err()
}

// StatementForTest is a statement of the device side, with what is to be true
// of its plan.
type StatementForTest struct {
	Text     string
	Args     []any
	Index    string // it is used
	Unsorted bool
}

// DeviceStatementsForTest returns the statements by keys that polls and reports
// of enrollments need.
func (s *Store) DeviceStatementsForTest(ids []string, uuid string) map[string]StatementForTest {
	keys := make([]keyPair, len(ids))
	for i, id := range ids {
		keys[i] = keyPair{ID: id, Item: uuid}
	}
	t := &tx{Tx: &sqldb.Tx{Dialect: s.db.Dialect()}}
	pairs, err := s.db.Dialect().PairArgs(keys)
	if err != nil {
		panic(err)
	}
	rows, rowArgs := t.lockedRowsText(keys, false)
	told, toldArgs := t.lockedRowsText(keys, true)
	ending, endArgs := queueRows.UpdateLockedText(t.Tx, "state = 10", keys)
	offered, offerArgs := queueRows.LockText(t.Tx, "id, command_uuid", keys, stillWaits)
	is, idArgs := t.Among(ids)
	locking, lockArgs := t.LockText("id", "nano_devices", ids)
	numbering, numberArgs := t.UpdateLockedText("nano_enrollment_push", "last_seq = last_seq + 1", ids)
	eligible, eligibleArgs := t.enrolledText(ids, uuid)
	return map[string]StatementForTest{
		"subjects":     {Text: s.texts.enrollmentState, Args: append([]any{int64(1), int64(1)}, pairs...), Index: "nano_enrollment_queue_next", Unsorted: true},
		"certificates": {Text: s.texts.certificateLookup, Args: pairs, Index: "nano_cert_auth_associations_id"},
		"locking":      {Text: locking, Args: lockArgs},
		"rows":         {Text: rows, Args: rowArgs},
		"events":       {Text: told, Args: toldArgs},
		"ending":       {Text: ending, Args: endArgs},
		"offered":      {Text: offered, Args: offerArgs},

		"numbering": {Text: numbering, Args: numberArgs},
		"eligible":  {Text: eligible, Args: eligibleArgs},
		"enrolled":  {Text: "SELECT id FROM nano_enrollments WHERE id " + is, Args: idArgs},
	}
}

// StandStillForTest lets time pass in which the store does nothing.
func (s *Store) StandStillForTest(d time.Duration) {
	uptime := s.uptime
	s.uptime = func() time.Duration { return uptime() + d }
}

// PushedForTest notes that a push about all commands up to seq was accepted;
// plan: and that the next one has a time.
func (s *Store) PushedForTest(id string, seq int64, plan bool) {
	s.act.note(activity{id: id, paid: seq, setPushAt: plan, pushAt: 1})
}

// OfferedForTest notes that a command was offered so many times.
func (s *Store) OfferedForTest(id, uuid string, times int) {
	s.act.note(activity{id: id, offered: uuid, offers: times, offeredAt: 1})
}

// CallForTest is a call of Enqueue in a batch of calls, and its outcome.
type CallForTest struct {
	Scope   storage.Scope
	Enqueue storage.Enqueue

	Failed   map[string]error
	Conflict error
}

// EnqueueTogetherForTest carries calls out in one transaction, as calls that
// arrive while others run.
func (s *Store) EnqueueTogetherForTest(ctx context.Context, calls []*CallForTest) error {
	batch := make([]*enqueueCall, len(calls))
	for i, c := range calls {
		batch[i] = &enqueueCall{scope: c.Scope, e: &c.Enqueue, ids: storableAmong(c.Enqueue.IDs, make(map[string]error))}
	}
	err := s.write(ctx, func(ctx context.Context, t *tx) error { return enqueueCalls(ctx, t, batch) })
	for i, c := range batch {
		calls[i].Failed, calls[i].Conflict = c.failed, c.conflict
	}
	return err
}
