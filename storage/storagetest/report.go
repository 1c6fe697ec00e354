package storagetest

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func reportTests() []subtest {
	return []subtest{
		{"commands are offered in order, each until it is reported", reportOrder},
		{"a terminal status ends a row and keeps its result", reportTerminal},
		{"another status changes nothing", reportOtherStatus},
		{"NotNow puts a command off until the device is idle", reportNotNow},
		{"refused commands drain in one later conversation", reportConversation},
		{"a conversation over two replicas and connections", reportConversations},
		{"a late NotNow does not bring a command back", reportLateNotNow},
		{"what was refused is pushed for once nothing else is left", reportOwesPush},
		{"a repeated report changes nothing", reportRepeated},
		{"a report for an unknown command changes nothing", reportUnknown},
		{"the result of a row that was ended is stored as late, once", reportLate},
		{"a report that cannot be read ends the command that was offered", reportUnreadable},
		{"a poll pays for the push and plans the next one", reportPays},
		{"a poll writes nothing by itself", reportPollIsLight},
		{"a large result is kept whole", reportLarge},
		{"an event commits with its change", eventCommits},
		{"events of one enrollment are in order", eventOrder},
		{"events of polls are written with the activity", eventVolatile},
		{"an event of a repeated report is not sent again", eventRepeated},
		{"an operation that fails sends no event", eventRefused},
		{"a change that cannot be committed leaves nothing", eventRolledBack},
	}
}

func reportOrder(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	require.Empty(t, d.polls(t))
	h.enqueue(t, []string{"D"}, "b", "a", "c")
	require.Equal(t, "b", d.polls(t))
	require.Equal(t, "b", d.polls(t), "until it is reported")
	out, err := d.apply(t, &storage.Report{Src: d.source(), Status: mdm.StatusIdle})
	require.NoError(t, err)
	require.Equal(t, command("b"), out.Command, "byte for byte")
	require.Equal(t, "a", d.reports(t, mdm.StatusAcknowledged, "b"))
	require.Equal(t, "c", d.reports(t, mdm.StatusError, "a"))
	h.enqueue(t, []string{"D"}, "d")
	require.Equal(t, "c", d.reports(t, mdm.StatusAcknowledged, "d"), "whatever the device did first")
	require.Empty(t, d.reports(t, mdm.StatusCommandFormatError, "c"))
	require.Empty(t, d.polls(t))
}

func reportTerminal(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	for status, state := range map[mdm.Status]storage.State{
		mdm.StatusAcknowledged: storage.Acknowledged, mdm.StatusError: storage.Failed, mdm.StatusCommandFormatError: storage.FormatError,
	} {
		uuid := string(status)
		h.enqueue(t, []string{"D"}, uuid)
		now := h.Clock.Advance(time.Second)
		require.Empty(t, d.reports(t, status, uuid))
		require.Equal(t, state, states(t, h, "D")[uuid])
		require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE command_uuid = ? AND finished_at = ?", uuid, now.UnixMicro()))
		require.Equal(t, []string{uuid + " " + uuid},
			h.Strings(t, "SELECT result FROM nano_command_results WHERE id = 'D' AND command_uuid = ? AND status = ? AND late = 0 AND created_at = ?", uuid, uuid, now.UnixMicro()))
	}
}

