package storagetest

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func sweepTests() []subtest {
	return []subtest{
		{"a call without the lease changes nothing", sweepWithoutLease},
		{"commands expire at their time, in every waiting state", sweepExpires},
		{"expiring is done in batches", sweepExpiresInBatches},
		{"expiry is told to those who ask", sweepAnnounces},
		{"a report and the expiry of its command come to one end", sweepExpiryRacesReport},
		{"scheduled commands are queued at their time, behind others and in order", sweepPromotes},
		{"replicas that sweep at once promote each row once", sweepAtOnce},
		{"old results go and their rows stay", sweepResults},
		{"old results go by request type", sweepResultsByType},
		{"history of one time is gone through once", sweepOneTime},
		{"finished rows go with results and unused commands", sweepFinished},
		{"rows that are not finished cannot be removed", sweepOnlyFinished},
		{"a row that was queued again is not removed", sweepQueuedAgain},
		{"a command that is queued again while it goes is there or is made anew", sweepRacesEnqueue},
		{"a late report after its row is gone is an unknown one", sweepThenReport},
		{"ten thousand rows go in small batches", sweepManyRows},
		{"history is counted", sweepCounts},
	}
}

// sweepLease takes the lease that the calls are made under.
func sweepLease(t *testing.T, h *Harness) storage.Lease {
	t.Helper()
	return take(t, h.Store, "sweep", "a")
}

// row is a queue row as it is planted.
type row struct {
	id, uuid             string
	state                storage.State
	seq                  int
	notBefore, expiresAt time.Time
	finishedAt           time.Time
}

func micros(at time.Time) any {
	if at.IsZero() {
		return nil
	}
	return at.UnixMicro()
}

// plant puts rows into the queue, in statements of many.
func plant(t *testing.T, h *Harness, rows ...row) {
	t.Helper()
	for chunk := range slices.Chunk(rows, 500) {
		var args []any
		for _, r := range chunk {
			args = append(args, r.id, r.uuid, r.seq, int(r.state), h.Clock.Now().UnixMicro(), micros(r.notBefore), micros(r.expiresAt), micros(r.finishedAt))
		}
		h.Exec(t, "INSERT INTO nano_enrollment_queue (id, command_uuid, seq, state, created_at, not_before, expires_at, finished_at) VALUES "+
			places(8, len(chunk)), args...)
	}
}

// plantCommands puts commands of one type into the store.
func plantCommands(t *testing.T, h *Harness, requestType string, uuids ...string) {
	t.Helper()
	for chunk := range slices.Chunk(uuids, 500) {
		var args []any
		for _, uuid := range chunk {
			args = append(args, uuid, requestType, []byte("<plist/>"), h.Clock.Now().UnixMicro())
		}
		h.Exec(t, "INSERT INTO nano_commands (command_uuid, request_type, command, created_at) VALUES "+places(4, len(chunk)), args...)
	}
}

// plantResults gives rows a result of four bytes each.
func plantResults(t *testing.T, h *Harness, at time.Time, rows ...row) {
	t.Helper()
	for chunk := range slices.Chunk(rows, 500) {
		var args []any
		for _, r := range chunk {
			args = append(args, r.id, r.uuid, "Acknowledged", []byte("four"), at.UnixMicro())
		}
		h.Exec(t, "INSERT INTO nano_command_results (id, command_uuid, status, result, created_at) VALUES "+places(5, len(chunk)), args...)
	}
}

func places(columns, rows int) string {
	one := "(?" + strings.Repeat(", ?", columns-1) + ")"
	return one + strings.Repeat(", "+one, rows-1)
}

// states reads the states of an enrollment's rows, by command.
func states(t *testing.T, h *Harness, id string) map[string]storage.State {
	t.Helper()
	uuids := h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE id = ? ORDER BY command_uuid", id)
	numbers := h.Strings(t, "SELECT state FROM nano_enrollment_queue WHERE id = ? ORDER BY command_uuid", id)
	out := make(map[string]storage.State)
	for i, uuid := range uuids {
		n, err := strconv.Atoi(numbers[i])
		require.NoError(t, err)
		out[uuid] = storage.State(n)
	}
	return out
}

