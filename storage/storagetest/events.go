package storagetest

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/groob/plist"
	"github.com/klauspost/compress/s2"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func outboxTests() []subtest {
	return []subtest{
		{"events are numbered in order for each enrollment", outboxOrder},
		{"events are numbered in order whatever the clocks of replicas say", outboxClocks},
		{"events that were committed together are numbered together", outboxTogether},
		{"an enrollment whose events keep coming starves no other", outboxFair},
		{"who lost the lease numbers nothing", outboxWithoutLease},
		{"numbers have no gaps and never repeat while reports come in", outboxWhileReporting},
		{"two who believe that they number do it once", outboxNumbersOnce},
		{"a page has the events after a number", outboxPage},
		{"a large payload is read by itself", outboxLarge},
		{"payloads of all sizes and kinds are read as they came", outboxMixed},
		{"many events of one report are read in order", outboxMany},
		{"long parameters of URLs", outboxParams},
		{"an event whose payload is cut holds up no other", outboxCut},
		{"an event that was stored before is stored again", outboxTwice},
		{"the log is read by topic and scope, from where one left off", outboxLog},
		{"the log goes on behind what was removed", outboxLogRemoved},
	}
}

func sinkTests() []subtest {
	return []subtest{
		{"a sink is stored, replaced and deleted", sinkStored},
		{"a new sink begins behind what is numbered", sinkBegins},
		{"a configured sink and one of the API's do not mix", sinkConflict},
		{"a sink that has another URL by now is not turned off", sinkTurnedOff},
		{"a configured sink that nobody has any more is forgotten", sinkForgotten},
	}
}

func deliveryTests() []subtest {
	return []subtest{
		{"a settlement moves the cursor and keeps what failed", deliverySettled},
		{"what waits is read in order for each enrollment", deliveryLanes},
		{"nothing is settled without the lease, or for a sink that was deleted", deliveryRefused},
		{"a receiver is down since it began to fail", receiverDown},
		{"what waits too long is given up", deliveryGivenUp},
		{"events are sent again by range", deliveryAgain},
		{"dead letters are sent again", deliveryDead},
		{"backlogs are counted", deliveryBacklogs},
	}
}

func upkeepTests() []subtest {
	return []subtest{
		{"a dropped payload goes when no sink needs it", upkeepPayloads},
		{"payloads go one by one, wherever they are stored", upkeepMixed},
		{"old events go when every sink is done with them", upkeepEvents},
		{"the log is trimmed to a number of bytes", upkeepTrimmed},
		{"the log counts its bytes beside an older release", upkeepBytesOfOlderRelease},
		{"events keep large payloads of results alone", upkeepOtherPayloads},
		{"nothing is kept up without the lease", upkeepWithoutLease},
		{"certificates near their end are announced once", upkeepExpiring},
		{"an expired command is announced", upkeepExpiredCommand},
		{"a push that failed for good is announced", upkeepPushFailed},
		{"nothing is announced that no sink names", upkeepUnasked},
	}
}

// eventLease takes the lease for events.
func eventLease(t *testing.T, h *Harness) storage.Lease {
	t.Helper()
	return take(t, h.Store, "events", "a")
}

// tells has a device report, with an event for each id.
func (c *channel) tells(t *testing.T, ids ...string) {
	t.Helper()
	for _, id := range ids {
		e := event(id, storage.TopicConnect)
		e.Status, e.CommandUUID = "Acknowledged", "X"
		c.withEvents(e).reports(t, mdm.StatusAcknowledged, "X")
	}
}

// number numbers all events, and returns the last number.
func (h *Harness) number(t *testing.T, l storage.Lease) int64 {
	t.Helper()
	for {
		n, last, err := h.Store.NumberEvents(t.Context(), l, 1000)
		require.NoError(t, err)
		if n == 0 {
			return last
		}
	}
}

// putSink stores a sink and returns it as stored.
func (h *Harness) putSink(t *testing.T, k storage.EventSink) *storage.EventSink {
	t.Helper()
	require.NoError(t, h.Store.PutEventSink(t.Context(), k))
	return h.sink(t, k.Name)
}

func (h *Harness) sink(t *testing.T, name string) *storage.EventSink {
	t.Helper()
	sinks, err := h.Store.EventSinks(t.Context())
	require.NoError(t, err)
	i := slices.IndexFunc(sinks, func(k storage.EventSink) bool { return k.Name == name })
	require.GreaterOrEqual(t, i, 0, name)
	return &sinks[i]
}

func hook(topics ...string) storage.EventSink {
	return storage.EventSink{Name: "hook", URL: "http://hook/", Enabled: true, Tokens: true, Filter: storage.EventFilter{Topics: topics}}
}

func idsOf(events []storage.Event) (ids []string) {
	for _, e := range events {
		ids = append(ids, e.ID)
	}
	return ids
}

// page reads the ids of all numbered events.
func (h *Harness) page(t *testing.T) []string {
	t.Helper()
	events, err := h.Store.SinkPage(t.Context(), 0, 10_000)
	require.NoError(t, err)
	for i := 1; i < len(events); i++ {
		require.Greater(t, events[i].Seq, events[i-1].Seq)
	}
	return idsOf(events)
}

func outboxOrder(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	a, b := h.device("A").enrolls(t), h.device("B").enrolls(t)
	n, last, err := h.Store.NumberEvents(t.Context(), l, 10)
	require.NoError(t, err)
	require.Zero(t, n+int(last))
	// The second event of A has an earlier time, as by another replica's clock.
	// The order of the commits counts.
	for i, c := range []*channel{a, a, b, a} {
		e := event([]string{"a1", "a2", "b1", "a3"}[i], storage.TopicConnect)
		e.CreatedAt = e.CreatedAt.Add([]time.Duration{10, -50, 5, 20}[i] * time.Second)
		c.withEvents(e).reports(t, mdm.StatusAcknowledged, "X")
	}
	require.EqualValues(t, 4, h.number(t, l))
	require.Equal(t, []string{"a1", "a2", "b1", "a3"}, h.page(t))
	a.tells(t, "a4")
	b.tells(t, "b2")
	n, last, err = h.Store.NumberEvents(t.Context(), l, 1)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.EqualValues(t, 5, last)
	require.EqualValues(t, 6, h.number(t, l))
	last, err = h.Store.LastEvent(t.Context())
	require.NoError(t, err)
	require.EqualValues(t, 6, last)
}

func outboxClocks(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	late := h.Open(t, func(cfg *sqlstore.Config) {
		cfg.Now = func() time.Time { return h.Clock.Now().Add(-time.Hour) }
	})
	var want []string
	for i := range 8 {
		c := d
		if i%2 == 1 {
			c = d.on(late)
		}
		want = append(want, fmt.Sprint("a", i))
		c.tells(t, want[i])
		if i == 3 { // the stamps of numbered batches do not count
			h.number(t, l)
		}
	}
	h.number(t, l)
	require.Equal(t, want, h.page(t))
}

