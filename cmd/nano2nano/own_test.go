package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// writeOwn writes a fleet into a database of this server, and says how to read
// it.
func (f *fleet) writeOwn(t *testing.T, e *storagetest.Engine, cfg sqlstore.Config) (kind, dsn string) {
	t.Helper()
	where := e.Unmigrated(t)
	cfg.Driver, cfg.DSN, cfg.RecordActivityEvery = where.Driver, where.DSN, -1
	store, err := sqlstore.Open(t.Context(), cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	f.store(t, store)
	return cfg.Driver, cfg.DSN
}

// store imports the fleet into a store.
func (f *fleet) store(t *testing.T, store *sqlstore.Store) {
	t.Helper()
	_, err := store.ImportPushCerts(t.Context(), []storage.PushCert{f.cert})
	require.NoError(t, err)
	_, err = store.ImportCommands(t.Context(), f.commands)
	require.NoError(t, err)
	for i := 0; i < len(f.devices); i += 200 {
		done, err := store.ImportDevices(t.Context(), f.devices[i:min(i+200, len(f.devices))])
		require.NoError(t, err)
		require.Empty(t, done.Refused)
	}
}

// Each engine's database of this server moves into each engine.
func TestMovesOwnDatabases(t *testing.T) {
	for _, source := range storagetest.Engines(t) {
		t.Run(source.Name, func(t *testing.T) {
			f := newFleet(t, *enrollments)
			kind, dsn := f.writeOwn(t, source, sqlstore.Config{})
			intoEach(t, kind, dsn, nil, func(x *trial) {
				require.Zero(x.t, x.run(), "%s", x.out)
				require.Contains(x.t, x.out, "Source: this server's database in ")
				x.holds(f, exactly)
				require.Zero(x.t, x.run("-check"), "%s", x.out)
			})
		})
	}
}

// A second run reads the devices of which something changed.
func TestSecondRunOfOwn(t *testing.T) {
	for _, e := range storagetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) {
			f := newFleet(t, 30)
			clock := begun.Add(47 * time.Hour)
			cfg := sqlstore.Config{Now: func() time.Time { return clock }}
			kind, dsn := f.writeOwn(t, e, cfg)
			x := newTrial(t, kind, dsn)
			require.Zero(t, x.run(), "%s", x.out)
			require.Contains(t, x.out, "Moved: ")

			x.now = x.now.Add(time.Hour)
			clock = x.now.Add(-30 * time.Minute)
			cfg.Driver, cfg.DSN, cfg.RecordActivityEvery = kind, dsn, -1
			store, err := sqlstore.Open(t.Context(), cfg)
			require.NoError(t, err)
			queued, tagged := f.devices[1].Channel.ID, f.devices[2].Channel.ID
			command, err := mdm.DecodeCommand(mdmtest.NewCommand("NEW", "ProfileList", nil))
			require.NoError(t, err)
			failed, err := store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command, IDs: []string{queued}})
			require.NoError(t, err)
			require.Empty(t, failed)
			_, err = store.ChangeTags(t.Context(), storage.Scope{}, storage.TagChange{IDs: []string{tagged}, Add: []string{"lab"},
				Record: func([]string) *storage.AuditRecord { return &storage.AuditRecord{Who: "w", Action: "tags"} }})
			require.NoError(t, err)
			require.NoError(t, store.Close())

			require.Zero(t, x.run(), "%s", x.out)
			require.Contains(t, x.out, "Moved: 2 devices,")
			require.Equal(t, []string{"lab"}, x.device(tagged).Tags)
			queue := x.device(queued).Channel.Queue
			require.Equal(t, "NEW", queue[len(queue)-1].CommandUUID)
			require.Zero(t, x.run("-check"), "%s", x.out)
		})
	}
}

