package sqldb

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
)

// engine is one entry of the table of engines.
type engine struct {
	// open connects to the database and checks its version and settings.
	open func(ctx context.Context, cfg Config) (*pools, error)
	// server engines may answer later; a file that cannot be opened stays so.
	server bool
	// unavailable recognizes the errors of a server that is out of reach.
	unavailable func(error) bool
	// remedy says what an operator can do about an error; see Dialect.
	remedy func(error) string
}

// engines are those that Config.Driver names. A new engine is a file with a
// dialect and a function that opens it, and a line here.
var engines = map[string]engine{
	"sqlite": {open: openSQLite, remedy: sqliteRemedy},
	"pgsql":  {open: openPgSQL, server: true, unavailable: pgsqlDialect().unavailable, remedy: pgsqlRemedy},
	"mysql":  {open: openMySQL, server: true, unavailable: mysqlDialect().unavailable, remedy: mysqlRemedy},
}

// pools are the connections to one database.
type pools struct {
	dialect *Dialect
	write   *sql.DB
	read    *sql.DB // write itself where one pool does both
}

// preparing says which statements this package keeps prepared.
type preparing int

const (
	prepareNone  preparing = iota // the driver prepares, or sends arguments inside the text
	prepareNamed                  // those that DB.Prepare named
	prepareAll
)

// Dialect holds everything that an engine does its own way. Fields without a
// value mean that the engine needs nothing there.
type Dialect struct {
	// Sending statements.

	// name is sqlite, pgsql, mysql or mariadb, for messages and never for an if.
	name string
	// numbered rewrites the placeholders ? to $1, $2, ...
	numbered bool
	// prepare says which statements are kept prepared.
	prepare preparing
	// begin is sent with the first statement of each transaction, as COMMIT is
	// with the last; if it is empty, the driver begins and commits.
	begin string
	// snapshot begins a transaction that reads one state of the database.
	snapshot []string
	// execBatch runs statements in one round trip, in order, up to the first
	// that fails; nil if there are no round trips to save.
	execBatch func(ctx context.Context, conn *sql.Conn, deferred []statement) error
	// batchCounts: execBatch stores the number of rows that statements returned.
	batchCounts bool
	// queryBatch is execBatch followed by queries; nil if it would save little.
	queryBatch func(ctx context.Context, conn *sql.Conn, deferred []statement, queries []BatchQuery) error

	// Errors.

	// unique: a row of that key exists.
	unique func(error) bool
	// readOnly: the server of this connection takes no writes. Another connection
	// may reach one that does.
	readOnly func(error) bool
	// remedy says what an operator can do about an error; empty if that is not
	// known.
	remedy func(error) string
	// retryable: the engine rolled the transaction back or never began it, and
	// repeating it may work.
	retryable func(error) bool
	// unavailable: the server is out of reach or going away, so that the
	// outcome of a commit under way is not known.
	unavailable func(error) bool
	// statementFault: the engine refuses this statement with these arguments,
	// so that repeating it fails again. Any other error of the engine (a full
	// disk, no memory, a standby) is the server's state.
	statementFault func(error) bool
	// fromEngine: the error is the engine's or its driver's.
	fromEngine func(error) bool
	// observe gets the error of each failed attempt, so that an engine can
	// change its protocol; nil if it never does.
	observe func(error)

	// Locks and plans.

	// forUpdate ends a SELECT that locks its rows for a change.
	forUpdate string
	// skipLocked follows forUpdate in a SELECT that leaves out the rows that
	// another transaction has locked.
	skipLocked string
	// forShare ends a SELECT that keeps its rows from being changed.
	forShare string
	// forceIndex follows a table's name and names the index to use; nil if the
	// planner chooses the right one.
	forceIndex func(index string) string
	// opaque hides a value from the planner, so that one plan serves all
	// values; nil where that changes nothing.
	opaque func(value string) string
	// lookup joins the rows of a table that fit, or with left perhaps none, by
	// an index, even where the planner would read the whole table.
	lookup func(left bool, table, alias, on string) string
	// parallelReads, parallelWrites and parallelBulk are how many batches of
	// reads, batches of writes and transactions of one bulk call run at once.
	// Fewer make larger batches, which cost less.
	parallelReads, parallelWrites, parallelBulk int

	// Arguments and lists.

	// prepareFrom is the size of the arguments, in bytes, from which on a statement
	// is prepared for one execution, since the driver would copy them several times
	// to put them into its text; 0 is never.
	prepareFrom int
	// maxArgs is how many arguments a statement may have, with some room.
	maxArgs int
	// chunkInserts inserts rows by statements of a few sizes, which can stay
	// prepared.
	chunkInserts bool
	// intPlaceholder is the placeholder of an integer in a SELECT list.
	intPlaceholder string
	// pairTable is the derived table r of two named columns of key pairs.
	pairTable func(id, item string) string
	// pairArgs are the arguments of pairTable.
	pairArgs func(pairs []KeyPair) ([]any, error)
	// arrays: a list of values is one argument, an array, and so is each column
	// of rows to insert, so that a statement has one text and one plan whatever
	// their number.
	arrays bool
	// arrayColumns is the query that reads the array type of each column.
	arrayColumns string
	// arrayTypes are the array types by table.column, read after migrating.
	arrayTypes map[string]string

	// Words.

	// greatest is the function that returns the largest of its arguments.
	greatest string
	// conflict writes the end of an upsert, behind VALUES (...).
	conflict func(columns []string, set string) string
	// values stands between VALUES (...) and conflict.
	values string
	// proposed names a column of the row that an upsert was to insert.
	proposed func(column string) string
	// words replace {word} in migrations.
	words map[string]string
	// repeated: this step of a migration has been done before.
	repeated func(error) bool
	// tables is the query that lists the names of the database's own tables.
	tables string

	// clock is the query that reads the server's clock, in UTC microseconds;
	// empty where it is the machine's own.
	clock string

	// release closes what else was opened; may be nil.
	release func() error

	texts     sync.Map // string to string, filled by Rebind
	textCount atomic.Int64
}

