package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
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
