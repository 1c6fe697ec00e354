// Package storagetest is the conformance suite of the store: subtests that run
// on every engine, each on an empty database of its own. It also provides such
// databases to the tests of other packages.
//
// SQLite needs no server. storage/engines/with-engines.sh starts the other
// engines, or NANOMDM_PGSQL_STORAGE_TEST_DSN, NANOMDM_MYSQL_STORAGE_TEST_DSN
// and NANOMDM_MARIADB_STORAGE_TEST_DSN name servers; their user must be allowed
// to create databases. Without its variable an engine's tests are skipped, and
// fail if CI=true.
package storagetest

import (
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver pgx
	"github.com/stretchr/testify/require"
	_ "modernc.org/sqlite" // the driver sqlite

	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// Engine is a kind of database to test with.
type Engine struct {
	// Name is sqlite, memory, pgsql, mysql or mariadb.
	Name string

	driver   string // sqlstore.Config.Driver
	variable string // holds the server's DSN; empty needs no server
	dsn      string // of the server
	via      string // the address of a pooler that stores connect to; empty is the server's own

	// A migration takes MySQL a second or two, so a database is used again once
	// it has been emptied and checked.
	mu   sync.Mutex
	idle []string
}

// Engines returns SQLite in a file, PostgreSQL, MySQL and MariaDB. Their
// databases are removed when t ends. Use it so:
//
//	for _, engine := range storagetest.Engines(t) {
//		t.Run(engine.Name, func(t testing.TB) {
//			store, err := sqlstore.Open(t.Context(), engine.Config(t))
//			...
func Engines(t testing.TB) []*Engine {
	engines := []*Engine{
		{Name: "sqlite", driver: "sqlite"},
		{Name: "pgsql", driver: "pgsql", variable: "NANOMDM_PGSQL_STORAGE_TEST_DSN"},
		{Name: "mysql", driver: "mysql", variable: "NANOMDM_MYSQL_STORAGE_TEST_DSN"},
		{Name: "mariadb", driver: "mysql", variable: "NANOMDM_MARIADB_STORAGE_TEST_DSN"},
	}
	for _, e := range engines {
		e.dsn = os.Getenv(e.variable)
		t.Cleanup(func() {
			for _, name := range e.idle {
				e.drop(t, name)
			}
		})
	}
	return engines
}

// memory is SQLite without a file, which has no second store and no other
// connection.
func memory() *Engine { return &Engine{Name: "memory", driver: "sqlite"} }

// Config returns the Driver and DSN of an empty database of this test. It has
// the schema, or gets it from sqlstore.Open. Close every store and connection
// to it before the test ends (cleanups that are registered after this call are
// in time).
func (e *Engine) Config(t testing.TB) sqlstore.Config {
	t.Helper()
	switch {
	case e.Name == "memory":
		return sqlstore.Config{Driver: e.driver, DSN: ":memory:"}
	case e.variable == "":
		return e.Unmigrated(t)
	}
	e.need(t)
	e.mu.Lock()
	name := ""
	if n := len(e.idle); n > 0 {
		name, e.idle = e.idle[n-1], e.idle[:n-1]
	}
	e.mu.Unlock()
	if name == "" {
		name = e.create(t)
	}
	direct := sqlstore.Config{Driver: e.driver, DSN: e.dsnOf(t, name)}
	cfg := sqlstore.Config{Driver: e.driver, DSN: e.through(t, direct.DSN)}
	t.Cleanup(func() {
		if t.Failed() || !e.empty(t, direct) {
			e.drop(t, name)
			return
		}
		e.mu.Lock()
		e.idle = append(e.idle, name)
		e.mu.Unlock()
	})
	return cfg
}

// Unmigrated is Config for a new database without tables.
func (e *Engine) Unmigrated(t testing.TB) sqlstore.Config {
	t.Helper()
	switch {
	case e.Name == "memory":
		return e.Config(t)
	case e.variable == "":
		return sqlstore.Config{Driver: e.driver, DSN: filepath.Join(t.TempDir(), "nanomdm.db")}
	}
	e.need(t)
	name := e.create(t)
	t.Cleanup(func() { e.drop(t, name) })
	return sqlstore.Config{Driver: e.driver, DSN: e.dsnOf(t, name)}
}

// need skips the test if its server is missing.
func (e *Engine) need(t testing.TB) {
	t.Helper()
	switch {
	case e.variable == "" || e.dsn != "":
	case os.Getenv("CI") == "true":
		t.Fatalf("%s is not set: in CI every engine is tested", e.variable)
	default:
		t.Skipf("no %s: set %s, or run storage/engines/with-engines.sh go test ./...", e.Name, e.variable)
	}
}

func (e *Engine) create(t testing.TB) string {
	t.Helper()
	name := "nanomdm_test_" + strings.ToLower(rand.Text())
	e.admin(t, "CREATE DATABASE "+name)
	return name
}

func (e *Engine) drop(t testing.TB, name string) {
	statement := "DROP DATABASE " + name
	if e.driver == "pgsql" {
		statement += " WITH (FORCE)"
	}
	e.admin(t, statement)
}

// admin runs a statement on the server's own database.
func (e *Engine) admin(t testing.TB, statement string) {
	t.Helper()
	db := connect(t, sqlstore.Config{Driver: e.driver, DSN: e.dsn})
	defer db.Close()
	_, err := db.ExecContext(context.Background(), statement)
	require.NoError(t, err)
}

// dsnOf returns the server's DSN with another database.
func (e *Engine) dsnOf(t testing.TB, name string) string {
	t.Helper()
	if e.driver == "mysql" {
		mc, err := mysql.ParseDSN(e.dsn)
		require.NoError(t, err)
		mc.DBName = name
		return mc.FormatDSN()
	}
	if u, err := url.Parse(e.dsn); err == nil && u.Scheme != "" {
		u.Path = "/" + name
		return u.String()
	}
	return e.dsn + " dbname=" + name
}

// through returns a DSN by way of the pooler, if there is one.
func (e *Engine) through(t testing.TB, dsn string) string {
	if e.via == "" {
		return dsn
	}
	u, err := url.Parse(dsn)
	require.NoError(t, err)
	u.Host = e.via
	return u.String()
}

// empty removes every row, and says whether the database is then as after a
// migration.
func (e *Engine) empty(t testing.TB, cfg sqlstore.Config) bool {
	db := connect(t, cfg)
	defer db.Close()
	query := "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE()"
	if e.driver == "pgsql" {
		query = "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()"
	}
	tables := column(t, db, query)
	if !slices.Contains(tables, "nano_schema") {
		return false // without tables
	}
	for _, table := range tables {
		if table == "nano_schema" || table == "nano_migrations" {
			continue
		}
		_, err := db.ExecContext(context.Background(), "DELETE FROM "+table)
		require.NoError(t, err)
		require.Equal(t, []string{"0"}, column(t, db, "SELECT COUNT(*) FROM "+table), table)
	}
	return true
}

// column returns the first column of a query's rows.
func column(t testing.TB, db *sql.DB, query string) (values []string) {
	rows, err := db.QueryContext(context.Background(), query)
	require.NoError(t, err)
	defer rows.Close()
	for rows.Next() {
		var value string
		require.NoError(t, rows.Scan(&value))
		values = append(values, value)
	}
	require.NoError(t, rows.Err())
	return values
}

// connect opens a connection that does not go through sqlstore.
func connect(t testing.TB, cfg sqlstore.Config) *sql.DB {
	t.Helper()
	driver, dsn := cfg.Driver, cfg.DSN
	switch cfg.Driver {
	case "sqlite":
		dsn = fmt.Sprintf("file:%s?_pragma=busy_timeout(10000)&_txlock=immediate", (&url.URL{Path: cfg.DSN}).EscapedPath())
	case "pgsql":
		driver = "pgx"
		// No statement stays prepared, since there may be a pooler.
		if u, err := url.Parse(dsn); err == nil && u.Scheme != "" {
			q := u.Query()
			q.Set("default_query_exec_mode", "cache_describe")
			u.RawQuery = q.Encode()
			dsn = u.String()
		}
	}
	db, err := sql.Open(driver, dsn)
	require.NoError(t, err)
	db.SetMaxOpenConns(1)
	db.SetConnMaxIdleTime(time.Minute)
	return db
}
