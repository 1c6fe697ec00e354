package storagetest

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func enqueueTests() []subtest {
	return []subtest{
		{"each id has an outcome of its own", enqueueOutcomes},
		{"the same command is taken again without effect", enqueueAgain},
		{"another command of that name is a conflict", enqueueConflict},
		{"one command goes to many, each by itself", enqueueFanOut},
		{"more ids than fit a transaction", enqueueMany},
		{"what is more urgent goes first", enqueuePriority},
		{"a push is owed with the command", enqueueOwesPush},
		{"a scheduled command waits and owes nothing", enqueueScheduled},
		{"an expired command is not delivered", enqueueExpired},
		{"a key replaces what waits with it", enqueueSupersedes},
		{"a scope sees its topics", enqueueScope},
	}
}

func enqueueOutcomes(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E", "out")
	require.NoError(t, h.device("out").checkOut(t))
	require.NoError(t, h.device("half").authenticate(t))
	ids := []string{"E", "unknown", "D", "D", "out", "half", "", "d", "D ", "\x00", "\xff"}
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("C"), IDs: ids})
	require.NoError(t, err)
	require.Len(t, failed, 8)
	for id, err := range failed {
		require.ErrorIs(t, err, storage.ErrNotEnrolled, id)
		require.NotContains(t, []string{"D", "E"}, id)
	}
	require.Equal(t, "C", h.device("D").polls(t))
	require.Equal(t, "C", h.device("E").polls(t))
	require.Equal(t, []string{"E", "unknown", "D", "D", "out", "half", "", "d", "D ", "\x00", "\xff"}, ids, "the caller's slice is left alone")

	failed, err = h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("none"), IDs: []string{"unknown"}})
	require.NoError(t, err)
	require.Len(t, failed, 1)
	failed, err = h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("none")})
	require.NoError(t, err)
	require.Empty(t, failed)
	require.Equal(t, []string{"C"}, h.Strings(t, "SELECT command_uuid FROM nano_commands"))
}

func enqueueAgain(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	d := h.device("D")
	h.enqueue(t, []string{"D"}, "1", "2")
	before := h.Strings(t, "SELECT owed_seq + last_seq FROM nano_enrollment_push WHERE id = 'D'")
	h.enqueue(t, []string{"D"}, "1")
	require.Equal(t, "1 queued, 2 queued", queueStates(t, h, "D"))
	require.Equal(t, before, h.Strings(t, "SELECT owed_seq + last_seq FROM nano_enrollment_push WHERE id = 'D'"))
	d.reports(t, mdm.StatusAcknowledged, "1")
	h.enqueue(t, []string{"D", "E"}, "1")
	require.Equal(t, "2", d.polls(t), "done is done")
	require.Equal(t, "1 acknowledged, 2 queued", queueStates(t, h, "D"))
	require.Equal(t, "1", h.device("E").polls(t), "who has not got it gets it")
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
}

func enqueueConflict(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	h.enqueue(t, []string{"D"}, "C")
	other := command("C")
	other.Raw = append([]byte(" "), other.Raw...)
	for _, ids := range [][]string{{"D"}, {"E"}, {"D", "E"}} {
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: other, IDs: ids})
		require.ErrorIs(t, err, storage.ErrConflict)
	}
	require.Equal(t, []string{"D"}, h.Strings(t, "SELECT id FROM nano_enrollment_queue"))
	out, err := h.device("D").apply(t, &storage.Report{Src: h.device("D").source(), Status: mdm.StatusIdle})
	require.NoError(t, err)
	require.Equal(t, command("C").Raw, out.Command.Raw)
	require.NoError(t, func() error {
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("c"), IDs: []string{"D"}})
		return err
	}(), "names differ byte for byte")
}

func enqueueFanOut(t *testing.T, h *Harness) {
	ids := []string{"D", "E", "F"}
	h.Enroll(t, ids...)
	h.enqueue(t, ids, "C")
	require.Empty(t, h.device("D").reports(t, mdm.StatusAcknowledged, "C"))
	require.Empty(t, h.device("E").reports(t, mdm.StatusError, "C"))
	require.Equal(t, "C", h.device("F").polls(t))
	require.Equal(t, []string{"D Acknowledged", "E Error"}, columns(h.Strings(t, "SELECT id FROM nano_command_results ORDER BY id"),
		h.Strings(t, "SELECT status FROM nano_command_results ORDER BY id")))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_commands"))
}

// columns joins two columns of the same rows.
func columns(a, b []string) []string {
	out := make([]string, len(a))
	for i := range a {
		out[i] = a[i] + " " + b[i]
	}
	return out
}

func enqueueMany(t *testing.T, h *Harness) {
	const devices = 1203
	var ids []string
	now := h.Clock.Now().UnixMicro()
	var args, more []any
	for i := range devices {
		id := fmt.Sprintf("D%04d", i)
		ids = append(ids, id)
		args = append(args, id, id, "Device", topicA, 1, now, now)
		more = append(more, id)
	}
	h.Exec(t, "INSERT INTO nano_enrollments (id, device_id, type, topic, enabled, created_at, updated_at) VALUES "+places(7, devices), args...)
	h.Exec(t, "INSERT INTO nano_enrollment_push (id) VALUES "+places(1, devices), more...)
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("C"), IDs: append(ids, "unknown 1", "A")})
	require.NoError(t, err)
	require.Len(t, failed, 2)
	require.EqualValues(t, devices, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE seq = 1"))
	require.EqualValues(t, devices, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE owed_seq = 1 AND last_seq = 1"))
	require.Equal(t, "C", h.device(ids[devices-1]).polls(t))
}

func enqueuePriority(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	for _, c := range []struct {
		uuid     string
		priority int
	}{{"usual 1", 0}, {"low", -5}, {"high 1", 5}, {"usual 2", 0}, {"highest", 9}, {"high 2", 5}} {
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command(c.uuid), IDs: []string{"D"}, Priority: c.priority})
		require.NoError(t, err)
	}
	next := d.polls(t)
	for _, want := range []string{"highest", "high 1", "high 2", "usual 1", "usual 2", "low"} {
		require.Equal(t, want, next)
		next = d.reports(t, mdm.StatusAcknowledged, next)
	}
	require.Empty(t, next)
}

