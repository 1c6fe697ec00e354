package sqldb

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

// pgsqlOldest is the oldest server_version_num that is served.
const pgsqlOldest = 130000

const dialTimeout = 10 * time.Second

// lockTimeout bounds one wait for a lock. It is below the time that a batch of
// devices' messages has.
const lockTimeout = 4 * time.Second

func openPgSQL(ctx context.Context, cfg Config) (*pools, error) {
	pc, err := parsePgSQL(cfg.DSN)
	if err != nil {
		return nil, err
	}
	dropParams(pc, cfg.Logger)
	if err := trustPgSQL(pc, cfg.RootCAs); err != nil {
		return nil, err
	}
	if pc.ConnectTimeout == 0 {
		pc.ConnectTimeout = dialTimeout
	}
	noteUnreplicated(pc)
	preparing := &pgsqlPreparing{log: cfg.Logger}
	db := stdlib.OpenDB(*pc, append(preparing.options(), stdlib.OptionAfterConnect(pgsqlSession(pc)))...)
	sizePool(db, cfg)
	err = checkPgSQL(ctx, cfg, db)
	if preparedLost(err) {
		preparing.observe(err)
		err = checkPgSQL(ctx, cfg, db)
	}
	if err != nil {
		db.Close()
		return nil, err
	}
	d := pgsqlDialect()
	d.observe = preparing.observe
	return &pools{dialect: d, write: db, read: db}, nil
}

// pgsqlTimeouts end what a process that was stopped leaves behind: a
// transaction with its locks, and a wait for such locks.
var pgsqlTimeouts = [...][2]string{
	{"idle_in_transaction_session_timeout", "5s"},
	{"lock_timeout", lockTimeout.String()},
}

// pgsqlSession sets pgsqlTimeouts on a new connection, but for those that the
// data source name sets. It sends SET and no startup parameters, which poolers
// refuse. A server that refuses SET is served without.
func pgsqlSession(pc *pgx.ConnConfig) func(context.Context, *pgx.Conn) error {
	var text strings.Builder
	for _, setting := range pgsqlTimeouts {
		_, given := pc.RuntimeParams[setting[0]]
		if !given && !strings.Contains(pc.RuntimeParams["options"], setting[0]) {
			fmt.Fprintf(&text, "SET %s = '%s';", setting[0], setting[1])
		}
	}
	return func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, text.String(), pgx.QueryExecModeSimpleProtocol)
		if pgCode(err) != "" {
			return nil
		}
		return err
	}
}

// sizePool applies the configured bounds to the pool of a server's
// connections.
func sizePool(db *sql.DB, cfg Config) {
	db.SetMaxOpenConns(cfg.MaxOpenConns)
	db.SetMaxIdleConns(cfg.MaxOpenConns)
	db.SetConnMaxLifetime(cfg.ConnMaxLifetime)
	db.SetConnMaxIdleTime(cfg.ConnMaxIdleTime)
}

func checkPgSQL(ctx context.Context, cfg Config, db *sql.DB) error {
	var version int
	var encoding, durable, readOnly string
	var standby bool
	err := db.QueryRowContext(ctx, `SELECT current_setting('server_version_num')::int, current_setting('server_encoding'),
		current_setting('synchronous_commit'), current_setting('default_transaction_read_only'), pg_is_in_recovery()`).
		Scan(&version, &encoding, &durable, &readOnly, &standby)
	switch {
	case err != nil:
		return fmt.Errorf("connecting: %w", err)
	case standby:
		return fmt.Errorf("%w: the server is a standby, which takes no writes: name all servers in -storage-dsn, with target_session_attrs=read-write", ErrUnavailable)
	case readOnly == "on":
		return fmt.Errorf("%w: the server takes no writes, default_transaction_read_only is on for this database or role: turn it off with ALTER DATABASE or ALTER ROLE", ErrUnavailable)
	}
	if version < pgsqlOldest {
		return fmt.Errorf("PostgreSQL %d is too old, %d is the oldest that is served", version/10000, pgsqlOldest/10000)
	}
	if encoding != "UTF8" {
		return fmt.Errorf("the database's encoding is %s, it must be UTF8", encoding)
	}
	if durable == "off" {
		cfg.Logger.WarnContext(ctx, "PostgreSQL's synchronous_commit is off: what was acknowledged to devices can be lost in a crash")
	}
	return nil
}

