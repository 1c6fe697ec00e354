package sqldb

import (
	"context"
	"maps"
	"path/filepath"
	"slices"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
)

// testMigrations are the migrations of some files, without other processes.
func testMigrations(files map[string]string) *Migrations {
	m := &Migrations{
		Files:  fstest.MapFS{},
		Refuse: func([]string) error { return nil },
		Hold: func(ctx context.Context, work func(context.Context, func(context.Context, *Tx) error) error) error {
			return work(ctx, func(context.Context, *Tx) error { return nil })
		},
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		m.Files.(fstest.MapFS)[name] = &fstest.MapFile{Data: []byte(files[name])}
		m.Checksums = append(m.Checksums, Checksum([]byte(files[name])))
	}
	return m
}

func TestChecksumFreezesMigrations(t *testing.T) {
	m := testMigrations(map[string]string{"0001_first.sql": "CREATE TABLE a (b BIGINT);\n"})
	require.NoError(t, m.Check())
	files := m.Files.(fstest.MapFS)

	files["0001_first.sql"].Data = []byte("CREATE TABLE a (b BIGINT);\r\n")
	require.NoError(t, m.Check(), "line ends of another system")

	files["0001_first.sql"].Data = []byte("CREATE TABLE a (c BIGINT);\n")
	require.ErrorContains(t, m.Check(), "0001_first.sql was edited")

	m.Checksums = nil
	require.ErrorContains(t, m.Check(), "no checksum in the code: it is "+Checksum(files["0001_first.sql"].Data))

	m = testMigrations(map[string]string{"0002_second.sql": "CREATE TABLE a (b BIGINT);\n"})
	require.ErrorContains(t, m.Check(), "number 0001 is next")

	m.Checksums = append(m.Checksums, "one that has no file")
	require.Error(t, m.Check())
}

// TestMigrateRefusesEdited: a database remembers the text that made it, also
// where code and checksum were edited alike.
func TestMigrateRefusesEdited(t *testing.T) {
	cfg := Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "test.db")}
	migrate := func(m *Migrations) error {
		db, err := Open(t.Context(), cfg)
		require.NoError(t, err)
		defer db.Close()
		return db.Migrate(t.Context(), m)
	}
	first := map[string]string{"0001_first.sql": "CREATE TABLE a (b BIGINT);\n"}
	require.NoError(t, migrate(testMigrations(first)))
	require.NoError(t, migrate(testMigrations(first)), "again")

	edited := map[string]string{"0001_first.sql": "CREATE TABLE a (c BIGINT);\n"}
	require.ErrorContains(t, migrate(testMigrations(edited)), "migration 1 has checksum")

	broken := testMigrations(edited)
	broken.Checksums = testMigrations(first).Checksums
	require.ErrorContains(t, migrate(broken), "0001_first.sql was edited")

	first["0002_second.sql"] = "ALTER TABLE a ADD COLUMN c BIGINT;\n"
	require.NoError(t, migrate(testMigrations(first)), "a new file is no edit")
	before := testMigrations(map[string]string{"0001_first.sql": first["0001_first.sql"]})
	require.NoError(t, migrate(before), "the release before goes on")
}

// TestReleases: a program serves the schema of the next release, of however many
// migrations, and not that of the release after it.
func TestReleases(t *testing.T) {
	cfg := Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "test.db")}
	db, err := Open(t.Context(), cfg)
	require.NoError(t, err)
	defer db.Close()
	files := map[string]string{"0001_first.sql": "CREATE TABLE a (b BIGINT);\n"}
	first := testMigrations(files)
	require.NoError(t, db.Migrate(t.Context(), first))
	files["0002_second.sql"] = "-- Why it is.\n-- release\nALTER TABLE a ADD COLUMN c BIGINT;\n"
	files["0003_third.sql"] = "ALTER TABLE a ADD COLUMN d BIGINT;\n-- release\n"
	next := testMigrations(files)
	require.NoError(t, db.Migrate(t.Context(), next))
	require.NoError(t, db.Migrate(t.Context(), first), "the release before goes on")
	files["0004_fourth.sql"] = "-- release\nALTER TABLE a ADD COLUMN e BIGINT;\n"
	require.NoError(t, db.Migrate(t.Context(), testMigrations(files)))
	require.NoError(t, db.Migrate(t.Context(), next))
	require.ErrorIs(t, db.Migrate(t.Context(), first), ErrNewer)
}

// TestContract: the release before a migration that takes something away is
// refused as soon as that has begun.
func TestContract(t *testing.T) {
	cfg := Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "test.db")}
	db, err := Open(t.Context(), cfg)
	require.NoError(t, err)
	defer db.Close()
	files := map[string]string{"0001_first.sql": "CREATE TABLE a (b BIGINT, c BIGINT);\n"}
	before := testMigrations(files)
	require.NoError(t, db.Migrate(t.Context(), before))
	files["0002_second.sql"] = "-- contract\n-- It breaks.\nALTER TABLE a DROP COLUMN missing;\n"
	require.Error(t, db.Migrate(t.Context(), testMigrations(files)))
	require.ErrorIs(t, db.Migrate(t.Context(), before), ErrNewer)

	files["0002_second.sql"] = "-- contract\nALTER TABLE a DROP COLUMN c;\n"
	after := testMigrations(files)
	require.NoError(t, db.Migrate(t.Context(), after))
	require.NoError(t, db.Migrate(t.Context(), after), "again")
	require.ErrorIs(t, db.Migrate(t.Context(), before), ErrNewer)
}
