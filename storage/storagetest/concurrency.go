package storagetest

import (
	"errors"
	"fmt"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func concurrencyTests() []subtest {
	return []subtest{
		{"fifty devices get twenty commands each", concurrentFleet},
		{"eight connections of one device", concurrentConnections},
		{"eight enqueuers for the same devices", concurrentEnqueuers},
		{"an enqueue and a new enrollment come to one end", concurrentAuthenticate},
		{"reports and a new enrollment come to one end", concurrentReports},
	}
}

// stores returns two replicas, or one if the engine allows only one.
func (h *Harness) stores(t *testing.T) []storage.Devices {
	if h.Engine.Name == "memory" {
		return []storage.Devices{h.Store, h.Store}
	}
	return []storage.Devices{h.Store, h.Open(t, nil)}
}

// work polls until nothing is left and returns the commands in the order in
// which they were offered. Each is acknowledged on the store after the last.
func (c *channel) work(t *testing.T, stores []storage.Devices) (got []string, err error) {
	next, err := c.on(stores[0]).report(t, mdm.StatusIdle, "")
	for i := 1; err == nil && next != ""; i++ {
		got = append(got, next)
		next, err = c.on(stores[i%len(stores)]).report(t, mdm.StatusAcknowledged, next)
	}
	return got, err
}

func numbered(prefix string, n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("%s%02d", prefix, i)
	}
	return out
}

func concurrentFleet(t *testing.T, h *Harness) {
	stores := h.stores(t)
	ids, uuids := numbered("D", 50), numbered("C", 20)
	h.Enroll(t, ids...)
	h.enqueue(t, ids, uuids...)
	got := make([][]string, len(ids))
	errs := together(len(ids), func(i int) (err error) {
		got[i], err = h.device(ids[i]).work(t, stores)
		return err
	})
	for i, err := range errs {
		require.NoError(t, err)
		require.Equal(t, uuids, got[i])
	}
	if h.Engine.Name == "memory" {
		return
	}
	require.EqualValues(t, 1000, h.Int(t, "SELECT COUNT(*) FROM nano_command_results WHERE late = 0"))
	require.EqualValues(t, 1000, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 10"))
}

func concurrentConnections(t *testing.T, h *Harness) {
	stores := h.stores(t)
	uuids := numbered("C", 20)
	h.Enroll(t, "D")
	h.enqueue(t, []string{"D"}, uuids...)
	var mu sync.Mutex
	done := make(map[string]bool) // its report was answered
	offered := make(map[string]bool)
	for _, err := range together(8, func(i int) error {
		d := h.device("D").on(stores[i%len(stores)])
		status, uuid := mdm.StatusIdle, ""
		for last := ""; ; {
			mu.Lock()
			before := make(map[string]bool, len(done))
			for k := range done {
				before[k] = true
			}
			mu.Unlock()
			next, err := d.report(t, status, uuid)
			if err != nil || next == "" {
				return err
			}
			mu.Lock()
			if uuid != "" {
				done[uuid] = true
			}
			offered[next] = true
			mu.Unlock()
			switch {
			case before[next]:
				return errors.New("offered after its report was answered: " + next)
			case next < last:
				return fmt.Errorf("%s was offered after %s", next, last)
			}
			status, uuid, last = mdm.StatusAcknowledged, next, next
		}
	}) {
		require.NoError(t, err)
	}
	require.Len(t, offered, len(uuids))
	if h.Engine.Name == "memory" {
		return
	}
	require.EqualValues(t, len(uuids), h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
	require.EqualValues(t, len(uuids), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 10"))
}

func concurrentEnqueuers(t *testing.T, h *Harness) {
	second := h.Open(t, nil)
	ids := numbered("D", 10)
	h.Enroll(t, ids...)
	const each = 5
	for _, err := range together(8, func(i int) error {
		q := []storage.Enqueuer{h.Store, second}[i%2]
		for n := range each {
			// One command of its own, and one that all of them queue.
			for _, uuid := range []string{fmt.Sprintf("%d-%d", i, n), fmt.Sprintf("shared-%d", n)} {
				failed, err := q.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command(uuid), IDs: ids})
				if err != nil || len(failed) > 0 {
					return fmt.Errorf("%v %w", failed, err)
				}
			}
		}
		return nil
	}) {
		require.NoError(t, err)
	}
	const all = 8*each + each
	for _, id := range ids {
		require.EqualValues(t, all, h.Int(t, "SELECT COUNT(DISTINCT seq) FROM nano_enrollment_queue WHERE id = ?", id))
		require.EqualValues(t, all, h.Int(t, "SELECT MAX(seq) FROM nano_enrollment_queue WHERE id = ?", id))
		require.EqualValues(t, all, h.Int(t, "SELECT owed_seq FROM nano_enrollment_push WHERE id = ? AND last_seq = owed_seq", id))
	}
	got, err := h.device(ids[0]).work(t, []storage.Devices{h.Store, second})
	require.NoError(t, err)
	require.Equal(t, h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE id = ? ORDER BY seq", ids[0]), got)
}

func concurrentAuthenticate(t *testing.T, h *Harness) {
	second := h.Open(t, nil)
	ids := numbered("D", 12)
	h.Enroll(t, ids...)
	// Each device begins anew once while commands come in for it.
	errs := together(len(ids)+4, func(i int) error {
		if i < len(ids) {
			return h.device(ids[i]).on(second).authenticate(t)
		}
		for n := range 5 {
			_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command(fmt.Sprintf("%d-%d", i, n)), IDs: ids})
			if err != nil {
				return err
			}
		}
		return nil
	})
	for _, err := range errs {
		require.NoError(t, err)
	}
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state <> 13"), "what was queued for the old enrollment ended with it")
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE owed_seq > paid_seq"))
}

func concurrentReports(t *testing.T, h *Harness) {
	second := h.Open(t, nil)
	ids, uuids := numbered("D", 12), numbered("C", 5)
	h.Enroll(t, ids...)
	h.enqueue(t, ids, uuids...)
	errs := together(2*len(ids), func(i int) error {
		d := h.device(ids[i/2])
		if i%2 == 1 {
			return d.on(second).authenticate(t)
		}
		for _, uuid := range uuids {
			if _, err := d.report(t, mdm.StatusAcknowledged, uuid); err != nil {
				return err
			}
		}
		return nil
	})
	for _, err := range errs {
		require.NoError(t, err)
	}
	all := int64(len(ids) * len(uuids))
	require.Equal(t, all, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"), "each result once")
	require.Equal(t, all, h.Int(t, `SELECT COUNT(*) FROM nano_enrollment_queue q JOIN nano_command_results r ON r.id = q.id AND r.command_uuid = q.command_uuid
WHERE q.state = 10 AND r.late = 0 OR q.state = 13 AND r.late = 1`), "as it stood when it came")
}
