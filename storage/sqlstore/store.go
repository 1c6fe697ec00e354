// Package sqlstore keeps what package storage promises in SQLite, PostgreSQL,
// MySQL or MariaDB.
//
// All SQL of the daemon is here, written once with ? for arguments. What an
// engine does its own way is a field of its dialect value; nothing else asks
// which engine it talks to. Files go by topic: store.go has transactions,
// dialect.go and one file for each engine what differs, migrate.go and
// migrations the schema, and the rest one role of package storage each.
//
// Times are integers in UTC microseconds, booleans SMALLINT, and identifiers
// are compared byte for byte on every engine.
package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// Config says where the database is. Driver and DSN are required; the zero
// value of everything else works.
type Config struct {
	// Driver is sqlite, pgsql or mysql (MySQL and MariaDB alike).
	Driver string
	// DSN is, for sqlite, the path of a file or ":memory:", optionally
	// followed by ? and modernc.org/sqlite parameters; for pgsql a URL or a
	// keyword string; for mysql a go-sql-driver data source name. It may hold
	// a password, so it never appears in errors.
	DSN string
	// Now is the clock of everything that is stored; time.Now if nil.
	Now func() time.Time
	// Logger takes what no caller can be told; nothing is logged if nil.
	Logger *slog.Logger
	// ConnMaxLifetime and ConnMaxIdleTime bound the age of a connection to a
	// database server: 30 and 3 minutes if zero, which is below the idle
	// limits of the usual load balancers (Azure has 4 minutes, AWS 350
	// seconds). SQLite's are kept.
	ConnMaxLifetime time.Duration
	ConnMaxIdleTime time.Duration
	// MaxOpenConns bounds the connections to a database server, 24 if zero,
	// and with SQLite the readers.
	MaxOpenConns int
	// Sealer encrypts push keys, unlock and bootstrap tokens, the messages that
	// hold them and the keys of event sinks; nothing is sealed if nil. Values
	// that were stored before are read as they are. A database with values of
	// a key that it does not have is refused.
	Sealer storage.Sealer
	// SealCommands seals commands, too.
	SealCommands bool
	// RecordActivityEvery is how long last-seen times and paid pushes are
	// gathered before they are written: 500 ms if zero. If negative they are
	// only written by Flush and Close.
	RecordActivityEvery time.Duration
	// Committed is told how many of devices' messages a group commit has,
	// Polled of how many that change nothing a shared read is. Each is called
	// before the batch is run, concurrently; nobody is told if nil.
	Committed, Polled func(messages int)
}

const (
	defaultMaxOpenConns    = 24
	defaultConnMaxLifetime = 30 * time.Minute
	defaultConnMaxIdleTime = 3 * time.Minute
	defaultRecordActivity  = 500 * time.Millisecond

	// opTimeout bounds one transaction with all its retries, so that a dead
	// database fails a request instead of holding it; deviceTimeout does for
	// a batch of devices' messages, which come again by themselves.
	// connectTimeout bounds the first conversation with a server.
	opTimeout      = 30 * time.Second
	deviceTimeout  = 5 * time.Second
	connectTimeout = 15 * time.Second

	// Retries of one transaction: pauses of up to 5 ms, 10 ms, ... 640 ms,
	// about two seconds in all.
	maxAttempts = 9
	firstPause  = 5 * time.Millisecond
)

// Store is an open database. Every method may be called concurrently, and any
// number of Stores, in any number of processes, may share one database.
type Store struct {
	cfg        Config
	d          *dialect
	db         *sql.DB // transactions; with SQLite its single writer
	rdb        *sql.DB // reads outside transactions; db itself but for SQLite
	stmts      *stmtCache
	rstmts     *stmtCache
	now        func() time.Time
	log        *slog.Logger
	act        *activityLog
	polls      *batcher[*pending]
	changes    *batcher[*pending]
	seal       *sealing
	retries    atomic.Int64
	unreadable atomic.Int64 // what Stats calls EventsUnreadable
	sent       atomic.Int64 // statements
	counted    headcount
	held       sync.Map // names of leases that were taken and not lost or released
	swept      swept

	closed    atomic.Bool
	closeOnce sync.Once
	closeErr  error
}

