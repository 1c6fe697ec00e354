package sqlstore

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

// dialect is what an engine does its own way.
type dialect struct {
	// name is sqlite, pgsql, mysql or mariadb; for messages, never for an if.
	name string
	// numbered rewrites ? to $1, $2, ...
	numbered bool
	// prepare says which statements this package keeps prepared; none if nil.
	// Drivers may do it themselves, or send arguments inside the text.
	prepare func(q string) bool
	// begin begins every transaction and goes with its first statement, as
	// COMMIT does with its last; if it is empty, the driver does both.
	begin string
	// together runs statements one after the other, in one round trip, up to
	// the first that fails; nil if there are no round trips to save.
	together func(ctx context.Context, conn *sql.Conn, late []statement) error
	counts   bool // together tells how many rows statements returned
	// ask is together with queries behind the statements; nil if it would save
	// little.
	ask func(ctx context.Context, conn *sql.Conn, late []statement, questions []question) error

	// forUpdate and forShare end a SELECT that locks the rows it reads.
	forUpdate string
	forShare  string
	// forceIndex follows a table's name where the planner has to be told the
	// index; nil where it finds it.
	forceIndex func(index string) string
	// greatest is the function that returns the larger of its arguments.
	greatest string
	// maxArgs is how many arguments a statement may have, with some room.
	maxArgs int
	// stepwise inserts rows in a few sizes of statements.
	stepwise bool
	// number is the place of a number among what a SELECT returns.
	number string
	// polls and changes are how many batches of devices' messages run at
	// once. Fewer make larger ones, which cost less. enqueues is how many
	// transactions of one call that queues a command do.
	polls, changes, enqueues int

	// arrays: a list of values is one argument, an array, and so is each
	// column of rows to insert, so that a statement has one text and one plan
	// whatever their number. kinds are the arrays' types by table and column;
	// columns reads them.
	arrays  bool
	columns string
	kinds   map[string]string
	// pairs is the derived table r (id, command_uuid), pairArgs its arguments.
	pairs    string
	pairArgs func(keys []queueKey) ([]any, error)
	// hidden writes a value so that the planner cannot look at it, and makes one
	// plan for all values; nil where that changes nothing.
	hidden func(value string) string
	// lookup joins the rows of a table that fit, or with left perhaps none, by
	// an index whatever the planner thinks of reading the whole table.
	lookup func(left bool, table, alias, on string) string

	// conflict writes what follows INSERT ... VALUES (...) in an upsert, and
	// proposed names a column of the row that was to be inserted.
	conflict func(columns []string, set string) string
	values   string // what stands between VALUES (...) and conflict
	proposed func(column string) string

	// unique: a row of that key exists. retryable: the engine rolled the
	// transaction back, or never began it, and it may work when repeated.
	// unavailable: the server cannot be reached or is going away, so that
	// nothing is known of a commit that was under way.
	unique      func(error) bool
	retryable   func(error) bool
	unavailable func(error) bool

	// words replace {word} in migrations.
	words map[string]string
	// repeated: this step of a migration has been done before.
	repeated func(error) bool
	// tables lists the names of the database's own tables.
	tables string

	// release closes what else was opened; may be nil.
	release func() error

	// The texts that read who speaks and who changes, made at the start.
	subjects, senders string

	texts     sync.Map // string to string, filled by rebind
	textCount atomic.Int64
}

// pools are the connections to one database.
type pools struct {
	dialect *dialect
	write   *sql.DB
	read    *sql.DB // write itself where one pool does both
}

// maxTexts bounds how many rewritten texts are remembered.
const maxTexts = 2048

// rebind rewrites the placeholders of a statement.
func (d *dialect) rebind(q string) string {
	if !d.numbered {
		return q
	}
	if v, ok := d.texts.Load(q); ok {
		return v.(string)
	}
	out := number(q)
	if d.textCount.Load() < maxTexts {
		if _, loaded := d.texts.LoadOrStore(q, out); !loaded {
			d.textCount.Add(1)
		}
	}
	return out
}

// number replaces each ? outside of quotes by $1, $2, ...
func number(q string) string {
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

// by names the index to read a table by.
func (d *dialect) by(index string) string {
	if d.forceIndex == nil {
		return ""
	}
	return d.forceIndex(index)
}

// hide keeps the planner from a value.
func (d *dialect) hide(value string) string {
	if d.hidden == nil {
		return value
	}
	return d.hidden(value)
}

// upsert returns an INSERT for one row that changes the row that is there if
// one has the same key (conflictCols, which must be the primary key: MySQL
// looks at every unique key). setCols are columns that take the new value, or
// assignments "col = expression", in which new.col is the new value and
// table.col, with the table's name, the old one; it must not read a column
// that another assignment writes, since MySQL assigns from left to right.
// Without setCols an existing row stays as it is.
func (d *dialect) upsert(table string, cols, conflictCols, setCols []string) string {
	return d.upsertRows(table, cols, conflictCols, setCols, 1)
}

// upsertRows is upsert for several rows of different keys at once.
func (d *dialect) upsertRows(table string, cols, conflictCols, setCols []string, rows int) string {
	return "INSERT INTO " + table + " (" + strings.Join(cols, ", ") + ") VALUES " + tuples(len(cols), rows) + d.onConflict(conflictCols, setCols)
}

// onConflict is the end of an upsert.
func (d *dialect) onConflict(conflictCols, setCols []string) string {
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
func (d *dialect) replaceNew(expr string) string {
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

// inOrder is the lookup of engines that go by the order of the tables if they
// are joined by the given word.
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

// lostConnection recognizes what every driver may return when the server is
// out of reach or the connection broke. The end of the caller's own context
// is not that.
func lostConnection(err error) bool {
	if err == nil || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return false
	}
	var network net.Error
	return errors.Is(err, driver.ErrBadConn) || errors.Is(err, sql.ErrConnDone) ||
		errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.As(err, &network)
}