func reportUnreadable(t *testing.T, h *Harness) {
	d := h.device("D").with("A").enrolls(t)
	h.enqueue(t, []string{"D"}, "1", "2", "3", "4", "5")
	unreadable := func(uuid string) string {
		out, err := d.apply(t, &storage.Report{Src: d.source(), Status: mdm.StatusUnreadable, CommandUUID: uuid, Raw: []byte("\xff\x00 odd")})
		require.NoError(t, err)
		if out.Command == nil {
			return ""
		}
		return out.Command.CommandUUID
	}
	require.Equal(t, "1", unreadable(""), "nothing was offered, so nothing ends")
	require.Equal(t, "2", unreadable(""))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, "3", unreadable(""), "an offer that was written counts, as one of another replica is")
	require.Equal(t, "3", unreadable("nobody's"))
	require.Equal(t, "3", unreadable("4"), "the one that it names")
	require.Equal(t, "1 error, 2 error, 3 queued, 4 error, 5 queued", queueStates(t, h, "D"))
	for _, uuid := range []string{"1", "2", "4"} {
		r, err := h.Store.CommandResult(t.Context(), storage.Scope{}, "D", uuid)
		require.NoError(t, err)
		require.Equal(t, "Unreadable", r.Status)
		require.Equal(t, []byte("\xff\x00 odd"), r.Raw)
	}
	thief := d.with("B")
	_, err := thief.apply(t, &storage.Report{Src: thief.source(), Status: mdm.StatusUnreadable, CommandUUID: "3"})
	require.ErrorIs(t, err, storage.ErrIdentity)
	require.Equal(t, "3", d.polls(t))
}

func reportOtherStatus(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "C")
	for _, status := range []mdm.Status{"", "Working", "idle", "acknowledged"} {
		require.Equal(t, "C", d.reports(t, status, "C"))
	}
	require.Equal(t, "C queued", queueStates(t, h, "D"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
}

func reportNotNow(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "1", "2", "3")
	require.Equal(t, "2", d.reports(t, mdm.StatusNotNow, "1"))
	require.Equal(t, "3", d.reports(t, mdm.StatusNotNow, "2"))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "3"), "not in the same conversation")
	require.Equal(t, "1", d.polls(t), "but in the next")
	require.Equal(t, "2", d.reports(t, mdm.StatusNotNow, "1"))
	require.Empty(t, d.reports(t, mdm.StatusNotNow, "2"))
	require.EqualValues(t, 2, h.Int(t, "SELECT notnow_count FROM nano_enrollment_queue WHERE command_uuid = '1' AND notnow_at = ?", h.Clock.Now().UnixMicro()))
	h.enqueue(t, []string{"D"}, "4")
	require.Equal(t, "1", d.polls(t), "an older one goes first")
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("5"), IDs: []string{"D"}, Priority: 1})
	require.NoError(t, err)
	require.Equal(t, "5", d.polls(t), "unless another one is more urgent")
	require.Equal(t, "1", d.reports(t, mdm.StatusAcknowledged, "5"))
	require.Equal(t, "2", d.reports(t, mdm.StatusAcknowledged, "1"))
	require.Equal(t, "4", d.reports(t, mdm.StatusError, "2"))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "4"))
	require.Empty(t, d.polls(t))
}

func reportConversation(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "1", "2", "3")
	require.Equal(t, "1", d.polls(t))
	require.Equal(t, "2", d.reports(t, mdm.StatusNotNow, "1"))
	require.Equal(t, "3", d.reports(t, mdm.StatusNotNow, "2"))
	require.Empty(t, d.reports(t, mdm.StatusNotNow, "3"))
	require.Equal(t, "1 notnow, 2 notnow, 3 notnow", queueStates(t, h, "D"))

	require.Equal(t, "1", d.polls(t), "the device wakes up")
	h.enqueue(t, []string{"D"}, "4")
	require.Equal(t, "2", d.reports(t, mdm.StatusAcknowledged, "1"), "and drains all that it had refused")
	require.Equal(t, "3", d.reports(t, mdm.StatusNotNow, "2"), "but for what it refuses again")
	require.Equal(t, "4", d.reports(t, mdm.StatusAcknowledged, "3"))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "4"), "not twice in one conversation")
	owed, _ := push(t, h, "D")
	require.True(t, owed)
	require.EqualValues(t, 2, h.Int(t, "SELECT notnow_count FROM nano_enrollment_queue WHERE command_uuid = '2'"))
	require.Equal(t, "2", d.polls(t))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "2"))
}