func outboxTogether(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	d.withEvents(event("a1", storage.TopicConnect), event("a2", storage.TopicConnect), event("a3", storage.TopicConnect)).
		reports(t, mdm.StatusAcknowledged, "X")
	d.tells(t, "a4", "a5")
	n, last, err := h.Store.NumberEvents(t.Context(), l, 2)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	require.EqualValues(t, 3, last)
	n, _, err = h.Store.NumberEvents(t.Context(), l, 2)
	require.NoError(t, err)
	require.Equal(t, 2, n)
	for after, want := range [][]string{{"a1", "a2"}, {"a2", "a3"}, {"a3", "a4"}, {"a4", "a5"}, {"a5"}, nil} {
		events, err := h.Store.SinkPage(t.Context(), int64(after), 2)
		require.NoError(t, err)
		require.Equal(t, want, idsOf(events))
		read, next, err := h.Store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{After: int64(after), Limit: 2})
		require.NoError(t, err)
		require.Equal(t, want, idsOf(read))
		require.EqualValues(t, after+len(want), next)
		raw, err := h.Store.EventPayload(t.Context(), int64(after+1))
		if want == nil {
			require.ErrorIs(t, err, storage.ErrNotFound)
		} else {
			require.Equal(t, "raw "+want[0], string(raw))
		}
	}
}

func outboxFair(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	a, b := h.device("A").enrolls(t), h.device("B").enrolls(t)
	a.tells(t, "a1", "a2", "a3")
	b.tells(t, "b1")
	for i := range 4 {
		_, _, err := h.Store.NumberEvents(t.Context(), l, 2)
		require.NoError(t, err)
		a.tells(t, fmt.Sprint("more1-", i), fmt.Sprint("more2-", i))
	}
	require.Contains(t, h.page(t), "b1")
}

func outboxWithoutLease(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	h.device("A").enrolls(t).tells(t, "a1")
	take(t, h.Store, "events", "b")
	_, _, err := h.Store.NumberEvents(t.Context(), l, 10)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	require.Empty(t, h.page(t))
}

func outboxWhileReporting(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	const devices, reports = 12, 15
	var ids []string
	for i := range devices {
		ids = append(ids, fmt.Sprintf("D%02d", i))
	}
	h.Enroll(t, ids...)
	done := make(chan struct{})
	var numbering sync.WaitGroup
	var read []string // what a reader of the log saw
	numbering.Go(func() {
		after := int64(0)
		for more := true; more; {
			select {
			case <-done:
				more = false
			default:
			}
			if _, _, err := h.Store.NumberEvents(t.Context(), l, 7); err != nil {
				t.Error(err)
				return
			}
			events, next, err := h.Store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{After: after, Limit: 5})
			if err != nil {
				t.Error(err)
				return
			}
			read, after = append(read, idsOf(events)...), next
		}
	})
	for i, err := range together(devices, func(i int) error {
		d := h.device(ids[i])
		for n := range reports {
			if _, err := d.withEvents(event(fmt.Sprintf("%s %02d", ids[i], n), storage.TopicConnect)).report(t, mdm.StatusAcknowledged, "X"); err != nil {
				return err
			}
		}
		return nil
	}) {
		require.NoError(t, err, i)
	}
	close(done)
	numbering.Wait()
	require.EqualValues(t, devices*reports, h.number(t, l))
	all := h.page(t)
	require.Len(t, all, devices*reports)
	require.Equal(t, all[:len(read)], read, "a reader misses nothing")
	for _, id := range ids {
		of := slices.DeleteFunc(slices.Clone(all), func(e string) bool { return e[:3] != id })
		require.IsIncreasing(t, of)
		require.Len(t, of, reports)
	}
}

func outboxNumbersOnce(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	second := h.Open(t, nil)
	d := h.device("A").enrolls(t)
	for i := range 20 {
		d.tells(t, fmt.Sprintf("a%02d", i))
	}
	// A paused process may wake up and go on under the same lease.
	for i, err := range together(8, func(i int) error {
		s := h.Store
		if i%2 == 1 {
			s = second
		}
		_, _, err := s.NumberEvents(t.Context(), l, 5)
		return err
	}) {
		require.NoError(t, err, i)
	}
	require.EqualValues(t, 20, h.number(t, l))
	require.IsIncreasing(t, h.page(t))
	require.Len(t, h.page(t), 20)
}

func outboxPage(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	d.tells(t, "a1", "a2", "a3")
	h.number(t, l)
	events, err := h.Store.SinkPage(t.Context(), 1, 1)
	require.NoError(t, err)
	require.Len(t, events, 1)
	e := events[0]
	require.Equal(t, "a2", e.ID)
	require.Equal(t, storage.TopicConnect, e.Topic)
	require.Equal(t, mdm.EnrollID{Type: mdm.Device, ID: "A"}, e.Enroll)
	require.EqualValues(t, 2, e.Seq)
	require.Equal(t, "raw a2", string(e.Raw))
	require.EqualValues(t, 6, e.RawSize)
	require.False(t, e.RawApart)
	require.Equal(t, topicA, e.APNsTopic)
	events, err = h.Store.SinkPage(t.Context(), 3, 10)
	require.NoError(t, err)
	require.Empty(t, events)
}

func outboxLarge(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	large := event("large", storage.TopicConnect)
	large.Raw = make([]byte, 1<<20)
	h.enqueue(t, []string{"A"}, "X")
	d.withEvents(large).reports(t, mdm.StatusAcknowledged, "X")
	h.number(t, l)
	events, err := h.Store.SinkPage(t.Context(), 0, 10)
	require.NoError(t, err)
	require.True(t, events[0].RawApart)
	require.Empty(t, events[0].Raw)
	require.EqualValues(t, 1<<20, events[0].RawSize)
	raw, err := h.Store.EventPayload(t.Context(), events[0].Seq)
	require.NoError(t, err)
	require.Len(t, raw, 1<<20)
	_, err = h.Store.EventPayload(t.Context(), 99)
	require.ErrorIs(t, err, storage.ErrNotFound)
	// One that nobody can open is an error, and counted.
	h.Exec(t, "UPDATE nano_event_payloads SET payload = ?", []byte("\xffNS1damaged"))
	_, err = h.Store.EventPayload(t.Context(), events[0].Seq)
	require.Error(t, err)
	require.NotErrorIs(t, err, storage.ErrNotFound)
	require.EqualValues(t, 1, h.Store.Stats().EventsUnreadable)
}

func outboxLog(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A")
	require.NoError(t, d.withEvents(event("authenticate", storage.TopicAuthenticate)).authenticate(t))
	d.enrolls(t).tells(t, "r1", "r2", "r3")
	h.number(t, l)
	read := func(scope storage.Scope, q storage.EventQuery) ([]string, int64) {
		t.Helper()
		events, next, err := h.Store.ReadEvents(t.Context(), scope, q)
		require.NoError(t, err)
		return idsOf(events), next
	}
	ids, next := read(storage.Scope{}, storage.EventQuery{Limit: 2})
	require.Equal(t, []string{"authenticate", "r1"}, ids)
	ids, next = read(storage.Scope{}, storage.EventQuery{After: next, Limit: 10})
	require.Equal(t, []string{"r2", "r3"}, ids)
	ids, again := read(storage.Scope{}, storage.EventQuery{After: next, Limit: 10})
	require.Empty(t, ids)
	require.Equal(t, next, again)
	ids, _ = read(storage.Scope{}, storage.EventQuery{Limit: 10, Topics: []string{storage.TopicAuthenticate, storage.TopicCheckOut}})
	require.Equal(t, []string{"authenticate"}, ids)
	ids, next = read(storage.Scope{Topics: []string{"com.apple.mgmt.other"}}, storage.EventQuery{Limit: 10})
	require.Empty(t, ids)
	require.EqualValues(t, 4, next, "what is left out is not looked at again")
	ids, _ = read(storage.Scope{Topics: []string{topicA}}, storage.EventQuery{Limit: 10})
	require.Len(t, ids, 4)
}