func pgsqlDialect() *Dialect {
	return &Dialect{
		// A backup may wait for where it is written to.
		snapshot: []string{"SET idle_in_transaction_session_timeout = 0", "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"},
		name:     "pgsql",
		numbered: true,
		// A server's default may be stricter, at the price of retries.
		begin:          "BEGIN ISOLATION LEVEL READ COMMITTED",
		execBatch:      pgsqlExecBatch,
		queryBatch:     pgsqlQueryBatch,
		batchCounts:    true,
		forUpdate:      " FOR UPDATE",
		skipLocked:     " SKIP LOCKED",
		forShare:       " FOR SHARE",
		greatest:       "GREATEST",
		maxArgs:        60000, // the protocol's limit is 65535
		parallelReads:  1,
		parallelWrites: 1,
		parallelBulk:   2,

		arrays:         true,
		intPlaceholder: "CAST(? AS BIGINT)",
		arrayColumns: `SELECT table_name || '.' || column_name, CASE data_type WHEN 'bytea' THEN 'bytea[]'
WHEN 'bigint' THEN 'bigint[]' WHEN 'smallint' THEN 'bigint[]' ELSE 'text[]' END
FROM information_schema.columns WHERE table_schema = current_schema()`,
		// A statement is planned anew each time while that looks cheaper than a
		// plan for any values, as it does for arrays of less than ten, and
		// planning costs far more than reading so few rows.
		opaque: func(value string) string { return "(SELECT " + value + ")" },
		pairTable: func(id, item string) string {
			return "unnest((SELECT ?::text[]), (SELECT ?::text[])) AS r (" + id + ", " + item + ")"
		},
		pairArgs: arrayPairs,
		// The offset keeps the planner from a hash join.
		lookup: func(left bool, table, alias, on string) string {
			join := " JOIN"
			if left {
				join = " LEFT JOIN"
			}
			return join + " LATERAL (SELECT * FROM " + table + " " + alias + " WHERE " + on + " OFFSET 0) " + alias + " ON true"
		},

		conflict: onConflict,
		proposed: excluded,

		unique:         func(err error) bool { return pgCode(err) == "23505" },
		readOnly:       func(err error) bool { return pgCode(err) == "25006" },
		remedy:         pgsqlRemedy,
		retryable:      pgsqlRetryable,
		unavailable:    pgsqlUnavailable,
		fromEngine:     func(err error) bool { return pgCode(err) != "" },
		statementFault: pgsqlStatementFault,

		words: map[string]string{
			"id":            `VARCHAR(255) COLLATE "C"`,
			"text":          "TEXT",
			"blob":          "BYTEA",
			"table":         "",
			"room":          "WITH (fillfactor = 50)",
			"if_not_exists": "IF NOT EXISTS",
			"where":         "WHERE",
			"pgsql":         "",
		},
		// Two replicas may still create the same thing at once, before there
		// is a lease to take: 42P07 duplicate_table, 42710 duplicate_object for
		// its row type, 23505 in the catalog. 42701 is duplicate_column.
		repeated: func(err error) bool {
			switch pgCode(err) {
			case "42P07", "42710", "42701", "23505":
				return true
			}
			return false
		},
		clock:  "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT)",
		tables: "SELECT table_name FROM information_schema.tables WHERE table_schema = current_schema()",
	}
}

func pgsqlRetryable(err error) bool {
	switch pgCode(err) {
	case "40001", // serialization_failure
		"40P01", // deadlock_detected
		"55P03", // lock_not_available
		"25006": // read_only_sql_transaction: a former primary
		return true
	}
	return preparedLost(err) || pgconn.SafeToRetry(err)
}

func pgsqlUnavailable(err error) bool {
	code := pgCode(err)
	switch {
	case code == "":
		var connect *pgconn.ConnectError
		return errors.As(err, &connect) || lostConnection(err)
	case code[:2] == "08": // connection exceptions
		return true
	}
	switch code {
	case "57P01", "57P02", "57P03", // shutting down, crashed, starting
		"25P03", // idle_in_transaction_session_timeout: the connection is gone
		"53300": // too_many_connections
		return true
	}
	return false
}

func pgsqlStatementFault(err error) bool {
	code := pgCode(err)
	switch code[:2] {
	case "0A", // feature_not_supported
		"21", // cardinality_violation
		"22", // data exceptions: too long, out of range, not UTF-8
		"23", // integrity constraints
		"42", // syntax, names, privileges
		"54": // program limits: too many columns, too complex
		return !preparedLost(err)
	}
	return false
}

// errUnreplicated is the outcome of a COMMIT that stopped waiting for the
// synchronous standby, for instance at a statement_timeout. PostgreSQL reports
// it as a success, with a warning, but a failover loses the transaction.
var errUnreplicated = fmt.Errorf("%w: the transaction is committed, but no synchronous standby has confirmed it", ErrUnavailable)

// unreplicatedKey is where a connection keeps that it got that warning.
const unreplicatedKey = "unreplicated"