// Two connections of one device, at two replicas, are one conversation, which
// the latest Idle began.
func reportConversations(t *testing.T, h *Harness) {
	a := h.device("D").enrolls(t)
	b := a.on(h.Open(t, nil))
	h.enqueue(t, []string{"D"}, "1", "2", "3")
	require.Equal(t, "1", a.polls(t))
	require.Equal(t, "2", a.reports(t, mdm.StatusNotNow, "1"))
	require.Equal(t, "1", b.polls(t))
	require.Equal(t, "2", b.reports(t, mdm.StatusNotNow, "1"))
	require.Equal(t, "3", a.reports(t, mdm.StatusAcknowledged, "2"), "1 was refused since the latest Idle")
	require.Empty(t, b.reports(t, mdm.StatusAcknowledged, "3"))
	require.Empty(t, a.reports(t, mdm.StatusAcknowledged, "2"), "a repetition brings nothing back")
	require.Equal(t, "1", a.polls(t))
	require.Empty(t, b.reports(t, mdm.StatusAcknowledged, "1"))
	require.Empty(t, a.polls(t))

	// The same at once: every command ends once, however often it is refused.
	ids := numbered("E", 8)
	h.Enroll(t, ids...)
	uuids := numbered("C", 6)
	h.enqueue(t, ids, uuids...)
	for _, err := range together(2*len(ids), func(i int) error {
		c := h.device(ids[i/2]).on([]storage.Devices{a.store, b.store}[i%2])
		for visit := range 40 {
			next, err := c.report(t, mdm.StatusIdle, "")
			for n := 0; err == nil && next != ""; n++ {
				if n > 4*len(uuids) {
					return fmt.Errorf("%s is offered %s without end", c.enroll.ID, next)
				}
				status := mdm.StatusAcknowledged
				if visit == 0 {
					status = mdm.StatusNotNow
				}
				next, err = c.report(t, status, next)
			}
			if err != nil {
				return err
			}
		}
		return nil
	}) {
		require.NoError(t, err)
	}
	for _, id := range ids {
		require.EqualValues(t, len(uuids), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE id = ? AND state = 10", id))
	}
}

func reportLateNotNow(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "1", "2")
	d.reports(t, mdm.StatusAcknowledged, "1")
	require.Equal(t, "2", d.reports(t, mdm.StatusNotNow, "1"))
	require.Equal(t, "2", d.polls(t))
	require.Equal(t, "1 acknowledged, 2 queued", queueStates(t, h, "D"))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
}

// push is the push row of an enrollment.
func push(t *testing.T, h *Harness, id string) (owed bool, at int64) {
	t.Helper()
	require.NoError(t, h.Store.Flush(t.Context()))
	owed = h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE id = ? AND owed_seq > paid_seq", id) == 1
	return owed, h.Int(t, "SELECT COALESCE(push_at, 0) FROM nano_enrollment_push WHERE id = ?", id)
}

func reportOwesPush(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "1", "2")
	d.polls(t)
	d.reports(t, mdm.StatusNotNow, "1")
	owed, _ := push(t, h, "D")
	require.False(t, owed)
	now := h.Clock.Advance(time.Second)
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "2"))
	owed, at := push(t, h, "D")
	require.True(t, owed, "1 would never be asked for")
	require.Equal(t, now.UnixMicro(), at)
	h.enqueue(t, []string{"D"}, "3")
	require.Equal(t, []string{"1", "2", "3"}, h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue ORDER BY seq"), "the debt took a number")
	d.polls(t)
	owed, at = push(t, h, "D")
	require.False(t, owed, "it came")
	require.Equal(t, now.Add(3*time.Minute).UnixMicro(), at)
	d.reports(t, mdm.StatusAcknowledged, "3")
	d.polls(t)
	d.reports(t, mdm.StatusNotNow, "1")
	owed, at = push(t, h, "D")
	require.False(t, owed, "a device comes back by itself after NotNow")
	require.Equal(t, now.Add(3*time.Minute).UnixMicro(), at)
	d.reports(t, mdm.StatusAcknowledged, "1")
	owed, at = push(t, h, "D")
	require.False(t, owed)
	require.Zero(t, at, "nothing waits")
}

