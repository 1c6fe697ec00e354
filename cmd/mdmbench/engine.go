package main

import (
	"context"
	"crypto/rand"
	"database/sql"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/go-sql-driver/mysql"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver pgx
)

// engine is a kind of database to measure with.
type engine struct {
	name, label string
	storage     string // the daemon's -storage
	driver      string // of database/sql; empty needs no server
	variable    string // holds the server's DSN
}

func engines() []engine {
	return []engine{
		{"pgsql", "PostgreSQL", "pgsql", "pgx", "NANOMDM_PGSQL_STORAGE_TEST_DSN"},
		{"mariadb", "MariaDB", "mysql", "mysql", "NANOMDM_MARIADB_STORAGE_TEST_DSN"},
		{"mysql", "MySQL", "mysql", "mysql", "NANOMDM_MYSQL_STORAGE_TEST_DSN"},
		{"sqlite", "SQLite", "sqlite", "", ""},
	}
}

func (e engine) present() bool { return e.variable == "" || os.Getenv(e.variable) != "" }

// database is an empty database of our own.
type database struct {
	engine
	dsn  string
	name string
	db   *sql.DB // of the server; nil for SQLite
	pid  int     // of the server, 0 if it is not on this machine
	note string  // the server's version and durability
}

func (e engine) create(ctx context.Context, dir string) (*database, error) {
	d := &database{engine: e, name: "nanomdm_bench_" + strings.ToLower(rand.Text())}
	if e.driver == "" {
		d.dsn, d.note = filepath.Join(dir, d.name+".db"), "in a file, as the daemon opens it"
		return d, nil
	}
	server := os.Getenv(e.variable)
	var host string
	if e.driver == "pgx" {
		u, err := url.Parse(server)
		if err != nil {
			return nil, fmt.Errorf("%s is no URL", e.variable)
		}
		host = u.Host
		u.Path = "/" + d.name
		d.dsn = u.String()
	} else {
		cfg, err := mysql.ParseDSN(server)
		if err != nil {
			return nil, fmt.Errorf("%s is no data source name", e.variable)
		}
		host = cfg.Addr
		cfg.DBName = d.name
		d.dsn = cfg.FormatDSN()
	}
	var err error
	if d.db, err = sql.Open(e.driver, server); err != nil {
		return nil, err
	}
	if _, err := d.db.ExecContext(ctx, "CREATE DATABASE "+d.name); err != nil {
		d.db.Close()
		return nil, err
	}
	if _, port, err := net.SplitHostPort(host); err == nil {
		if n, err := strconv.Atoi(port); err == nil {
			d.pid = listenerPID(n)
		}
	}
	d.note, err = d.describe(ctx)
	return d, err
}

func (d *database) describe(ctx context.Context) (string, error) {
	query := `SELECT CONCAT(VERSION(), ', innodb_flush_log_at_trx_commit = ', @@innodb_flush_log_at_trx_commit)`
	if d.driver == "pgx" {
		query = `SELECT current_setting('server_version') || ', fsync = ' || current_setting('fsync')
			|| ', synchronous_commit = ' || current_setting('synchronous_commit')`
	}
	var note string
	err := d.db.QueryRowContext(ctx, query).Scan(&note)
	return note, err
}

// drop removes the database; the context of the run may have ended.
func (d *database) drop() error {
	if d.db == nil {
		return nil // goes with its directory
	}
	defer d.db.Close()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	statement := "DROP DATABASE " + d.name
	if d.driver == "pgx" {
		statement += " WITH (FORCE)"
	}
	_, err := d.db.ExecContext(ctx, statement)
	return err
}

// commits is the database's own count of transactions that wrote, of all its
// clients. known is false if it keeps none.
func (d *database) commits(ctx context.Context) (n float64, known bool, err error) {
	switch {
	case d.db == nil:
		return 0, false, nil
	case d.driver == "pgx":
		// Transactions get a number when they first write.
		err = d.db.QueryRowContext(ctx, "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint").Scan(&n)
		return n, true, err
	}
	var name string
	err = d.db.QueryRowContext(ctx, "SHOW GLOBAL STATUS LIKE 'Com_commit'").Scan(&name, &n)
	return n, true, err
}

func (d *database) cpu() (time.Duration, error) {
	if d.pid == 0 {
		return 0, nil
	}
	return treeCPU(d.pid)
}