// Stats counts what happened since the store was opened.
type Stats struct {
	// Statements that were sent to the database.
	Statements int64
	// Leases that are held, by name, as far as this store knows.
	Leases []string
	// Retries of whole transactions: deadlocks, lost connections, failovers.
	Retries int64
	// ActivityDropped counts last-seen notes that were dropped because the
	// database could not take them for long.
	ActivityDropped int64
	// EventsDropped counts events without a change, such as idle polls, that
	// were dropped for the same reason.
	EventsDropped int64
	// EventsUnreadable counts how often a batch of events or a payload was
	// wanted and could not be read: damaged, or sealed with a key that is not here.
	EventsUnreadable int64
	// What this store's sweeps did: commands that became due and that
	// expired, and history that was removed.
	Promoted, Expired                            int64
	RemovedRows, RemovedResults, RemovedCommands int64
	RemovedResultBytes                           int64
}

// Open connects to the database, checks that it is one that this package can
// work with, sets what correctness needs for its connections, and brings the
// schema up to date. Another replica may do the same at the same time; one
// migrates, the others wait. The context bounds opening only.
//
// The error is storage.ErrUnavailable if a database server is out of reach or
// not ready, so that it is worth to try again later; anything else needs an
// operator.
//
// Close must be called to release the store.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxOpenConns <= 0 {
		cfg.MaxOpenConns = defaultMaxOpenConns
	}
	if cfg.ConnMaxLifetime <= 0 {
		cfg.ConnMaxLifetime = defaultConnMaxLifetime
	}
	if cfg.ConnMaxIdleTime <= 0 {
		cfg.ConnMaxIdleTime = defaultConnMaxIdleTime
	}
	if cfg.RecordActivityEvery == 0 {
		cfg.RecordActivityEvery = defaultRecordActivity
	}
	if cfg.DSN == "" {
		return nil, errors.New("opening the store: Config.DSN is empty")
	}

	p, err := connect(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("opening the %s database: %w", cfg.Driver, err)
	}
	s := &Store{
		cfg: cfg, d: p.dialect, db: p.write, rdb: p.read,
		now: cfg.Now, log: cfg.Logger, seal: newSealing(cfg),
		counted: headcount{turn: make(chan struct{}, 1)},
	}
	s.d.subjects, s.d.senders = s.d.subjectsText(), s.d.sendersText()
	if s.d.prepare != nil {
		s.stmts = newStmtCache(p.write)
		s.rstmts = newStmtCache(p.read)
	}
	if err := s.migrate(ctx); err != nil {
		s.closePools()
		return nil, fmt.Errorf("preparing the %s database: %w", cfg.Driver, err)
	}
	if err := s.readKinds(ctx); err != nil {
		s.closePools()
		return nil, fmt.Errorf("preparing the %s database: %w", cfg.Driver, err)
	}
	if err := s.checkSeal(ctx); err != nil {
		s.closePools()
		return nil, fmt.Errorf("preparing the %s database: %w", cfg.Driver, err)
	}
	s.act = startActivity(s, cfg.RecordActivityEvery)
	s.startBatches()
	return s, nil
}

// connect has the first conversation with the database. A file that cannot be
// opened does not get better by waiting, a server may.
func connect(ctx context.Context, cfg Config) (*pools, error) {
	askCtx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	var (
		p           *pools
		err         error
		unavailable func(error) bool
	)
	switch cfg.Driver {
	case "sqlite":
		return openSQLite(askCtx, cfg)
	case "pgsql":
		p, err = openPgSQL(askCtx, cfg)
		unavailable = pgsqlDialect().unavailable
	case "mysql":
		p, err = openMySQL(askCtx, cfg)
		unavailable = mysqlDialect().unavailable
	default:
		return nil, fmt.Errorf("Config.Driver %q is not sqlite, pgsql or mysql", cfg.Driver)
	}
	if err != nil && ctx.Err() == nil && (unavailable(err) || errors.Is(err, context.DeadlineExceeded)) {
		err = fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
	}
	return p, err
}

