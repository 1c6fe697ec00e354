package sqlstore_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// TestActivityLocksInKeyOrder: the transaction that writes what polls noted
// holds no row while it waits for one with a smaller key, or it would be in a
// deadlock with transactions that lock in key order.
func TestActivityLocksInKeyOrder(t *testing.T) {
	// A statement of its own writes what is noted of A; the others may run before.
	for name, c := range map[string]struct {
		note   func(s *sqlstore.Store)
		hold   string
		others []string
		table  string
	}{
		"payments": {
			note: func(s *sqlstore.Store) {
				s.PushedForTest("A", 1, true)
				s.PushedForTest("B", 1, false)
			},
			hold:   "SELECT id FROM nano_enrollment_push WHERE id = 'A' FOR UPDATE",
			others: []string{"SELECT id FROM nano_enrollment_push WHERE id = 'B' FOR UPDATE NOWAIT"},
			table:  "nano_enrollment_push",
		},
		"offers": {
			note: func(s *sqlstore.Store) {
				s.OfferedForTest("A", "C1", 1)
				s.OfferedForTest("B", "C1", 2)
				s.OfferedForTest("C", "C1", 3)
				s.OfferedForTest("D", "C1", 4)
			},
			hold: "SELECT id FROM nano_enrollment_queue WHERE id = 'A' AND command_uuid = 'C1' FOR UPDATE",
			others: []string{
				"SELECT id FROM nano_enrollment_queue WHERE id = 'B' AND command_uuid = 'C1' FOR UPDATE NOWAIT",
				"SELECT id FROM nano_enrollment_queue WHERE id = 'C' AND command_uuid = 'C1' FOR UPDATE NOWAIT",
				"SELECT id FROM nano_enrollment_queue WHERE id = 'D' AND command_uuid = 'C1' FOR UPDATE NOWAIT",
			},
			table: "nano_enrollment_queue",
		},
	} {
		t.Run(name, func(t *testing.T) {
			servers(t, func(t *testing.T, h *storagetest.Harness) {
				h.Enroll(t, "A", "B", "C", "D")
				_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{
					Command: &mdm.Command{CommandUUID: "C1", RequestType: "ProfileList", Raw: []byte("command")}, IDs: []string{"A", "B", "C", "D"},
				})
				require.NoError(t, err)
				written := make(chan error, 1)
				require.NoError(t, h.Store.WriteForTest(t.Context(), func(exec func(string, ...any) (int64, error)) error {
					if _, err := exec(c.hold); err != nil {
						return err
					}
					c.note(h.Store)
					go func() { written <- h.Store.Flush(t.Context()) }()
					require.Eventually(t, func() bool { return waits(t, h, c.table) }, 10*time.Second, 5*time.Millisecond)
					for _, q := range c.others {
						h.Strings(t, q)
					}
					return nil
				}))
				require.NoError(t, <-written)
			})
		})
	}
}

// waits says whether a statement on a table goes on, which it does while it
// waits for a lock.
func waits(t *testing.T, h *storagetest.Harness, table string) bool {
	running := "SELECT COUNT(*) FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID() AND info LIKE "
	if h.Engine.Name == "pgsql" {
		running = "SELECT COUNT(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock' AND query LIKE "
	}
	return h.Int(t, running+"'%"+table+"%'") > 0
}