func outboxLogRemoved(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	h.device("A").enrolls(t).tells(t, "r1", "r2", "r3")
	h.number(t, l)
	h.Exec(t, "DELETE FROM nano_event_batches WHERE seq <= 2")
	events, next, err := h.Store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{Limit: 10})
	require.NoError(t, err)
	require.Equal(t, []string{"r3"}, idsOf(events))
	h.Exec(t, "DELETE FROM nano_event_batches")
	events, again, err := h.Store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{Limit: 10})
	require.NoError(t, err)
	require.Empty(t, events)
	require.Equal(t, next, again)
	h.device("A").tells(t, "r4")
	require.EqualValues(t, 4, h.number(t, l), "numbers are not used again")
}

func sinkStored(t *testing.T, h *Harness) {
	k := storage.EventSink{
		Name: "hook", URL: "https://user:pass@hook/", Keys: []string{"k1", "k2"}, Form: storage.FormCheckin, Tokens: true, Enabled: true, OnError: storage.OnErrorSkip,
		Filter: storage.EventFilter{Topics: []string{storage.TopicConnect}, EnrollmentTypes: []mdm.EnrollType{mdm.Device},
			RequestTypes: []string{"ProfileList"}, APNsTopics: []string{topicA}, Idle: true},
	}
	began := h.Clock.Now()
	got := *h.putSink(t, k)
	k.CreatedAt, k.UpdatedAt = began, began
	require.Equal(t, k, got)
	h.putSink(t, storage.EventSink{Name: "another"})
	k.Enabled, k.Reason, k.Keys, k.UpdatedAt = false, "by hand", nil, h.Clock.Advance(time.Hour)
	require.Equal(t, k, *h.putSink(t, k))
	sinks, err := h.Store.EventSinks(t.Context())
	require.NoError(t, err)
	require.Equal(t, "another", sinks[0].Name)
	require.Len(t, sinks, 2)
	require.NoError(t, h.Store.DeleteEventSink(t.Context(), "hook"))
	require.ErrorIs(t, h.Store.DeleteEventSink(t.Context(), "hook"), storage.ErrNotFound)
	sinks, err = h.Store.EventSinks(t.Context())
	require.NoError(t, err)
	require.Len(t, sinks, 1)
}

func sinkBegins(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	d.tells(t, "a1", "a2")
	h.number(t, l)
	d.tells(t, "a3")
	require.EqualValues(t, 2, h.putSink(t, hook()).Cursor)
	require.NoError(t, h.Store.Settle(t.Context(), l, h.sink(t, "hook"), storage.Settlement{Cursor: 1}))
	require.EqualValues(t, 1, h.putSink(t, hook()).Cursor, "one that is there goes on where it was")
}

func sinkConflict(t *testing.T, h *Harness) {
	k := hook()
	h.putSink(t, k)
	k.Configured = true
	require.ErrorIs(t, h.Store.PutEventSink(t.Context(), k), storage.ErrConflict)
	k.Name = "configured"
	h.putSink(t, k)
	k.Configured = false
	require.ErrorIs(t, h.Store.PutEventSink(t.Context(), k), storage.ErrConflict)
}

func sinkTurnedOff(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	moved := hook()
	moved.URL = "http://elsewhere/"
	h.putSink(t, moved)
	require.NoError(t, h.Store.TurnOffEventSink(t.Context(), l, k, "gone"))
	require.True(t, h.sink(t, "hook").Enabled)
	k = h.putSink(t, hook())
	require.NoError(t, h.Store.TurnOffEventSink(t.Context(), l, k, "gone"))
	require.False(t, h.sink(t, "hook").Enabled)
	require.Equal(t, "gone", h.sink(t, "hook").Reason)
	h.putSink(t, hook())
	take(t, h.Store, "events", "b")
	require.ErrorIs(t, h.Store.TurnOffEventSink(t.Context(), l, k, "gone"), storage.ErrLeaseLost)
	require.True(t, h.sink(t, "hook").Enabled)
}

func sinkForgotten(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	kept, gone, api := hook(), hook(), hook()
	kept.Name, gone.Name = "kept", "gone"
	kept.Configured, gone.Configured = true, true
	began := h.Clock.Now()
	require.Equal(t, began, h.putSink(t, kept).SeenAt)
	k := h.putSink(t, gone)
	h.putSink(t, api)
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Put: []storage.Delivery{{Seq: 1, State: storage.DeliveryDead}}}))
	now := h.Clock.Advance(time.Hour)
	require.NoError(t, h.Store.SeeEventSinks(t.Context(), []string{"kept", "hook", "nobody"}))
	require.NoError(t, h.Store.SeeEventSinks(t.Context(), nil))
	require.Equal(t, now, h.sink(t, "kept").SeenAt)
	n, err := h.Store.ForgetEventSinks(t.Context(), l, began)
	require.NoError(t, err)
	require.Zero(t, n)
	n, err = h.Store.ForgetEventSinks(t.Context(), l, now)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Equal(t, []string{"hook", "kept"}, h.Strings(t, "SELECT name FROM nano_event_sinks ORDER BY name"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_event_deliveries"))
}

// waits is a delivery of an event of device A.
func waits(seq int64, state storage.DeliveryState) storage.Delivery {
	return storage.Delivery{Seq: seq, Enrollment: "A", CreatedAt: time.Unix(1_700_000_000, 0), State: state}
}

func deliverySettled(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	h.device("A").enrolls(t).tells(t, "a1", "a2", "a3", "a4")
	h.number(t, l)
	next := h.Clock.Now().Add(time.Minute)
	failed := storage.Delivery{Seq: 2, Enrollment: "A", State: storage.DeliveryWaiting, Attempts: 3, NextAt: next, Error: "HTTP 500"}
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 3, Put: []storage.Delivery{failed, waits(3, storage.DeliveryWaiting)}}))
	require.EqualValues(t, 3, h.sink(t, "hook").Cursor)
	waiting, err := h.Store.WaitingEnrollments(t.Context(), "hook", 10)
	require.NoError(t, err)
	require.Equal(t, []storage.WaitingEnrollment{{Enrollment: "A", First: 2, Attempts: 3, NextAt: next}}, waiting)
	require.Equal(t, []string{"HTTP 500"}, h.Strings(t, "SELECT last_error FROM nano_event_deliveries WHERE seq = 2"))
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Done: []int64{2, 4}}))
	require.EqualValues(t, 3, h.sink(t, "hook").Cursor)
	require.Equal(t, []string{"3"}, h.Strings(t, "SELECT seq FROM nano_event_deliveries"))
}

