package sqlstore_test

import (
	"database/sql"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

func TestOpenRefuses(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  sqlstore.Config
		want string
	}{
		{"no DSN", sqlstore.Config{Driver: "sqlite"}, "Config.DSN is empty"},
		{"no driver", sqlstore.Config{DSN: "x"}, `Config.Driver ""`},
		{"unknown driver", sqlstore.Config{Driver: "oracle", DSN: "x"}, `"oracle"`},
		{"a directory that is not there", sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "no", "such.db")}, "opening the file"},
		{"a DSN that cannot be read", sqlstore.Config{Driver: "pgsql", DSN: "host=x password=hunter2 port=nonsense"}, "not a PostgreSQL URL"},
		{"a MySQL DSN that cannot be read", sqlstore.Config{Driver: "mysql", DSN: "u:hunter2@tcp(x)nonsense"}, "is not user:password@tcp("},
		{"nobody listens", sqlstore.Config{Driver: "mysql", DSN: "u:hunter2@tcp(127.0.0.1:1)/x"}, "connecting"},
		{"nobody listens there either", sqlstore.Config{Driver: "pgsql", DSN: "postgres://u:hunter2@127.0.0.1:1/x"}, "connecting"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := sqlstore.Open(t.Context(), tc.cfg)
			require.ErrorContains(t, err, tc.want)
			require.NotContains(t, err.Error(), "hunter2")
		})
	}
}

// A text of several statements goes on in autocommit when another node of a
// Galera cluster aborts its transaction between two of them, and COMMIT is
// confirmed. So connections to MariaDB refuse such texts.
func TestMariaDBTakesNoTextOfSeveralStatements(t *testing.T) {
	for _, e := range storagetest.Engines(t) {
		if e.Name != "mariadb" {
			continue
		}
		s, err := sqlstore.Open(t.Context(), e.Config(t))
		require.NoError(t, err)
		defer s.Close()
		err = s.ExecForTest(t.Context(), "DO 1; DO 2")
		require.ErrorContains(t, err, "1064")
	}
}

// TestSettings looks at what correctness needs of every connection.
func TestSettings(t *testing.T) {
	want := map[string]map[string]string{
		"sqlite": {
			"PRAGMA journal_mode": "wal", "PRAGMA synchronous": "2", "PRAGMA foreign_keys": "1", "PRAGMA busy_timeout": "10000",
		},
		"memory": {"PRAGMA foreign_keys": "1"},
		"pgsql": {
			"SHOW server_encoding": "UTF8", "SHOW idle_in_transaction_session_timeout": "5s", "SHOW lock_timeout": "4s",
		},
		"mysql": {
			"SELECT @@transaction_isolation": "READ-COMMITTED", "SELECT @@collation_connection": "utf8mb4_0900_bin",
			"SELECT @@sql_mode": "STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION", "SELECT @@innodb_lock_wait_timeout": "4",
			"SELECT @@lock_wait_timeout": "10", "SELECT @@wait_timeout": "8",
		},
		"mariadb": {
			"SELECT @@tx_isolation": "READ-COMMITTED", "SELECT @@collation_connection": "utf8mb4_nopad_bin",
			"SELECT @@sql_mode": "STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION",
			"SELECT @@optimizer_switch LIKE '%subquery_cache=off%'": "1",
			"SELECT @@innodb_lock_wait_timeout":                     "4", "SELECT @@lock_wait_timeout": "10", "SELECT @@idle_transaction_timeout": "5",
		},
	}
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			for q, value := range want[engine.Name] {
				got, err := h.Store.SettingForTest(t.Context(), q)
				require.NoError(t, err, q)
				require.Equal(t, value, got, q)
			}
		})
	}
	t.Run("overridden", func(t *testing.T) {
		store, err := sqlstore.Open(t.Context(), sqlstore.Config{
			Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "a b%20#.db") + "?_pragma=synchronous(1)",
		})
		require.NoError(t, err)
		got, err := store.SettingForTest(t.Context(), "PRAGMA synchronous")
		require.NoError(t, err)
		require.Equal(t, "1", got)
		require.NoError(t, store.Close())
	})
}

