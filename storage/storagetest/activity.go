package storagetest

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func activityTests() []subtest {
	return []subtest{
		{"Close writes what is gathered", activityClose},
		{"Flush writes what is gathered", activityFlush},
		{"activity is written by itself", activityByItself},
		{"last seen never goes back", activityLater},
		{"a poll pays for what was owed when it came", activityPays},
		{"replicas flush the same enrollments at once", activityAtOnce},
		{"what was offered without an answer is counted", activityOffers},
		{"what is answered within seconds is no offer without an answer", activityUnanswered},
	}
}

// lastSeen reads when an enrollment was last seen, 0 if unknown.
func lastSeen(t *testing.T, h *Harness, id string) int64 {
	t.Helper()
	return h.Int(t, "SELECT COALESCE(MAX(last_seen_at), 0) FROM nano_enrollment_activity WHERE id = ?", id)
}

func activityClose(t *testing.T, h *Harness) {
	second := h.Open(t, nil)
	h.Enroll(t, "D")
	at := h.Clock.Advance(time.Minute)
	require.NoError(t, h.device("D").on(second).seen(t))
	require.Zero(t, lastSeen(t, h, "D"), "not yet")
	require.NoError(t, second.Close())
	require.Equal(t, at.UnixMicro(), lastSeen(t, h, "D"))
}

func activityFlush(t *testing.T, h *Harness) {
	var ids []string
	for i := range 12 {
		ids = append(ids, fmt.Sprintf("D%02d", i))
	}
	h.Enroll(t, ids...)
	at := h.Clock.Advance(time.Minute)
	for _, id := range ids {
		require.Empty(t, h.device(id).polls(t))
	}
	require.NoError(t, h.Store.Flush(t.Context()))
	require.EqualValues(t, len(ids), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_activity WHERE last_seen_at = ?", at.UnixMicro()))
	require.NoError(t, h.Store.Flush(t.Context()), "with nothing to write")
}

func activityByItself(t *testing.T, h *Harness) {
	store := h.Open(t, func(c *sqlstore.Config) { c.RecordActivityEvery = 5 * time.Millisecond })
	h.Enroll(t, "D")
	at := h.Clock.Advance(time.Minute)
	require.NoError(t, h.device("D").on(store).seen(t))
	require.Eventually(t, func() bool { return lastSeen(t, h, "D") == at.UnixMicro() }, 10*time.Second, 5*time.Millisecond)
}

func activityLater(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	require.NoError(t, h.Store.Flush(t.Context()))
	second := h.Open(t, nil)
	require.NoError(t, h.device("D").on(second).seen(t))
	later := h.Clock.Advance(time.Minute)
	require.NoError(t, h.device("D").seen(t))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.NoError(t, second.Flush(t.Context())) // gathered before, written after
	require.Equal(t, later.UnixMicro(), lastSeen(t, h, "D"))
}

func activityPays(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "1")
	require.Equal(t, "1", d.polls(t))
	h.enqueue(t, []string{"D"}, "2") // before the first is written
	owed := func() int64 {
		return h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE id = 'D' AND paid_seq < owed_seq")
	}
	require.NoError(t, h.Store.Flush(t.Context()))
	require.EqualValues(t, 1, owed(), "the second is still owed")
	require.Equal(t, "1", d.polls(t))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Zero(t, owed())
}

func activityAtOnce(t *testing.T, h *Harness) {
	second := h.Open(t, nil)
	var ids []string
	for i := range 30 {
		ids = append(ids, fmt.Sprintf("D%02d", i))
	}
	h.Enroll(t, ids...)
	h.enqueue(t, ids, "C")
	at := h.Clock.Advance(time.Minute)
	var wg sync.WaitGroup
	for _, store := range []*sqlstore.Store{h.Store, second} {
		wg.Go(func() {
			for _, id := range ids {
				if _, err := h.device(id).on(store).report(t, "Idle", ""); err != nil {
					t.Error(err)
				}
				if err := store.Flush(t.Context()); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, len(ids), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_activity WHERE last_seen_at = ?", at.UnixMicro()))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE paid_seq < owed_seq"))
}

func activityUnanswered(t *testing.T, h *Harness) {
	store := h.Open(t, func(c *sqlstore.Config) { c.RecordActivityEvery = 5 * time.Millisecond })
	h.Enroll(t, "D", "E", "F", "G")
	h.enqueue(t, []string{"D", "E"}, "C1")
	written := func(id string) {
		t.Helper()
		at := h.Clock.Advance(time.Second)
		require.NoError(t, h.device(id).on(store).seen(t))
		require.Eventually(t, func() bool { return lastSeen(t, h, id) == at.UnixMicro() }, 10*time.Second, 5*time.Millisecond)
	}
	for _, id := range []string{"D", "E"} {
		require.Equal(t, "C1", h.device(id).on(store).polls(t))
	}
	written("F")
	written("G")
	require.Zero(t, h.attempts(t, "D", "C1"), "it has some seconds to answer")
	require.Empty(t, h.device("E").on(store).reports(t, mdm.StatusAcknowledged, "C1"))
	h.Clock.Advance(time.Minute)
	require.Eventually(t, func() bool { return h.attempts(t, "D", "C1") == 1 }, 10*time.Second, 5*time.Millisecond)
	require.Zero(t, h.attempts(t, "E", "C1"))
}

// attempts reads the stored number of offers of a command without an answer.
func (h *Harness) attempts(t *testing.T, id, uuid string) int {
	t.Helper()
	item, err := h.Store.QueueItem(t.Context(), storage.Scope{}, id, uuid)
	require.NoError(t, err)
	return item.Attempts
}

func activityOffers(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	h.enqueue(t, []string{"D", "E"}, "C1", "C2")
	attempts := func(id, uuid string) int {
		t.Helper()
		require.NoError(t, h.Store.Flush(t.Context()))
		return h.attempts(t, id, uuid)
	}
	d := h.device("D")
	for range 2 {
		require.Equal(t, "C1", d.polls(t))
	}
	require.Equal(t, 2, attempts("D", "C1"))
	require.Equal(t, "C1", d.polls(t))
	require.Equal(t, 3, attempts("D", "C1"))
	require.Equal(t, 3, attempts("D", "C1"), "once each")
	require.Zero(t, attempts("E", "C1"))

	require.Equal(t, "C1", d.polls(t))
	require.Equal(t, "C2", d.reports(t, mdm.StatusAcknowledged, "C1"))
	require.Equal(t, 3, attempts("D", "C1"), "the answer came at once")
	require.Equal(t, 1, attempts("D", "C2"))
	require.Equal(t, "C2", d.polls(t))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "C2"))
	require.Equal(t, 1, attempts("D", "C2"))
}
