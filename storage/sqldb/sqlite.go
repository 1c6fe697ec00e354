package sqldb

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"runtime"
	"slices"
	"strings"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/nanomdm/nanomdm/backoff"
)

// memory is the DSN of a database that lives as long as its Store.
const memory = ":memory:"

// sqlitePragmas are set on each connection, unless the DSN sets the same.
var sqlitePragmas = [...]string{
	"busy_timeout(10000)",
	"journal_mode(WAL)",
	"synchronous(FULL)", // 200 means committed, also after a power failure
	"foreign_keys(1)",
	"temp_store(MEMORY)",
	"cache_size(-2000)", // KiB, of each of about five; the system caches the file, too
	"journal_size_limit(67108864)",
}

// openSQLite opens a file with one connection that writes and several that
// read beside it. SQLite has one writer at a time anyway; waiting for it in
// Go is fair and costs nothing, waiting in SQLite is polling.
func openSQLite(ctx context.Context, cfg Config) (*pools, error) {
	d := sqliteDialect()
	name, options, _ := strings.Cut(cfg.DSN, "?")
	params, err := url.ParseQuery(options)
	if err != nil {
		return nil, errors.New("the parameters after ? cannot be read")
	}
	params["_pragma"] = withDefaults(params["_pragma"])
	if name == memory {
		return openMemory(ctx, d, params)
	}
	name = strings.TrimPrefix(name, "file:")
	if err := createPrivate(name); err != nil {
		return nil, err
	}
	write, err := sqlitePool(name, params, "immediate")
	if err != nil {
		return nil, err
	}
	write.SetMaxOpenConns(1)
	if err := checkSQLite(ctx, cfg, write); err != nil {
		write.Close()
		return nil, err
	}
	read, err := sqlitePool(name, params, "deferred")
	if err != nil {
		write.Close()
		return nil, err
	}
	readers := min(cfg.MaxOpenConns, max(4, runtime.GOMAXPROCS(0)))
	read.SetMaxOpenConns(readers)
	read.SetMaxIdleConns(readers)
	return &pools{dialect: d, write: write, read: read}, nil
}

// createPrivate makes a file that does not exist yet for its owner alone. SQLite
// gives the files beside it the same mode. Other failures are left to SQLite,
// which knows names that no file system does.
func createPrivate(name string) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil
	}
	return f.Close()
}

// SQLiteFile returns the path of the file that a data source name of SQLite's
// names, or "" for a database in memory.
func SQLiteFile(dsn string) string {
	name, _, _ := strings.Cut(dsn, "?")
	if name == memory {
		return ""
	}
	name = strings.TrimPrefix(name, "file:")
	if rest, ok := strings.CutPrefix(name, "//"); ok {
		return rest // file:///path: an empty host
	}
	return name
}

// withDefaults adds those of sqlitePragmas that are not given. The driver runs
// pragmas in the order of their text, so of two the later one need not win.
func withDefaults(given []string) []string {
	name := func(pragma string) string {
		name, _, _ := strings.Cut(pragma, "(")
		name, _, _ = strings.Cut(name, "=")
		return strings.ToLower(strings.TrimSpace(name))
	}
	all := slices.Clone(given)
	for _, pragma := range sqlitePragmas {
		same := func(other string) bool { return name(other) == name(pragma) }
		if !slices.ContainsFunc(given, same) {
			all = append(all, pragma)
		}
	}
	return all
}

// openMemory opens a database in memory with one connection for everything,
// as its readers and writers would only wait for each other. A second one
// keeps the database alive if the pool throws the first away.
func openMemory(ctx context.Context, d *Dialect, params url.Values) (*pools, error) {
	params.Set("vfs", "memdb")
	name := "/nanomdm-" + rand.Text() // the slash shares it inside the process
	db, err := sqlitePool(name, params, "immediate")
	if err != nil {
		return nil, err
	}
	db.SetMaxOpenConns(1)
	keep, err := sqlitePool(name, params, "deferred")
	if err != nil {
		db.Close()
		return nil, err
	}
	if err := keep.PingContext(ctx); err != nil {
		keep.Close()
		db.Close()
		return nil, err
	}
	d.release = keep.Close
	return &pools{dialect: d, write: db, read: db}, nil
}