func reportRepeated(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "1", "2")
	first := h.Clock.Now().UnixMicro()
	d.reports(t, mdm.StatusAcknowledged, "1")
	h.Clock.Advance(time.Minute)
	for _, status := range []mdm.Status{mdm.StatusAcknowledged, mdm.StatusError, mdm.StatusCommandFormatError, mdm.StatusNotNow} {
		require.Equal(t, "2", d.reports(t, status, "1"))
	}
	require.Equal(t, "1 acknowledged, 2 queued", queueStates(t, h, "D"))
	require.Equal(t, []string{"Acknowledged 1"}, h.Strings(t, "SELECT result FROM nano_command_results WHERE created_at = ?", first))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE finished_at = ?", first))
}

func reportUnknown(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.device("E").enrolls(t)
	h.enqueue(t, []string{"D"}, "C")
	h.enqueue(t, []string{"E"}, "E")
	for _, uuid := range []string{"", "X", "c", "C ", "E", "\x00", "C\x00", "\xff", strings.Repeat("C", 256), strings.Repeat("C", 1<<20)} {
		for _, status := range []mdm.Status{mdm.StatusAcknowledged, mdm.StatusError, mdm.StatusNotNow} {
			require.Equal(t, "C", d.reports(t, status, uuid))
		}
	}
	require.Equal(t, "C queued", queueStates(t, h, "D"))
	require.Equal(t, "E queued", queueStates(t, h, "E"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
}

func reportLate(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	ended := []storage.State{storage.Cancelled, storage.Expired, storage.Superseded}
	for _, state := range ended {
		uuid := state.String()
		h.enqueue(t, []string{"D"}, uuid)
		h.Exec(t, "UPDATE nano_enrollment_queue SET state = ?, finished_at = 1 WHERE command_uuid = ?", int(state), uuid)
	}
	for _, state := range ended {
		uuid := state.String()
		require.Empty(t, d.reports(t, mdm.StatusNotNow, uuid))
		require.Empty(t, d.reports(t, mdm.StatusError, uuid))
		require.Empty(t, d.reports(t, mdm.StatusAcknowledged, uuid), "the first one counts")
		require.Equal(t, state, states(t, h, "D")[uuid])
		require.Equal(t, []string{"Error " + uuid}, h.Strings(t, "SELECT result FROM nano_command_results WHERE command_uuid = ? AND late = 1 AND status = 'Error'", uuid))
	}
	require.EqualValues(t, 3, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE finished_at = 1"))
}

func reportPays(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "C")
	owed, at := push(t, h, "D")
	require.True(t, owed)
	require.Equal(t, h.Clock.Now().Add(30*time.Second).UnixMicro(), at)
	now := h.Clock.Advance(time.Minute)
	d.polls(t)
	owed, at = push(t, h, "D")
	require.False(t, owed)
	require.Equal(t, now.Add(3*time.Minute).UnixMicro(), at, "it may fall silent now")
	d.reports(t, mdm.StatusAcknowledged, "C")
	owed, at = push(t, h, "D")
	require.False(t, owed)
	require.Zero(t, at)

	// A poll does not pay the push of a command that is queued after it.
	h.enqueue(t, []string{"D"}, "2")
	d.polls(t)
	h.enqueue(t, []string{"D"}, "3")
	owed, at = push(t, h, "D")
	require.True(t, owed)
	require.Equal(t, now.Add(30*time.Second).UnixMicro(), at)
}

func reportPollIsLight(t *testing.T, h *Harness) {
	h.shared(t)
	d := h.device("D").with("c").enrolls(t)
	require.NoError(t, h.Store.Flush(t.Context()))
	before := h.Clock.Now()
	after := h.Clock.Advance(time.Hour)
	lastSeen := func() int64 {
		return h.Int(t, "SELECT last_seen_at FROM nano_enrollment_activity WHERE id = 'D'")
	}
	// Another transaction keeps the enrollment from being written, and with
	// SQLite everything.
	other := connect(t, h.cfg)
	defer other.Close()
	tx, err := other.BeginTx(t.Context(), nil)
	require.NoError(t, err)
	defer func() { _ = tx.Rollback() }()
	_, err = tx.ExecContext(t.Context(), "UPDATE nano_enrollments SET updated_at = 1")
	require.NoError(t, err)
	require.Empty(t, d.polls(t))
	require.NoError(t, d.seen(t))
	_, err = d.bootstrapToken(t)
	require.NoError(t, err)
	if h.Engine.Name != "sqlite" {
		require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "X"), "reports do without it, too")
	}
	require.NoError(t, tx.Rollback())
	require.Equal(t, before.UnixMicro(), lastSeen())
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, after.UnixMicro(), lastSeen())
}

