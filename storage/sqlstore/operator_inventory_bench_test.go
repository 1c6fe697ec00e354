package sqlstore_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// BenchmarkLists times a page of each filter and list in a large database:
//
//	NANOMDM_BENCH_STORAGE=pgsql NANOMDM_BENCH_DSN=postgres://.../empty \
//	NANOMDM_BENCH_ENROLLMENTS=1000000 go test ./storage/sqlstore -run '^$' -bench Lists -timeout 2h
//
// The database gets as many enrollments as are asked for and ten queue rows for
// each, unless an earlier run filled it; it is left as it is. Without the
// variables it is a file of SQLite with 20,000 enrollments.
func BenchmarkLists(b *testing.B) {
	cfg := sqlstore.Config{Driver: os.Getenv("NANOMDM_BENCH_STORAGE"), DSN: os.Getenv("NANOMDM_BENCH_DSN")}
	if cfg.Driver == "" {
		cfg = sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(b.TempDir(), "bench.db")}
	}
	enrollments := 20_000
	if text := os.Getenv("NANOMDM_BENCH_ENROLLMENTS"); text != "" {
		var err error
		enrollments, err = strconv.Atoi(text)
		require.NoError(b, err)
	}
	store, err := sqlstore.Open(b.Context(), cfg)
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, store.Close()) })
	fillLists(b, store, cfg.Driver, enrollments)

	page := func(f storage.EnrollmentFilter, after storage.EnrollmentKey) func(b *testing.B) {
		return func(b *testing.B) {
			found := 0
			for b.Loop() {
				ids, _, err := store.FindEnrollments(b.Context(), storage.Scope{}, f, after, 100)
				require.NoError(b, err)
				list, err := store.Enrollments(b.Context(), storage.Scope{}, ids)
				require.NoError(b, err)
				found = len(list)
			}
			b.ReportMetric(float64(found), "items")
		}
	}
	all := map[string]storage.EnrollmentFilter{
		"none": {}, "type=Shared iPad": {Type: mdm.SharediPad}, "enabled=true": {Enabled: new(true)}, "enabled=false": {Enabled: new(false)},
		"topic": {Topic: "rare"}, "serial": {Serial: "S7"}, "user": {User: "rare"}, "model": {Model: "rare"}, "os_version": {OSVersion: "rare"},
		"last_seen_before": {LastSeenBefore: time.UnixMicro(1000)}, "last_seen_after": {LastSeenAfter: time.UnixMicro(1000)},
		"waiting=true": {Waiting: new(true)}, "waiting=false": {Waiting: new(false)},
		"push_status=owed": {Push: storage.PushOwed}, "push_status=unanswered": {Push: storage.PushUnanswered},
		"push_status=refused": {Push: storage.PushRefused}, "push_status=token_dead": {Push: storage.PushTokenDead},
		"certificate_expires_before": {CertificateExpiresBefore: time.UnixMicro(1000)},
		"topic and nothing fits":     {Topic: "usual", Type: mdm.User},
	}
	for _, name := range sortedKeys(all) {
		b.Run("filter/"+name, page(all[name], storage.EnrollmentKey{}))
	}
	b.Run("filter/none, in the middle", page(storage.EnrollmentFilter{}, storage.EnrollmentKey{By: "id", Key: "D5"}))
	b.Run("filter/last_seen_after, in the middle", page(storage.EnrollmentFilter{LastSeenAfter: time.UnixMicro(1)},
		storage.EnrollmentKey{By: "nano_enrollment_activity_last_seen_at", At: time.UnixMicro(int64(enrollments) / 2), Key: "D"}))

	run := func(name string, call func() error) {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				require.NoError(b, call())
			}
		})
	}
	commands := func(f storage.CommandFilter) func() error {
		return func() error {
			_, _, err := store.FindCommands(b.Context(), storage.Scope{}, f, storage.CommandKey{}, 100)
			return err
		}
	}
	run("commands/none", commands(storage.CommandFilter{}))
	run("commands/request_type", commands(storage.CommandFilter{RequestType: "rare"}))
	run("commands/state=queued", commands(storage.CommandFilter{State: storage.Queued}))
	run("commands/created_before", commands(storage.CommandFilter{CreatedBefore: time.UnixMicro(500)}))
	run("command/of all enrollments", func() error {
		_, err := store.Command(b.Context(), storage.Scope{}, "ALL")
		return err
	})
	run("command/a page of its enrollments", func() error {
		_, err := store.CommandItems(b.Context(), storage.Scope{}, "ALL", 0, "D5", 100)
		return err
	})
	run("command/waits", func() error {
		_, err := store.CommandWaits(b.Context(), storage.Scope{}, "ALL")
		return err
	})
	run("queue", func() error {
		_, err := store.Queue(b.Context(), storage.Scope{}, "D7", 0, storage.QueueKey{}, 100)
		return err
	})
	run("statistics", func() error {
		_, err := store.Statistics(b.Context(), storage.Scope{})
		return err
	})
}

