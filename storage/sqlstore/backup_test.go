package sqlstore

import (
	"bytes"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// A backup has every table and every column that the database does not
// compute.
func TestBackupSchemaIsWhole(t *testing.T) {
	s, err := Open(t.Context(), Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "mdm.db")})
	require.NoError(t, err)
	defer s.Close()
	tables, err := backupSchema()
	require.NoError(t, err)
	columns := make(map[string][]string)
	for _, table := range tables {
		require.NotEmpty(t, table.Key, table.Name)
		columns[table.Name] = table.names()
	}
	rows, err := s.db.Writer().QueryContext(t.Context(), `SELECT m.name, c.name FROM sqlite_master m, pragma_table_xinfo(m.name) c
WHERE m.type = 'table' AND c.hidden = 0 AND m.name NOT IN ('nano_schema', 'nano_migrations', 'nano_leases') AND m.name NOT LIKE 'sqlite%' ORDER BY m.name, c.cid`)
	require.NoError(t, err)
	defer rows.Close()
	want := make(map[string][]string)
	for rows.Next() {
		var table, column string
		require.NoError(t, rows.Scan(&table, &column))
		want[table] = append(want[table], column)
	}
	require.NoError(t, rows.Err())
	require.Equal(t, want, columns)
	for _, sealed := range sealedTables(true) {
		for _, column := range sealed.columns {
			require.Contains(t, columns[sealed.name], column[len(sealed.name)+1:])
		}
	}
}

// Whatever a file holds, it is a whole backup or ErrBackup, and costs memory
// by what is in it.
func FuzzCheckBackup(f *testing.F) {
	var file bytes.Buffer
	cfg := Config{Driver: "sqlite", DSN: filepath.Join(f.TempDir(), "mdm.db")}
	s, err := Open(f.Context(), cfg)
	require.NoError(f, err)
	require.NoError(f, s.Close())
	_, err = Backup(f.Context(), cfg, &file, BackupOptions{})
	require.NoError(f, err)
	f.Add(file.Bytes())
	f.Add([]byte(backupMagic))
	f.Add(file.Bytes()[:file.Len()-8])
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _, err := CheckBackup(bytes.NewReader(data))
		if err != nil {
			require.ErrorIs(t, err, ErrBackup)
		}
	})
}
