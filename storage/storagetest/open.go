package storagetest

import (
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func openTests() []subtest {
	return []subtest{
		{"a migrated database opens again", openAgain},
		{"replicas that start at once migrate once", openAtOnce},
		{"a migration that was interrupted is resumed", openInterrupted},
		{"a step that was done and not recorded is repeated", openUnrecorded},
		{"a database of a much newer release is refused", openNewer},
		{"a database of the next release is served", openNext},
		{"checksums of migrations are recorded, and others refused", openEdited},
		{"tables of NanoMDM are refused", openForeign},
		{"identifiers are compared byte for byte", openBinary},
		{"identifiers sort as Go sorts them", openSorted},
	}
}

func openAgain(t *testing.T, h *Harness) {
	require.NoError(t, h.Store.Ping(t.Context()))
	second := h.Open(t, nil)
	require.NoError(t, second.Ping(t.Context()))
	require.NoError(t, h.Store.Close())
	require.Error(t, h.Store.Ping(t.Context()))
	require.NoError(t, second.Ping(t.Context()))
}

// unmigrated gives the harness a new database without tables. Its Store keeps
// the old one.
func (h *Harness) unmigrated(t *testing.T) {
	t.Helper()
	h.shared(t)
	h.cfg, h.db = h.Engine.Unmigrated(t), nil
}

func openAtOnce(t *testing.T, h *Harness) {
	h.unmigrated(t)
	stores := make([]*sqlstore.Store, 4)
	errs := make([]error, len(stores))
	var wg sync.WaitGroup
	for i := range stores {
		wg.Go(func() { stores[i], errs[i] = sqlstore.Open(t.Context(), h.cfg) })
	}
	wg.Wait()
	for i, s := range stores {
		require.NoError(t, errs[i])
		require.NoError(t, s.Ping(t.Context()))
		require.NoError(t, s.Close())
	}
	require.Equal(t, "", h.Strings(t, "SELECT holder FROM nano_leases WHERE name = 'schema'")[0], "the lease was released")
}

func openInterrupted(t *testing.T, h *Harness) {
	h.unmigrated(t)
	require.NoError(t, h.Open(t, nil).Close())
	steps := h.Int(t, "SELECT COUNT(*) FROM nano_schema")
	h.Exec(t, "DROP TABLE nano_command_results")
	h.Exec(t, "DROP TABLE nano_push_certs")
	h.Exec(t, "DELETE FROM nano_schema WHERE step > 5")
	store := h.Open(t, nil)
	require.NoError(t, store.Ping(t.Context()))
	require.Equal(t, steps, h.Int(t, "SELECT COUNT(*) FROM nano_schema"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_push_certs"))
}

func openUnrecorded(t *testing.T, h *Harness) {
	h.unmigrated(t)
	require.NoError(t, h.Open(t, nil).Close())
	steps := h.Int(t, "SELECT COUNT(*) FROM nano_schema")
	h.Exec(t, "DELETE FROM nano_schema")
	require.NoError(t, h.Open(t, nil).Ping(t.Context()))
	require.Equal(t, steps, h.Int(t, "SELECT COUNT(*) FROM nano_schema"))
}

func openNewer(t *testing.T, h *Harness) {
	h.unmigrated(t)
	store := h.Open(t, nil)
	h.Exec(t, "INSERT INTO nano_schema (version, step, applied_at) VALUES (9998, -1, 0), (9998, 1, 0), (9999, -1, 0), (9999, 1, 0)")
	require.ErrorContains(t, store.Ping(t.Context()), "9999")
	_, err := sqlstore.Open(t.Context(), h.cfg)
	require.ErrorContains(t, err, "newer version")
}

// openNext: the next release expands the schema, and replicas of this one go on
// beside it and may be started again.
func openNext(t *testing.T, h *Harness) {
	h.unmigrated(t)
	store := h.Open(t, nil)
	known := h.Int(t, "SELECT MAX(version) FROM nano_schema")
	require.False(t, store.Stats().SchemaNewer)
	h.Exec(t, "ALTER TABLE nano_enrollments ADD COLUMN next_release BIGINT")
	h.Exec(t, "INSERT INTO nano_schema (version, step, applied_at) VALUES (?, -1, 0), (?, 1, 0), (?, 1, 0)", known+1, known+1, known+2)
	h.Exec(t, "INSERT INTO nano_migrations (version, checksum, recorded_at) VALUES (?, 'of the next release', 0)", known+1)
	require.NoError(t, store.Ping(t.Context()))
	require.True(t, store.Stats().SchemaNewer)
	again := h.Open(t, nil)
	require.NoError(t, again.Ping(t.Context()))
	require.True(t, again.Stats().SchemaNewer)
	h.Store = again
	h.Enroll(t, "D")
	h.enqueue(t, []string{"D"}, "C")
	require.Equal(t, "C", h.device("D").polls(t))

	h.Exec(t, "INSERT INTO nano_schema (version, step, applied_at) VALUES (?, 0, 0)", known+1)
	require.ErrorIs(t, again.Ping(t.Context()), sqlstore.ErrSchema, "what that migration takes away is in use here")
	_, err := sqlstore.Open(t.Context(), h.cfg)
	require.ErrorContains(t, err, "newer version")
}

func openEdited(t *testing.T, h *Harness) {
	h.unmigrated(t)
	require.NoError(t, h.Open(t, nil).Close())
	const sums = "SELECT checksum FROM nano_migrations ORDER BY version"
	want := h.Strings(t, sums)
	require.NotEmpty(t, want)
	require.EqualValues(t, len(want), h.Int(t, "SELECT COUNT(DISTINCT version) FROM nano_schema"))
	h.Exec(t, "DELETE FROM nano_migrations") // as a database from before checksums has it
	require.NoError(t, h.Open(t, nil).Close())
	require.Equal(t, want, h.Strings(t, sums))
	h.Exec(t, "UPDATE nano_migrations SET checksum = 'edited' WHERE version = 1")
	_, err := sqlstore.Open(t.Context(), h.cfg)
	require.ErrorContains(t, err, "its migration 1 has checksum edited")
}

func openForeign(t *testing.T, h *Harness) {
	for _, table := range []string{"enrollments", "nano_enrollments", "cert_auth_associations"} {
		h.unmigrated(t)
		h.Exec(t, "CREATE TABLE "+table+" (id VARCHAR(10))")
		_, err := sqlstore.Open(t.Context(), h.cfg)
		require.ErrorContains(t, err, table)
		require.ErrorContains(t, err, "nano2nano")
	}
}

func openBinary(t *testing.T, h *Harness) {
	ids := []string{"X", "X ", "x", "X\t", "é", "e", "É", "ß", "ss"}
	for _, id := range ids {
		h.Exec(t, "INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES (?, 1)", id)
	}
	for _, id := range ids {
		require.Equal(t, []string{id}, h.Strings(t, "SELECT id FROM nano_enrollment_activity WHERE id = ?", id))
	}
}

func openSorted(t *testing.T, h *Harness) {
	sorted := []string{"", " ", "-1", "A", "B", "Z", "Z ", "_", "a", "a-", "aa", "z", "é", "ａ", "𝄞"}
	for i := range sorted {
		id := sorted[(i*7)%len(sorted)]
		h.Exec(t, "INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES (?, 1)", id)
	}
	require.Equal(t, sorted, h.Strings(t, "SELECT id FROM nano_enrollment_activity ORDER BY id"))
}