// With -history none the finished rows and their commands stay behind.
func TestOwnWithoutHistory(t *testing.T) {
	f := newFleet(t, 2)
	kind, dsn := f.writeOwn(t, engine(t, "sqlite"), sqlstore.Config{})
	x := newTrial(t, kind, dsn, "-history", "none")
	require.Zero(t, x.run(), "%s", x.out)
	for _, item := range x.device(f.devices[0].Channel.ID).Channel.Queue {
		require.False(t, item.State.Terminal())
	}
	commands, err := x.store().ExportCommands(t.Context(), "", 100)
	require.NoError(t, err)
	require.Len(t, commands, 3)
}

// Secrets are opened with the source's keys and sealed with the target's. A
// value that is damaged is reported by its key.
func TestOwnSealed(t *testing.T) {
	write := func(name, key string) (string, storage.Sealer) {
		path := filepath.Join(t.TempDir(), name)
		require.NoError(t, os.WriteFile(path, []byte(key), 0o600))
		keys, err := sealKeys(path)
		require.NoError(t, err)
		return path, keys
	}
	oldFile, old := write("old", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n")
	newFile, current := write("new", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHiA=\n")
	f := newFleet(t, 6)
	fixture, dsn := sqlSource(t, "pgsql", "")
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "pgsql", DSN: dsn, Sealer: old, SealCommands: true, RecordActivityEvery: -1})
	require.NoError(t, err)
	f.store(t, store)
	require.NoError(t, store.Close())

	x := newTrial(t, "pgsql", dsn)
	require.Equal(t, exitFailure, x.run(), "%s", x.out)
	require.Contains(t, x.out, "give -source-seal-key-file")
	x.flags = append(x.flags, "-source-seal-key-file", oldFile)
	fixture.exec("UPDATE nano_devices SET token_update = unlock_token WHERE id = ?", f.devices[3].Channel.ID)
	fixture.exec("UPDATE nano_commands SET command = (SELECT command FROM nano_commands WHERE command_uuid = ?) WHERE command_uuid = ?", f.commands[0].UUID, f.commands[5].UUID)
	require.Equal(t, exitPartial, x.run("-seal-key-file", newFile), "%s", x.out)
	require.Contains(t, x.out, "left out: device "+f.devices[3].Channel.ID+": reading devices: a value of nano_devices.token_update")
	require.Contains(t, x.out, "left out: command "+f.commands[5].UUID+": a value of nano_commands.command")
	x.target.Sealer = current
	require.Equal(t, f.devices[0].UnlockToken.Value, x.device(f.devices[0].Channel.ID).UnlockToken.Value)
}

// A database that is not there stays so, and one of another release is refused.
func TestOwnIsOnlyRead(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing.db")
	x := newTrial(t, "sqlite", missing)
	require.Equal(t, exitFailure, x.run(), "%s", x.out)
	require.NoFileExists(t, missing)

	f := newFleet(t, 1)
	fixture, dsn := sqlSource(t, "pgsql", "")
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "pgsql", DSN: dsn, RecordActivityEvery: -1})
	require.NoError(t, err)
	f.store(t, store)
	require.NoError(t, store.Close())
	fixture.exec("DELETE FROM nano_schema WHERE version > 3")
	x = newTrial(t, "pgsql", dsn)
	require.Equal(t, exitFailure, x.run(), "%s", x.out)
	require.Contains(t, x.out, "use the nano2nano of the release that serves it")
}

// An old server takes the check-ins of this server's devices back.
func TestOwnToAnEndpoint(t *testing.T) {
	f := newFleet(t, 10)
	kind, dsn := f.writeOwn(t, engine(t, "sqlite"), sqlstore.Config{})
	endpoint := new(migrationEndpoint)
	address := serve(t, endpoint)
	x := newTrial(t, kind, dsn)
	require.Zero(t, x.run("-url", address, "-key", "secret"), "%s", x.out)
	for _, d := range f.devices {
		require.Contains(t, endpoint.sent(), "Authenticate "+d.Channel.ID+"\n")
	}
}