// Name is sqlite, pgsql, mysql or mariadb, for messages.
func (d *Dialect) Name() string { return d.name }

// ForUpdate ends a SELECT that locks its rows for a change; empty where
// writers wait for each other anyway.
func (d *Dialect) ForUpdate() string { return d.forUpdate }

// ForShare ends a SELECT that keeps its rows from being changed until the
// transaction ends.
func (d *Dialect) ForShare() string { return d.forShare }

// Greatest is the name of the function that returns its largest argument.
func (d *Dialect) Greatest() string { return d.greatest }

// IntPlaceholder is the placeholder of an integer in a SELECT list or a CASE.
func (d *Dialect) IntPlaceholder() string { return d.intPlaceholder }

// HasArrays says whether lists are one argument, an array; see ArrayTable.
func (d *Dialect) HasArrays() bool { return d.arrays }

// Lookup joins the rows of a table that fit, or with left perhaps none, by an
// index, even where the planner would read the whole table.
func (d *Dialect) Lookup(left bool, table, alias, on string) string {
	return d.lookup(left, table, alias, on)
}

// PairTable is the derived table r with two named columns of key pairs; its
// arguments are those of PairArgs.
func (d *Dialect) PairTable(id, item string) string { return d.pairTable(id, item) }

// PairArgs are the arguments of PairTable.
func (d *Dialect) PairArgs(pairs []KeyPair) ([]any, error) { return d.pairArgs(pairs) }

// Unique recognizes the error of an INSERT for a key that exists.
func (d *Dialect) Unique(err error) bool { return d.unique(err) }

// Index follows a table's name and names the index to use, if the dialect needs
// it.
func (d *Dialect) Index(index string) string {
	if d.forceIndex == nil {
		return ""
	}
	return d.forceIndex(index)
}

// Opaque hides a value from the planner, so that one plan serves all values.
func (d *Dialect) Opaque(value string) string {
	if d.opaque == nil {
		return value
	}
	return d.opaque(value)
}

// temporary says whether the failed statement may work when it is repeated.
func (d *Dialect) temporary(err error) bool { return d.retryable(err) || d.unavailable(err) }