func deliveryLanes(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	a, b := h.device("A").enrolls(t), h.device("B").enrolls(t)
	b.tells(t, "b1")
	h.number(t, l)
	a.tells(t, "a1", "a2", "a3")
	h.number(t, l)
	b.tells(t, "b2")
	h.number(t, l)
	var put []storage.Delivery
	for seq, of := range []string{"B", "A", "A", "A", "B"} {
		put = append(put, storage.Delivery{Seq: int64(seq + 1), Enrollment: of, State: storage.DeliveryWaiting, Attempts: seq})
	}
	put[3].State = storage.DeliveryDead
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 5, Put: put}))
	waiting, err := h.Store.WaitingEnrollments(t.Context(), "hook", 10)
	require.NoError(t, err)
	require.Len(t, waiting, 2)
	require.Equal(t, "B", waiting[0].Enrollment, "the one that waits longest")
	waiting, err = h.Store.WaitingEnrollments(t.Context(), "hook", 1)
	require.NoError(t, err)
	require.Len(t, waiting, 1)
	events, err := h.Store.WaitingEvents(t.Context(), "hook", "A", 10)
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2"}, idsOf(events))
	require.Equal(t, 2, events[1].Attempts)
	require.Equal(t, "raw a2", string(events[1].Raw))
	events, err = h.Store.WaitingEvents(t.Context(), "other", "A", 10)
	require.NoError(t, err)
	require.Empty(t, events)
}

func deliveryRefused(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	s := storage.Settlement{Cursor: 1, Put: []storage.Delivery{waits(1, storage.DeliveryWaiting)}}
	require.NoError(t, h.Store.Settle(t.Context(), l, k, s))
	require.NoError(t, h.Store.DeleteEventSink(t.Context(), "hook"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_event_deliveries"))
	s.Cursor = 0
	require.ErrorIs(t, h.Store.Settle(t.Context(), l, k, s), storage.ErrNotFound)
	h.Clock.Advance(time.Second)
	fresh := h.putSink(t, hook())
	require.ErrorIs(t, h.Store.Settle(t.Context(), l, k, s), storage.ErrNotFound, "it is another one of that name")
	_, err := h.Store.GiveUp(t.Context(), l, k, h.Clock.Now(), "late", 10)
	require.ErrorIs(t, err, storage.ErrNotFound)
	take(t, h.Store, "events", "b")
	require.ErrorIs(t, h.Store.Settle(t.Context(), l, fresh, s), storage.ErrLeaseLost)
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_event_deliveries"))
	require.Zero(t, h.sink(t, "hook").Cursor)
}

func receiverDown(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	settle := func(state *storage.ReceiverState) *storage.EventSink {
		require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Receiver: state}))
		return h.sink(t, "hook")
	}
	require.Zero(t, settle(&storage.ReceiverState{}).DownSince)
	began := h.Clock.Now()
	require.Equal(t, began, settle(&storage.ReceiverState{Down: true, Error: "refused"}).DownSince)
	h.Clock.Advance(time.Second)
	down := settle(&storage.ReceiverState{Down: true, Error: "502"}) // by another replica
	require.Equal(t, began, down.DownSince)
	require.Equal(t, "502", down.DownError)
	require.Equal(t, began, settle(nil).DownSince)
	require.Equal(t, began, h.putSink(t, hook()).DownSince, "its configuration says nothing of it")
	up := settle(&storage.ReceiverState{})
	require.Zero(t, up.DownSince)
	require.Empty(t, up.DownError)
}

func deliveryGivenUp(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	d := h.device("A").enrolls(t)
	d.tells(t, "a1", "a2", "a3")
	young := event("a4", storage.TopicConnect)
	young.CreatedAt = young.CreatedAt.Add(time.Hour)
	d.withEvents(young).reports(t, mdm.StatusAcknowledged, "X")
	h.number(t, l)
	var put []storage.Delivery
	for seq := range int64(4) {
		put = append(put, waits(seq+1, storage.DeliveryWaiting))
	}
	put[2].State, put[3].CreatedAt = storage.DeliveryAgain, young.CreatedAt
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 4, Put: put}))
	for _, want := range []int{1, 1, 0} {
		n, err := h.Store.GiveUp(t.Context(), l, k, young.CreatedAt, "late", 1)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	require.Equal(t, []string{"3", "3", "2", "1"}, h.Strings(t, "SELECT state FROM nano_event_deliveries ORDER BY seq"))
	require.Equal(t, []string{"late", "late", "", ""}, h.Strings(t, "SELECT last_error FROM nano_event_deliveries ORDER BY seq"))
}

func deliveryAgain(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	filtered := hook()
	filtered.Filter.RequestTypes = []string{"ProfileList"}
	k := h.putSink(t, filtered)
	d := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "C")
	for i := range 6 {
		e := event(fmt.Sprint("a", i+1), storage.TopicDeclarativeManagement)
		if i == 2 { // the result of an unknown command
			e.Topic, e.CommandUUID = storage.TopicConnect, "X"
		}
		d.withEvents(e).reports(t, mdm.StatusAcknowledged, "X")
	}
	h.number(t, l)
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 5, Put: []storage.Delivery{waits(4, storage.DeliveryWaiting)}}))
	_, err := h.Store.Redeliver(t.Context(), storage.Redelivery{Sink: "nobody"})
	require.ErrorIs(t, err, storage.ErrNotFound)
	n, err := h.Store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", After: 1, Through: 2})
	require.NoError(t, err)
	require.EqualValues(t, 1, n)
	n, err = h.Store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Limit: 2})
	require.NoError(t, err)
	require.EqualValues(t, 2, n)
	n, err = h.Store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook"})
	require.NoError(t, err)
	require.EqualValues(t, 3, n, "neither one that waits, nor one that it does not take, nor one that it has before it")
	events, err := h.Store.RedeliveredEvents(t.Context(), "hook", 10)
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2", "a5"}, idsOf(events))
	events, err = h.Store.RedeliveredEvents(t.Context(), "hook", 2)
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2"}, idsOf(events))
	later := storage.Delivery{Seq: 1, Enrollment: "A", State: storage.DeliveryAgain, Attempts: 1, NextAt: h.Clock.Now().Add(time.Minute)}
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Put: []storage.Delivery{later}, Done: []int64{2}}))
	events, err = h.Store.RedeliveredEvents(t.Context(), "hook", 10)
	require.NoError(t, err)
	require.Equal(t, []string{"a5"}, idsOf(events))
	h.Clock.Advance(time.Minute)
	events, err = h.Store.RedeliveredEvents(t.Context(), "hook", 10)
	require.NoError(t, err)
	require.Equal(t, []string{"a5", "a1"}, idsOf(events))
	require.Equal(t, 1, events[1].Attempts)
}

func deliveryDead(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	d := h.device("A").enrolls(t)
	for i := range 1200 {
		d = d.withEvents(append(d.events, event(fmt.Sprintf("a%04d", i), storage.TopicConnect))...)
	}
	d.reports(t, mdm.StatusAcknowledged, "X")
	h.number(t, l)
	var put []storage.Delivery
	for seq := range int64(1200) {
		put = append(put, waits(seq+1, storage.DeliveryDead))
	}
	put[0].State, put[1].State, put[2].State = storage.DeliveryDropped, storage.DeliveryGone, storage.DeliveryWaiting
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 1200, Put: put}))
	n, err := h.Store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Dead: true, After: 100, Through: 200})
	require.NoError(t, err)
	require.EqualValues(t, 100, n)
	n, err = h.Store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Dead: true})
	require.NoError(t, err)
	require.EqualValues(t, 1098, n)
	require.Equal(t, []string{"2", "5", "1"}, h.Strings(t, "SELECT state FROM nano_event_deliveries WHERE seq <= 3 ORDER BY seq"))
	n, err = h.Store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Dead: true})
	require.NoError(t, err)
	require.Zero(t, n)
}