// TestIdleTransactionsEnd: the server ends the transaction of a process that
// stands still in it, with its locks, as soon as the DSN says. The process
// learns that it did not commit.
func TestIdleTransactionsEnd(t *testing.T) {
	timeout := map[string]string{"pgsql": "idle_in_transaction_session_timeout=200", "mysql": "wait_timeout=1", "mariadb": "idle_transaction_timeout=1"}
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		h.Exec(t, "INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES ('a', 1)")
		store := h.Open(t, func(cfg *sqlstore.Config) {
			sep := "?"
			if strings.Contains(cfg.DSN, "?") {
				sep = "&"
			}
			cfg.DSN += sep + timeout[h.Engine.Name]
		})
		locked, goOn := make(chan struct{}), make(chan struct{})
		done := make(chan error, 1)
		go func() {
			done <- store.WriteForTest(t.Context(), func(exec func(string, ...any) (int64, error)) error {
				_, err := exec("UPDATE nano_enrollment_activity SET last_seen_at = last_seen_at + 1 WHERE id = 'a'")
				close(locked)
				<-goOn
				return err
			})
		}()
		<-locked
		h.Exec(t, "UPDATE nano_enrollment_activity SET last_seen_at = 7 WHERE id = 'a'") // waits for the lock
		close(goOn)
		require.ErrorIs(t, <-done, storage.ErrUnavailable)
		require.EqualValues(t, 7, h.Int(t, "SELECT last_seen_at FROM nano_enrollment_activity WHERE id = 'a'"))
	})
}

// TestOpenWaitsForWriter: a start on a standby, which takes no writes, is to be
// tried again, with a schema and without one.
func TestOpenWaitsForWriter(t *testing.T) {
	readOnly := map[string]string{"pgsql": "default_transaction_read_only=on", "mysql": "transaction_read_only=1", "mariadb": "tx_read_only=1"}
	for _, engine := range storagetest.Engines(t) {
		if engine.Name == "sqlite" {
			continue
		}
		t.Run(engine.Name, func(t *testing.T) {
			cfg := engine.Unmigrated(t)
			standby := cfg
			sep := "?"
			if strings.Contains(cfg.DSN, "?") {
				sep = "&"
			}
			standby.DSN += sep + readOnly[engine.Name]
			_, err := sqlstore.Open(t.Context(), standby)
			require.ErrorIs(t, err, storage.ErrUnavailable)
			store, err := sqlstore.Open(t.Context(), cfg)
			require.NoError(t, err)
			require.NoError(t, store.Close())
			_, err = sqlstore.Open(t.Context(), standby)
			require.ErrorIs(t, err, storage.ErrUnavailable)
			store, err = sqlstore.Open(t.Context(), cfg)
			require.NoError(t, err, "it is the writer now")
			require.NoError(t, store.Close())
		})
	}
}

// TestDatabaseClock: what is due is decided by the database's clock, whatever
// the replica's says.
func TestDatabaseClock(t *testing.T) {
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		for _, wrong := range []time.Duration{-10 * time.Minute, 10 * time.Minute} {
			store := h.Open(t, func(cfg *sqlstore.Config) {
				cfg.DatabaseClock, cfg.Now = true, func() time.Time { return time.Now().Add(wrong) }
			})
			require.InDelta(t, -wrong.Seconds(), store.Stats().ClockOffset.Seconds(), 2)
			id := "K" + wrong.String()
			require.NoError(t, store.CreateAPIKey(t.Context(), &storage.APIKey{Name: id, Role: "reader", Hash: storage.KeyHash{byte(len(id))}}))
			at := time.UnixMicro(h.Int(t, "SELECT created_at FROM nano_api_keys WHERE name = ?", id))
			require.WithinDuration(t, time.Now(), at, 5*time.Second)
		}
	})
}

// TestLimitConnections: more callers than connections wait, and connections
// beyond a new limit end.
func TestLimitConnections(t *testing.T) {
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		ask := func(callers int) {
			var all sync.WaitGroup
			for range callers {
				all.Go(func() { assert.NoError(t, h.Store.Ping(t.Context())) })
			}
			all.Wait()
		}
		ask(20)
		h.Store.LimitConnections(2)
		ask(20)
		pool := h.Store.Pools()["write"]
		require.Equal(t, 2, pool.MaxOpenConnections)
		require.LessOrEqual(t, pool.OpenConnections, 2)
	})
}

// servers are the engines with more than one writer and with widths.
func servers(t *testing.T, run func(t *testing.T, h *storagetest.Harness)) {
	for _, engine := range storagetest.Engines(t) {
		if engine.Name == "sqlite" {
			continue
		}
		t.Run(engine.Name, func(t *testing.T) { run(t, storagetest.NewHarness(t, engine)) })
	}
}