// Close writes what is gathered, waits for the store's goroutines and for
// statements that are under way, and releases the connections. Calls after it
// fail with storage.ErrClosed.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		err := s.act.stop()
		s.closed.Store(true)
		s.closeErr = errors.Join(err, s.closePools())
	})
	return s.closeErr
}

func (s *Store) closePools() error {
	s.stmts.close()
	s.rstmts.close()
	err := s.db.Close()
	if s.rdb != s.db {
		err = errors.Join(err, s.rdb.Close())
	}
	if s.d.release != nil {
		err = errors.Join(err, s.d.release())
	}
	return err
}

// Stats returns the counters.
func (s *Store) Stats() Stats {
	return Stats{
		Statements: s.sent.Load(),
		Leases:     s.leasesHeld(),
		Retries:    s.retries.Load(), ActivityDropped: s.act.dropped.Load(),
		EventsDropped: s.act.eventsDropped.Load(), EventsUnreadable: s.unreadable.Load(),
		Promoted: s.swept.promoted.Load(), Expired: s.swept.expired.Load(),
		RemovedRows: s.swept.rows.Load(), RemovedResults: s.swept.results.Load(),
		RemovedCommands: s.swept.commands.Load(), RemovedResultBytes: s.swept.resultBytes.Load(),
	}
}

// Pools returns the state of the connection pools: write, and with SQLite also
// read.
func (s *Store) Pools() map[string]sql.DBStats {
	pools := map[string]sql.DBStats{"write": s.db.Stats()}
	if s.rdb != s.db {
		pools["read"] = s.rdb.Stats()
	}
	return pools
}

// Ping implements storage.Health.
func (s *Store) Ping(ctx context.Context) error {
	var version int64
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		var err error
		version, err = schemaVersion(ctx, t)
		return err
	})
	if err != nil {
		return fmt.Errorf("reaching the database: %w", err)
	}
	if known := newestMigration(); version != known {
		return fmt.Errorf("%w: the database has schema %d, this binary knows %d", ErrSchema, version, known)
	}
	return nil
}

// ErrSchema is Ping's error for a database that answers, and that another
// release has migrated since it was opened.
var ErrSchema = errors.New("schema is not the one this binary knows")

// micros is how every time is stored. The zero time is 0, which columns that
// may be empty store as NULL (see null).
func micros(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMicro()
}

// fromMicros is the inverse of micros.
func fromMicros(us int64) time.Time {
	if us == 0 {
		return time.Time{}
	}
	return time.UnixMicro(us).UTC()
}

// null turns 0 into NULL, for columns where it means never.
func null(us int64) any {
	if us == 0 {
		return nil
	}
	return us
}

// in returns "(?, ?, ...)" with n places.
func in(n int) string {
	if n < 1 {
		return "(NULL)" // matches nothing
	}
	return "(?" + strings.Repeat(", ?", n-1) + ")"
}

// querier is what *sql.DB and *sql.Tx have in common.
type querier interface {
	ExecContext(ctx context.Context, q string, args ...any) (sql.Result, error)
	QueryContext(ctx context.Context, q string, args ...any) (*sql.Rows, error)
	QueryRowContext(ctx context.Context, q string, args ...any) *sql.Row
}