func reportLarge(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "C")
	raw := []byte(strings.Repeat("\x00'\\\xff", 1<<19)) // 2 MB, all of it to be escaped
	_, err := d.apply(t, &storage.Report{Src: d.source(), Status: mdm.StatusAcknowledged, CommandUUID: "C", Raw: raw})
	require.NoError(t, err)
	require.True(t, string(raw) == h.Strings(t, "SELECT result FROM nano_command_results")[0])
}

// storedEvent is an event as its batch describes it, with its payload.
type storedEvent struct {
	ID          string            `json:"id"`
	Enrollment  string            `json:"enrollment"`
	Type        mdm.EnrollType    `json:"type"`
	Parent      string            `json:"parent"`
	Topic       string            `json:"topic"`
	UDID        string            `json:"udid"`
	APNsTopic   string            `json:"apns_topic"`
	RequestType string            `json:"request_type"`
	Status      string            `json:"status"`
	CommandUUID string            `json:"command_uuid"`
	Tally       int               `json:"tally"`
	Params      map[string]string `json:"params"`
	TraceParent string            `json:"traceparent"`
	CreatedAt   int64             `json:"created_at"`
	Size        int               `json:"size"`
	Apart       bool              `json:"apart"`
}

// storedEvents reads all events in their order, and without the store.
func storedEvents(t *testing.T, h *Harness) (events []storedEvent) {
	t.Helper()
	for _, details := range h.Strings(t, `SELECT details FROM nano_event_batches b JOIN nano_events e ON e.batch_id = b.batch_id
ORDER BY CASE WHEN seq = 0 THEN 1 ELSE 0 END, seq, stamp`) {
		var batch []storedEvent
		require.NoError(t, json.Unmarshal([]byte(decompressed(t, details)), &batch))
		events = append(events, batch...)
	}
	return events
}

// eventIDs are the ids of those events that fit, in their order.
func eventIDs(t *testing.T, h *Harness, fits func(e storedEvent) bool) (ids []string) {
	t.Helper()
	for _, e := range storedEvents(t, h) {
		if fits(e) {
			ids = append(ids, e.ID)
		}
	}
	return ids
}

// sentEvents reads the events of an enrollment in their order.
func sentEvents(t *testing.T, h *Harness, id string) []string {
	t.Helper()
	return eventIDs(t, h, func(e storedEvent) bool { return e.Enrollment == id })
}

