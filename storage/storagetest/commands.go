package storagetest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func commandTests() []subtest {
	return []subtest{
		{"a queue is listed in the order of delivery", queueInOrder},
		{"a queue's pages miss nothing", queuePages},
		{"what ended is listed by its state", queueEnded},
		{"commands are found by type, state and time", commandsFound},
		{"commands are counted by state", commandsCounted},
		{"a command's enrollments come in pages", commandItems},
		{"a scope hides commands of other topics", commandsScope},
		{"a result is read as it came", resultRead},
	}
}

// queue lists a queue in pages of a size, as command UUIDs.
func (h *Harness) queue(t *testing.T, id string, state storage.State, limit int) (uuids []string) {
	t.Helper()
	var after storage.QueueKey
	for {
		items, err := h.Store.Queue(t.Context(), storage.Scope{}, id, state, after, limit)
		require.NoError(t, err)
		if len(items) == 0 {
			return uuids
		}
		for _, i := range items {
			require.Equal(t, id, i.Enrollment)
			uuids = append(uuids, i.CommandUUID)
		}
		last := items[len(items)-1]
		after = storage.QueueKey{Priority: last.Priority, Seq: last.Seq}
	}
}

// asks queues a command with options.
func (h *Harness) asks(t *testing.T, e storage.Enqueue, uuid, requestType string, ids ...string) {
	t.Helper()
	e.Command, e.IDs = &mdm.Command{CommandUUID: uuid, RequestType: requestType, Raw: []byte("raw " + uuid)}, ids
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &e)
	require.NoError(t, err)
	require.Empty(t, failed)
}

func queueInOrder(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	now := h.Clock.Now()
	h.asks(t, storage.Enqueue{}, "second", "A", "D")
	h.asks(t, storage.Enqueue{Priority: 5, ExpiresAt: now.Add(time.Hour), SupersedeKey: "k"}, "first", "B", "D")
	h.asks(t, storage.Enqueue{}, "third", "A", "D")
	h.asks(t, storage.Enqueue{Priority: -1}, "last", "A", "D")
	h.asks(t, storage.Enqueue{NotBefore: now.Add(time.Hour)}, "later", "A", "D")
	h.asks(t, storage.Enqueue{}, "another's", "A", "E")
	h.device("D").reports(t, mdm.StatusNotNow, "second")
	for _, limit := range []int{1, 2, 100} {
		require.Equal(t, []string{"first", "second", "third", "last"}, h.queue(t, "D", 0, limit))
		require.Equal(t, []string{"later"}, h.queue(t, "D", storage.Scheduled, limit))
		require.Equal(t, []string{"second"}, h.queue(t, "D", storage.NotNow, limit))
	}
	items, err := h.Store.Queue(t.Context(), storage.Scope{}, "D", 0, storage.QueueKey{}, 2)
	require.NoError(t, err)
	require.Equal(t, []storage.QueueItem{
		{Enrollment: "D", CommandUUID: "first", RequestType: "B", State: storage.Queued, Seq: 2, Priority: 5, CreatedAt: now, ExpiresAt: now.Add(time.Hour), SupersedeKey: "k"},
		{Enrollment: "D", CommandUUID: "second", RequestType: "A", State: storage.NotNow, Seq: 1, CreatedAt: now, NotNowAt: now, NotNowCount: 1},
	}, items)
	item, err := h.Store.QueueItem(t.Context(), storage.Scope{}, "D", "later")
	require.NoError(t, err)
	require.Equal(t, now.Add(time.Hour), item.NotBefore)
	require.Equal(t, storage.Scheduled, item.State)

	var got []string
	for next := h.device("D").polls(t); next != ""; next = h.device("D").polls(t) {
		got = append(got, next)
		h.device("D").reports(t, mdm.StatusAcknowledged, next)
	}
	require.Equal(t, []string{"first", "second", "third", "last"}, got, "as the device gets them on Idle")
	_, err = h.Store.Queue(t.Context(), storage.Scope{}, "nobody", 0, storage.QueueKey{}, 10)
	require.ErrorIs(t, err, storage.ErrNotFound)
	for _, bad := range [][2]string{{"D", "none"}, {"nobody", "first"}, {"\x00", "first"}, {"D", "\x00"}} {
		_, err = h.Store.QueueItem(t.Context(), storage.Scope{}, bad[0], bad[1])
		require.ErrorIs(t, err, storage.ErrNotFound)
	}
}

func queuePages(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	want := make(map[int][]string)
	for i := range 60 {
		priority, uuid := i%3, fmt.Sprintf("C%02d", i)
		h.asks(t, storage.Enqueue{Priority: priority}, uuid, "A", "D")
		want[priority] = append(want[priority], uuid)
		if i%4 == 0 {
			h.device("D").reports(t, mdm.StatusNotNow, uuid)
		}
	}
	all := slices.Concat(want[2], want[1], want[0])
	for _, limit := range []int{1, 7, 20, 1000} {
		require.Equal(t, all, h.queue(t, "D", 0, limit))
	}
}