func deliveryBacklogs(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	h.putSink(t, storage.EventSink{Name: "log", Enabled: true})
	h.putSink(t, storage.EventSink{Name: "off", URL: "http://off/"})
	d := h.device("A").enrolls(t)
	for i := range 8 {
		e := event(fmt.Sprint("a", i+1), storage.TopicConnect)
		e.CreatedAt = e.CreatedAt.Add(time.Duration(i) * time.Second)
		d.withEvents(e).reports(t, mdm.StatusAcknowledged, "X")
	}
	h.number(t, l)
	first := time.Unix(1_700_000_000, 0).UTC()
	backlogs, err := h.Store.EventBacklogs(t.Context())
	require.NoError(t, err)
	require.Equal(t, []storage.SinkBacklog{{Sink: "hook", Behind: 8, Oldest: first}}, backlogs)
	put := []storage.Delivery{waits(1, storage.DeliveryDead), waits(2, storage.DeliveryDropped), waits(3, storage.DeliveryGone),
		waits(4, storage.DeliveryWaiting), waits(5, storage.DeliveryAgain)}
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 6, Put: put}))
	backlogs, err = h.Store.EventBacklogs(t.Context())
	require.NoError(t, err)
	require.Equal(t, []storage.SinkBacklog{{Sink: "hook", Behind: 2, Oldest: first.Add(3 * time.Second), Waiting: 1, Again: 1, Dead: 1, Dropped: 2}}, backlogs)
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 8, Done: []int64{4}}))
	backlogs, err = h.Store.EventBacklogs(t.Context())
	require.NoError(t, err)
	require.Zero(t, backlogs[0].Oldest)
}

func upkeepPayloads(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	other := hook()
	other.Name = "other"
	o := h.putSink(t, other)
	h.device("A").enrolls(t).tells(t, "a1", "a2", "a3")
	h.number(t, l)
	bare := func() []string {
		t.Helper()
		_, err := h.Store.DropPayloads(t.Context(), l, 10)
		require.NoError(t, err)
		return eventIDs(t, h, func(e storedEvent) bool { return e.Size < 0 })
	}
	put := []storage.Delivery{waits(1, storage.DeliveryDropped), waits(2, storage.DeliveryDropped), waits(3, storage.DeliveryDead)}
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 3, Put: put}))
	require.Empty(t, bare(), "the other one has them before it")
	require.NoError(t, h.Store.Settle(t.Context(), l, o, storage.Settlement{Cursor: 3, Put: []storage.Delivery{waits(2, storage.DeliveryWaiting)}}))
	require.Equal(t, []string{"a1"}, bare(), "the other one waits for the second")
	require.NoError(t, h.Store.Settle(t.Context(), l, o, storage.Settlement{Done: []int64{2}}))
	require.Equal(t, []string{"a1", "a2"}, bare(), "a dead letter keeps its payload")
	require.Equal(t, []string{"5", "5", "3"}, h.Strings(t, "SELECT state FROM nano_event_deliveries WHERE sink = 'hook' ORDER BY seq"))
	events, err := h.Store.SinkPage(t.Context(), 0, 10)
	require.NoError(t, err)
	for i, want := range []string{"", "", "raw a3"} {
		require.Equal(t, want, string(events[i].Raw))
		require.False(t, events[i].RawApart)
	}
	require.EqualValues(t, -1, events[0].RawSize)
	require.EqualValues(t, 6, events[2].RawSize)
}

// mixed are events of one report whose payloads are stored in each of the ways.
func mixed() []storage.Event {
	var events []storage.Event
	for i, size := range []int{100, 16<<10 + 1, 16 << 10, 0, 64<<10 + 1, 64 << 10, 50, 60, 70} {
		e := event(fmt.Sprint("m", i), storage.TopicConnect)
		e.Raw = bytes.Repeat([]byte{byte('0' + i)}, size)
		if i >= 7 {
			e.Topic = storage.TopicTokenUpdate
		}
		events = append(events, e)
	}
	events[3].Raw = nil
	return events
}

func outboxMixed(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	want := mixed()
	d := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "X")
	d.withEvents(want...).reports(t, mdm.StatusAcknowledged, "X")
	h.number(t, l)
	check := func(events []storage.Event) {
		t.Helper()
		require.Len(t, events, len(want))
		for i, e := range events {
			require.Equal(t, want[i].ID, e.ID)
			require.EqualValues(t, i+1, e.Seq)
			size := len(want[i].Raw)
			if want[i].Raw == nil {
				size = -1
			}
			require.EqualValues(t, size, e.RawSize, e.ID)
			require.Equal(t, size > 64<<10, e.RawApart, e.ID)
			if !e.RawApart {
				require.True(t, bytes.Equal(want[i].Raw, e.Raw), e.ID)
			}
			raw, err := h.Store.EventPayload(t.Context(), e.Seq)
			require.NoError(t, err)
			require.True(t, bytes.Equal(want[i].Raw, raw), e.ID)
		}
	}
	events, err := h.Store.SinkPage(t.Context(), 0, 100)
	require.NoError(t, err)
	check(events)
	events, _, err = h.Store.ReadEvents(t.Context(), storage.Scope{Topics: []string{topicA}}, storage.EventQuery{Limit: 100})
	require.NoError(t, err)
	check(events)
	k := h.putSink(t, hook())
	var put []storage.Delivery
	for i := range want {
		put = append(put, waits(int64(i+1), storage.DeliveryWaiting))
	}
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Put: put}))
	events, err = h.Store.WaitingEvents(t.Context(), "hook", "A", 100)
	require.NoError(t, err)
	check(events)
}

func upkeepMixed(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	d := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "X")
	d.withEvents(mixed()...).reports(t, mdm.StatusAcknowledged, "X")
	h.number(t, l)
	var put []storage.Delivery
	for _, seq := range []int64{1, 2, 5, 8} {
		put = append(put, waits(seq, storage.DeliveryDropped))
	}
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 9, Put: put}))
	_, err := h.Store.DropPayloads(t.Context(), l, 100)
	require.NoError(t, err)
	require.Equal(t, []string{"m0", "m1", "m3", "m4", "m7"}, eventIDs(t, h, func(e storedEvent) bool { return e.Size < 0 }))
	require.Equal(t, []string{"m5", "m8"}, h.Strings(t, "SELECT event_id FROM nano_event_payloads ORDER BY event_id"))
	events, err := h.Store.SinkPage(t.Context(), 0, 100)
	require.NoError(t, err)
	for i, e := range mixed() {
		if slices.Contains([]int{0, 1, 3, 4, 7}, i) {
			e.Raw = nil
		}
		require.True(t, bytes.Equal(e.Raw, events[i].Raw), e.ID)
	}
	n, err := h.Store.RemoveEvents(t.Context(), l, h.Clock.Now(), 1)
	require.NoError(t, err)
	require.Equal(t, 9, n)
	for _, table := range []string{"nano_events", "nano_event_batches", "nano_event_payloads", "nano_event_deliveries"} {
		require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM "+table), table)
	}
}