func eventCommits(t *testing.T, h *Harness) {
	d := h.device("D").with("c")
	require.NoError(t, d.withEvents(event("authenticate", "mdm.Authenticate")).authenticate(t))
	_, err := d.withEvents(event("token", "mdm.TokenUpdate")).tokenUpdate(t)
	require.NoError(t, err)
	u := d.user("U")
	_, err = u.withEvents(event("user", "mdm.TokenUpdate")).tokenUpdate(t)
	require.NoError(t, err)
	_, err = u.withEvents(event("user 2", "mdm.TokenUpdate")).tokenUpdate(t)
	require.NoError(t, err)
	h.enqueue(t, []string{"D"}, "C")
	report := event("report", "mdm.Connect")
	report.Status, report.CommandUUID, report.Params = "Acknowledged", "C", map[string]string{"a": "b"}
	report.TraceParent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	d.withEvents(report).reports(t, mdm.StatusAcknowledged, "C")
	unknown := event("unknown", "mdm.Connect")
	unknown.Status, unknown.CommandUUID = "Error", "X"
	d.withEvents(unknown).reports(t, mdm.StatusError, "X")
	require.NoError(t, d.withEvents(event("status", "mdm.DeclarativeManagement")).seen(t))
	require.NoError(t, d.withEvents(event("bootstrap", "mdm.SetBootstrapToken")).setBootstrapToken(t, "b"))
	require.NoError(t, d.withEvents(event("check out", "mdm.CheckOut")).checkOut(t))
	stranger := h.device("E")
	require.NoError(t, stranger.withEvents(event("stranger", "mdm.CheckOut")).checkOut(t))

	require.Equal(t, []string{"authenticate", "token", "report", "unknown", "status", "bootstrap", "check out"}, sentEvents(t, h, "D"))
	require.Equal(t, []string{"stranger"}, sentEvents(t, h, "E"))
	require.Equal(t, []string{"user", "user 2"}, sentEvents(t, h, "D:U"))
	all := storedEvents(t, h)
	require.Len(t, all, 10)
	byID := make(map[string]storedEvent)
	for _, e := range all {
		byID[e.ID] = e
		if e.ID != "stranger" {
			require.Equal(t, topicA, e.APNsTopic, e.ID)
			require.Equal(t, "udid", e.UDID, e.ID)
		}
	}
	for i, id := range []string{"user", "user 2"} {
		require.Equal(t, i+1, byID[id].Tally)
		require.Equal(t, "D", byID[id].Parent)
		require.Equal(t, mdm.User, byID[id].Type)
	}
	require.Equal(t, storedEvent{
		ID: "report", Enrollment: "D", Type: mdm.Device, Topic: "mdm.Connect", UDID: "udid", APNsTopic: topicA, RequestType: "ProfileList",
		Status: "Acknowledged", CommandUUID: "C", Params: map[string]string{"a": "b"}, TraceParent: report.TraceParent,
		CreatedAt: time.Unix(1_700_000_000, 0).UnixMicro(), Size: len("raw report"),
	}, byID["report"])
	require.Equal(t, []string{"report"}, eventIDs(t, h, func(e storedEvent) bool { return e.RequestType != "" }))
	require.Equal(t, []string{"report"}, eventIDs(t, h, func(e storedEvent) bool { return e.TraceParent != "" }))
	events := h.holdEvents(t, h.Store)
	_, _, err = h.Store.NumberEvents(t.Context(), events, 100)
	require.NoError(t, err)
	page, err := h.Store.SinkPage(t.Context(), 0, 100)
	require.NoError(t, err)
	for _, e := range page {
		want := ""
		if e.ID == "report" {
			want = report.TraceParent
		}
		require.Equal(t, want, e.TraceParent, e.ID)
	}
	require.Len(t, page, 10)
	for _, e := range page {
		require.Equal(t, "raw "+e.ID, string(e.Raw))
		require.EqualValues(t, len(e.Raw), e.RawSize)
		require.False(t, e.RawApart)
	}
}

func eventOrder(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	second := h.Open(t, nil)
	for i, err := range together(40, func(i int) error {
		c := d.withEvents(event(fmt.Sprint("E", i), "mdm.Connect"), event(fmt.Sprint("F", i), "mdm.Connect"))
		if i%2 == 1 {
			c = c.on(second)
		}
		_, err := c.report(t, mdm.StatusAcknowledged, "X")
		return err
	}) {
		require.NoError(t, err, i)
	}
	l := h.holdEvents(t, h.Store)
	_, last, err := h.Store.NumberEvents(t.Context(), l, 100)
	require.NoError(t, err)
	require.EqualValues(t, 80, last)
	page, err := h.Store.SinkPage(t.Context(), 0, 100)
	require.NoError(t, err)
	require.Len(t, page, 80)
	for i := 0; i < len(page); i += 2 {
		require.EqualValues(t, i+1, page[i].Seq)
		require.Equal(t, page[i].ID[1:], page[i+1].ID[1:])
		require.Equal(t, "EF", page[i].ID[:1]+page[i+1].ID[:1], "two of one operation follow each other")
	}
}

