package storagetest

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func onceTests() []subtest {
	return []subtest{
		{"a call with a key takes effect once, whatever became of its rows", onceRepeated},
		{"a key is one caller's and one call's", onceConflict},
		{"calls with a key that come at once take effect once", onceAtOnce},
		{"a call that broke off goes on where it was", onceBroken},
		{"finding a call locks it", onceFound},
		{"a call leaves one audit record, with its first rows", onceAudit},
		{"old keys are forgotten, under the lease", onceForgotten},
	}
}

// once asks for a command with an idempotency key.
func once(uuid, key, digest string, ids ...string) *storage.Enqueue {
	return &storage.Enqueue{Command: command(uuid), IDs: ids, Once: &storage.Once{Caller: "ann", Key: key, Digest: digest}}
}

// many names devices of which only those that are named are enrolled.
func many(t *testing.T, h *Harness, n int, enrolled ...int) (ids []string) {
	t.Helper()
	for i := range n {
		ids = append(ids, fmt.Sprintf("D%04d", i))
	}
	for _, i := range enrolled {
		h.Enroll(t, ids[i])
	}
	return ids
}

func onceRepeated(t *testing.T, h *Harness) {
	ids := many(t, h, 700, 0, 650)
	ids = append(ids, "\x00")
	first := once("C", "k", "d", ids...)
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, first)
	require.NoError(t, err)
	require.Len(t, failed, 699)
	require.False(t, first.Once.Repeated)
	h.device("D0000").reports(t, mdm.StatusAcknowledged, "C")
	h.Exec(t, "DELETE FROM nano_enrollment_queue WHERE id = 'D0000'")
	h.Enroll(t, "D0001")

	again := once("C", "k", "d", ids...)
	repeated, err := h.Store.Enqueue(t.Context(), storage.Scope{}, again)
	require.NoError(t, err)
	require.Equal(t, failed, repeated)
	require.True(t, again.Once.Repeated)
	require.Empty(t, h.device("D0000").polls(t))
	require.Empty(t, h.device("D0001").polls(t), "what failed the first time is another call's")
	found, err := h.Store.FindEnqueued(t.Context(), "ann", "k")
	require.NoError(t, err)
	require.Equal(t, []any{"C", "d", 700, true}, []any{found.CommandUUID, found.Digest, found.Count, found.Done})
	require.Len(t, found.Failed, 698)
	_, err = h.Store.FindEnqueued(t.Context(), "ann", "K")
	require.ErrorIs(t, err, storage.ErrNotFound)
}

// A plain read may return a commit that a failover loses. PostgreSQL shows the
// lock on the row, and its commit waits for the standby.
func onceFound(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, once("C", "k", "d", "D"))
	require.NoError(t, err)
	_, err = h.Store.FindEnqueued(t.Context(), "ann", "other")
	require.ErrorIs(t, err, storage.ErrNotFound)
	locker := func() []string {
		if h.Engine.Name != "pgsql" {
			return nil
		}
		return h.Strings(t, "SELECT xmax::text FROM nano_enqueue_calls")
	}
	before := locker()
	found, err := h.Store.FindEnqueued(t.Context(), "ann", "k")
	require.NoError(t, err)
	require.Equal(t, storage.Enqueued{CommandUUID: "C", Digest: "d", Count: 1, Done: true}, *found)
	if before != nil {
		require.NotEqual(t, before, locker())
	}
}

func onceConflict(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	for _, tc := range []struct {
		name string
		e    *storage.Enqueue
		want error
	}{
		{"the first", once("C1", "k", "d", "D"), nil},
		{"other contents", once("C1", "k", "other", "D"), storage.ErrKeyUsed},
		{"another command", once("C2", "k", "d", "D"), storage.ErrKeyUsed},
		{"another key", once("C3", "K", "d", "D"), nil},
		{"another caller", &storage.Enqueue{Command: command("C4"), IDs: []string{"D"}, Once: &storage.Once{Caller: "bob", Key: "k", Digest: "d"}}, nil},
	} {
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, tc.e)
		if tc.want == nil {
			require.NoError(t, err, tc.name)
		} else {
			require.ErrorIs(t, err, tc.want, tc.name)
		}
	}
	require.Equal(t, "C1 queued, C3 queued, C4 queued", queueStates(t, h, "D"))
	// A call that fails as a whole uses no key up.
	other := once("C1", "new", "d", "D")
	other.Command.Raw = []byte("other bytes")
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, other)
	require.ErrorIs(t, err, storage.ErrConflict)
	_, err = h.Store.Enqueue(t.Context(), storage.Scope{}, once("C5", "new", "d2", "D"))
	require.NoError(t, err)
}