// noteUnreplicated makes connections remember the warning. It has no code of
// its own and its text is translated, so the server's routine tells it.
func noteUnreplicated(pc *pgx.ConnConfig) {
	pc.OnNotice = func(conn *pgconn.PgConn, n *pgconn.Notice) {
		if n.Routine == "SyncRepWaitForLSN" {
			conn.CustomData()[unreplicatedKey] = true
		}
	}
}

// unreplicated is errUnreplicated if the connection got the warning since it
// was last called.
func unreplicated(conn *pgconn.PgConn) error {
	if _, warned := conn.CustomData()[unreplicatedKey]; !warned {
		return nil
	}
	delete(conn.CustomData(), unreplicatedKey)
	return errUnreplicated
}

// pgsqlExecBatch sends all statements before it reads the first outcome.
func pgsqlExecBatch(ctx context.Context, conn *sql.Conn, deferred []statement) error {
	return pgsqlQueryBatch(ctx, conn, deferred, nil)
}

// pgsqlQueryBatch sends all statements and queries before it reads the first outcome.
func pgsqlQueryBatch(ctx context.Context, conn *sql.Conn, deferred []statement, queries []BatchQuery) error {
	return conn.Raw(func(dc any) (err error) {
		var b pgx.Batch
		for _, s := range deferred {
			b.Queue(s.text, s.args...)
		}
		for _, q := range queries {
			b.Queue(q.Text, q.Args...)
		}
		results := dc.(*stdlib.Conn).Conn().SendBatch(ctx, &b)
		defer func() { err = cmp.Or(err, results.Close(), unreplicated(dc.(*stdlib.Conn).Conn().PgConn())) }()
		for _, s := range deferred {
			tag, err := results.Exec()
			if err == nil && tag.String() == "ROLLBACK" {
				err = pgx.ErrTxCommitRollback // it had failed before
			}
			if err != nil {
				return fmt.Errorf("%s: %w", s.name(), err)
			}
			if s.rows != nil {
				*s.rows = int(tag.RowsAffected())
			}
		}
		for _, q := range queries {
			rows, err := results.Query()
			if err != nil {
				return q.failed(err)
			}
			for err == nil && rows.Next() {
				err = q.Read(pgsqlRow{rows})
			}
			rows.Close()
			if err := cmp.Or(err, rows.Err()); err != nil {
				return q.failed(err)
			}
		}
		return nil
	})
}

// pgsqlRow is a row of the driver itself.
type pgsqlRow struct{ pgx.Rows }

// Scan is that of database/sql, in that a number is also true or false.
func (r pgsqlRow) Scan(into ...any) error {
	for i, v := range into {
		if v, ok := v.(*bool); ok {
			into[i] = (*flag)(v)
		}
	}
	return r.Rows.Scan(into...)
}

// flag is a bool that is stored as a number.
type flag bool

// Scan implements sql.Scanner.
func (f *flag) Scan(value any) error {
	n, ok := value.(int64)
	*f = n != 0
	if !ok {
		return fmt.Errorf("%T is neither true nor false", value)
	}
	return nil
}

// preparedLost recognizes a pooler that gives each transaction another server
// connection: there, a prepared statement is unknown, or known already.
func preparedLost(err error) bool {
	code := pgCode(err)
	return code == "26000" || code == "42P05"
}

// pgsqlPreparing says how connections send statements: prepared on the server,
// or, behind a pooler that cannot keep those, unprepared.
type pgsqlPreparing struct {
	unprepared atomic.Bool
	log        *slog.Logger
}

// observe switches to unprepared statements, once.
func (p *pgsqlPreparing) observe(err error) {
	if preparedLost(err) && p.unprepared.CompareAndSwap(false, true) {
		p.log.Warn("the server connection changes between transactions, as behind PgBouncer in transaction mode: going on without prepared statements", "error", err)
	}
}

// options make each connection talk as was found out, and retire those that
// were made before.
func (p *pgsqlPreparing) options() []stdlib.OptionOpenDB {
	return []stdlib.OptionOpenDB{
		stdlib.OptionBeforeConnect(func(_ context.Context, pc *pgx.ConnConfig) error {
			if p.unprepared.Load() {
				pc.DefaultQueryExecMode = pgx.QueryExecModeCacheDescribe
			}
			return nil
		}),
		stdlib.OptionResetSession(func(_ context.Context, conn *pgx.Conn) error {
			if p.unprepared.Load() && conn.Config().DefaultQueryExecMode == pgx.QueryExecModeCacheStatement {
				return driver.ErrBadConn
			}
			return nil
		}),
	}
}

func pgCode(err error) string {
	var e *pgconn.PgError
	if errors.As(err, &e) && len(e.Code) == 5 {
		return e.Code
	}
	return ""
}