func sortedKeys[V any](m map[string]V) (keys []string) {
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// fillLists makes enrollments with ten queue rows each. One enrollment in a
// thousand is rare in all that can be asked for. All is made by the database
// itself, in stretches, and indexes are built afterwards.
func fillLists(b *testing.B, store *sqlstore.Store, driver string, enrollments int) {
	b.Helper()
	_, err := store.Command(b.Context(), storage.Scope{}, "ALL")
	if err == nil {
		return
	}
	require.ErrorIs(b, err, storage.ErrNotFound)
	exec := func(q string) {
		b.Helper()
		require.NoError(b, store.ExecForTest(b.Context(), q), q)
	}
	began := time.Now()
	drop, create := store.IndexesForTest()
	for _, q := range drop {
		exec(q)
	}
	const stretch = 10_000
	exec("CREATE TABLE bench_numbers (n BIGINT NOT NULL PRIMARY KEY)")
	for from := 0; from < stretch; from += 1000 {
		q := fmt.Sprintf("INSERT INTO bench_numbers (n) VALUES (%d)", from)
		for i := 1; i < 1000; i++ {
			q += fmt.Sprintf(", (%d)", from+i)
		}
		exec(q)
	}
	for from := 0; from < enrollments; from += stretch {
		// i is the number of an enrollment; the rare ones end in 007.
		numbers := fmt.Sprintf("(SELECT %d + n AS i, n %% 1000 AS n FROM bench_numbers) x", from)
		word := "CASE WHEN n = 7 THEN 'rare' ELSE 'usual' END"
		for _, q := range []string{
			`INSERT INTO nano_devices (id, serial_number, model, model_name, product_name, os_version, authenticate, authenticate_at, created_at, updated_at)
SELECT CONCAT('D', i), CONCAT('S', i), ` + word + `, ` + word + `, ` + word + `, ` + word + `, '', 1, 1, 1 FROM ` + numbers,
			`INSERT INTO nano_users (id, device_id, user_id, user_short_name, created_at, updated_at)
SELECT CONCAT('D', i), CONCAT('D', i), CONCAT('U', i), ` + word + `, 1, 1 FROM ` + numbers,
			`INSERT INTO nano_enrollments (id, device_id, type, topic, enabled, created_at, updated_at)
SELECT CONCAT('D', i), CONCAT('D', i), CASE WHEN n = 7 THEN 'Shared iPad' ELSE 'Device' END, ` + word + `, CASE WHEN n = 7 THEN 0 ELSE 1 END, 1, 1 FROM ` + numbers,
			`INSERT INTO nano_enrollment_push (id, last_seq, owed_seq, paid_seq, push_at, last_push_at, last_push_class, token_dead_at)
SELECT CONCAT('D', i), 10, 10, CASE WHEN n IN (7, 8) THEN 9 ELSE 10 END, CASE WHEN n IN (7, 8, 9) THEN i + 1 ELSE NULL END, i + 5,
CASE WHEN n = 7 THEN 'token_dead' WHEN n = 8 THEN 'retry_later' ELSE 'accepted' END, CASE WHEN n = 7 THEN 1 ELSE NULL END FROM ` + numbers,
			`INSERT INTO nano_enrollment_activity (id, last_seen_at) SELECT CONCAT('D', i), i + 1 FROM ` + numbers,
			`INSERT INTO nano_cert_auth_associations (sha256, id, not_after, created_at, retired_at) SELECT CONCAT('live', i), CONCAT('D', i), i + 1, 1, NULL FROM ` + numbers,
			`INSERT INTO nano_cert_auth_associations (sha256, id, not_after, created_at, retired_at) SELECT CONCAT('dead', i), CONCAT('D', i), 1, 1, 2 FROM ` + numbers,
			`INSERT INTO nano_enrollment_queue (id, command_uuid, seq, state, created_at, finished_at)
SELECT CONCAT('D', i), CASE WHEN c.n = 0 THEN 'ALL' ELSE CONCAT('C', x.n * 10 + c.n) END, c.n + 1, CASE WHEN x.n IN (7, 8, 9) AND c.n > 6 THEN 2 ELSE 10 END, i + 1,
CASE WHEN x.n IN (7, 8, 9) AND c.n > 6 THEN NULL ELSE i + 2 END FROM ` + numbers + ` CROSS JOIN (SELECT n FROM bench_numbers WHERE n < 10) c`,
		} {
			exec(q)
		}
	}
	exec(`INSERT INTO nano_commands (command_uuid, request_type, command, created_at)
SELECT CONCAT('C', n), CASE WHEN n % 1000 = 7 THEN 'rare' ELSE 'usual' END, '', n FROM bench_numbers`)
	for _, q := range create {
		exec(q)
	}
	for _, table := range []string{"nano_devices", "nano_users", "nano_enrollments", "nano_enrollment_push", "nano_enrollment_activity",
		"nano_cert_auth_associations", "nano_enrollment_queue", "nano_commands"} {
		exec(map[string]string{"sqlite": "ANALYZE ", "pgsql": "VACUUM ANALYZE ", "mysql": "ANALYZE TABLE "}[driver] + table)
	}
	// Last, since it says that all is there.
	exec("INSERT INTO nano_commands (command_uuid, request_type, command, created_at) VALUES ('ALL', 'usual', '', 1)")
	b.Logf("%d enrollments with 10 queue rows each were made in %v", enrollments, time.Since(began).Round(time.Second))
}