func queueEnded(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	h.enqueue(t, []string{"D"}, "C1", "C2", "C3")
	d := h.device("D")
	d.reports(t, mdm.StatusAcknowledged, "C1")
	now := h.Clock.Advance(time.Minute)
	d.reports(t, mdm.StatusError, "C2")
	require.Equal(t, []string{"C3"}, h.queue(t, "D", 0, 10))
	require.Equal(t, []string{"C1"}, h.queue(t, "D", storage.Acknowledged, 10))
	require.Equal(t, []string{"C2"}, h.queue(t, "D", storage.Failed, 10))
	item, err := h.Store.QueueItem(t.Context(), storage.Scope{}, "D", "C2")
	require.NoError(t, err)
	require.Equal(t, now, item.FinishedAt)
}

// commands lists commands in pages of a size.
func (h *Harness) commands(t *testing.T, scope storage.Scope, f storage.CommandFilter, limit int) []string {
	t.Helper()
	uuids := []string{}
	var after storage.CommandKey
	for range 1000 {
		list, next, err := h.Store.FindCommands(t.Context(), scope, f, after, limit)
		require.NoError(t, err)
		for _, c := range list {
			uuids = append(uuids, c.UUID)
		}
		if next == (storage.CommandKey{}) {
			return uuids
		}
		after = next
	}
	t.Fatal("the list does not end")
	return nil
}

func commandsFound(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	began := h.Clock.Now()
	h.asks(t, storage.Enqueue{}, "C1", "A", "D")
	h.asks(t, storage.Enqueue{}, "C2", "B", "D", "E")
	later := h.Clock.Advance(time.Hour)
	h.asks(t, storage.Enqueue{}, "C3", "A", "E")
	h.device("D").reports(t, mdm.StatusAcknowledged, "C1")
	h.device("E").reports(t, mdm.StatusError, "C2")
	for name, tc := range map[string]struct {
		f    storage.CommandFilter
		want []string
	}{
		"all, newest first":   {storage.CommandFilter{}, []string{"C3", "C2", "C1"}},
		"type":                {storage.CommandFilter{RequestType: "A"}, []string{"C3", "C1"}},
		"no such type":        {storage.CommandFilter{RequestType: "X"}, []string{}},
		"waiting":             {storage.CommandFilter{State: storage.Queued}, []string{"C3", "C2"}},
		"failed":              {storage.CommandFilter{State: storage.Failed}, []string{"C2"}},
		"type and state":      {storage.CommandFilter{RequestType: "A", State: storage.Acknowledged}, []string{"C1"}},
		"after":               {storage.CommandFilter{CreatedAfter: later}, []string{"C3"}},
		"before":              {storage.CommandFilter{CreatedBefore: later}, []string{"C2", "C1"}},
		"type, before, after": {storage.CommandFilter{RequestType: "A", CreatedAfter: began, CreatedBefore: later}, []string{"C1"}},
	} {
		for _, limit := range []int{1, 2, 100} {
			require.Equal(t, tc.want, h.commands(t, storage.Scope{}, tc.f, limit), "%s, %d a page", name, limit)
		}
	}
}

func commandsCounted(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E", "F")
	h.asks(t, storage.Enqueue{}, "C1", "A", "D", "E", "F")
	h.device("D").reports(t, mdm.StatusAcknowledged, "C1")
	h.device("E").reports(t, mdm.StatusNotNow, "C1")
	want := storage.CommandInfo{UUID: "C1", RequestType: "A", CreatedAt: h.Clock.Now(),
		States: map[storage.State]int64{storage.Acknowledged: 1, storage.NotNow: 1, storage.Queued: 1}}
	list, _, err := h.Store.FindCommands(t.Context(), storage.Scope{}, storage.CommandFilter{}, storage.CommandKey{}, 10)
	require.NoError(t, err)
	require.Equal(t, []storage.CommandInfo{want}, list)
	c, err := h.Store.Command(t.Context(), storage.Scope{}, "C1")
	require.NoError(t, err)
	require.Equal(t, want, *c)
	for _, uuid := range []string{"none", "", "\x00"} {
		_, err = h.Store.Command(t.Context(), storage.Scope{}, uuid)
		require.ErrorIs(t, err, storage.ErrNotFound)
	}
	waits, err := h.Store.CommandWaits(t.Context(), storage.Scope{}, "C1")
	require.NoError(t, err)
	require.True(t, waits)
	h.device("E").reports(t, mdm.StatusError, "C1")
	h.device("F").reports(t, mdm.StatusAcknowledged, "C1")
	waits, err = h.Store.CommandWaits(t.Context(), storage.Scope{}, "C1")
	require.NoError(t, err)
	require.False(t, waits)

	// A list does not count all of a large one.
	var rows []any
	for i := range 11_000 {
		rows = append(rows, fmt.Sprint("X", i), "C1", i, int(storage.Acknowledged), 1)
	}
	for chunk := range slices.Chunk(rows, 5*1000) {
		h.Exec(t, "INSERT INTO nano_enrollment_queue (id, command_uuid, seq, state, created_at) VALUES "+places(5, len(chunk)/5), chunk...)
	}
	list, _, err = h.Store.FindCommands(t.Context(), storage.Scope{}, storage.CommandFilter{}, storage.CommandKey{}, 10)
	require.NoError(t, err)
	require.EqualValues(t, 10_001, list[0].Counted)
	c, err = h.Store.Command(t.Context(), storage.Scope{}, "C1")
	require.NoError(t, err)
	require.EqualValues(t, 11_002, c.States[storage.Acknowledged])
}

