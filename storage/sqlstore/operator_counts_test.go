package sqlstore_test

import (
	"context"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

func TestWaitingCounts(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
			cfg := engine.Config(t)
			cfg.Now = func() time.Time { return now }
			var commits []int
			cfg.Committed = func(messages int) { commits = append(commits, messages) }
			store, err := sqlstore.Open(t.Context(), cfg)
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, store.Close()) })

			waiting, err := store.WaitingCounts(t.Context())
			require.NoError(t, err)
			require.Equal(t, sqlstore.WaitingCounts{Waiting: map[storage.State]sqlstore.Backlog{
				storage.Scheduled: {}, storage.Queued: {}, storage.NotNow: {},
			}}, waiting)

			enroll := mdm.EnrollID{ID: "D1", Type: mdm.Device}
			src := storage.Source{Enroll: enroll, Pin: &storage.Pin{Hash: "aa", Certificate: []byte{1}, NotAfter: now.Add(24 * time.Hour)}}
			_, err = store.Apply(t.Context(), &storage.Authenticate{Src: src, Message: &mdm.Authenticate{Topic: "t", Raw: []byte("x")}})
			require.NoError(t, err)
			_, err = store.Apply(t.Context(), &storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{Topic: "t", PushMagic: "m", Token: []byte{1}, Raw: []byte("x")}})
			require.NoError(t, err)
			for _, uuid := range []string{"C1", "C2"} {
				command, err := mdm.DecodeCommand(mdmtest.NewCommand(uuid, "ProfileList", nil))
				require.NoError(t, err)
				failed, err := store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command, IDs: []string{"D1"}})
				require.NoError(t, err)
				require.Empty(t, failed)
				now = now.Add(time.Minute)
			}
			waiting, err = store.WaitingCounts(t.Context())
			require.NoError(t, err)
			require.Equal(t, sqlstore.Backlog{Count: 2, Oldest: now.Add(-2 * time.Minute)}, waiting.Waiting[storage.Queued])
			require.EqualValues(t, 1, waiting.PushesOwed)

			counts, err := store.CertificatesExpiring(t.Context(), now, now.Add(48*time.Hour))
			require.NoError(t, err)
			require.Equal(t, []int64{0, 1}, counts)
			next, err := store.NextCertificateExpiry(t.Context(), now)
			require.NoError(t, err)
			require.Equal(t, now.Add(-2*time.Minute).Add(24*time.Hour), next)
			next, err = store.NextCertificateExpiry(t.Context(), now.Add(25*time.Hour))
			require.NoError(t, err)
			require.Zero(t, next)

			require.Positive(t, store.Stats().Statements)
			require.Equal(t, []int{1, 1}, commits)
			require.Contains(t, store.Pools(), "write")
		})
	}
}

func TestHeldLeases(t *testing.T) {
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: ":memory:"})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	require.Empty(t, store.Stats().Leases)
	seen, err := store.PeekLease(t.Context(), "push")
	require.NoError(t, err)
	mine, err := store.TakeLease(t.Context(), seen, "me")
	require.NoError(t, err)
	require.Equal(t, []string{"push"}, store.Stats().Leases)
	store.StandStillForTest(15 * time.Second)
	require.Empty(t, store.Stats().Leases, "another may have it by now")
	mine, err = store.RenewLease(t.Context(), mine)
	require.NoError(t, err)
	require.Equal(t, []string{"push"}, store.Stats().Leases)
	_, err = store.TakeLease(t.Context(), mine, "another")
	require.NoError(t, err)
	_, err = store.RenewLease(t.Context(), mine)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	require.Empty(t, store.Stats().Leases)
}

func TestOpenSaysWhetherWaitingHelps(t *testing.T) {
	for _, c := range []struct {
		driver, dsn string
		waiting     bool
	}{
		{"pgsql", "postgres://u:p@127.0.0.1:1/x", true},
		{"mysql", "u:p@tcp(127.0.0.1:1)/x", true},
		{"pgsql", "postgres://u:p@h:port/x", false},
		{"mysql", "no DSN", false},
		{"sqlite", "/no/such/folder/x.db", false},
		{"oracle", "x", false},
	} {
		_, err := sqlstore.Open(context.Background(), sqlstore.Config{Driver: c.driver, DSN: c.dsn})
		require.Error(t, err)
		if c.waiting {
			require.ErrorIs(t, err, storage.ErrUnavailable, c.dsn)
		} else {
			require.NotErrorIs(t, err, storage.ErrUnavailable, c.dsn)
		}
	}
}

// A count of enrollments that took long is kept for a while.
func TestHeadcountIsKept(t *testing.T) {
	now, step := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC), time.Duration(0)
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: ":memory:", RecordActivityEvery: -1, Now: func() time.Time {
		now = now.Add(step)
		return now
	}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	enroll := func(id string) {
		src := storage.Source{Enroll: mdm.EnrollID{ID: id, Type: mdm.Device}}
		_, err = store.Apply(t.Context(), &storage.Authenticate{Src: src, Message: &mdm.Authenticate{Topic: "t", Raw: []byte("x")}})
		require.NoError(t, err)
		_, err = store.Apply(t.Context(), &storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{Topic: "t", PushMagic: "m", Token: []byte{1}, Raw: []byte("x")}})
		require.NoError(t, err)
	}
	expect := func(n int64) {
		t.Helper()
		st, err := store.Statistics(t.Context(), storage.Scope{})
		require.NoError(t, err)
		require.Equal(t, n, st.Enabled)
		stranded, err := store.StrandedEnrollments(t.Context())
		require.NoError(t, err)
		require.Equal(t, map[string]int64{"t": n}, stranded)
	}
	enroll("D1")
	expect(1)
	enroll("D2")
	expect(2)
	step = 200 * time.Millisecond // a tick is what counting takes
	expect(2)
	step = 0
	enroll("D3")
	expect(2)
	now = now.Add(time.Minute)
	expect(3)
}