func onceAtOnce(t *testing.T, h *Harness) {
	ids := many(t, h, 1100, 0, 501, 1099)
	stores := []storage.Enqueuer{h.Store, h.Store}
	if h.Engine.Name != "memory" {
		stores[1] = h.Open(t, nil)
	}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			// Half of them are repetitions of one call, the others come each
			// with a CommandUUID of its own.
			uuid := "same"
			if i%2 == 0 {
				uuid = fmt.Sprint("other", i)
			}
			failed, err := stores[i/4].Enqueue(context.Background(), storage.Scope{}, once(uuid, "k", "d", ids...))
			switch {
			case err == nil && len(failed) != 1097:
				t.Errorf("%d failed", len(failed))
			case err != nil && !errors.Is(err, storage.ErrKeyUsed):
				t.Error(err)
			}
		})
	}
	wg.Wait()
	found, err := h.Store.FindEnqueued(t.Context(), "ann", "k")
	require.NoError(t, err)
	require.True(t, found.Done)
	require.Len(t, found.Failed, 1097)
	for _, i := range []int{0, 501, 1099} {
		require.Equal(t, found.CommandUUID, h.device(ids[i]).polls(t))
	}
	h.shared(t)
	require.EqualValues(t, 3, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue"))
	require.EqualValues(t, 3, h.Int(t, "SELECT SUM(last_seq) FROM nano_enrollment_push"))
}

func onceBroken(t *testing.T, h *Harness) {
	ids := many(t, h, 1100, 0, 499, 500, 1099)
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, once("C", "k", "d", ids...))
	require.NoError(t, err)
	// The server died after the first transaction, and the first device has
	// been seen to since.
	h.Exec(t, "DELETE FROM nano_enrollment_queue")
	h.Exec(t, "UPDATE nano_enqueue_calls SET through = 'D0499', finished = 0, failed = ?", []byte(`["D0001"]`))
	again := once("C", "k", "d", ids...)
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, again)
	require.NoError(t, err)
	require.False(t, again.Once.Repeated)
	require.Len(t, failed, 1+598)
	require.Equal(t, []string{"D0500", "D1099"}, h.Strings(t, "SELECT id FROM nano_enrollment_queue ORDER BY id"))
	found, err := h.Store.FindEnqueued(t.Context(), "ann", "k")
	require.NoError(t, err)
	require.True(t, found.Done)
	require.Len(t, found.Failed, 1+598)
}

func onceAudit(t *testing.T, h *Harness) {
	ids := many(t, h, 1100, 0)
	for range 2 {
		e := once("C", "k", "d", ids...)
		e.Audit = &storage.AuditRecord{Who: "ann", Action: "command.enqueue", Target: "C", Outcome: storage.AuditDone}
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, e)
		require.NoError(t, err)
	}
	records, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 1)
	require.Equal(t, "C", records[0].Target)

	conflict := &storage.Enqueue{Command: command("C"), IDs: ids[:1], Audit: &storage.AuditRecord{Who: "bob"}}
	conflict.Command.Raw = []byte("other bytes")
	_, err = h.Store.Enqueue(t.Context(), storage.Scope{}, conflict)
	require.ErrorIs(t, err, storage.ErrConflict)
	records, err = h.Store.AuditRecords(t.Context(), storage.AuditFilter{}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 1, "nothing was done")
}

func onceForgotten(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	for i := range 5 {
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, once(fmt.Sprint("C", i), fmt.Sprint("k", i), "d", "D"))
		require.NoError(t, err)
		h.Clock.Advance(time.Hour)
	}
	old := take(t, h.Store, "queue", "a")
	l := take(t, h.Store, "queue", "b")
	before := h.Clock.Now().Add(-90 * time.Minute)
	_, err := h.Store.ForgetEnqueued(t.Context(), old, before, 3)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	for _, want := range []int{3, 1, 0} {
		n, err := h.Store.ForgetEnqueued(t.Context(), l, before, 3)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	_, err = h.Store.FindEnqueued(t.Context(), "ann", "k0")
	require.ErrorIs(t, err, storage.ErrNotFound)
	_, err = h.Store.FindEnqueued(t.Context(), "ann", "k4")
	require.NoError(t, err)
}
