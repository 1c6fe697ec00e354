package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// Snapshot reads one state of a whole database, which replicas may go on to
// use. It writes nothing, and migrates nothing. It is used by one goroutine at
// a time.
type Snapshot struct {
	db *sqldb.DB
	s  *sqldb.Snapshot
	t  *tx
}

// OpenSnapshot begins a snapshot of a database, whose schema must be the one of
// this program. Config.Sealer opens values that are sealed. Close must be
// called to release it.
func OpenSnapshot(ctx context.Context, cfg Config) (*Snapshot, error) {
	db, err := openExisting(ctx, cfg)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{db: db}
	if s.s, err = db.OpenSnapshot(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("beginning a snapshot: %w", storageError(err)), db.Close())
	}
	s.t = &tx{Tx: s.s.Tx, seal: newSealing(cfg)}
	if _, err = knownSchema(ctx, s.t.Tx); err == nil {
		_, err = s.t.tryKeys(ctx, cfg.Sealer)
	}
	if err != nil {
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}

// openExisting opens a database to read it. SQLite would make a file that is
// not there.
func openExisting(ctx context.Context, cfg Config) (*sqldb.DB, error) {
	if cfg.Driver == "sqlite" {
		file := sqldb.SQLiteFile(cfg.DSN)
		if file == "" {
			return nil, errors.New("a database in memory is its program's alone")
		}
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("opening the sqlite database: %w", err)
		}
	}
	db, err := sqldb.Open(ctx, sqldb.Config{Driver: cfg.Driver, DSN: cfg.DSN, Now: cfg.Now, Logger: cfg.Logger, RootCAs: cfg.RootCAs})
	if err != nil {
		return nil, fmt.Errorf("opening the %s database: %w", cfg.Driver, storageError(err))
	}
	return db, nil
}

// knownSchema returns the schema of the database, which is ErrSchema if it is
// another one than this program's.
func knownSchema(ctx context.Context, t *sqldb.Tx) (int64, error) {
	version, err := sqldb.SchemaVersion(ctx, t)
	if err != nil {
		return 0, fmt.Errorf("reading the schema: %w", err)
	}
	if known := migrations().Newest(); version != known {
		return 0, fmt.Errorf("%w: the database has schema %d, this binary knows %d", ErrSchema, version, known)
	}
	return version, nil
}

// Close ends the snapshot.
func (s *Snapshot) Close() error { return errors.Join(s.s.Close(), s.db.Close()) }

// Engine returns the name of the database's engine.
func (s *Snapshot) Engine() string { return s.t.Dialect.Name() }

// ExportPushCerts is that of storage.Exporter.
func (s *Snapshot) ExportPushCerts(ctx context.Context) ([]storage.PushCert, error) {
	return s.t.exportPushCerts(ctx)
}

// ExportCommands is that of storage.Exporter, but that a command which is
// ErrUnreadable is reported and stands in the list without its bytes.
func (s *Snapshot) ExportCommands(ctx context.Context, after string, limit int, report func(uuid string, err error)) ([]storage.CommandRecord, error) {
	return s.t.exportCommands(ctx, after, limit, func(uuid string, err error) error {
		report(uuid, err)
		return nil
	})
}

// ExportDeviceIDs is that of storage.Exporter.
func (s *Snapshot) ExportDeviceIDs(ctx context.Context, after string, limit int) ([]string, error) {
	return s.t.exportDeviceIDs(ctx, after, limit)
}

// ExportDevices is that of storage.Exporter. It is ErrUnreadable if a value of
// one of the devices is.
func (s *Snapshot) ExportDevices(ctx context.Context, ids []string) ([]*storage.DeviceRecord, error) {
	return s.t.exportDevices(ctx, ids)
}

// Count counts the rows of a kind: devices, commands, and what an Exporter does
// not give.
func (s *Snapshot) Count(ctx context.Context, what Counted) (n int64, err error) {
	if err = s.t.QueryRow(ctx, "SELECT COUNT(*) FROM "+string(what)).Scan(&n); err != nil {
		err = fmt.Errorf("counting rows of %s: %w", what, err)
	}
	return n, err
}

// Counted is what Snapshot.Count counts.
type Counted string

// The counted kinds.
const (
	CountDevices      Counted = "nano_devices"
	CountCommands     Counted = "nano_commands"
	CountPushCerts    Counted = "nano_push_certs"
	CountInventories  Counted = "nano_device_inventory"
	CountEvents       Counted = "nano_events"
	CountEventSinks   Counted = "nano_event_sinks"
	CountAPIKeys      Counted = "nano_api_keys"
	CountAuditRecords Counted = "nano_audit"
)

// changes finds the devices of a list that changed since a time, of which each
// query has as many arguments as it says.
var changes = []struct {
	text  string
	times int
}{
	{"SELECT id FROM nano_devices WHERE updated_at >= ? AND id ", 1},
	{`SELECT e.device_id FROM nano_enrollments e LEFT JOIN nano_enrollment_activity a ON a.id = e.id LEFT JOIN nano_users u ON u.id = e.id
WHERE (e.updated_at >= ? OR a.last_seen_at >= ? OR u.updated_at >= ?) AND e.device_id `, 3},
	{"SELECT id FROM nano_cert_auth_associations WHERE (created_at >= ? OR retired_at >= ?) AND id ", 2},
	{"SELECT id FROM nano_device_tags WHERE created_at >= ? AND id ", 1},
}

// ChangedDevices returns those of the ids, in their order, whose devices
// changed since a time. A tag that was taken away is no change.
func (s *Snapshot) ChangedDevices(ctx context.Context, ids []string, since time.Time) ([]string, error) {
	changed := make(map[string]bool)
	note := func(row sqldb.Row) error {
		var id string
		err := row.Scan(&id)
		changed[id] = true
		return err
	}
	is, idArgs := s.t.Among(ids)
	after := func(times int) (args []any) {
		for range times {
			args = append(args, micros(since))
		}
		return args
	}
	for _, q := range changes {
		if err := s.t.Query(ctx, q.text+is, append(after(q.times), idArgs...)...).Each(note); err != nil {
			return nil, fmt.Errorf("looking for devices that changed: %w", err)
		}
	}
	states, stateArgs := sqldb.InList(storage.States())
	err := s.t.Query(ctx, "SELECT e.device_id FROM nano_enrollments e JOIN nano_enrollment_queue q ON q.id = e.id AND q.state IN "+states+
		" WHERE (q.created_at >= ? OR q.finished_at >= ? OR q.notnow_at >= ?) AND e.device_id "+is, append(append(stateArgs, after(3)...), idArgs...)...).Each(note)
	if err != nil {
		return nil, fmt.Errorf("looking for queues that changed: %w", err)
	}
	var list []string
	for _, id := range ids {
		if changed[id] {
			list = append(list, id)
		}
	}
	return list, nil
}

// CommandsSince returns those of the CommandUUIDs whose commands wait for an
// enrollment, or have ended for one since a time.
func (s *Snapshot) CommandsSince(ctx context.Context, uuids []string, since time.Time) (map[string]bool, error) {
	is, args := s.t.Among(uuids)
	found, err := sqldb.Column[string](s.t.Query(ctx, "SELECT DISTINCT command_uuid FROM nano_enrollment_queue WHERE (finished_at IS NULL OR finished_at > ?) AND command_uuid "+is,
		append([]any{micros(since)}, args...)...))
	if err != nil {
		return nil, fmt.Errorf("looking for commands in use: %w", err)
	}
	used := make(map[string]bool, len(found))
	for _, uuid := range found {
		used[uuid] = true
	}
	return used, nil
}