func outboxTwice(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "X", "Y")
	for _, uuid := range []string{"X", "Y"} {
		d.withEvents(mixed()[1], mixed()[7]).reports(t, mdm.StatusAcknowledged, uuid)
	}
	h.number(t, l)
	events, err := h.Store.SinkPage(t.Context(), 0, 10)
	require.NoError(t, err)
	require.Equal(t, []string{"m1", "m7", "m1", "m7"}, idsOf(events))
	for _, seq := range []int64{1, 2, 3, 4} {
		raw, err := h.Store.EventPayload(t.Context(), seq)
		require.NoError(t, err)
		require.NotEmpty(t, raw)
		require.True(t, bytes.Equal(raw, events[seq-1].Raw))
	}
}

func outboxCut(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	d.withEvents(event("a1", storage.TopicConnect), event("a2", storage.TopicConnect), event("a3", storage.TopicConnect)).
		reports(t, mdm.StatusAcknowledged, "X")
	d.tells(t, "a4")
	h.number(t, l)
	const first = " WHERE batch_id = (SELECT batch_id FROM nano_event_batches WHERE seq = 3)"
	h.Exec(t, "UPDATE nano_events SET payloads = ?"+first, compressed("raw a1ra"))
	events, err := h.Store.SinkPage(t.Context(), 0, 10)
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2", "a3", "a4"}, idsOf(events))
	for i, want := range []string{"raw a1", "", "", "raw a4"} {
		require.Equal(t, want, string(events[i].Raw))
		if want == "" {
			require.EqualValues(t, -1, events[i].RawSize)
		}
	}
	h.Exec(t, "UPDATE nano_events SET payloads = SUBSTR(payloads, 1, LENGTH(payloads) - 4)"+first)
	events, err = h.Store.SinkPage(t.Context(), 0, 10)
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2", "a3", "a4"}, idsOf(events))
	require.Equal(t, "raw a4", string(events[3].Raw))
	// A size must not allocate memory, nor the sum of three, which is -1 here.
	details := decompressed(t, h.Strings(t, "SELECT details FROM nano_events"+first)[0])
	large := strings.ReplaceAll(details, `"size":6`, `"size":6148914691236517205`)
	require.NotEqual(t, details, large)
	h.Exec(t, "UPDATE nano_events SET details = ?"+first, compressed(large))
	events, err = h.Store.SinkPage(t.Context(), 0, 10)
	require.NoError(t, err)
	require.Equal(t, []string{"a1", "a2", "a3", "a4"}, idsOf(events))
	require.EqualValues(t, -1, events[0].RawSize)
	require.Equal(t, "raw a4", string(events[3].Raw))
	// Later events do not wait for details that cannot be read.
	h.Exec(t, "UPDATE nano_events SET details = ?"+first, []byte("damaged"))
	events, err = h.Store.SinkPage(t.Context(), 0, 1)
	require.NoError(t, err)
	require.Equal(t, []string{"a4"}, idsOf(events))
	require.EqualValues(t, 4, events[0].Seq)
	require.EqualValues(t, 4, h.Store.Stats().EventsUnreadable) // one for each look at it
	events, _, err = h.Store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{Limit: 10, Topics: []string{storage.TopicConnect}})
	require.NoError(t, err)
	require.Equal(t, []string{"a4"}, idsOf(events))
	require.EqualValues(t, 5, h.Store.Stats().EventsUnreadable, "what was asked for may have been in it")
	k := h.putSink(t, hook())
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 4, Put: []storage.Delivery{waits(2, storage.DeliveryDropped)}}))
	n, err := h.Store.DropPayloads(t.Context(), l, 10)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Equal(t, []string{"damaged"}, h.Strings(t, "SELECT details FROM nano_events"+first))
	n, err = h.Store.RemoveEvents(t.Context(), l, h.Clock.Now().Add(time.Hour), 10)
	require.NoError(t, err)
	require.Equal(t, 4, n)
}

// compressed and decompressed convert a text as batches of events do.
func compressed(text string) []byte { return s2.Encode(nil, []byte(text)) }

func decompressed(t *testing.T, value string) string {
	t.Helper()
	text, err := s2.Decode(nil, []byte(value))
	require.NoError(t, err)
	return string(text)
}

// Parameters of URLs are stored with the details: they must not make a batch
// too large to read.
func outboxParams(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	long := strings.Repeat("<", 60_000) // six bytes each, as JSON
	var events []storage.Event
	for i := range 60 {
		e := event(fmt.Sprintf("long%02d", i), storage.TopicConnect)
		e.Params = map[string]string{"a": long, "b": e.ID}
		events = append(events, e)
	}
	d.withEvents(events...).reports(t, mdm.StatusAcknowledged, "X")
	require.EqualValues(t, 60, h.number(t, l))
	require.EqualValues(t, 60, h.Int(t, "SELECT COUNT(*) FROM nano_events"))
	read, err := h.Store.SinkPage(t.Context(), 0, 100)
	require.NoError(t, err)
	require.Equal(t, idsOf(read), func() (ids []string) {
		for _, e := range events {
			ids = append(ids, e.ID)
		}
		return ids
	}())
	for _, e := range read {
		require.Equal(t, map[string]string{"a": long, "b": e.ID}, e.Params)
		require.Equal(t, "raw "+e.ID, string(e.Raw))
	}
}

func outboxMany(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	var events []storage.Event
	for i := range 300 {
		e := event(fmt.Sprintf("many%03d", i), storage.TopicConnect)
		e.Raw = bytes.Repeat([]byte{byte(i)}, 1000)
		events = append(events, e)
	}
	d.withEvents(events...).reports(t, mdm.StatusAcknowledged, "X")
	require.EqualValues(t, 300, h.number(t, l))
	require.Greater(t, h.Int(t, "SELECT COUNT(*) FROM nano_events"), int64(1), "no batch is larger than who wants one of its events may read")
	var read []string
	for after := int64(0); ; {
		page, err := h.Store.SinkPage(t.Context(), after, 7)
		require.NoError(t, err)
		if len(page) == 0 {
			break
		}
		for _, e := range page {
			require.True(t, bytes.Equal(events[len(read)].Raw, e.Raw), e.ID)
			read = append(read, e.ID)
			require.EqualValues(t, len(read), e.Seq)
		}
		after = page[len(page)-1].Seq
	}
	require.Len(t, read, 300)
	require.IsIncreasing(t, read)
}

func upkeepEvents(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	off := hook()
	off.Name, off.Enabled = "off", false
	h.putSink(t, off)
	d := h.device("A").enrolls(t)
	d.tells(t, "a1", "a2", "a3", "a4")
	young := event("young", storage.TopicConnect)
	young.CreatedAt = young.CreatedAt.Add(time.Hour)
	d.withEvents(young).reports(t, mdm.StatusAcknowledged, "X")
	h.number(t, l)
	d.tells(t, "unnumbered")
	left := func(limit int) []string {
		t.Helper()
		_, err := h.Store.RemoveEvents(t.Context(), l, young.CreatedAt, limit)
		require.NoError(t, err)
		require.Equal(t, h.Int(t, "SELECT COUNT(*) FROM nano_event_batches"), h.Int(t, "SELECT COUNT(*) FROM nano_events"))
		return sentEvents(t, h, "A")
	}
	require.Len(t, left(10), 6, "the sink has them before it")
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 5, Put: []storage.Delivery{waits(1, storage.DeliveryDead), waits(3, storage.DeliveryAgain)}}))
	require.Len(t, left(1), 5)
	require.Equal(t, []string{"a3", "a4", "young", "unnumbered"}, left(10), "one is to be sent again")
	require.Equal(t, []string{"3"}, h.Strings(t, "SELECT seq FROM nano_event_deliveries"))
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Done: []int64{3}}))
	require.Equal(t, []string{"young", "unnumbered"}, left(10))
}