func TestTooLongIsRefusedNotCut(t *testing.T) {
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		err := h.Store.WriteForTest(t.Context(), func(exec func(string, ...any) (int64, error)) error {
			_, err := exec("INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES (?, 1)", strings.Repeat("x", 256))
			return err
		})
		require.Error(t, err)
		require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_activity"))
	})
}

// TestMatchedRowsCount: an update that changes nothing has still met its row.
func TestMatchedRowsCount(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			h.Exec(t, "INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES ('a', 1)")
			require.NoError(t, h.Store.WriteForTest(t.Context(), func(exec func(string, ...any) (int64, error)) error {
				n, err := exec("UPDATE nano_enrollment_activity SET last_seen_at = 1 WHERE id = 'a'")
				require.EqualValues(t, 1, n)
				return err
			}))
		})
	}
}

// TestDeadlockIsRetried makes two transactions lock two rows in opposite
// orders. The engine ends one of them, and both are done in the end.
func TestDeadlockIsRetried(t *testing.T) {
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		for _, id := range []string{"a", "b"} {
			h.Exec(t, "INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES (?, 0)", id)
		}
		var both sync.WaitGroup
		both.Add(2)
		orders := [][]string{{"a", "b"}, {"b", "a"}}
		errs := make([]error, len(orders))
		var wg sync.WaitGroup
		for i, order := range orders {
			wg.Go(func() {
				first := true
				errs[i] = h.Store.WriteForTest(t.Context(), func(exec func(string, ...any) (int64, error)) error {
					for n, id := range order {
						if _, err := exec("UPDATE nano_enrollment_activity SET last_seen_at = last_seen_at + 1 WHERE id = ?", id); err != nil {
							return err
						}
						if n == 0 && first { // both have their first lock
							first = false
							both.Done()
							both.Wait()
						}
					}
					return nil
				})
			})
		}
		wg.Wait()
		require.NoError(t, errors.Join(errs...))
		require.EqualValues(t, 4, h.Int(t, "SELECT SUM(last_seen_at) FROM nano_enrollment_activity"))
		require.Positive(t, h.Store.Stats().Retries)
	})
}

func TestErrorRollsBack(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			broken := errors.New("broken")
			insert := "INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES ('a', 1)"
			require.ErrorIs(t, h.Store.WriteForTest(t.Context(), func(exec func(string, ...any) (int64, error)) error {
				_, err := exec(insert)
				require.NoError(t, err)
				return broken
			}), broken)
			require.Panics(t, func() {
				_ = h.Store.WriteForTest(t.Context(), func(exec func(string, ...any) (int64, error)) error {
					_, err := exec(insert)
					require.NoError(t, err)
					panic("broken")
				})
			})
			require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_activity"))
			require.NoError(t, h.Store.Ping(t.Context()), "the connection is free again")
		})
	}
}

func TestClosed(t *testing.T) {
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: ":memory:"})
	require.NoError(t, err)
	require.NoError(t, store.Close())
	require.NoError(t, store.Close(), "twice")
	require.ErrorIs(t, store.Ping(t.Context()), storage.ErrClosed)
	require.ErrorIs(t, store.Flush(t.Context()), storage.ErrClosed)
	_, err = store.TakeLease(t.Context(), storage.Lease{Name: "x"}, "a")
	require.ErrorIs(t, err, storage.ErrClosed)
}

// TestLostServer ends every connection under an idle store: the next call
// finds a new one.
func TestLostServer(t *testing.T) {
	markDeleted := map[string]string{
		"pgsql":   "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()",
		"mysql":   "SELECT CONCAT('KILL ', id) FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()",
		"mariadb": "SELECT CONCAT('KILL ', id) FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()",
	}
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		_, err := h.Store.TakeLease(t.Context(), storage.Lease{Name: "x"}, "a")
		require.NoError(t, err)
		for _, statement := range h.Strings(t, markDeleted[h.Engine.Name]) {
			if strings.HasPrefix(statement, "KILL") {
				h.Exec(t, statement)
			}
		}
		began := time.Now()
		l, err := h.Store.PeekLease(t.Context(), "x")
		require.NoError(t, err)
		_, err = h.Store.RenewLease(t.Context(), l)
		require.NoError(t, err)
		require.Less(t, time.Since(began), 5*time.Second)
	})
}