// operational recognizes errors of the server's state, and not of the
// statement: it may work later, and no input is at fault.
func (d *Dialect) operational(err error) bool {
	return d.unavailable(err) || d.fromEngine(err) && !d.statementFault(err)
}

// maxTexts bounds how many rewritten texts are remembered.
const maxTexts = 2048

// Rebind rewrites the placeholders of a statement.
func (d *Dialect) Rebind(q string) string {
	if !d.numbered {
		return q
	}
	if v, ok := d.texts.Load(q); ok {
		return v.(string)
	}
	out := numberPlaceholders(q)
	if d.textCount.Load() < maxTexts {
		if _, loaded := d.texts.LoadOrStore(q, out); !loaded {
			d.textCount.Add(1)
		}
	}
	return out
}

// numberPlaceholders replaces each ? outside of quotes by $1, $2, ...
func numberPlaceholders(q string) string {
	var b strings.Builder
	b.Grow(len(q) + 16)
	n := 0
	var quote byte
	for i := 0; i < len(q); i++ {
		c := q[i]
		switch {
		case quote != 0:
			if c == quote {
				quote = 0
			}
		case c == '\'' || c == '"':
			quote = c
		case c == '?':
			n++
			b.WriteByte('$')
			b.WriteString(strconv.Itoa(n))
			continue
		}
		b.WriteByte(c)
	}
	return b.String()
}

// Upsert returns an INSERT for one row that changes the row that is there if
// one has the same key (conflictCols, which must be the primary key: MySQL
// looks at every unique key). setCols are columns that take the new value, or
// assignments "col = expression", in which new.col is the new value and
// table.col, with the table's name, the old one; it must not read a column
// that another assignment writes, since MySQL assigns from left to right.
// Without setCols an existing row stays as it is.
func (d *Dialect) Upsert(table string, cols, conflictCols, setCols []string) string {
	return "INSERT INTO " + table + " (" + strings.Join(cols, ", ") + ") VALUES " + In(len(cols)) + d.onConflict(conflictCols, setCols)
}

// onConflict is the end of an upsert.
func (d *Dialect) onConflict(conflictCols, setCols []string) string {
	var set strings.Builder
	for i, c := range setCols {
		if i > 0 {
			set.WriteString(", ")
		}
		if left, right, ok := strings.Cut(c, " = "); ok {
			set.WriteString(left + " = " + d.replaceNew(right))
		} else {
			set.WriteString(c + " = " + d.proposed(c))
		}
	}
	return d.values + d.conflict(conflictCols, set.String())
}

// replaceNew turns each new.col into the engine's name for it.
func (d *Dialect) replaceNew(expr string) string {
	const prefix = "new."
	var b strings.Builder
	for {
		i := strings.Index(expr, prefix)
		if i < 0 {
			b.WriteString(expr)
			return b.String()
		}
		end := i + len(prefix)
		for end < len(expr) && (expr[end] == '_' || expr[end] >= 'a' && expr[end] <= 'z' || expr[end] >= '0' && expr[end] <= '9') {
			end++
		}
		b.WriteString(expr[:i] + d.proposed(expr[i+len(prefix):end]))
		expr = expr[end:]
	}
}

// inOrder is the lookup of engines that keep the order of tables that are
// joined by the given word.
func inOrder(join string) func(left bool, table, alias, on string) string {
	return func(left bool, table, alias, on string) string {
		word := join
		if left {
			word = "LEFT JOIN"
		}
		return " " + word + " " + table + " " + alias + " ON " + on
	}
}

// onConflict is the standard's way, of SQLite and PostgreSQL.
func onConflict(columns []string, set string) string {
	key := " ON CONFLICT (" + strings.Join(columns, ", ") + ") DO "
	if set == "" {
		return key + "NOTHING"
	}
	return key + "UPDATE SET " + set
}

func excluded(column string) string { return "excluded." + column }

// lostConnection recognizes the errors that every driver may return when the
// server is out of reach or the connection broke. The end of the caller's own
// context is not one of them.
func lostConnection(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var network net.Error
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &network)
}