func sweepWithoutLease(t *testing.T, h *Harness) {
	old := sweepLease(t, h)
	take(t, h.Store, "sweep", "b")
	now := h.Clock.Now()
	before := now.Add(-time.Hour)
	rows := []row{
		{id: "D", uuid: "1", state: storage.Queued, expiresAt: before},
		{id: "D", uuid: "2", state: storage.Scheduled, notBefore: before},
		{id: "D", uuid: "3", state: storage.Acknowledged, finishedAt: before},
	}
	plant(t, h, rows...)
	plantResults(t, h, before, rows[2])
	_, err := h.Store.ExpireCommands(t.Context(), old, 100)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	_, err = h.Store.PromoteCommands(t.Context(), old, 100)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	_, err = h.Store.RemoveResults(t.Context(), old, storage.Removal{Before: now, Limit: 100})
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	_, err = h.Store.RemoveFinished(t.Context(), old, storage.Acknowledged, storage.Removal{Before: now, Limit: 100})
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	require.Equal(t, map[string]storage.State{"1": storage.Queued, "2": storage.Scheduled, "3": storage.Acknowledged}, states(t, h, "D"))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
}

func sweepExpires(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	soon := h.Clock.Now().Add(time.Minute)
	plant(t, h,
		row{id: "D", uuid: "never", state: storage.Queued},
		row{id: "D", uuid: "queued", state: storage.Queued, expiresAt: soon},
		row{id: "D", uuid: "notnow", state: storage.NotNow, expiresAt: soon},
		row{id: "D", uuid: "scheduled", state: storage.Scheduled, expiresAt: soon, notBefore: soon.Add(time.Hour)},
		row{id: "D", uuid: "later", state: storage.Queued, expiresAt: soon.Add(time.Microsecond)},
		row{id: "D", uuid: "done", state: storage.Acknowledged, expiresAt: soon, finishedAt: h.Clock.Now()},
	)
	h.Clock.Advance(time.Minute - time.Microsecond)
	n, err := h.Store.ExpireCommands(t.Context(), l, 100)
	require.NoError(t, err)
	require.Zero(t, n, "a microsecond early")
	h.Clock.Advance(time.Microsecond)
	n, err = h.Store.ExpireCommands(t.Context(), l, 100)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	require.Equal(t, map[string]storage.State{
		"never": storage.Queued, "queued": storage.Expired, "notnow": storage.Expired, "scheduled": storage.Expired,
		"later": storage.Queued, "done": storage.Acknowledged,
	}, states(t, h, "D"))
	require.EqualValues(t, 3, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE finished_at = ?", soon.UnixMicro()))
	n, err = h.Store.ExpireCommands(t.Context(), l, 100)
	require.NoError(t, err)
	require.Zero(t, n)
	require.EqualValues(t, 3, h.Store.Stats().Expired)
}

func sweepExpiresInBatches(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	var rows []row
	for i := range 25 {
		state := []storage.State{storage.Scheduled, storage.Queued, storage.NotNow}[i%3]
		rows = append(rows, row{id: fmt.Sprint("D", i), uuid: "C", state: state, expiresAt: h.Clock.Now()})
	}
	plant(t, h, rows...)
	var sizes []int
	for {
		n, err := h.Store.ExpireCommands(t.Context(), l, 10)
		require.NoError(t, err)
		if n == 0 {
			break
		}
		sizes = append(sizes, n)
	}
	require.Equal(t, []int{10, 10, 5}, sizes)
}

func sweepAnnounces(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	h.Enroll(t, "D", "E")
	plantCommands(t, h, "ProfileList", "1", "2", "3")
	now := h.Clock.Now()
	plant(t, h, row{id: "E", uuid: "1", state: storage.Queued, expiresAt: now})
	n, err := h.Store.ExpireCommands(t.Context(), l, 100)
	require.NoError(t, err)
	require.Equal(t, 1, n)
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_events"), "nobody asked")

	require.NoError(t, h.Store.PutEventSink(t.Context(), storage.EventSink{
		Name: "x", Enabled: true, Filter: storage.EventFilter{Topics: []string{storage.TopicCommandExpired}},
	}))
	plant(t, h,
		row{id: "D", uuid: "1", state: storage.Queued, expiresAt: now},
		row{id: "D", uuid: "2", state: storage.NotNow, expiresAt: now},
		row{id: "E", uuid: "3", state: storage.Scheduled, expiresAt: now})
	n, err = h.Store.ExpireCommands(t.Context(), l, 100)
	require.NoError(t, err)
	require.Equal(t, 3, n)
	var of []string
	for _, e := range storedEvents(t, h) {
		require.Equal(t, storage.TopicCommandExpired, e.Topic)
		require.Equal(t, "ProfileList", e.RequestType)
		of = append(of, e.CommandUUID+" of "+e.Enrollment)
	}
	require.ElementsMatch(t, []string{"1 of D", "2 of D", "3 of E"}, of)
	require.EqualValues(t, 3, h.Int(t, "SELECT SUM(size) FROM nano_event_batches"), "each has its place in the log")
}

func sweepExpiryRacesReport(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	const devices = 40
	var rows []row
	for i := range devices {
		id := fmt.Sprintf("D%02d", i)
		h.Enroll(t, id)
		rows = append(rows, row{id: id, uuid: "C", state: storage.Queued, expiresAt: h.Clock.Now()})
	}
	plantCommands(t, h, "DeviceInformation", "C")
	plant(t, h, rows...)
	var wg sync.WaitGroup
	for part := range slices.Chunk(rows, devices/4) {
		wg.Go(func() {
			for _, r := range part {
				if _, err := h.device(r.id).report(t, mdm.StatusAcknowledged, "C"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Go(func() {
		for range devices {
			if _, err := h.Store.ExpireCommands(t.Context(), l, 3); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	require.EqualValues(t, devices, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"), "no result is lost")
	expired := h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = ?", int(storage.Expired))
	acknowledged := h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = ?", int(storage.Acknowledged))
	require.EqualValues(t, devices, expired+acknowledged)
	require.Equal(t, expired, h.Int(t, `SELECT COUNT(*) FROM nano_enrollment_queue q
JOIN nano_command_results r ON r.id = q.id AND r.command_uuid = q.command_uuid AND r.late = 1 WHERE q.state = ?`, int(storage.Expired)))
	require.EqualValues(t, expired, h.Store.Stats().Expired, "counted once each")
}

func sweepPromotes(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	now := h.Clock.Now()
	h.Enroll(t, "D", "E", "F")
	h.Exec(t, "UPDATE nano_enrollment_push SET last_seq = 7, owed_seq = 7, paid_seq = 7 WHERE id = 'D'")
	owedF := h.Strings(t, "SELECT owed_seq FROM nano_enrollment_push WHERE id = 'F'")
	plantCommands(t, h, "DeviceInformation", "waits", "first", "second", "third", "tomorrow", "e")
	plant(t, h,
		row{id: "D", uuid: "waits", state: storage.Queued, seq: 7},
		row{id: "D", uuid: "third", state: storage.Scheduled, seq: 1, notBefore: now.Add(2 * time.Minute)},
		row{id: "D", uuid: "first", state: storage.Scheduled, seq: 2, notBefore: now.Add(time.Minute)},
		row{id: "D", uuid: "second", state: storage.Scheduled, seq: 3, notBefore: now.Add(time.Minute)},
		row{id: "D", uuid: "tomorrow", state: storage.Scheduled, seq: 4, notBefore: now.Add(24 * time.Hour)},
		row{id: "E", uuid: "e", state: storage.Scheduled, seq: 9, notBefore: now.Add(time.Minute)},
		row{id: "F", uuid: "e", state: storage.Scheduled, seq: 9, notBefore: now.Add(24 * time.Hour)},
	)
	n, err := h.Store.PromoteCommands(t.Context(), l, 100)
	require.NoError(t, err)
	require.Zero(t, n)
	now = h.Clock.Advance(2 * time.Minute)
	n, err = h.Store.PromoteCommands(t.Context(), l, 100)
	require.NoError(t, err)
	require.Equal(t, 4, n)
	require.EqualValues(t, 4, h.Store.Stats().Promoted)
	require.Equal(t, []string{"waits", "first", "second", "third"},
		h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE id = 'D' AND state = 2 ORDER BY seq"))
	require.Equal(t, []string{"7", "8", "9", "10"},
		h.Strings(t, "SELECT seq FROM nano_enrollment_queue WHERE id = 'D' AND state = 2 ORDER BY seq"))
	require.Equal(t, storage.Scheduled, states(t, h, "D")["tomorrow"])
	require.Equal(t, storage.Queued, states(t, h, "E")["e"])
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE id = 'D' AND last_seq = 10 AND owed_seq = 10 AND paid_seq = 7 AND push_at = ?", now.UnixMicro()))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE id = 'E' AND owed_seq > paid_seq AND push_at = ?", now.UnixMicro()))
	require.Equal(t, owedF, h.Strings(t, "SELECT owed_seq FROM nano_enrollment_push WHERE id = 'F'"))

	require.Equal(t, "e", h.device("E").polls(t))
}

// sweepAtOnce has two replicas sweep at the same time, as they may for a
// moment if one was paused: the lease that both show is the same.
func sweepAtOnce(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	second := h.Open(t, nil)
	now := h.Clock.Now()
	var rows []row
	var ids []string
	for i := range 10 {
		id := fmt.Sprint("D", i)
		ids = append(ids, id)
		for j := range 10 {
			rows = append(rows, row{id: id, uuid: fmt.Sprint("C", 9-j), state: storage.Scheduled, seq: j, notBefore: now})
		}
	}
	h.Enroll(t, ids...)
	plant(t, h, rows...)
	before := h.Int(t, "SELECT SUM(last_seq) FROM nano_enrollment_push")
	var wg sync.WaitGroup
	for _, s := range []storage.Sweeps{h.Store, second} {
		wg.Go(func() {
			for range 20 {
				if _, err := s.PromoteCommands(t.Context(), l, 7); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.EqualValues(t, 100, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 2"))
	require.EqualValues(t, 100, h.Int(t, "SELECT SUM(last_seq) FROM nano_enrollment_push")-before, "one number each")
	require.EqualValues(t, 100, h.Store.Stats().Promoted+second.Stats().Promoted)
	for _, id := range ids {
		require.Equal(t, []string{"C9", "C8", "C7", "C6", "C5", "C4", "C3", "C2", "C1", "C0"},
			h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE id = ? ORDER BY seq", id))
	}
}

// removeAll goes through history to its end.
func removeAll(t *testing.T, r storage.Removal, step func(storage.Removal) (storage.Removed, error)) (total storage.Removed) {
	t.Helper()
	for range 10_000 {
		out, err := step(r)
		require.NoError(t, err)
		require.LessOrEqual(t, out.Looked, r.Limit)
		total.Looked += out.Looked
		total.Rows += out.Rows
		total.Results += out.Results
		total.Bytes += out.Bytes
		total.Commands += out.Commands
		if out.Done {
			return total
		}
		require.NotEqual(t, r.After, out.Next, "no way forward")
		r.After = out.Next
	}
	t.Fatal("does not end")
	return total
}

func sweepResults(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	now := h.Clock.Now()
	rows := []row{
		{id: "D", uuid: "old", state: storage.Acknowledged, finishedAt: now.Add(-2 * time.Hour)},
		{id: "D", uuid: "edge", state: storage.Acknowledged, finishedAt: now.Add(-time.Hour)},
		{id: "D", uuid: "new", state: storage.Acknowledged, finishedAt: now},
	}
	plant(t, h, rows...)
	plantCommands(t, h, "ProfileList", "old", "edge", "new")
	for _, r := range rows {
		plantResults(t, h, r.finishedAt, r)
	}
	total := removeAll(t, storage.Removal{Before: now.Add(-time.Hour), Limit: 10}, func(r storage.Removal) (storage.Removed, error) {
		return h.Store.RemoveResults(t.Context(), l, r)
	})
	require.Equal(t, storage.Removed{Looked: 1, Results: 1, Bytes: 4}, total)
	require.Equal(t, []string{"edge", "new"}, h.Strings(t, "SELECT command_uuid FROM nano_command_results ORDER BY command_uuid"))
	require.EqualValues(t, 3, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue"))
	require.EqualValues(t, 3, h.Int(t, "SELECT COUNT(*) FROM nano_commands"))
	stats := h.Store.Stats()
	require.EqualValues(t, 1, stats.RemovedResults)
	require.EqualValues(t, 4, stats.RemovedResultBytes)
}

func sweepResultsByType(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	now := h.Clock.Now()
	plantCommands(t, h, "InstalledApplicationList", "apps")
	plantCommands(t, h, "ProfileList", "profiles")
	plantCommands(t, h, "SecurityInfo", "security")
	for _, uuid := range []string{"apps", "profiles", "security", "gone"} { // the last has no command
		plantResults(t, h, now.Add(-time.Hour), row{id: "D", uuid: uuid})
	}
	left := func() []string {
		return h.Strings(t, "SELECT command_uuid FROM nano_command_results ORDER BY command_uuid")
	}
	step := func(r storage.Removal) (storage.Removed, error) { return h.Store.RemoveResults(t.Context(), l, r) }
	total := removeAll(t, storage.Removal{Before: now, Type: "InstalledApplicationList", Limit: 2}, step)
	require.Equal(t, storage.Removed{Looked: 4, Results: 1, Bytes: 4}, total)
	require.Equal(t, []string{"gone", "profiles", "security"}, left())
	removeAll(t, storage.Removal{Before: now, Except: []string{"SecurityInfo", "InstalledApplicationList"}, Limit: 2}, step)
	require.Equal(t, []string{"security"}, left())
}

// sweepOneTime: what one transaction wrote has one time, more of it than fits
// a batch.
func sweepOneTime(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	now := h.Clock.Now()
	plantCommands(t, h, "ProfileList", "C")
	var rows []row
	for i := range 30 {
		rows = append(rows, row{id: fmt.Sprintf("D%02d", i/3), uuid: fmt.Sprint("C", i%3), seq: i % 3, state: storage.Acknowledged, finishedAt: now})
	}
	plant(t, h, rows...)
	plantResults(t, h, now, rows...)
	step := func(r storage.Removal) (storage.Removed, error) { return h.Store.RemoveResults(t.Context(), l, r) }
	kept := removeAll(t, storage.Removal{Before: now.Add(1), Type: "Other", Limit: 7}, step)
	require.Zero(t, kept.Looked, "before is less than a microsecond later")
	kept = removeAll(t, storage.Removal{Before: now.Add(time.Microsecond), Type: "Other", Limit: 7}, step)
	require.Equal(t, storage.Removed{Looked: 30}, kept)
	removed := removeAll(t, storage.Removal{Before: now.Add(time.Microsecond), Limit: 7}, step)
	require.Equal(t, storage.Removed{Looked: 30, Results: 30, Bytes: 120}, removed)

	step = func(r storage.Removal) (storage.Removed, error) {
		return h.Store.RemoveFinished(t.Context(), l, storage.Acknowledged, r)
	}
	kept = removeAll(t, storage.Removal{Before: now.Add(time.Microsecond), Type: "Other", Limit: 7}, step)
	require.Equal(t, storage.Removed{Looked: 30}, kept)
	removed = removeAll(t, storage.Removal{Before: now.Add(time.Microsecond), Limit: 7}, step)
	require.Equal(t, 30, removed.Rows)
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue"))
}

func sweepFinished(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	now := h.Clock.Now()
	old := now.Add(-2 * time.Hour)
	rows := []row{
		{id: "D", uuid: "shared", state: storage.Acknowledged, finishedAt: old},
		{id: "E", uuid: "shared", state: storage.Queued},
		{id: "D", uuid: "alone", state: storage.Acknowledged, finishedAt: old},
		{id: "D", uuid: "failed", state: storage.Failed, finishedAt: old},
		{id: "D", uuid: "new", state: storage.Acknowledged, finishedAt: now},
	}
	plant(t, h, rows...)
	plantCommands(t, h, "ProfileList", "shared", "alone", "failed", "new")
	plantResults(t, h, now, rows[0], rows[2], rows[3], rows[4])
	total := removeAll(t, storage.Removal{Before: now.Add(-time.Hour), Limit: 10}, func(r storage.Removal) (storage.Removed, error) {
		return h.Store.RemoveFinished(t.Context(), l, storage.Acknowledged, r)
	})
	require.Equal(t, storage.Removed{Looked: 2, Rows: 2, Results: 2, Bytes: 8, Commands: 1}, total)
	require.Equal(t, map[string]storage.State{"failed": storage.Failed, "new": storage.Acknowledged}, states(t, h, "D"))
	require.Equal(t, map[string]storage.State{"shared": storage.Queued}, states(t, h, "E"))
	require.Equal(t, []string{"failed", "new", "shared"}, h.Strings(t, "SELECT command_uuid FROM nano_commands ORDER BY command_uuid"))
	require.Equal(t, []string{"failed", "new"}, h.Strings(t, "SELECT command_uuid FROM nano_command_results ORDER BY command_uuid"))
	stats := h.Store.Stats()
	require.EqualValues(t, 2, stats.RemovedRows)
	require.EqualValues(t, 1, stats.RemovedCommands)
}

func sweepOnlyFinished(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	for _, state := range []storage.State{storage.Scheduled, storage.Queued, storage.NotNow} {
		_, err := h.Store.RemoveFinished(t.Context(), l, state, storage.Removal{Before: h.Clock.Now(), Limit: 10})
		require.ErrorContains(t, err, "not finished")
	}
}

// sweepQueuedAgain has rows go back to the queue while a removal of their
// state goes on.
func sweepQueuedAgain(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	now := h.Clock.Now()
	var rows []row
	for i := range 60 {
		rows = append(rows, row{id: fmt.Sprintf("D%02d", i), uuid: "C", state: storage.Failed, finishedAt: now.Add(-time.Hour)})
	}
	plant(t, h, rows...)
	plantCommands(t, h, "ProfileList", "C")
	requeued := int64(0)
	var wg sync.WaitGroup
	wg.Go(func() {
		for _, r := range rows {
			requeued += h.Exec(t, "UPDATE nano_enrollment_queue SET state = 2, finished_at = NULL WHERE id = ? AND command_uuid = 'C' AND state = 11", r.id)
		}
	})
	removed := 0
	wg.Go(func() {
		r := storage.Removal{Before: now, Limit: 5}
		for range 20 {
			out, err := h.Store.RemoveFinished(t.Context(), l, storage.Failed, r)
			if err != nil {
				t.Error(err)
				return
			}
			removed += out.Rows
		}
	})
	wg.Wait()
	require.EqualValues(t, len(rows), requeued+int64(removed), "each is queued or gone")
	require.Equal(t, requeued, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 2"))
	if requeued > 0 {
		require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_commands"))
	}
}

// sweepRacesEnqueue queues commands for a second device while they are being
// removed with their first.
func sweepRacesEnqueue(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	h.Enroll(t, "D", "E")
	now := h.Clock.Now()
	var commands []*mdm.Command
	var rows []row
	for i := range 40 {
		c := &mdm.Command{CommandUUID: fmt.Sprintf("C%02d", i), RequestType: "ProfileList", Raw: []byte("<plist/>")}
		commands = append(commands, c)
		plantCommands(t, h, c.RequestType, c.CommandUUID)
		rows = append(rows, row{id: "D", uuid: c.CommandUUID, state: storage.Acknowledged, finishedAt: now.Add(-time.Hour)})
	}
	plant(t, h, rows...)
	var wg sync.WaitGroup
	wg.Go(func() {
		for _, c := range commands {
			failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: c, IDs: []string{"E"}})
			if err != nil || len(failed) > 0 {
				t.Error(err, failed)
			}
		}
	})
	wg.Go(func() {
		for range len(rows) {
			if _, err := h.Store.RemoveFinished(t.Context(), l, storage.Acknowledged, storage.Removal{Before: now, Limit: 1}); err != nil {
				t.Error(err)
			}
		}
	})
	wg.Wait()
	require.EqualValues(t, len(commands), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE id = 'E'"))
	require.EqualValues(t, len(commands), h.Int(t, "SELECT COUNT(*) FROM nano_commands"), "no row without its command")
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE id = 'D'"))
}

func sweepThenReport(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	h.Enroll(t, "D")
	plantCommands(t, h, "ProfileList", "old", "next")
	plant(t, h,
		row{id: "D", uuid: "old", state: storage.Cancelled, finishedAt: h.Clock.Now().Add(-time.Hour)},
		row{id: "D", uuid: "next", state: storage.Queued, seq: 1})
	out, err := h.Store.RemoveFinished(t.Context(), l, storage.Cancelled, storage.Removal{Before: h.Clock.Now(), Limit: 10})
	require.NoError(t, err)
	require.Equal(t, 1, out.Rows)
	require.Equal(t, "next", h.device("D").reports(t, mdm.StatusAcknowledged, "old"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
	require.Equal(t, map[string]storage.State{"next": storage.Queued}, states(t, h, "D"))
}

func sweepManyRows(t *testing.T, h *Harness) {
	l := sweepLease(t, h)
	const devices, each = 100, 100
	old := h.Clock.Now().Add(-48 * time.Hour)
	var rows []row
	var uuids []string
	for c := range each {
		uuids = append(uuids, fmt.Sprintf("C%03d", c))
		for d := range devices {
			rows = append(rows, row{
				id: fmt.Sprintf("D%03d", d), uuid: uuids[c], state: storage.Acknowledged, seq: c,
				finishedAt: old.Add(time.Duration(c) * time.Minute),
			})
		}
	}
	plant(t, h, rows...)
	plantCommands(t, h, "ProfileList", uuids...)
	plantResults(t, h, old, rows[:devices*each/2]...)
	plant(t, h, row{id: "D000", uuid: "waits", state: storage.Queued, seq: each})

	r := storage.Removal{Before: h.Clock.Now(), Limit: 250}
	var total storage.Removed
	for {
		out, err := h.Store.RemoveFinished(t.Context(), l, storage.Acknowledged, r)
		require.NoError(t, err)
		require.LessOrEqual(t, out.Rows, r.Limit)
		total.Rows += out.Rows
		total.Results += out.Results
		total.Commands += out.Commands
		if out.Done {
			break
		}
		r.After = out.Next
	}
	require.Equal(t, storage.Removed{Rows: devices * each, Results: devices * each / 2, Commands: each}, total)
	require.Equal(t, []string{"waits"}, h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue"))
}

func sweepCounts(t *testing.T, h *Harness) {
	now := h.Clock.Now()
	rows := []row{
		{id: "D", uuid: "1", state: storage.Scheduled}, {id: "D", uuid: "2", state: storage.Queued}, {id: "D", uuid: "3", state: storage.NotNow},
		{id: "D", uuid: "4", state: storage.Acknowledged, finishedAt: now}, {id: "D", uuid: "5", state: storage.Superseded, finishedAt: now},
	}
	plant(t, h, rows...)
	plantCommands(t, h, "ProfileList", "1", "2", "3", "4")
	plantResults(t, h, now, rows[3])
	size, err := h.Store.HistorySize(t.Context())
	require.NoError(t, err)
	require.Equal(t, storage.HistorySize{Waiting: 3, Finished: 2, Results: 1, Commands: 4}, size)
}
