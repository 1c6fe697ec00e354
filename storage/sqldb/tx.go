package sqldb

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

const (
	// opTimeout bounds one transaction with all its retries, so that a dead
	// database fails a request instead of holding it.
	opTimeout = 30 * time.Second
	// rollbackTimeout bounds a ROLLBACK whose caller may be gone.
	rollbackTimeout = 5 * time.Second
)

// querier is what *sql.DB, *sql.Conn and *sql.Tx have in common.
type querier interface {
	ExecContext(ctx context.Context, q string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, q string, args ...any) (*sql.Rows, error)
	PrepareContext(ctx context.Context, q string) (*sql.Stmt, error)
}

// Tx runs statements, all in one transaction (DB.Write) or each by itself
// (DB.Read). It belongs to one goroutine, and rows must be closed before its
// next call. Arguments: bool is stored as 0 or 1, a nil []byte as NULL.
type Tx struct {
	Dialect *Dialect
	// Now is the clock in UTC microseconds, the same for everything in one
	// transaction.
	Now int64
	// SkipLocked has the methods that lock rows leave out those that another
	// transaction has locked, in place of waiting for it.
	SkipLocked bool

	sent     *atomic.Int64 // counts statements
	q        querier
	conn     *sql.Conn // nil in DB.Read
	sqltx    *sql.Tx   // nil in DB.Read, and where the dialect has a text to begin with
	begun    bool      // that text was sent
	deferred []statement
	stmts    *stmtCache
	prepared map[string]bool
	missed   []string // texts to prepare once the connection is free
}