func commandItems(t *testing.T, h *Harness) {
	ids := numbered("D", 20)
	h.Enroll(t, ids...)
	h.asks(t, storage.Enqueue{}, "C1", "A", ids...)
	for i, status := range []mdm.Status{mdm.StatusAcknowledged, mdm.StatusError, mdm.StatusNotNow} {
		h.device(ids[i*5]).reports(t, status, "C1")
	}
	for _, limit := range []int{1, 7, 20, 100} {
		var got []string
		for after := ""; ; {
			items, err := h.Store.CommandItems(t.Context(), storage.Scope{}, "C1", 0, after, limit)
			require.NoError(t, err)
			if len(items) == 0 {
				break
			}
			for _, i := range items {
				got = append(got, i.Enrollment)
				require.Equal(t, "A", i.RequestType)
			}
			after = got[len(got)-1]
		}
		require.Equal(t, ids, got)
	}
	items, err := h.Store.CommandItems(t.Context(), storage.Scope{}, "C1", storage.Failed, "", 10)
	require.NoError(t, err)
	require.Len(t, items, 1)
	require.Equal(t, ids[5], items[0].Enrollment)
}

func commandsScope(t *testing.T, h *Harness) {
	inventory(t, h)
	h.asks(t, storage.Enqueue{}, "both", "A", "mac", "phone")
	h.asks(t, storage.Enqueue{}, "mac's", "A", "mac")
	b := storage.Scope{Topics: []string{topicB}}
	require.Equal(t, []string{"both"}, h.commands(t, b, storage.CommandFilter{}, 1))
	require.Equal(t, []string{"both"}, h.commands(t, b, storage.CommandFilter{RequestType: "A", State: storage.Queued}, 1))
	h.device("phone").with("c-phone").reports(t, mdm.StatusAcknowledged, "both")
	require.Empty(t, h.commands(t, b, storage.CommandFilter{State: storage.Queued}, 1), "another's row says nothing")

	c, err := h.Store.Command(t.Context(), b, "both")
	require.NoError(t, err)
	require.Equal(t, map[storage.State]int64{storage.Acknowledged: 1}, c.States)
	_, err = h.Store.Command(t.Context(), b, "mac's")
	require.ErrorIs(t, err, storage.ErrNotFound)
	items, err := h.Store.CommandItems(t.Context(), b, "both", 0, "", 10)
	require.NoError(t, err)
	require.Len(t, items, 1)
	waits, err := h.Store.CommandWaits(t.Context(), b, "both")
	require.NoError(t, err)
	require.False(t, waits)
	_, err = h.Store.Queue(t.Context(), b, "mac", 0, storage.QueueKey{}, 10)
	require.ErrorIs(t, err, storage.ErrNotFound)
	_, err = h.Store.QueueItem(t.Context(), b, "mac", "both")
	require.ErrorIs(t, err, storage.ErrNotFound)
	_, err = h.Store.CommandResult(t.Context(), b, "mac", "both")
	require.ErrorIs(t, err, storage.ErrNotFound)
}

func resultRead(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	h.enqueue(t, []string{"D"}, "C1", "C2")
	_, err := h.Store.CommandResult(t.Context(), storage.Scope{}, "D", "C1")
	require.ErrorIs(t, err, storage.ErrNotFound)
	h.device("D").reports(t, mdm.StatusAcknowledged, "C1")
	r, err := h.Store.CommandResult(t.Context(), storage.Scope{}, "D", "C1")
	require.NoError(t, err)
	require.Equal(t, "Acknowledged", r.Status)
	require.False(t, r.Late)
	require.Equal(t, h.Clock.Now(), r.CreatedAt)
	require.NotEmpty(t, r.Raw)

	was, err := h.Store.CancelItem(t.Context(), storage.Scope{}, "D", "C2", auditRecord("cancel"))
	require.NoError(t, err)
	require.Equal(t, storage.Queued, was)
	h.device("D").reports(t, mdm.StatusError, "C2")
	r, err = h.Store.CommandResult(t.Context(), storage.Scope{}, "D", "C2")
	require.NoError(t, err)
	require.True(t, r.Late)
	require.Equal(t, "Error", r.Status)
}
