// Package sqlstore implements package storage on SQLite, PostgreSQL, MySQL and
// MariaDB, by way of package sqldb.
//
// All SQL of the domain is here, written once with ? for arguments. Files are
// named by topic: device_ applies the messages of devices, queue_ holds
// commands and their results, event_ the log of events and its sinks, push_
// the pushes and their certificates, operator_ what operators see and change.
// Each change of the schema is a file in migrations.
//
// Times are integers in UTC microseconds, booleans SMALLINT, and identifiers
// are compared byte for byte on every engine.
package sqlstore

import (
	"cmp"
	"context"
	"crypto/x509"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
	"github.com/nanomdm/nanomdm/supervise"
)

// Config is the configuration of a Store. Driver and DSN are required; the zero
// value of every other field works.
type Config struct {
	// Driver is sqlite, pgsql or mysql (MySQL and MariaDB alike).
	Driver string
	// DSN is, for sqlite, the path of a file or ":memory:", optionally
	// followed by ? and modernc.org/sqlite parameters; for pgsql a URL or a
	// keyword string; for mysql a go-sql-driver data source name. It may hold
	// a password, so it never appears in errors.
	DSN string
	// Now is the clock of all stored times; time.Now if nil.
	Now func() time.Time
	// DatabaseClock bounds Now by the clock of a database server, so that
	// replicas agree on what is due.
	DatabaseClock bool
	// Logger gets errors that no caller gets; nil logs nothing.
	Logger *slog.Logger
	// Supervisor runs the store's goroutine. Default: one that reports nothing.
	Supervisor *supervise.Supervisor
	// ConnMaxLifetime and ConnMaxIdleTime bound the age of a connection to a
	// database server: 30 and 3 minutes if zero, which is below the idle
	// limits of the usual load balancers (Azure has 4 minutes, AWS 350
	// seconds). SQLite's are kept.
	ConnMaxLifetime time.Duration
	ConnMaxIdleTime time.Duration
	// RootCAs verifies a database server, whose connections then use TLS. If
	// nil, the DSN alone decides about TLS.
	RootCAs *x509.CertPool
	// MaxOpenConns bounds the connections to a database server, 24 if zero,
	// and with SQLite the readers.
	MaxOpenConns int
	// Sealer encrypts push keys, unlock and bootstrap tokens, the messages that
	// hold them and the keys of event sinks; nil seals nothing. Older plain
	// values stay readable. A database with values of a key that the Sealer
	// does not have is refused.
	Sealer storage.Sealer
	// SealCommands seals commands, too.
	SealCommands bool
	// MaxUserChannels bounds the users of one device, 200 if zero. Existing
	// users stay.
	MaxUserChannels int
	// RecordActivityEvery is the interval at which last-seen times and paid
	// pushes are written: 500 ms if zero. If negative, only Flush and Close
	// write them.
	RecordActivityEvery time.Duration
	// Committed is called with the number of device messages in a group commit,
	// Polled with the number of messages that share a read. Each is called
	// before the batch runs, concurrently; nil is not called.
	Committed, Polled func(messages int)
}

const (
	defaultRecordActivity  = 500 * time.Millisecond
	defaultMaxUserChannels = 200

	// deviceTimeout bounds a batch of device messages. Devices repeat a failed
	// message.
	deviceTimeout = 5 * time.Second
)

// Store is an open database. Every method may be called concurrently, and any
// number of Stores, in any number of processes, may share one database.
type Store struct {
	cfg           Config
	db            *sqldb.DB
	now           func() time.Time
	log           *slog.Logger
	act           *activityLog
	polls         *batcher[*opRun]
	changes       *batcher[*opRun]
	enqueues      []*batcher[*enqueueCall]
	seal          *sealing
	texts         deviceTexts
	unreadable    atomic.Int64 // Stats.EventsUnreadable
	counted       enrollmentCounts
	held          sync.Map // uptime of the last renewal of leases that are held, by name
	uptime        func() time.Duration
	probe         writeProbe
	sweepCounters sweepCounters
	newer         atomic.Bool // see Stats.SchemaNewer

	closeOnce sync.Once
	closeErr  error
}

// Stats counts what happened since the store was opened.
type Stats struct {
	// Statements that were sent to the database.
	Statements int64
	// SchemaNewer: the next release has migrated the database, and this release
	// still serves it.
	SchemaNewer bool
	// ClockOffset is how far the database's clock is ahead of this machine's.
	ClockOffset time.Duration
	// Leases lists the names of leases that this store believes to hold.
	Leases []string
	// Retries of whole transactions: deadlocks, lost connections, failovers.
	Retries int64
	// ActivityDropped counts last-seen notes that were dropped because the
	// database could not take them for long.
	ActivityDropped int64
	// EventsDropped counts events without a change, such as idle polls, that
	// were dropped for the same reason.
	EventsDropped int64
	// EventsUnreadable counts failed reads of a batch of events or a payload:
	// it is damaged, or sealed with an unknown key.
	EventsUnreadable int64
	// The counts of this store's sweeps: promoted and expired commands, and
	// removed history.
	Promoted, Expired                            int64
	RemovedRows, RemovedResults, RemovedCommands int64
	RemovedResultBytes                           int64
}