func upkeepWithoutLease(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	configured := hook(storage.TopicPushCertExpiring)
	configured.Configured = true
	h.putSink(t, configured)
	h.device("A").enrolls(t).tells(t, "a1")
	h.number(t, l)
	require.NoError(t, h.Store.Settle(t.Context(), l, h.sink(t, "hook"), storage.Settlement{Cursor: 1, Put: []storage.Delivery{waits(1, storage.DeliveryDropped)}}))
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: topicA, NotAfter: h.Clock.Now()}))
	take(t, h.Store, "events", "b")
	later := h.Clock.Now().Add(time.Hour)
	for name, step := range map[string]func() (int, error){
		"payloads": func() (int, error) { return h.Store.DropPayloads(t.Context(), l, 10) },
		"trim":     func() (int, error) { return h.Store.TrimEvents(t.Context(), l, 0, 10) },
		"events":   func() (int, error) { return h.Store.RemoveEvents(t.Context(), l, later, 10) },
		"notices":  func() (int, error) { return h.Store.NoteExpiring(t.Context(), l, later, 10) },
		"sinks":    func() (int, error) { return h.Store.ForgetEventSinks(t.Context(), l, later) },
	} {
		_, err := step()
		require.ErrorIs(t, err, storage.ErrLeaseLost, name)
	}
	kept := h.Strings(t, "SELECT payloads FROM nano_events")
	require.Len(t, kept, 1)
	require.Equal(t, "raw a1", decompressed(t, kept[0]))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_event_sinks"))
}

// announcedEvents reads the server's own events, oldest first.
func announcedEvents(t *testing.T, h *Harness, l storage.Lease) []storage.Event {
	t.Helper()
	h.number(t, l)
	events, err := h.Store.SinkPage(t.Context(), 0, 1000)
	require.NoError(t, err)
	return slices.DeleteFunc(events, func(e storage.Event) bool { return !storage.ServerTopic(e.Topic) })
}

func upkeepExpiring(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	h.putSink(t, hook(storage.TopicPushCertExpiring, storage.TopicIdentityExpiring))
	now := h.Clock.Now().Truncate(time.Second)
	soon, late := now.Add(time.Hour), now.Add(100*24*time.Hour)
	for id, notAfter := range map[string]time.Time{"A": soon, "B": late, "C": soon} {
		d := h.device(id).with("cert " + id)
		d.pin.NotAfter = notAfter
		d.enrolls(t)
	}
	renewed := h.device("C").with("next C")
	renewed.pin.NotAfter, renewed.pin.Reenroll = late, storage.ReenrollAllow
	renewed.enrolls(t)
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: topicA, NotAfter: soon}))
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: "other", NotAfter: late}))
	for _, want := range []int{2, 0} {
		n, err := h.Store.NoteExpiring(t.Context(), l, now.Add(24*time.Hour), 10)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	events := announcedEvents(t, h, l)
	require.Len(t, events, 2)
	slices.SortFunc(events, func(a, b storage.Event) int { return -len(a.Enroll.ID) + len(b.Enroll.ID) })
	require.Equal(t, storage.TopicIdentityExpiring, events[0].Topic)
	require.Equal(t, mdm.EnrollID{Type: mdm.Device, ID: "A"}, events[0].Enroll)
	require.Equal(t, soon.Format(time.RFC3339), events[0].Params["not_after"])
	require.NotEmpty(t, events[0].Params["certificate_sha256"])
	require.Equal(t, "A", events[0].UDID)
	require.Equal(t, storage.TopicPushCertExpiring, events[1].Topic)
	require.Equal(t, topicA, events[1].APNsTopic)
	require.Zero(t, events[1].Enroll)
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: topicA, NotAfter: soon.Add(time.Minute)}))
	n, err := h.Store.NoteExpiring(t.Context(), l, now.Add(24*time.Hour), 10)
	require.NoError(t, err)
	require.Equal(t, 1, n, "the one that replaces it has another end")
}

func upkeepExpiredCommand(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	h.putSink(t, hook(storage.TopicCommandExpired))
	d := h.device("A").enrolls(t)
	d.tells(t, "a1")
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("C"), IDs: []string{"A"}, ExpiresAt: h.Clock.Now().Add(time.Minute)})
	require.NoError(t, err)
	h.Clock.Advance(time.Hour)
	n, err := h.Store.ExpireCommands(t.Context(), take(t, h.Store, "queue", "a"), 10)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	d.tells(t, "a2")
	events := announcedEvents(t, h, l)
	require.Len(t, events, 1)
	require.Equal(t, []string{"a1", events[0].ID, "a2"}, h.page(t), "it stands between the two of the device")
	require.Equal(t, "C", events[0].CommandUUID)
	require.Equal(t, "ProfileList", events[0].RequestType)
	require.Equal(t, "A", events[0].Enroll.ID)
}

func upkeepPushFailed(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	h.putSink(t, hook(storage.TopicPushFailed))
	h.Enroll(t, "A", "B", "C")
	h.enqueue(t, []string{"A", "B"}, "C1")
	now := h.Clock.Advance(time.Minute)
	dead := storage.PushRecord{ID: "A", At: now, Class: "token_dead", Status: 410, Reason: "Unregistered", APNsID: "x", TokenAt: now, TokenDeadAt: now}
	for range 2 {
		records := []storage.PushRecord{dead, {ID: "B", At: now, Class: "retry_later", Reason: "TooManyRequests", NextAt: now.Add(time.Hour)}}
		require.NoError(t, h.Store.RecordPushes(t.Context(), records))
	}
	// A dead token that the device has replaced is no finding.
	old := dead
	old.ID, old.TokenDeadAt = "C", now.Add(-time.Hour)
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{old}))
	events := announcedEvents(t, h, l)
	require.Len(t, events, 1)
	require.Equal(t, "A", events[0].Enroll.ID)
	require.Equal(t, map[string]string{"class": "token_dead", "status": "410", "reason": "Unregistered", "apns_id": "x"}, events[0].Params)
}

func upkeepUnasked(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	off := hook(storage.TopicPushFailed, storage.TopicCommandExpired, storage.TopicPushCertExpiring, storage.TopicIdentityExpiring)
	off.Name, off.Enabled = "off", false
	h.putSink(t, off)
	h.putSink(t, hook()) // which is all topics of devices
	d := h.device("A").with("cert")
	d.pin.NotAfter = h.Clock.Now()
	d.enrolls(t)
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("C"), IDs: []string{"A"}, ExpiresAt: h.Clock.Now().Add(time.Minute)})
	require.NoError(t, err)
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: topicA, NotAfter: h.Clock.Now()}))
	now := h.Clock.Advance(time.Hour)
	n, err := h.Store.ExpireCommands(t.Context(), take(t, h.Store, "queue", "a"), 10)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{ID: "A", At: now, Class: "token_dead", TokenAt: now, TokenDeadAt: now}}))
	n, err = h.Store.NoteExpiring(t.Context(), l, now, 10)
	require.NoError(t, err)
	require.Zero(t, n)
	require.Empty(t, announcedEvents(t, h, l))
	// The event is written once a sink names its topic.
	h.putSink(t, hook(storage.TopicIdentityExpiring))
	n, err = h.Store.NoteExpiring(t.Context(), l, now, 10)
	require.NoError(t, err)
	require.Equal(t, 1, n)
}