// Write runs fn in one transaction and commits it. After an error that the
// engine calls retryable it runs fn again, with a bound and with jitter, so fn
// must set its results, not add to them. fn must lock rows in key order. A
// commit that fails is an error; it is repeated only if the engine said that it
// rolled back.
func (db *DB) Write(ctx context.Context, fn func(ctx context.Context, t *Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return db.writeUntimed(ctx, fn)
}

// writeUntimed is Write without its time limit: a step of a migration on a
// large table takes long.
func (db *DB) writeUntimed(ctx context.Context, fn func(ctx context.Context, t *Tx) error) error {
	return db.retry(ctx, func() (bool, error) { return db.attempt(ctx, fn) })
}

// Read runs fn outside a transaction: each statement sees what was committed
// when it began, so reads that must agree belong in one statement. It retries
// as Write does.
func (db *DB) Read(ctx context.Context, fn func(ctx context.Context, t *Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return db.retry(ctx, func() (bool, error) {
		t := db.newTx(db.readStmts)
		t.q = db.read
		err := fn(ctx, t)
		return db.dialect.temporary(err), err
	})
}

func (db *DB) newTx(stmts *stmtCache) *Tx {
	return &Tx{Dialect: db.dialect, Now: db.Now().UnixMicro(), sent: &db.sent, stmts: stmts, prepared: db.prepared}
}

// attempt runs fn in a transaction once. It works on a connection of its own,
// which is thrown away if the transaction's end failed: a connection that is
// still inside a transaction must not go back to the pool.
func (db *DB) attempt(ctx context.Context, fn func(ctx context.Context, t *Tx) error) (again bool, err error) {
	conn, err := db.write.Conn(ctx)
	if err != nil {
		return db.dialect.temporary(err), err
	}
	defer conn.Close()
	t := db.newTx(db.writeStmts)
	t.conn = conn
	if err := t.begin(ctx); err != nil {
		discard(conn)
		return db.dialect.temporary(err), err
	}
	finished := false
	defer func() {
		if !finished { // fn panicked
			_ = t.rollback(ctx)
			discard(conn)
		}
	}()
	err = fn(ctx, t)
	finished = true
	if err != nil {
		if rerr := t.rollback(ctx); rerr != nil || db.dialect.readOnly != nil && db.dialect.readOnly(err) {
			discard(conn)
		}
		return db.dialect.temporary(err), err
	}
	if lost, err := t.commit(ctx); err != nil {
		if rerr := t.rollback(ctx); rerr != nil { // sql.Tx has no end after a commit that failed
			discard(conn)
		}
		// A connection that was lost during COMMIT leaves open whether it
		// took effect; only an engine's word that it rolled back does not.
		return db.dialect.retryable(err) || !lost && db.dialect.unavailable(err), fmt.Errorf("committing: %w", err)
	}
	conn.Close()
	for _, q := range t.missed {
		db.writeStmts.prepare(ctx, q)
	}
	return false, nil
}

// discard takes a connection out of its pool.
func discard(conn *sql.Conn) {
	_ = conn.Raw(func(any) error { return driver.ErrBadConn })
}

// begin begins the transaction, at once or with its first statement.
func (t *Tx) begin(ctx context.Context) (err error) {
	if t.Dialect.begin != "" {
		t.q, t.deferred = t.conn, []statement{{text: t.Dialect.begin}}
		return nil
	}
	t.sqltx, err = t.conn.BeginTx(ctx, nil)
	t.q = t.sqltx
	return err
}

// commit commits. If it fails, lost says whether COMMIT was sent: the outcome
// of the transaction is then known only if the error says so.
func (t *Tx) commit(ctx context.Context) (lost bool, err error) {
	if t.sqltx == nil {
		t.deferred = append(t.deferred, statement{text: "COMMIT"})
		return true, t.flush(ctx)
	}
	if err := t.flush(ctx); err != nil {
		return false, err
	}
	return true, t.sqltx.Commit()
}

// rollback ends a transaction that is not to be committed, even if its
// context has ended.
func (t *Tx) rollback(ctx context.Context) error {
	t.deferred = nil
	if t.sqltx != nil {
		return t.sqltx.Rollback()
	}
	if !t.begun {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
	defer cancel()
	_, err := t.conn.ExecContext(ctx, "ROLLBACK")
	return err
}

// Exec runs a statement and returns how many rows it matched (on every
// engine, changed or not). For an upsert the number differs between engines.
func (t *Tx) Exec(ctx context.Context, q string, args ...any) (int64, error) {
	if err := t.flush(ctx); err != nil {
		return 0, err
	}
	t.sent.Add(1)
	q, args = t.Dialect.Rebind(q), storedArgs(args)
	var res sql.Result
	var err error
	if stmt := t.stmt(ctx, q); stmt != nil {
		res, err = stmt.ExecContext(ctx, args...)
	} else if from := t.Dialect.prepareFrom; from > 0 && argBytes(args) >= from {
		res, err = execPrepared(ctx, t.q, q, args)
	} else {
		res, err = t.q.ExecContext(ctx, q, args...)
	}
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// Query runs a statement that returns rows.
func (t *Tx) Query(ctx context.Context, q string, args ...any) Result {
	if err := t.flush(ctx); err != nil {
		return Result{err: err}
	}
	t.sent.Add(1)
	q, args = t.Dialect.Rebind(q), storedArgs(args)
	var r Result
	if stmt := t.stmt(ctx, q); stmt != nil {
		r.rows, r.err = stmt.QueryContext(ctx, args...)
	} else {
		r.rows, r.err = t.q.QueryContext(ctx, q, args...)
	}
	return r
}

// QueryRow runs a statement that returns at most one row; Scan reports
// sql.ErrNoRows if none.
func (t *Tx) QueryRow(ctx context.Context, q string, args ...any) Row {
	return t.Query(ctx, q, args...)
}

// Row is one row of a result.
type Row interface {
	Scan(into ...any) error
}

// Result is the rows of a query, or its error. Either Each or Scan must be
// called, once.
type Result struct {
	rows *sql.Rows
	err  error
}

// ErrStop is returned by a function of Each that wants no more rows.
var ErrStop = errors.New("no more rows are wanted")

// Each calls a function for each row, up to its first error, and ends the
// statement.
func (r Result) Each(read func(Row) error) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	for r.rows.Next() {
		if err := read(r.rows); errors.Is(err, ErrStop) {
			return r.rows.Close()
		} else if err != nil {
			return err
		}
	}
	return cmp.Or(r.rows.Err(), r.rows.Close())
}

// Collect returns the values that a function reads, one from each row.
func Collect[T any](r Result, read func(Row, *T) error) ([]T, error) {
	var all []T
	err := r.Each(func(row Row) error {
		var v T
		if err := read(row, &v); err != nil {
			return err
		}
		all = append(all, v)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return all, nil
}

// Column returns the values of the first column.
func Column[T any](r Result) ([]T, error) {
	return Collect(r, func(row Row, v *T) error { return row.Scan(v) })
}

// Scan reads the first row and ends the statement; sql.ErrNoRows if there is
// none.
func (r Result) Scan(into ...any) error {
	if r.err != nil {
		return r.err
	}
	defer r.rows.Close()
	if !r.rows.Next() {
		return cmp.Or(r.rows.Err(), sql.ErrNoRows)
	}
	if err := r.rows.Scan(into...); err != nil {
		return err
	}
	return r.rows.Close()
}

// execText runs a statement without arguments as it is.
func (t *Tx) execText(ctx context.Context, q string) error {
	if err := t.flush(ctx); err != nil {
		return err
	}
	_, err := t.q.ExecContext(ctx, q)
	return err
}

// stmt returns q prepared, or nil if it is to be run as text.
func (t *Tx) stmt(ctx context.Context, q string) *sql.Stmt {
	if t.stmts == nil || t.Dialect.prepare == prepareNamed && !t.prepared[q] {
		return nil
	}
	if t.conn == nil {
		return t.stmts.prepare(ctx, q)
	}
	if t.sqltx == nil {
		return nil
	}
	// The transaction may hold the only connection, so preparing waits for
	// its end.
	stmt := t.stmts.get(q)
	if stmt == nil {
		t.missed = append(t.missed, q)
		return nil
	}
	return t.sqltx.StmtContext(ctx, stmt)
}

// execPrepared prepares a statement for one execution.
func execPrepared(ctx context.Context, on querier, q string, args []any) (sql.Result, error) {
	stmt, err := on.PrepareContext(ctx, q)
	if err != nil {
		return nil, err
	}
	defer stmt.Close()
	return stmt.ExecContext(ctx, args...)
}

// argBytes is the size of the texts and bytes among arguments.
func argBytes(args []any) int {
	n := 0
	for _, a := range args {
		switch a := a.(type) {
		case string:
			n += len(a)
		case []byte:
			n += len(a)
		}
	}
	return n
}

// storedArgs makes arguments mean the same to each driver.
func storedArgs(args []any) []any {
	for i, a := range args {
		switch v := a.(type) {
		case bool:
			if v {
				args[i] = int64(1)
			} else {
				args[i] = int64(0)
			}
		case []byte:
			if v == nil {
				args[i] = nil
			}
		}
	}
	return args
}