// Connections are replaced when they are old, and closed when they are idle,
// before something between here and the server drops them in silence. A
// device's message does not notice.
func TestPoolsRecycle(t *testing.T) {
	servers(t, func(t *testing.T, h *storagetest.Harness) {
		for name, c := range map[string]struct {
			change func(*sqlstore.Config)
			closed func(sql.DBStats) int64
		}{
			"old":  {func(cfg *sqlstore.Config) { cfg.ConnMaxLifetime = time.Millisecond }, func(s sql.DBStats) int64 { return s.MaxLifetimeClosed }},
			"idle": {func(cfg *sqlstore.Config) { cfg.ConnMaxIdleTime = time.Millisecond }, func(s sql.DBStats) int64 { return s.MaxIdleTimeClosed }},
		} {
			store := h.Open(t, c.change)
			require.Eventually(t, func() bool {
				require.NoError(t, store.Ping(t.Context()))
				return c.closed(store.Pools()["write"]) >= 2
			}, 20*time.Second, 2*time.Millisecond, name)
		}
	})
}

// TestLater: statements that wait run in order, before what reads, and the
// error of any of them fails the whole transaction.
func TestLater(t *testing.T) {
	const (
		insert = "INSERT INTO nano_event_counters (name, value) VALUES (?, ?)"
		count  = "SELECT COUNT(*) FROM nano_event_counters WHERE name LIKE 'later%'"
	)
	type (
		later  = func(q string, args ...any) error
		number = func(q string) (int, error)
	)
	insertAll := func(later later, from, to int, value any) error {
		for i := from; i < to; i++ {
			if err := later(insert, fmt.Sprintf("later %d", i), value); err != nil {
				return err
			}
		}
		return nil
	}
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			store := storagetest.NewHarness(t, engine).Store
			requireRows := func(want int) {
				t.Helper()
				got, err := store.SettingForTest(t.Context(), count)
				require.NoError(t, err)
				require.Equal(t, strconv.Itoa(want), got)
			}
			require.NoError(t, store.LaterForTest(t.Context(), func(later later, number number) error {
				require.NoError(t, insertAll(later, 0, 40, 1)) // more than wait at once
				n, err := number(count)
				require.Equal(t, 40, n, "seen by the transaction itself")
				require.NoError(t, later("UPDATE nano_event_counters SET value = 2 WHERE name = ?", "later 1"))
				require.NoError(t, later("UPDATE nano_event_counters SET value = value + 2 WHERE name = ?", "later 1"))
				return err
			}))
			requireRows(40)
			value, err := store.SettingForTest(t.Context(), "SELECT value FROM nano_event_counters WHERE name = 'later 1'")
			require.NoError(t, err)
			require.Equal(t, "4", value, "in order")

			require.NoError(t, store.LaterForTest(t.Context(), func(later, number) error { return nil }), "nothing to do")
			require.ErrorContains(t, store.LaterForTest(t.Context(), func(later later, _ number) error {
				require.NoError(t, insertAll(later, 40, 42, 1))
				return errors.New("changed my mind")
			}), "changed my mind")
			require.Error(t, store.LaterForTest(t.Context(), func(later later, _ number) error {
				return insertAll(later, 39, 42, 1) // the first of them is there
			}))
			err = store.LaterForTest(t.Context(), func(later later, _ number) error {
				if err := insertAll(later, 40, 42, 1); err != nil {
					return err
				}
				return insertAll(later, 41, 43, 1) // one in the middle is
			})
			require.Error(t, err)
			if engine.Name != "sqlite" && engine.Name != "mariadb" { // where nothing waits, and who sends it knows what it was
				require.ErrorContains(t, err, "INSERT INTO nano_event_counters: ")
			}
			require.Error(t, store.LaterForTest(t.Context(), func(later later, number number) error {
				if err := insertAll(later, 40, 42, 1); err != nil {
					return err
				}
				if err := insertAll(later, 42, 43, nil); err != nil {
					return err
				}
				_, err := number(count) // tells what was wrong before
				return err
			}))
			requireRows(40)
			large := strings.Repeat("'\\", 200<<10)
			require.NoError(t, store.LaterForTest(t.Context(), func(later later, _ number) error {
				for range 4 {
					if err := later("UPDATE nano_devices SET authenticate = ? WHERE id = ?", []byte(large), "nobody's"); err != nil {
						return err
					}
				}
				return insertAll(later, 40, 41, 1)
			}))
			requireRows(41)
		})
	}
}
