package storagetest

import (
	"database/sql"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// subtest is one rule of the contracts. Its name states the rule.
type subtest struct {
	name string
	run  func(t *testing.T, h *Harness)
}

// topic is the subtests of one file.
type topic struct {
	name     string
	subtests []subtest
}

// topics is the suite. To add subtests for sheep, make a file sheep.go with
//
//	func sheepTests() []subtest {
//		return []subtest{
//			{"a sheep is counted once", sheepCountedOnce},
//		}
//	}
//
//	func sheepCountedOnce(t *testing.T, h *Harness) { ... h.Store ... }
//
// and a line here. Run one with
// go test ./storage/sqlstore -run TestConformance/mysql/sheep/counted
func topics() []topic {
	return []topic{
		{"open", openTests()},
		{"lease", leaseTests()},
		{"activity", activityTests()},
		{"enroll", enrollTests()},
		{"identity", identityTests()},
		{"report", reportTests()},
		{"refusals", refusalTests()},
		{"enqueue", enqueueTests()},
		{"once", onceTests()},
		{"concurrency", concurrencyTests()},
		{"held", heldTests()},
		{"keys", keyTests()},
		{"sealing", sealingTests()},
		{"push", pushTests()},
		{"sweep", sweepTests()},
		{"audit", auditTests()},
		{"inventory", inventoryTests()},
		{"tags", tagTests()},
		{"answers", answerTests()},
		{"outbox", outboxTests()},
		{"sinks", sinkTests()},
		{"deliveries", deliveryTests()},
		{"upkeep", upkeepTests()},
		{"commands", commandTests()},
		{"steering", steeringTests()},
		{"import", importTests()},
		{"tenants", tenantTests()},
		{"backup", backupTests()},
		{"replicas", replicaTests()},
	}
}

// Run runs the suite on every engine. Subtests run in parallel, each with its
// own Harness, that is, an empty database. SQLite in memory is one more engine;
// it skips subtests that need a second connection.
func Run(t *testing.T) {
	for _, e := range append(Engines(t), memory()) {
		t.Run(e.Name, func(t *testing.T) {
			e.need(t)
			e.run(t, topics())
		})
	}
}

// RunBehindPgBouncer runs the topics about devices on PostgreSQL behind
// Debian's PgBouncer in transaction mode, which gives each transaction another
// server connection.
func RunBehindPgBouncer(t *testing.T) {
	e := behindPgBouncer(t)
	var chosen []topic
	for _, topic := range topics() {
		if slices.Contains([]string{"enroll", "report", "enqueue", "concurrency"}, topic.name) {
			chosen = append(chosen, topic)
		}
	}
	e.run(t, chosen)
}

func (e *Engine) run(t *testing.T, topics []topic) {
	for _, topic := range topics {
		t.Run(topic.name, func(t *testing.T) {
			for _, s := range topic.subtests {
				t.Run(s.name, func(t *testing.T) {
					t.Parallel()
					s.run(t, NewHarness(t, e))
				})
			}
		})
	}
}

// Harness is an empty store with access to its database and clock.
type Harness struct {
	Engine *Engine
	// Store is open. It writes activity only on Flush and Close.
	Store *sqlstore.Store
	// Clock is the clock of all stores of the harness.
	Clock *Clock

	cfg sqlstore.Config
	db  *sql.DB
}

// NewHarness opens a store on an empty database; it is closed when the test
// ends.
func NewHarness(t *testing.T, e *Engine) *Harness {
	t.Helper()
	h := &Harness{Engine: e, Clock: NewClock(), cfg: e.Config(t)}
	h.Store = h.Open(t, nil)
	return h
}

// Open opens another store on the same database, like another replica. change
// may alter its configuration; nil does not. The store is closed when the test
// ends, unless it was closed before. With SQLite in memory the test is skipped,
// since a second store cannot read the data.
func (h *Harness) Open(t *testing.T, change func(*sqlstore.Config)) *sqlstore.Store {
	t.Helper()
	if h.Store != nil {
		h.shared(t)
	}
	cfg := h.cfg
	cfg.Now = h.Clock.Now
	cfg.RecordActivityEvery = -1
	if change != nil {
		change(&cfg)
	}
	store, err := sqlstore.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	return store
}

func (h *Harness) shared(t *testing.T) {
	t.Helper()
	if h.Engine.Name == "memory" {
		t.Skip("a database in memory has no second way in")
	}
}

// Exec changes the database behind the store's back and returns how many rows
// changed. Places are ? on every engine; no other ? may be in the text.
func (h *Harness) Exec(t *testing.T, query string, args ...any) int64 {
	t.Helper()
	query = h.bind(t, query)
	res, err := h.db.ExecContext(t.Context(), query, args...)
	require.NoError(t, err)
	n, err := res.RowsAffected()
	require.NoError(t, err)
	return n
}

// Int reads one number behind the store's back, such as a count.
func (h *Harness) Int(t *testing.T, query string, args ...any) (n int64) {
	t.Helper()
	query = h.bind(t, query)
	require.NoError(t, h.db.QueryRowContext(t.Context(), query, args...).Scan(&n))
	return n
}

// Strings reads the first column of some rows behind the store's back.
func (h *Harness) Strings(t *testing.T, query string, args ...any) (values []string) {
	t.Helper()
	query = h.bind(t, query)
	rows, err := h.db.QueryContext(t.Context(), query, args...)
	require.NoError(t, err)
	defer rows.Close()
	for rows.Next() {
		var value sql.NullString
		require.NoError(t, rows.Scan(&value))
		values = append(values, value.String)
	}
	require.NoError(t, rows.Err())
	return values
}

// bind makes the connection on first use and rewrites the places.
func (h *Harness) bind(t *testing.T, query string) string {
	t.Helper()
	h.shared(t)
	if h.db == nil {
		db := connect(t, h.cfg)
		t.Cleanup(func() { require.NoError(t, db.Close()) })
		h.db = db
	}
	if h.cfg.Driver != "pgsql" {
		return query
	}
	parts := strings.Split(query, "?")
	var b strings.Builder
	for i, part := range parts {
		if i > 0 {
			b.WriteString("$" + strconv.Itoa(i))
		}
		b.WriteString(part)
	}
	return b.String()
}

// Clock is a clock that a test advances. It is safe for concurrent use.
type Clock struct {
	mu  sync.Mutex
	now time.Time
}

// NewClock returns a clock at a fixed time, in whole microseconds as the store
// keeps them.
func NewClock() *Clock {
	return &Clock{now: time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)}
}

// Now is for sqlstore.Config.
func (c *Clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Advance moves the clock and returns the new time.
func (c *Clock) Advance(d time.Duration) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
	return c.now
}