func sqlitePool(name string, params url.Values, begin string) (*sql.DB, error) {
	q := make(url.Values, len(params)+1)
	for k, v := range params {
		q[k] = v
	}
	q.Set("_txlock", begin)
	path := (&url.URL{Path: name}).EscapedPath()
	connector, err := sqlite.NewConnector("file:" + path + "?" + q.Encode())
	if err != nil {
		return nil, err
	}
	return sql.OpenDB(connector), nil
}

// checkSQLite makes the first connection and looks whether the file system
// allows what was asked for. Of several that switch a new file to its
// write-ahead log at once all but one fail, since SQLite lets none of them
// wait for that.
func checkSQLite(ctx context.Context, cfg Config, db *sql.DB) error {
	var mode string
	err := db.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode)
	for busy := sqliteDialect().retryable; busy(err) && ctx.Err() == nil; {
		_ = backoff.Sleep(ctx, firstPause) // the loop looks at ctx
		err = db.QueryRowContext(ctx, "PRAGMA journal_mode").Scan(&mode)
	}
	if err != nil {
		return fmt.Errorf("opening the file: %w", err)
	}
	if mode != "wal" {
		cfg.Logger.WarnContext(ctx, "SQLite does not use its write-ahead log here; readers and writers will wait for each other", "journal_mode", mode)
	}
	return nil
}

func sqliteDialect() *Dialect {
	return &Dialect{
		snapshot:       []string{"BEGIN"},
		name:           "sqlite",
		prepare:        prepareAll,
		greatest:       "MAX",
		maxArgs:        30000, // the library's limit is 32766
		parallelReads:  4,     // readers need not wait for each other
		parallelWrites: 1,
		parallelBulk:   1,
		chunkInserts:   true,
		intPlaceholder: "?",
		pairTable: func(id, item string) string {
			return "(SELECT value ->> 0 AS " + id + ", value ->> 1 AS " + item + " FROM json_each(?)) r"
		},
		pairArgs: jsonPairs,
		lookup:   inOrder("CROSS JOIN"),

		conflict: onConflict,
		proposed: excluded,

		unique:         sqliteUnique,
		retryable:      sqliteRetryable,
		remedy:         sqliteRemedy,
		unavailable:    sqliteUnavailable,
		fromEngine:     func(err error) bool { return sqliteCode(err) != 0 },
		statementFault: sqliteStatementFault,

		words: map[string]string{
			"id":            "TEXT",
			"text":          "TEXT",
			"blob":          "BLOB",
			"table":         "",
			"room":          "",
			"if_not_exists": "IF NOT EXISTS",
			"where":         "WHERE",
			"pgsql":         "--",
		},
		// ALTER TABLE has no IF NOT EXISTS for columns, and the error no code of
		// its own.
		repeated: func(err error) bool {
			return sqliteCode(err) == sqlite3.SQLITE_ERROR && strings.Contains(err.Error(), "duplicate column name")
		},
		tables: "SELECT name FROM sqlite_master WHERE type = 'table'",
	}
}

func sqliteUnique(err error) bool {
	switch sqliteCode(err) {
	case sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY, sqlite3.SQLITE_CONSTRAINT_ROWID:
		return true
	}
	return false
}

func sqliteRetryable(err error) bool {
	code := sqliteCode(err) & 0xff
	return code == sqlite3.SQLITE_BUSY || code == sqlite3.SQLITE_LOCKED
}

func sqliteUnavailable(err error) bool {
	switch sqliteCode(err) & 0xff {
	case sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL:
		return true
	}
	return false
}

func sqliteStatementFault(err error) bool {
	switch sqliteCode(err) & 0xff {
	case sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_TOOBIG,
		sqlite3.SQLITE_RANGE, sqlite3.SQLITE_MISUSE:
		return true
	}
	return false
}

func sqliteCode(err error) int {
	var e *sqlite.Error
	if errors.As(err, &e) {
		return e.Code()
	}
	return 0
}
