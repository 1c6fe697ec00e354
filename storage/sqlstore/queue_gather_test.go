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

// TestEnqueueTogether: calls of one transaction have the outcomes that they have
// one after the other.
func TestEnqueueTogether(t *testing.T) {
	for _, e := range storagetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) { enqueueTogether(t, storagetest.NewHarness(t, e)) })
	}
}

func enqueueTogether(t *testing.T, h *storagetest.Harness) {
	h.Enroll(t, "A", "B", "C")
	call := func(uuid, raw string, change func(*sqlstore.CallForTest), ids ...string) *sqlstore.CallForTest {
		c := &sqlstore.CallForTest{Enqueue: storage.Enqueue{
			Command: &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte(raw)}, IDs: ids,
			Audit: &storage.AuditRecord{Action: "command.enqueue", Target: uuid},
		}}
		if change != nil {
			change(c)
		}
		return c
	}
	h.Exec(t, "UPDATE nano_enrollment_push SET paid_seq = 0, owed_seq = 0, push_at = NULL")
	before := call("before", "before", nil, "A")
	require.NoError(t, h.Store.EnqueueTogetherForTest(t.Context(), []*sqlstore.CallForTest{before}))

	noPush := func(c *sqlstore.CallForTest) { c.Enqueue.NoPush = true }
	calls := []*sqlstore.CallForTest{
		call("first", "first", nil, "A", "B", "stranger"),
		call("second", "second", noPush, "B", "C"),
		call("first", "first", nil, "B", "C"), // B has it from the call before
		call("before", "other bytes", nil, "B"),
		call("before", "before", nil, "A", "B"), // A has it
		call("third", "third", func(c *sqlstore.CallForTest) { c.Scope.Topics = []string{"another topic"} }, "A"),
		call("later", "later", func(c *sqlstore.CallForTest) { c.Enqueue.NotBefore = h.Clock.Now().Add(time.Hour) }, "C"),
		call("urgent", "urgent", func(c *sqlstore.CallForTest) { c.Enqueue.Priority = 5 }, "A"),
	}
	require.NoError(t, h.Store.EnqueueTogetherForTest(t.Context(), calls))
	notEnrolled := func(ids ...string) map[string]error {
		failed := make(map[string]error)
		for _, id := range ids {
			failed[id] = storage.ErrNotEnrolled
		}
		return failed
	}
	for i, want := range []struct {
		failed   map[string]error
		conflict error
	}{{notEnrolled("stranger"), nil}, {}, {}, {nil, storage.ErrConflict}, {}, {notEnrolled("A"), nil}, {}, {}} {
		require.Equal(t, len(want.failed), len(calls[i].Failed), i)
		for id, err := range want.failed {
			require.ErrorIs(t, calls[i].Failed[id], err, i)
		}
		require.ErrorIs(t, calls[i].Conflict, want.conflict, i)
	}
	queue := func(id string) []string {
		return h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE id = ? ORDER BY seq", id)
	}
	require.Equal(t, []string{"before", "first", "urgent"}, queue("A"))
	require.Equal(t, []string{"first", "second", "before"}, queue("B"))
	require.Equal(t, []string{"second", "first", "later"}, queue("C"))
	for id, last := range map[string]int64{"A": 3, "B": 3, "C": 3} {
		require.Equal(t, last, h.Int(t, "SELECT last_seq FROM nano_enrollment_push WHERE id = ?", id), id)
		require.Equal(t, last, h.Int(t, "SELECT MAX(seq) FROM nano_enrollment_queue WHERE id = ?", id), id)
		require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE id = ? AND owed_seq = last_seq AND push_at IS NOT NULL", id), id)
	}
	require.EqualValues(t, 0, h.Int(t, "SELECT COUNT(*) FROM nano_commands WHERE command_uuid = 'third'"))
	require.EqualValues(t, 5, h.Int(t, "SELECT COUNT(*) FROM nano_commands"))
	require.EqualValues(t, 8, h.Int(t, "SELECT COUNT(*) FROM nano_audit WHERE action = 'command.enqueue'"))

	// Two calls with one new CommandUUID and other bytes are no batch.
	err := h.Store.EnqueueTogetherForTest(t.Context(), []*sqlstore.CallForTest{call("new", "one", nil, "A"), call("new", "two", nil, "B")})
	require.ErrorIs(t, err, storage.ErrConflict)
	require.EqualValues(t, 0, h.Int(t, "SELECT COUNT(*) FROM nano_commands WHERE command_uuid = 'new'"))
}
