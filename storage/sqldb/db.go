// Package sqldb opens SQLite, PostgreSQL, MySQL and MariaDB databases and runs
// statements on them that are written once, with ? for arguments.
//
// It holds connections, transactions with their retries, the statements'
// batches, the prepared statements, lists of arguments and the runner of
// migrations. It knows no table but those that its callers name. Everything
// that an engine does its own way is a field of its Dialect, one file for each
// engine; no other code asks which engine it talks to.
package sqldb

import (
	"context"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"
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
	// Now is the clock of transactions; time.Now if nil.
	Now func() time.Time
	// Logger takes warnings about the database; nothing is logged if nil.
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
	// RootCAs verifies a database server, whose connections then use TLS. If
	// nil, the DSN alone decides about TLS.
	RootCAs *x509.CertPool
}

const (
	defaultMaxOpenConns    = 24
	defaultConnMaxLifetime = 30 * time.Minute
	defaultConnMaxIdleTime = 3 * time.Minute

	// connectTimeout bounds the first conversation with a server.
	connectTimeout = 15 * time.Second
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrUnavailable: the database is out of reach, or did not answer in time.
	ErrUnavailable = errors.New("database unavailable")
	// ErrBusy: the transaction failed with retryable errors until the last
	// retry.
	ErrBusy = errors.New("too busy")
	// ErrClosed: the DB is closed.
	ErrClosed = errors.New("store is closed")
)

// DB is an open database. Every method may be called concurrently.
type DB struct {
	dialect    *Dialect
	write      *sql.DB // transactions; with SQLite its single writer
	read       *sql.DB // reads outside transactions; write itself but for SQLite
	writeStmts *stmtCache
	readStmts  *stmtCache
	prepared   map[string]bool  // texts that Prepare named
	machine    func() time.Time // Config.Now
	offset     atomic.Int64     // see ClockOffset
	log        *slog.Logger

	retries atomic.Int64
	sent    atomic.Int64 // statements
	closed  atomic.Bool
}

// Open connects to the database, checks that its version and settings can be
// worked with, and sets what correctness needs for its connections. The
// context bounds opening only. The error is ErrUnavailable if a database
// server is out of reach or not ready. Errors with a known cause say what an
// operator can do about it. Close must be called to release the DB.
func Open(ctx context.Context, cfg Config) (*DB, error) {
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
	if cfg.DSN == "" {
		return nil, errors.New("Config.DSN is empty")
	}
	p, err := connect(ctx, cfg)
	if err != nil {
		return nil, err
	}
	db := &DB{dialect: p.dialect, write: p.write, read: p.read, machine: cfg.Now, log: cfg.Logger}
	if db.dialect.prepare != prepareNone {
		db.writeStmts, db.readStmts = newStmtCache(p.write), newStmtCache(p.read)
	}
	return db, nil
}

// connect has the first conversation with the database.
func connect(ctx context.Context, cfg Config) (*pools, error) {
	e, known := engines[cfg.Driver]
	if !known {
		return nil, fmt.Errorf("Config.Driver %q is not sqlite, pgsql or mysql", cfg.Driver)
	}
	connectCtx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	p, err := e.open(connectCtx, cfg)
	err = withRemedy(err, e.remedy)
	if err != nil && e.server && ctx.Err() == nil && !untrusted(err) && (e.unavailable(err) || errors.Is(err, context.DeadlineExceeded)) {
		err = fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return p, err
}

// Prepare names texts that stay prepared on engines that gain by it. It
// belongs before the first statement.
func (db *DB) Prepare(texts ...string) {
	if db.prepared == nil {
		db.prepared = make(map[string]bool, len(texts))
	}
	for _, q := range texts {
		db.prepared[q] = true
	}
}

// Close waits for statements that are under way and releases the connections.
// Calls after it fail with ErrClosed.
func (db *DB) Close() error {
	db.closed.Store(true)
	db.writeStmts.close()
	db.readStmts.close()
	err := db.write.Close()
	if db.read != db.write {
		err = errors.Join(err, db.read.Close())
	}
	if db.dialect.release != nil {
		err = errors.Join(err, db.dialect.release())
	}
	return err
}

// Closed says whether Close was called.
func (db *DB) Closed() bool { return db.closed.Load() }

// Dialect is what the database's engine does its own way.
func (db *DB) Dialect() *Dialect { return db.dialect }

// Writer is the pool of connections that transactions run on.
func (db *DB) Writer() *sql.DB { return db.write }

// Statements counts the statements that were sent to the database.
func (db *DB) Statements() int64 { return db.sent.Load() }

// Retries counts the repetitions of whole transactions: deadlocks, lost
// connections, failovers.
func (db *DB) Retries() int64 { return db.retries.Load() }

// Pools returns the state of the connection pools: write, and with SQLite also
// read.
func (db *DB) Pools() map[string]sql.DBStats {
	pools := map[string]sql.DBStats{"write": db.write.Stats()}
	if db.read != db.write {
		pools["read"] = db.read.Stats()
	}
	return pools
}

// LimitConnections changes how many connections to a database server there are
// at most. SQLite's stay as they are.
func (db *DB) LimitConnections(n int) {
	if db.read != db.write {
		return
	}
	db.write.SetMaxOpenConns(n)
	db.write.SetMaxIdleConns(n)
}

// Parallel says how many batches of reads, batches of writes and transactions
// of one bulk call are best run at once. A single connection, as SQLite's
// writer has, gets one, since a second one would only wait there.
func (db *DB) Parallel() (reads, writes, bulk int) {
	readers, writers := db.read.Stats().MaxOpenConnections, db.write.Stats().MaxOpenConnections
	d := db.dialect
	return min(d.parallelReads, readers), min(d.parallelWrites, writers), min(d.parallelBulk, writers)
}