func eventVolatile(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	volatile := func(id string) storage.Event {
		e := event(id, "mdm.Connect")
		e.Volatile = true
		return e
	}
	d.withEvents(volatile("idle 1")).polls(t)
	require.NoError(t, d.withEvents(volatile("seen")).seen(t))
	_, err := d.apply(t, &storage.GetBootstrapToken{Src: d.withEvents(volatile("get")).source()})
	require.NoError(t, err)
	require.Empty(t, sentEvents(t, h, "D"))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, []string{"idle 1", "seen", "get"}, sentEvents(t, h, "D"))
	d.withEvents(volatile("idle 2"), event("change", "mdm.Connect")).polls(t)
	require.Equal(t, []string{"idle 1", "seen", "get", "idle 2", "change"}, sentEvents(t, h, "D"), "together with one that is not")
	// None of an unknown device, or of one that is refused, is lost or sent.
	h.device("E").withEvents(volatile("stranger")).polls(t)
	_, err = d.with("x").withEvents(volatile("refused")).report(t, mdm.StatusIdle, "")
	require.ErrorIs(t, err, storage.ErrIdentity)
	second := h.Open(t, nil)
	d.on(second).withEvents(volatile("last")).polls(t)
	require.NoError(t, second.Close(), "which writes what is left")
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, []string{"idle 1", "seen", "get", "idle 2", "change", "last"}, sentEvents(t, h, "D"))
	require.Equal(t, []string{"stranger"}, sentEvents(t, h, "E"))
}

func eventRepeated(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "C", "cancelled")
	h.Exec(t, "UPDATE nano_enrollment_queue SET state = 13, finished_at = 1 WHERE command_uuid = 'cancelled'")
	n := 0
	say := func(status mdm.Status, uuid string) {
		n++
		d.withEvents(event(fmt.Sprint(n), "mdm.Connect")).reports(t, status, uuid)
	}
	say(mdm.StatusAcknowledged, "C")
	say(mdm.StatusAcknowledged, "C")
	say(mdm.StatusError, "C") // another report, so there is an event
	say(mdm.StatusAcknowledged, "cancelled")
	say(mdm.StatusAcknowledged, "cancelled")
	require.Equal(t, []string{"1", "3", "4"}, sentEvents(t, h, "D"))
}

func eventRefused(t *testing.T, h *Harness) {
	d := h.device("D").with("c").enrolls(t)
	thief := d.with("x").withEvents(event("thief", "mdm.Connect"))
	refused(t, thief, storage.ErrIdentity)
	_, err := h.device("E").withEvents(event("stranger", "mdm.TokenUpdate")).tokenUpdate(t)
	require.ErrorIs(t, err, storage.ErrNotEnrolled)
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_events"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_event_batches"))
}

func eventRolledBack(t *testing.T, h *Harness) {
	h.unmigrated(t)
	h.Store = h.Open(t, nil)
	const devices = 30
	var ids []string
	for i := range devices {
		ids = append(ids, fmt.Sprintf("D%02d", i))
	}
	h.Enroll(t, ids...)
	h.enqueue(t, ids, "C")
	h.Exec(t, "DROP TABLE nano_events")
	for i, err := range together(devices, func(i int) error {
		d := h.device(ids[i])
		if i%10 == 0 {
			d = d.withEvents(event(ids[i], "mdm.Connect"))
		}
		_, err := d.report(t, mdm.StatusAcknowledged, "C")
		return err
	}) {
		if i%10 == 0 {
			require.Error(t, err)
			require.Equal(t, "C queued", queueStates(t, h, ids[i]))
		} else {
			require.NoError(t, err, "those of others are left alone")
			require.Equal(t, "C acknowledged", queueStates(t, h, ids[i]))
		}
	}
	require.EqualValues(t, devices-3, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_event_batches"))
}
