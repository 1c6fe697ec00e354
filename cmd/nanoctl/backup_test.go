package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

func TestBackupAndRestore(t *testing.T) {
	dir := t.TempDir()
	from, to, file, keys := filepath.Join(dir, "from.db"), filepath.Join(dir, "to.db"), filepath.Join(dir, "backup"), filepath.Join(dir, "keys")
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: from})
	require.NoError(t, err)
	defer store.Close() // it is open meanwhile
	require.NoError(t, store.PutEventSink(t.Context(), storage.EventSink{Name: "S", URL: "https://sink", Keys: []string{"secret"}, Enabled: true}))
	require.NoError(t, os.WriteFile(keys, []byte("AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=\n"), 0o600))
	o := newOperator(t)

	r := o.run("", "backup", "-storage-dsn", from, file)
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.err, "give -seal-key-file, or -plain-secrets")
	require.NoFileExists(t, file)

	r = o.run("", "backup", "-storage-dsn", from, "-seal-key-file", keys, file)
	require.Zero(t, r.code, r.err)
	info, err := os.Stat(file)
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode())

	r = o.run("", "restore", "-check", file)
	require.Zero(t, r.code, r.err)
	require.Contains(t, r.out, "sqlite")
	require.NotContains(t, r.out, "none", "it names the key")
	r = o.run("", "restore", "-storage-dsn", to, file)
	require.Zero(t, r.code, r.err)
	_, err = sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: to})
	require.ErrorIs(t, err, storage.ErrNotSealing)
	r = o.run("", "restore", "-storage-dsn", to, file)
	require.Equal(t, exitFailure, r.code)
	require.Contains(t, r.err, "not empty")

	r = o.run("", "backup", file)
	require.Equal(t, exitUsage, r.code)
	require.Contains(t, r.err, "-storage-dsn")
}

// fillDatabase makes an SQLite database with many rows in several tables.
func fillDatabase(t *testing.T) sqlstore.Config {
	t.Helper()
	cfg := sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "from.db")}
	store, err := sqlstore.Open(t.Context(), cfg)
	require.NoError(t, err)
	defer func() { require.NoError(t, store.Close()) }()
	var commands []storage.CommandRecord
	for n := range 300 {
		uuid := fmt.Sprintf("C-%04d", n)
		commands = append(commands, storage.CommandRecord{UUID: uuid, RequestType: "ProfileList", Raw: mdmtest.NewCommand(uuid, "ProfileList", nil), CreatedAt: time.Unix(1_760_000_000, 0)})
	}
	_, err = store.ImportCommands(t.Context(), commands)
	require.NoError(t, err)
	for page := range 6 {
		var devices []*storage.DeviceRecord
		for n := range 50 {
			d := &storage.DeviceRecord{SerialNumber: "S", Authenticate: storage.Checkin{Raw: []byte("authenticate"), At: time.Unix(1_760_000_000, 0)}}
			d.Channel = storage.ChannelRecord{ID: fmt.Sprintf("D-%02d-%02d", page, n), Type: mdm.Device, Topic: "topic", Enabled: true}
			for q := range 10 {
				d.Channel.Queue = append(d.Channel.Queue, storage.ItemRecord{CommandUUID: commands[(n+q)%len(commands)].UUID, State: storage.Queued, CreatedAt: time.Unix(1_760_000_000, 0)})
			}
			devices = append(devices, d)
		}
		_, err := store.ImportDevices(t.Context(), devices)
		require.NoError(t, err)
	}
	return cfg
}

// A restore is killed again and again, each time somewhat later, until one run
// ends: the database is the one that was backed up.
func TestRestoreIsKilled(t *testing.T) {
	from := fillDatabase(t)
	_, want := storagetest.Contents(t, from)
	file := filepath.Join(t.TempDir(), "backup")
	r := newOperator(t).run("", "backup", "-storage-dsn", from.DSN, "-plain-secrets", file)
	require.Zero(t, r.code, r.err)
	program, err := exec.LookPath("nanoctl") // this test's own, by TestMain
	require.NoError(t, err)
	for _, e := range storagetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) {
			to := e.Config(t)
			// The schema is there, as after a migration that was killed the next
			// one waits for the lease.
			store, err := sqlstore.Open(t.Context(), to)
			require.NoError(t, err)
			require.NoError(t, store.Close())
			kills := 0
			for after := 20 * time.Millisecond; ; after += after / 3 {
				require.Less(t, after, 10*time.Minute)
				ctx, cancel := context.WithTimeout(t.Context(), after) // its end kills the program
				out, err := exec.CommandContext(ctx, program, "restore", "-storage", to.Driver, "-storage-dsn", to.DSN, file).CombinedOutput()
				killed := ctx.Err() != nil
				cancel()
				// It may be killed after its last line, on its way out.
				if err == nil || strings.Contains(string(out), "seal keys") {
					break
				}
				require.True(t, killed, "%v: %s", err, out)
				kills++
			}
			t.Logf("killed %d times", kills)
			require.Positive(t, kills)
			_, got := storagetest.Contents(t, to)
			require.True(t, want == got)
			store, err = sqlstore.Open(t.Context(), to)
			require.NoError(t, err)
			require.NoError(t, store.Close())
		})
	}
}