// tx runs statements, all in one transaction (Store.write) or each by itself
// (Store.read). It belongs to one goroutine, and rows must be closed before
// its next call. Arguments: bool is stored as 0 or 1, a nil []byte as NULL.
type tx struct {
	d *dialect
	// now is the store's clock in microseconds, the same for everything in
	// one transaction.
	now  int64
	seal *sealing

	sent *atomic.Int64 // counts statements

	q      querier
	conn   *sql.Conn // nil in Store.read
	sqltx  *sql.Tx   // nil in Store.read, and where the dialect has a text to begin with
	begun  bool      // that text was sent
	late   []statement
	stmts  *stmtCache
	missed []string // texts to prepare once the connection is free
}

// statement is one that waits to be sent with others.
type statement struct {
	text string
	args []any
	rows *int // takes how many rows it returned or changed, where the dialect tells; may be nil
}

// name is how the statement begins, for errors.
func (s statement) name() string {
	words := strings.Fields(s.text[:min(len(s.text), 100)])
	return strings.Join(words[:min(len(words), 3)], " ")
}

// mostLate is how many statements wait at most.
const mostLate = 16

// later runs a statement whose outcome nobody looks at: together with those
// that follow, at the latest before the next one that returns something or at
// the end of the transaction, which its error fails. So several cost one round
// trip, where the engine is at the end of one.
func (t *tx) later(ctx context.Context, q string, args ...any) error {
	if t.conn == nil || t.d.together == nil {
		_, err := t.exec(ctx, q, args...)
		return err
	}
	t.sent.Add(1)
	t.late = append(t.late, statement{text: t.d.rebind(q), args: values(args)})
	if len(t.late) < mostLate {
		return nil
	}
	return t.flush(ctx)
}

// flush sends the statements that wait.
func (t *tx) flush(ctx context.Context) error {
	late := t.late
	if len(late) == 0 {
		return nil
	}
	t.late, t.begun = nil, true
	return t.d.together(ctx, t.conn, late)
}

// question is a query and what reads its rows.
type question struct {
	doing string // for errors
	text  string
	args  []any
	read  func(rows) error
}

// failed says what failed.
func (q *question) failed(err error) error { return fmt.Errorf("%s: %w", q.doing, err) }

// rows are the rows of a question.
type rows interface {
	Next() bool
	Scan(into ...any) error
	Err() error
}

// ask runs queries, one after the other. What waits goes with them: where the
// engine can do it, it all costs one round trip. No query may need what one
// before it read.
func (t *tx) ask(ctx context.Context, questions ...question) error {
	if t.conn != nil && t.d.ask != nil {
		late := t.late
		t.late, t.begun = nil, true
		for i := range questions {
			q := &questions[i]
			q.text, q.args = t.d.rebind(q.text), values(q.args)
		}
		t.sent.Add(int64(len(questions)))
		return t.d.ask(ctx, t.conn, late, questions)
	}
	for _, q := range questions {
		rows, err := t.query(ctx, q.text, q.args...)
		if err != nil {
			return q.failed(err)
		}
		err = cmp.Or(q.read(rows), rows.Err())
		if err := cmp.Or(err, rows.Close()); err != nil {
			return q.failed(err)
		}
	}
	return nil
}

// begin begins the transaction, at once or with its first statement.
func (t *tx) begin(ctx context.Context) (err error) {
	if t.d.begin != "" {
		t.q, t.late = t.conn, []statement{{text: t.d.begin}}
		return nil
	}
	t.sqltx, err = t.conn.BeginTx(ctx, nil)
	t.q = t.sqltx
	return err
}

// commit commits. If it fails, lost says whether COMMIT was on its way: then
// nothing is known of what became of the transaction but what the error says.
func (t *tx) commit(ctx context.Context) (lost bool, err error) {
	if t.sqltx == nil {
		t.late = append(t.late, statement{text: "COMMIT"})
		return true, t.flush(ctx)
	}
	if err := t.flush(ctx); err != nil {
		return false, err
	}
	return true, t.sqltx.Commit()
}

