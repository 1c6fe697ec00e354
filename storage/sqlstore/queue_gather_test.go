package sqlstore_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
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

// TestEnqueueShares: a call whose enrollments are shared between transactions
// queues one row for each of them, in order of the calls, and is audited once.
func TestEnqueueShares(t *testing.T) {
	for _, e := range storagetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) { enqueueShares(t, storagetest.NewHarness(t, e)) })
	}
}

func enqueueShares(t *testing.T, h *storagetest.Harness) {
	var ids []string
	for i := range 150 {
		ids = append(ids, fmt.Sprintf("D%03d", i))
	}
	h.Enroll(t, ids...)
	call := func(uuid, raw string) (map[string]error, error) {
		return h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{
			Command: &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte(raw)},
			IDs:     append([]string{"stranger"}, ids...),
			Audit:   &storage.AuditRecord{Action: "command.enqueue", Target: uuid},
		})
	}
	const each = 5
	var callers sync.WaitGroup
	for caller := range 3 {
		callers.Go(func() {
			for i := range each {
				uuid := fmt.Sprintf("%c%d", 'a'+caller, i)
				failed, err := call(uuid, uuid)
				if !assert.NoError(t, err) {
					return
				}
				assert.Len(t, failed, 1)
				assert.ErrorIs(t, failed["stranger"], storage.ErrNotEnrolled)
			}
		})
	}
	callers.Wait()
	require.EqualValues(t, 3*each, h.Int(t, "SELECT COUNT(*) FROM nano_audit WHERE action = 'command.enqueue'"))
	require.EqualValues(t, len(ids), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE last_seq = 15 AND owed_seq = 15"))
	for _, id := range ids {
		last := map[byte]string{}
		queue := h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE id = ? ORDER BY seq", id)
		require.Len(t, queue, 3*each, id)
		for _, uuid := range queue { // each caller's in the order in which it made them
			require.Greater(t, uuid, last[uuid[0]], id)
			last[uuid[0]] = uuid
		}
	}

	failed, err := call("a0", "a0") // repeated: nothing is queued twice
	require.NoError(t, err)
	require.Len(t, failed, 1)
	_, err = call("a0", "other bytes")
	require.ErrorIs(t, err, storage.ErrConflict)
	require.EqualValues(t, 3*each*len(ids), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue"))
}