func enqueueOwesPush(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("1"), IDs: []string{"D"}, NoPush: true})
	require.NoError(t, err)
	owed, at := push(t, h, "D")
	require.False(t, owed)
	require.Zero(t, at)
	require.Equal(t, "1", h.device("D").polls(t))
	h.device("D").reports(t, mdm.StatusAcknowledged, "1")

	first := h.Clock.Advance(time.Minute)
	h.enqueue(t, []string{"D"}, "2")
	h.Clock.Advance(time.Second)
	h.enqueue(t, []string{"D"}, "3")
	owed, at = push(t, h, "D")
	require.True(t, owed)
	require.Equal(t, first.Add(30*time.Second).UnixMicro(), at, "the first one is not put off")
	later := h.Clock.Now().Add(time.Hour).UnixMicro()
	h.Exec(t, "UPDATE nano_enrollment_push SET push_at = ?", later)
	h.enqueue(t, []string{"D"}, "4")
	_, at = push(t, h, "D")
	require.Equal(t, h.Clock.Now().Add(30*time.Second).UnixMicro(), at)
}

func enqueueScheduled(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	now := h.Clock.Now()
	later := func(uuid string, at time.Time) {
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command(uuid), IDs: []string{"D"}, NotBefore: at})
		require.NoError(t, err)
	}
	later("later", now.Add(time.Hour))
	require.Equal(t, "later scheduled", queueStates(t, h, "D"))
	require.Equal(t, now.Add(time.Hour).UnixMicro(), h.Int(t, "SELECT not_before FROM nano_enrollment_queue"))
	owed, at := push(t, h, "D")
	require.False(t, owed)
	require.Zero(t, at)
	require.Empty(t, d.polls(t))
	later("now", now)
	require.Equal(t, "now", d.polls(t), "a time that has come is none")
	h.enqueue(t, []string{"D"}, "last")
	require.Equal(t, "last", d.reports(t, mdm.StatusAcknowledged, "now"))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "last"))
	require.Equal(t, "later scheduled, now acknowledged, last acknowledged", queueStates(t, h, "D"))
}

func enqueueExpired(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	soon := h.Clock.Now().Add(time.Minute)
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("soon"), IDs: []string{"D"}, ExpiresAt: soon})
	require.NoError(t, err)
	h.enqueue(t, []string{"D"}, "never")
	require.Equal(t, "soon", d.polls(t))
	h.Clock.Advance(time.Minute)
	require.Equal(t, "never", d.polls(t), "also before a sweep has seen it")
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "never"))
	require.Equal(t, "soon queued, never acknowledged", queueStates(t, h, "D"))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "soon"), "the device had it in time")
	require.Equal(t, "soon acknowledged, never acknowledged", queueStates(t, h, "D"))
}

func enqueueSupersedes(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	d := h.device("D")
	with := func(key, uuid string, notBefore time.Time, ids ...string) {
		_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command(uuid), IDs: ids, SupersedeKey: key, NotBefore: notBefore})
		require.NoError(t, err)
	}
	now := h.Clock.Now()
	h.enqueue(t, []string{"D"}, "plain")
	with("k", "done", time.Time{}, "D")
	d.reports(t, mdm.StatusAcknowledged, "done")
	with("k", "one", time.Time{}, "D", "E")
	with("k", "scheduled", now.Add(time.Hour), "D")
	with("K", "other", time.Time{}, "D")
	with("k", "two", time.Time{}, "D")
	d.reports(t, mdm.StatusNotNow, "two")
	with("k", "three", time.Time{}, "D")
	require.Equal(t, "plain queued, done acknowledged, one superseded, scheduled superseded, other queued, two superseded, three queued", queueStates(t, h, "D"))
	require.Equal(t, "one queued", queueStates(t, h, "E"))
	with("k", "three", time.Time{}, "D")
	require.Equal(t, storage.Queued, states(t, h, "D")["three"], "a command does not replace itself")
	require.EqualValues(t, 3, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 15 AND finished_at = ?", now.UnixMicro()))
	require.Equal(t, "other", d.reports(t, mdm.StatusAcknowledged, "plain"))
	require.Equal(t, "three", d.reports(t, mdm.StatusAcknowledged, "other"))
	require.Equal(t, "three", d.reports(t, mdm.StatusAcknowledged, "one"), "late")
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_command_results WHERE command_uuid = 'one' AND late = 1"))
}

func enqueueScope(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	h.Exec(t, "UPDATE nano_enrollments SET topic = 'b' WHERE id = 'E'")
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{Topics: []string{"b", "c"}}, &storage.Enqueue{Command: command("C"), IDs: []string{"D", "E"}})
	require.NoError(t, err)
	require.Len(t, failed, 1)
	require.ErrorIs(t, failed["D"], storage.ErrNotEnrolled)
	require.Empty(t, h.device("D").polls(t))
	require.Equal(t, "C", h.device("E").polls(t))
}