// rollback ends a transaction that is not to be committed, whatever ended it.
func (t *tx) rollback(ctx context.Context) error {
	t.late = nil
	if t.sqltx != nil {
		return t.sqltx.Rollback()
	}
	if !t.begun {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deviceTimeout)
	defer cancel()
	_, err := t.conn.ExecContext(ctx, "ROLLBACK")
	return err
}

// exec runs a statement and returns how many rows it matched (on every
// engine, changed or not). For an upsert the number differs between engines.
func (t *tx) exec(ctx context.Context, q string, args ...any) (int64, error) {
	if err := t.flush(ctx); err != nil {
		return 0, err
	}
	t.sent.Add(1)
	q, args = t.d.rebind(q), values(args)
	var res sql.Result
	var err error
	if stmt := t.stmt(ctx, q); stmt != nil {
		res, err = stmt.ExecContext(ctx, args...)
	} else {
		res, err = t.q.ExecContext(ctx, q, args...)
	}
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// query runs a statement that returns rows. The caller closes them and looks
// at Err.
func (t *tx) query(ctx context.Context, q string, args ...any) (*sql.Rows, error) {
	if err := t.flush(ctx); err != nil {
		return nil, err
	}
	t.sent.Add(1)
	q, args = t.d.rebind(q), values(args)
	if stmt := t.stmt(ctx, q); stmt != nil {
		return stmt.QueryContext(ctx, args...)
	}
	return t.q.QueryContext(ctx, q, args...)
}

// queryRow runs a statement that returns at most one row; Scan reports
// sql.ErrNoRows if none.
func (t *tx) queryRow(ctx context.Context, q string, args ...any) row {
	rows, err := t.query(ctx, q, args...)
	return row{rows, err}
}

// row is the first of some rows; it must be scanned.
type row struct {
	rows *sql.Rows
	err  error
}

// Scan reads the row, and ends the statement.
func (r row) Scan(into ...any) error {
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

// text runs a statement without arguments as it is.
func (t *tx) text(ctx context.Context, q string) error {
	if err := t.flush(ctx); err != nil {
		return err
	}
	_, err := t.q.ExecContext(ctx, q)
	return err
}

// stmt returns q prepared, or nil if it is to be run as text.
func (t *tx) stmt(ctx context.Context, q string) *sql.Stmt {
	if t.stmts == nil || !t.d.prepare(q) {
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

// values makes arguments mean the same to each driver.
func values(args []any) []any {
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

// write runs fn in one transaction and commits it. What the engine calls
// retryable is retried from the beginning, with a bound and with jitter, so
// fn must set what it computes, not add to it. Rows are to be locked in key
// order. A commit that fails is an error; it is repeated only if the engine
// said that it rolled back.
func (s *Store) write(ctx context.Context, fn func(ctx context.Context, t *tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return s.retry(ctx, func() (bool, error) { return s.attempt(ctx, fn) })
}

// read runs fn outside a transaction: each statement sees what was committed
// when it began, so reads that must agree belong in one statement. It retries
// as write does.
func (s *Store) read(ctx context.Context, fn func(ctx context.Context, t *tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, opTimeout)
	defer cancel()
	return s.retry(ctx, func() (bool, error) {
		t := &tx{d: s.d, now: micros(s.now()), seal: s.seal, sent: &s.sent, q: s.rdb, stmts: s.rstmts}
		err := fn(ctx, t)
		return s.d.retryable(err) || s.d.unavailable(err), err
	})
}

// retry repeats try while it says that this is worth it.
func (s *Store) retry(ctx context.Context, try func() (again bool, err error)) error {
	pause := firstPause
	for attempt := 1; ; attempt++ {
		again, err := try()
		if err == nil {
			return nil
		}
		if s.closed.Load() {
			return storage.ErrClosed
		}
		if !again || attempt == maxAttempts || ctx.Err() != nil {
			return s.classify(err)
		}
		s.retries.Add(1)
		s.log.DebugContext(ctx, "repeating a transaction", "attempt", attempt, "error", err)
		timer := time.NewTimer(rand.N(pause) + pause/8)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return s.classify(err)
		}
		pause *= 2
	}
}

// inTime bounds a batch of devices' messages, and tells its size.
func inTime(tell func(messages int), run func(context.Context, []*pending) error) func(context.Context, []*pending) error {
	return func(ctx context.Context, batch []*pending) error {
		if tell != nil {
			tell(len(batch))
		}
		ctx, cancel := context.WithTimeout(ctx, deviceTimeout)
		defer cancel()
		return run(ctx, batch)
	}
}

// classify marks errors that callers tell apart from broken statements: the
// database is away, or too busy to ever get a turn.
func (s *Store) classify(err error) error {
	switch {
	case errors.Is(err, storage.ErrUnavailable), errors.Is(err, storage.ErrBusy), errors.Is(err, context.Canceled):
		return err
	case s.d.unavailable(err), errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
	case s.d.retryable(err):
		return fmt.Errorf("%w: %w", storage.ErrBusy, err)
	}
	return err
}

// attempt runs fn in a transaction once. It works on a connection of its own,
// which is thrown away if the transaction's end failed: a connection that is
// still inside a transaction must not go back to the pool.
func (s *Store) attempt(ctx context.Context, fn func(ctx context.Context, t *tx) error) (again bool, err error) {
	conn, err := s.db.Conn(ctx)
	if err != nil {
		return s.d.retryable(err) || s.d.unavailable(err), err
	}
	defer conn.Close()
	t := &tx{d: s.d, now: micros(s.now()), seal: s.seal, sent: &s.sent, conn: conn, stmts: s.stmts}
	if err := t.begin(ctx); err != nil {
		discard(conn)
		return s.d.retryable(err) || s.d.unavailable(err), err
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
		if rerr := t.rollback(ctx); rerr != nil {
			discard(conn)
		}
		return s.d.retryable(err) || s.d.unavailable(err), err
	}
	if lost, err := t.commit(ctx); err != nil {
		if rerr := t.rollback(ctx); rerr != nil { // sql.Tx has no end after a commit that failed
			discard(conn)
		}
		// A connection that was lost during COMMIT leaves open whether it
		// took effect; only an engine's word that it rolled back does not.
		return s.d.retryable(err) || !lost && s.d.unavailable(err), fmt.Errorf("committing: %w", err)
	}
	conn.Close()
	for _, q := range t.missed {
		s.stmts.prepare(ctx, q)
	}
	return false, nil
}

// discard takes a connection out of its pool.
func discard(conn *sql.Conn) {
	_ = conn.Raw(func(any) error { return driver.ErrBadConn })
}

// stmtCache keeps statements of one pool prepared, by text. A nil cache
// prepares nothing.
type stmtCache struct {
	db *sql.DB

	mu     sync.RWMutex
	byText map[string]*sql.Stmt
}

// maxStmts bounds the cache; texts differ by the number of their arguments.
const maxStmts = 512

func newStmtCache(db *sql.DB) *stmtCache {
	return &stmtCache{db: db, byText: make(map[string]*sql.Stmt)}
}

func (c *stmtCache) get(q string) *sql.Stmt {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return c.byText[q]
}

// prepare returns q prepared, or nil if it cannot be or the cache is full;
// running the text then shows the error.
func (c *stmtCache) prepare(ctx context.Context, q string) *sql.Stmt {
	if stmt := c.get(q); stmt != nil {
		return stmt
	}
	c.mu.RLock()
	full := len(c.byText) >= maxStmts
	c.mu.RUnlock()
	if full {
		return nil
	}
	stmt, err := c.db.PrepareContext(ctx, q)
	if err != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if was := c.byText[q]; was != nil {
		stmt.Close()
		return was
	}
	c.byText[q] = stmt
	return stmt
}

func (c *stmtCache) close() {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, stmt := range c.byText {
		stmt.Close()
	}
	clear(c.byText)
}