// Open connects to the database, checks that this package supports it, sets the
// parameters of connections that correctness needs, and migrates the schema.
// Several replicas may open at once: one migrates, the others wait. The context
// bounds opening only.
//
// The error is storage.ErrUnavailable if a database server is out of reach or
// not ready, as a standby is that takes no writes, so that it is worth to try
// again later; anything else needs an operator.
//
// Close must be called to release the store.
func Open(ctx context.Context, cfg Config) (*Store, error) {
	s, err := connectStore(ctx, cfg)
	if err != nil {
		return nil, err
	}
	for _, check := range []func(context.Context) error{s.checkRestored, s.checkSeal} {
		if err := check(ctx); err != nil {
			s.db.Close()
			return nil, fmt.Errorf("preparing the %s database: %w", cfg.Driver, err)
		}
	}
	s.act = startActivity(s, s.cfg.RecordActivityEvery)
	s.startBatches()
	return s, nil
}

// connectStore connects and migrates, and starts nothing.
func connectStore(ctx context.Context, cfg Config) (*Store, error) {
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Supervisor == nil {
		cfg.Supervisor = supervise.New(supervise.Config{Logger: cfg.Logger})
	}
	if cfg.RecordActivityEvery == 0 {
		cfg.RecordActivityEvery = defaultRecordActivity
	}
	if cfg.MaxUserChannels == 0 {
		cfg.MaxUserChannels = defaultMaxUserChannels
	}
	db, err := sqldb.Open(ctx, sqldb.Config{
		Driver: cfg.Driver, DSN: cfg.DSN, Now: cfg.Now, Logger: cfg.Logger,
		ConnMaxLifetime: cfg.ConnMaxLifetime, ConnMaxIdleTime: cfg.ConnMaxIdleTime, MaxOpenConns: cfg.MaxOpenConns, RootCAs: cfg.RootCAs,
	})
	if err != nil {
		return nil, fmt.Errorf("opening the %s database: %w", cfg.Driver, storageError(err))
	}
	s := &Store{
		cfg: cfg, db: db, now: cfg.Now, log: cfg.Logger, seal: newSealing(cfg),
		texts: newDeviceTexts(db.Dialect()), counted: enrollmentCounts{turn: make(chan struct{}, 1)},
	}
	if cfg.DatabaseClock {
		s.now = db.Now
	}
	began := time.Now()
	s.uptime = func() time.Duration { return time.Since(began) }
	db.Prepare(s.texts.enrollmentState, s.texts.certificateLookup)
	for _, prepare := range []func(context.Context) error{s.measureClock, s.migrate, s.probeWrite} {
		if err := prepare(ctx); err != nil {
			db.Close()
			return nil, fmt.Errorf("preparing the %s database: %w", cfg.Driver, notNow(err))
		}
	}
	return s, nil
}

// Close writes the gathered activity, waits for the store's goroutines and for
// running statements, and closes the connections. Later calls fail with
// storage.ErrClosed.
func (s *Store) Close() error {
	s.closeOnce.Do(func() {
		s.closeErr = errors.Join(s.act.stop(), s.db.Close())
	})
	return s.closeErr
}

// Now is the clock of stored times: Config.Now, bounded by the database's clock
// with Config.DatabaseClock. Times that are compared with stored ones come from
// it.
func (s *Store) Now() time.Time { return s.now() }

// Stats returns the counters.
func (s *Store) Stats() Stats {
	return Stats{
		Statements: s.db.Statements(), SchemaNewer: s.newer.Load(),
		ClockOffset: s.db.ClockOffset(),
		Leases:      s.leasesHeld(),
		Retries:     s.db.Retries(), ActivityDropped: s.act.dropped.Load(),
		EventsDropped: s.act.eventsDropped.Load(), EventsUnreadable: s.unreadable.Load(),
		Promoted: s.sweepCounters.promoted.Load(), Expired: s.sweepCounters.expired.Load(),
		RemovedRows: s.sweepCounters.rows.Load(), RemovedResults: s.sweepCounters.results.Load(),
		RemovedCommands: s.sweepCounters.commands.Load(), RemovedResultBytes: s.sweepCounters.resultBytes.Load(),
	}
}

// Pools returns the state of the connection pools: write, and with SQLite also
// read.
func (s *Store) Pools() map[string]sql.DBStats { return s.db.Pools() }

// LimitConnections changes how many connections to a database server the store
// opens at most. SQLite's stay as they are.
func (s *Store) LimitConnections(n int) { s.db.LimitConnections(n) }

// Ping implements storage.Health.
func (s *Store) Ping(ctx context.Context) error {
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		newer, err := migrations().Serves(ctx, t.Tx)
		if err == nil {
			s.noteSchema(ctx, newer)
		}
		return err
	})
	switch {
	case errors.Is(err, sqldb.ErrNewer):
		return fmt.Errorf("%w: %w", ErrSchema, err)
	case err != nil:
		return fmt.Errorf("reaching the database: %w", err)
	}
	if err := s.probe.ask(s.uptime(), func() error { return cmp.Or(s.probeWrite(ctx), s.measureClock(ctx)) }); err != nil {
		return fmt.Errorf("writing to the database: %w", err)
	}
	return nil
}

// noteSchema notes whether the database has the schema of the next release.
func (s *Store) noteSchema(ctx context.Context, newer bool) {
	if s.newer.Swap(newer) != newer && newer {
		s.log.WarnContext(ctx, "the database has the schema of the next release; upgrade this replica, too, before the release after that")
	}
}

// ErrSchema is Ping's error for a database that another release has migrated to
// a schema that this one does not support.
var ErrSchema = errors.New("schema is not the one this binary knows")