// logSize returns the size of the log, which must be what its batches take.
func (h *Harness) logSize(t *testing.T) storage.EventLogSize {
	t.Helper()
	size, err := h.Store.EventLogSize(t.Context())
	require.NoError(t, err)
	require.Equal(t, h.Int(t, "SELECT COALESCE(SUM(stored_bytes), 0) FROM nano_event_batches WHERE seq > 0"), size.Bytes)
	require.Equal(t, h.Int(t, "SELECT COALESCE(SUM(size), 0) FROM nano_event_batches WHERE seq > 0"), size.Events)
	return size
}

// fills has a device answer commands with results of a size, each with its event.
func (c *channel) fills(t *testing.T, size int, uuids ...string) {
	t.Helper()
	c.h.enqueue(t, []string{c.enroll.ID}, uuids...)
	for _, uuid := range uuids {
		e := event("of "+uuid, storage.TopicConnect)
		e.Raw = make([]byte, size)
		rand.NewChaCha8([32]byte([]byte(fmt.Sprintf("%32s", uuid)))).Read(e.Raw) // does not compress
		c.withEvents(e).reports(t, mdm.StatusAcknowledged, uuid)
	}
}

func upkeepTrimmed(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	k := h.putSink(t, hook())
	watcher := hook()
	watcher.Name, watcher.URL, watcher.Filter.Topics = "watcher", "", []string{storage.TopicEventLogFull}
	h.putSink(t, watcher)
	require.Zero(t, h.logSize(t))
	d := h.device("A").enrolls(t)
	const each, most = 100 << 10, 450 << 10
	d.fills(t, each, "C1", "C2", "C3", "C4")
	h.number(t, l)
	trim := func() int {
		t.Helper()
		n, err := h.Store.TrimEvents(t.Context(), l, most, 2)
		require.NoError(t, err)
		return n
	}
	require.Zero(t, trim(), "it fits")
	d.fills(t, each, "C5", "C6", "C7")
	h.number(t, l)
	size := h.logSize(t)
	require.EqualValues(t, 7, size.Events)
	require.Greater(t, size.Bytes, int64(7*each))
	require.Less(t, size.Bytes, int64(7*each+7*4096))
	require.Zero(t, trim(), "the sink has them before it")
	through, newest, err := h.Store.EventExcess(t.Context(), most)
	require.NoError(t, err)
	require.EqualValues(t, 3, through)
	require.True(t, event("", "").CreatedAt.Equal(newest))
	require.NoError(t, h.Store.Settle(t.Context(), l, k, storage.Settlement{Cursor: 7, Put: []storage.Delivery{waits(1, storage.DeliveryDead)}}))
	require.Equal(t, 2, trim())
	require.Equal(t, 1, trim())
	require.Zero(t, trim())
	require.LessOrEqual(t, h.logSize(t).Bytes, int64(most))
	through, _, err = h.Store.EventExcess(t.Context(), most)
	require.NoError(t, err)
	require.Zero(t, through)
	require.Equal(t, []string{"of C4", "of C5", "of C6", "of C7"}, sentEvents(t, h, "A"))
	require.EqualValues(t, 4, h.Int(t, "SELECT COUNT(*) FROM nano_event_payloads"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_event_deliveries"))

	h.number(t, l)
	events, _, err := h.Store.ReadEvents(t.Context(), everything, storage.EventQuery{Limit: 10, Topics: []string{storage.TopicEventLogFull}})
	require.NoError(t, err)
	require.Len(t, events, 1, "once a day")
	require.Equal(t, map[string]string{"max_bytes": fmt.Sprint(most)}, events[0].Params)
	n, err := h.Store.RemoveEvents(t.Context(), l, h.Clock.Now().Add(time.Hour), 10)
	require.NoError(t, err)
	require.NotZero(t, n)
	h.logSize(t)
}

func upkeepBytesOfOlderRelease(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	h.putSink(t, storage.EventSink{Name: "log", Enabled: true})
	d.fills(t, 1000, "C1")
	h.number(t, l)
	// An older release numbers events and counts nothing.
	d.fills(t, 1000, "C2")
	h.Exec(t, "UPDATE nano_event_batches SET seq = 2 WHERE seq = 0")
	h.Exec(t, "UPDATE nano_event_counters SET value = 2 WHERE name = 'seq'")
	d.fills(t, 1000, "C3")
	h.number(t, l)
	for range 2 {
		n, err := h.Store.TrimEvents(t.Context(), l, 10, 1)
		require.NoError(t, err)
		require.Equal(t, 1, n)
	}
	d.fills(t, 1000, "C4", "C5")
	h.number(t, l)
	n, err := h.Store.TrimEvents(t.Context(), l, 10, 1)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.EqualValues(t, 2, h.logSize(t).Events)
}

// A device sends reports that no operator asked for, with bodies of any size.
func upkeepOtherPayloads(t *testing.T, h *Harness) {
	l := eventLease(t, h)
	d := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "C", "put off")
	large := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{}).Read(large)
	n := 0
	says := func(status mdm.Status, uuid string, raw []byte) {
		n++
		e := event(fmt.Sprint(n), storage.TopicConnect)
		e.UDID, e.Status, e.CommandUUID, e.Raw = "A<&", string(status), uuid, raw
		d.withEvents(e).reports(t, status, uuid)
	}
	says(mdm.StatusAcknowledged, "C", large)
	for range 3 {
		says(mdm.StatusAcknowledged, "unknown", large)
		says(mdm.StatusError, "C", large) // it ended before
		says(mdm.StatusNotNow, "put off", large)
		says(mdm.StatusAcknowledged, strings.Repeat("long", 1000), large)
		says(mdm.StatusIdle, "", large)
	}
	says(mdm.StatusAcknowledged, "unknown", []byte("small"))
	require.NoError(t, h.Store.Flush(t.Context()))
	h.number(t, l)
	size := h.logSize(t)
	require.EqualValues(t, n, size.Events)
	require.Less(t, size.Bytes, int64(len(large)+n*4096))
	for seq := range int64(n) {
		events, err := h.Store.SinkPage(t.Context(), seq, 1)
		require.NoError(t, err)
		e := events[0]
		raw, err := h.Store.EventPayload(t.Context(), e.Seq)
		require.NoError(t, err)
		switch e.ID {
		case "1":
			require.True(t, bytes.Equal(large, raw))
		case fmt.Sprint(n):
			require.Equal(t, "small", string(raw))
		default:
			var said struct{ CommandUUID, Status, UDID string }
			require.NoError(t, plist.Unmarshal(raw, &said))
			require.Equal(t, "A<&", said.UDID)
			require.Equal(t, e.Status, said.Status)
			require.Equal(t, e.CommandUUID, said.CommandUUID)
		}
	}
}
