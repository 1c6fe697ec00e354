package storagetest

import (
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func steeringTests() []subtest {
	return []subtest{
		{"one command of an enrollment is cancelled", cancelItem},
		{"a command is cancelled for all that it waits for", cancelCommand},
		{"a queue is cleared", clearQueue},
		{"what is cancelled while devices report ends once", cancelRace},
		{"what failed is queued again", requeueItem},
		{"what cannot be queued again stays as it is", requeueRefused},
		{"an operator disables and enables a device with its users", disableEnrollment},
		{"a device is deleted with all that it has", deleteDevice},
		{"a user channel is deleted alone", deleteUser},
		{"who enrolls anew while being deleted stays", deleteRace},
		{"a deletion is told to who asked for it", deleteAnnounced},
		{"renewal windows are opened for devices and closed", setRenewal},
		{"tokens are read with a record", readTokens},
		{"steering keeps to its scope", steeringScope},
	}
}

var everything storage.Scope

func auditRecord(action string) *storage.AuditRecord {
	return &storage.AuditRecord{Who: "op", Action: action, Outcome: storage.AuditDone}
}

// auditCount counts the records of an action.
func (h *Harness) auditCount(t *testing.T, action string) int {
	t.Helper()
	records, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{Action: action}, storage.AuditKey{}, 100)
	require.NoError(t, err)
	return len(records)
}

func cancelItem(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	h.enqueue(t, []string{"D", "E"}, "C1", "C2", "C3")
	d := h.device("D")
	d.reports(t, mdm.StatusNotNow, "C1")
	was, err := h.Store.CancelItem(t.Context(), everything, "D", "C1", auditRecord("c"))
	require.NoError(t, err)
	require.Equal(t, storage.NotNow, was)
	was, err = h.Store.CancelItem(t.Context(), everything, "D", "C1", auditRecord("c"))
	require.NoError(t, err)
	require.Equal(t, storage.Cancelled, was, "it had ended")
	d.reports(t, mdm.StatusAcknowledged, "C2")
	was, err = h.Store.CancelItem(t.Context(), everything, "D", "C2", auditRecord("c"))
	require.NoError(t, err)
	require.Equal(t, storage.Acknowledged, was)
	require.Equal(t, 1, h.auditCount(t, "c"), "of what was done")
	require.Equal(t, "C3", d.polls(t))
	require.Equal(t, "C1", h.device("E").polls(t), "the other's stays")
	for _, bad := range [][2]string{{"D", "none"}, {"nobody", "C1"}, {"D", ""}} {
		_, err = h.Store.CancelItem(t.Context(), everything, bad[0], bad[1], auditRecord("c"))
		require.ErrorIs(t, err, storage.ErrNotFound)
	}
	item, err := h.Store.QueueItem(t.Context(), everything, "D", "C1")
	require.NoError(t, err)
	require.Equal(t, h.Clock.Now(), item.FinishedAt)
}

func cancelCommand(t *testing.T, h *Harness) {
	ids := numbered("D", 12)
	h.Enroll(t, ids...)
	h.asks(t, storage.Enqueue{}, "C1", "A", ids[:8]...)
	h.asks(t, storage.Enqueue{NotBefore: h.Clock.Now().Add(time.Hour)}, "C2", "A", ids[0])
	h.asks(t, storage.Enqueue{}, "C3", "A", ids...)
	h.device(ids[0]).reports(t, mdm.StatusAcknowledged, "C1")
	h.device(ids[1]).reports(t, mdm.StatusNotNow, "C1")
	cancelled, finished, err := h.Store.CancelCommand(t.Context(), everything, "C1")
	require.NoError(t, err)
	require.EqualValues(t, 7, cancelled)
	require.EqualValues(t, 1, finished)
	cancelled, finished, err = h.Store.CancelCommand(t.Context(), everything, "C1")
	require.NoError(t, err)
	require.Zero(t, cancelled)
	require.EqualValues(t, 8, finished)
	cancelled, _, err = h.Store.CancelCommand(t.Context(), everything, "C2")
	require.NoError(t, err)
	require.EqualValues(t, 1, cancelled, "scheduled ones, too")
	for _, id := range ids {
		require.Equal(t, "C3", h.device(id).polls(t))
	}
	_, _, err = h.Store.CancelCommand(t.Context(), everything, "none")
	require.ErrorIs(t, err, storage.ErrNotFound)
}

func clearQueue(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	h.enqueue(t, []string{"D", "E"}, numbered("C", 20)...)
	h.asks(t, storage.Enqueue{NotBefore: h.Clock.Now().Add(time.Hour)}, "later", "A", "D")
	h.device("D").reports(t, mdm.StatusNotNow, "C03")
	h.device("D").reports(t, mdm.StatusAcknowledged, "C05")
	cancelled, err := h.Store.ClearQueue(t.Context(), everything, "D")
	require.NoError(t, err)
	require.EqualValues(t, 20, cancelled)
	require.Empty(t, h.device("D").polls(t))
	require.Equal(t, "C00", h.device("E").polls(t))
	cancelled, err = h.Store.ClearQueue(t.Context(), everything, "D")
	require.NoError(t, err)
	require.Zero(t, cancelled)
	_, err = h.Store.ClearQueue(t.Context(), everything, "nobody")
	require.ErrorIs(t, err, storage.ErrNotFound)
}

// cancelRace has devices work through their queues while an operator cancels
// in each way that there is.
func cancelRace(t *testing.T, h *Harness) {
	stores := h.stores(t)
	ids, uuids := numbered("D", 16), numbered("C", 12)
	h.Enroll(t, ids...)
	h.enqueue(t, ids, uuids...)
	var cancelled atomic.Int64
	errs := together(len(ids)+3, func(i int) error {
		if i < len(ids) {
			_, err := h.device(ids[i]).work(t, stores)
			return err
		}
		for n, uuid := range uuids {
			switch i - len(ids) {
			case 0:
				n, _, err := h.Store.CancelCommand(t.Context(), everything, uuids[len(uuids)-1-n])
				cancelled.Add(n)
				if err != nil {
					return err
				}
			case 1:
				for _, id := range ids {
					was, err := h.Store.CancelItem(t.Context(), everything, id, uuid, auditRecord("c"))
					if err != nil {
						return err
					}
					if !was.Terminal() {
						cancelled.Add(1)
					}
				}
			case 2:
				n, err := h.Store.ClearQueue(t.Context(), everything, ids[n])
				cancelled.Add(n)
				if err != nil {
					return err
				}
			}
		}
		return nil
	})
	for _, err := range errs {
		require.NoError(t, err)
	}
	if h.Engine.Name == "memory" {
		return
	}
	all := int64(len(ids) * len(uuids))
	acknowledged := h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 10")
	require.Equal(t, cancelled.Load(), h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = 13"), "each was cancelled once")
	require.Equal(t, all, acknowledged+cancelled.Load(), "each ended once")
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE finished_at IS NULL"))
	require.Equal(t, acknowledged, h.Int(t, `SELECT COUNT(*) FROM nano_enrollment_queue q JOIN nano_command_results r
ON r.id = q.id AND r.command_uuid = q.command_uuid WHERE q.state = 10 AND r.late = 0`), "what was acknowledged has its result")
	require.Zero(t, h.Int(t, `SELECT COUNT(*) FROM nano_enrollment_queue q JOIN nano_command_results r
ON r.id = q.id AND r.command_uuid = q.command_uuid WHERE q.state = 13 AND r.late = 0`), "and what was cancelled at most a late one")
}

func requeueItem(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	d := h.device("D")
	h.asks(t, storage.Enqueue{ExpiresAt: h.Clock.Now().Add(time.Hour)}, "C1", "A", "D")
	h.enqueue(t, []string{"D"}, "C2")
	d.reports(t, mdm.StatusNotNow, "C1")
	d.reports(t, mdm.StatusError, "C1")
	h.accepted(t, "D", time.Hour)
	h.Clock.Advance(2 * time.Hour)
	was, err := h.Store.Requeue(t.Context(), everything, "D", "C1", auditRecord("r"))
	require.NoError(t, err)
	require.Equal(t, storage.Failed, was)
	require.Equal(t, 1, h.auditCount(t, "r"))
	require.Equal(t, []string{"C2", "C1"}, h.queue(t, "D", 0, 10), "behind what waits")
	item, err := h.Store.QueueItem(t.Context(), everything, "D", "C1")
	require.NoError(t, err)
	require.Zero(t, item.FinishedAt)
	require.Zero(t, item.NotNowCount)
	require.Zero(t, item.ExpiresAt, "it has passed")
	require.True(t, h.pushState(t, "D").Owed)
	_, err = h.Store.CommandResult(t.Context(), everything, "D", "C1")
	require.ErrorIs(t, err, storage.ErrNotFound)

	require.Equal(t, "C2", d.polls(t))
	require.Equal(t, "C1", d.reports(t, mdm.StatusAcknowledged, "C2"))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "C1"))
	r, err := h.Store.CommandResult(t.Context(), everything, "D", "C1")
	require.NoError(t, err)
	require.Equal(t, "Acknowledged", r.Status)
	require.False(t, r.Late)
}

func requeueRefused(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	h.enqueue(t, []string{"D"}, "C1", "C2", "C3")
	h.device("D").reports(t, mdm.StatusAcknowledged, "C1")
	for uuid, want := range map[string]storage.State{"C1": storage.Acknowledged, "C2": storage.Queued} {
		was, err := h.Store.Requeue(t.Context(), everything, "D", uuid, auditRecord("r"))
		require.NoError(t, err)
		require.Equal(t, want, was)
		item, err := h.Store.QueueItem(t.Context(), everything, "D", uuid)
		require.NoError(t, err)
		require.Equal(t, want, item.State)
	}
	for _, bad := range [][2]string{{"D", "none"}, {"nobody", "C1"}, {"D", "\x00"}} {
		_, err := h.Store.Requeue(t.Context(), everything, bad[0], bad[1], auditRecord("r"))
		require.ErrorIs(t, err, storage.ErrNotFound)
	}
	require.NoError(t, h.device("D").checkOut(t))
	_, err := h.Store.Requeue(t.Context(), everything, "D", "C3", auditRecord("r"))
	require.ErrorIs(t, err, storage.ErrNotEnrolled)
	require.Zero(t, h.auditCount(t, "r"))
}

func disableEnrollment(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	u := h.device("D").user("u").enrolls(t)
	ids := []string{"D", u.enroll.ID, "E"}
	h.enqueue(t, ids, "C1")
	disabled, err := h.Store.SetDisabled(t.Context(), everything, "D", true, auditRecord("d"))
	require.NoError(t, err)
	require.Equal(t, []string{"D", "D:u"}, disabled)
	require.Empty(t, h.device("D").polls(t))
	require.Empty(t, u.polls(t))
	require.Equal(t, "C1", h.device("E").polls(t))
	_, err = h.device("D").tokenUpdate(t)
	require.NoError(t, err)
	require.Empty(t, h.device("D").polls(t), "the device does not clear what an operator set")

	now := h.Clock.Advance(time.Minute)
	_, err = h.Store.SetDisabled(t.Context(), everything, u.enroll.ID, false, auditRecord("d"))
	require.NoError(t, err)
	require.Equal(t, "C1", u.polls(t), "one channel alone")
	require.Empty(t, h.device("D").polls(t))
	enabled, err := h.Store.SetDisabled(t.Context(), everything, "D", false, auditRecord("d"))
	require.NoError(t, err)
	require.Equal(t, []string{"D", "D:u"}, enabled)
	require.Equal(t, now, h.pushState(t, "D").NextAt, "what is owed is due at once")
	require.Equal(t, "C1", h.device("D").polls(t))
	require.Equal(t, 3, h.auditCount(t, "d"))
	_, err = h.Store.SetDisabled(t.Context(), everything, "nobody", true, auditRecord("d"))
	require.ErrorIs(t, err, storage.ErrNotFound)
}

func deleteDevice(t *testing.T, h *Harness) {
	d := h.device("D").with("c1").enrolls(t)
	u := d.user("u").enrolls(t)
	require.NoError(t, d.user("never").userAuthenticate(t))
	other := h.device("E").with("c2").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "token"))
	h.tags(t, everything, []string{"D"}, []string{"lab"}, nil)
	uuids := numbered("C", 120)
	h.enqueue(t, []string{"D", "D:u"}, uuids...)
	h.enqueue(t, []string{"D", "E"}, "shared")
	for _, uuid := range uuids[:110] {
		d.reports(t, mdm.StatusAcknowledged, uuid)
	}
	h.Exec(t, "INSERT INTO nano_command_results (id, command_uuid, status, result, created_at) VALUES ('D', 'gone', 'Error', ?, 1)", []byte("x"))
	require.NoError(t, h.Store.Flush(t.Context()))
	h.Clock.Advance(time.Minute)
	require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("x")))
	require.Equal(t, 1, h.auditCount(t, "x"))
	for table, column := range map[string]string{"nano_devices": "id", "nano_users": "device_id", "nano_enrollments": "device_id", "nano_enrollment_push": "id",
		"nano_enrollment_activity": "id", "nano_enrollment_queue": "id", "nano_command_results": "id", "nano_device_tags": "id"} {
		require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM "+table+" WHERE "+column+" IN ('D', 'D:u', 'D:never')"), table)
	}
	require.Equal(t, []string{"shared"}, h.Strings(t, "SELECT command_uuid FROM nano_commands"), "commands of nobody else go, too")
	require.Equal(t, "shared", other.polls(t))
	require.ErrorIs(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("x")), storage.ErrNotFound)

	// The certificate is dead for everybody, and for the device itself.
	certificateIsRetired(t, d)
	_, err := u.report(t, mdm.StatusIdle, "")
	require.ErrorIs(t, err, storage.ErrIdentity)
	require.ErrorIs(t, h.device("F").with("c1").authenticate(t), storage.ErrIdentity)
	_, err = h.Store.EnrollmentByCertificate(t.Context(), "c1")
	require.ErrorIs(t, err, storage.ErrNotFound)

	again := h.device("D").with("c3").enrolls(t)
	token, err := again.bootstrapToken(t)
	require.NoError(t, err)
	require.Empty(t, token)
	h.enqueue(t, []string{"D"}, uuids[0])
	require.Equal(t, uuids[0], again.polls(t), "it enrolls anew with another one")
}

// certificateIsRetired checks that a certificate does nothing for its former
// device.
func certificateIsRetired(t *testing.T, c *channel) {
	t.Helper()
	_, updated := c.tokenUpdate(t)
	_, reported := c.report(t, mdm.StatusIdle, "")
	_, asked := c.bootstrapToken(t)
	for _, err := range []error{c.authenticate(t), updated, reported, asked, c.setBootstrapToken(t, "stolen"), c.userAuthenticate(t), c.seen(t)} {
		require.True(t, errors.Is(err, storage.ErrIdentity) || errors.Is(err, storage.ErrNotEnrolled), err)
	}
}

func deleteUser(t *testing.T, h *Harness) {
	d := h.device("D").with("c1").enrolls(t)
	u := d.user("u").enrolls(t)
	h.enqueue(t, []string{"D", "D:u"}, "C1")
	require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D:u", auditRecord("x")))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollments WHERE id = 'D:u'"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_users"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE id = 'D:u'"))
	require.Equal(t, "C1", d.polls(t))
	_, err := u.tokenUpdate(t)
	require.NoError(t, err, "the user may come back")
	require.Empty(t, u.polls(t))
}

// deleteRace lets a device enroll anew in the middle, by a database that has
// more to remove than one transaction takes.
func deleteRace(t *testing.T, h *Harness) {
	for i := range 8 {
		id := fmt.Sprint("D", i)
		h.device(id).with("old-" + id).enrolls(t)
		h.enqueue(t, []string{id}, numbered("C", 150)...)
	}
	second := h.Open(t, nil)
	errs := together(16, func(i int) error {
		id := fmt.Sprint("D", i/2)
		if i%2 == 0 {
			return h.Store.DeleteEnrollment(t.Context(), everything, id, auditRecord("x"))
		}
		d := h.device(id).with("new-" + id).on(second)
		if err := d.authenticate(t); err != nil {
			return err
		}
		_, err := d.tokenUpdate(t)
		return err
	})
	for i, err := range errs {
		id := fmt.Sprint("D", i/2)
		switch {
		case i%2 == 0 && err != nil:
			require.ErrorIs(t, err, storage.ErrConflict)
		case i%2 == 1 && err != nil: // deleted between its two messages
			require.True(t, errors.Is(err, storage.ErrNotEnrolled) || errors.Is(err, storage.ErrIdentity), err)
		case i%2 == 1:
			certificate := h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ? AND retired_at IS NULL", id)
			device := h.Int(t, "SELECT COUNT(*) FROM nano_devices WHERE id = ?", id)
			enrollment := h.Int(t, "SELECT COUNT(*) FROM nano_enrollments WHERE id = ?", id)
			require.Equal(t, device, enrollment, "whole or not at all")
			require.LessOrEqual(t, certificate, device, "nobody acts for what is gone")
		}
		certificateIsRetired(t, h.device(id).with("old-"+id))
	}
}

func deleteAnnounced(t *testing.T, h *Harness) {
	require.NoError(t, h.Store.PutEventSink(t.Context(), storage.EventSink{Name: "s", Enabled: true, Filter: storage.EventFilter{Topics: []string{storage.TopicEnrollmentDeleted}}}))
	h.device("D").enrolls(t).user("u").enrolls(t)
	require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("x")))
	var of []string
	for _, e := range storedEvents(t, h) {
		require.Equal(t, storage.TopicEnrollmentDeleted, e.Topic)
		of = append(of, e.Enrollment)
	}
	require.ElementsMatch(t, []string{"D", "D:u"}, of)
}

func setRenewal(t *testing.T, h *Harness) {
	d := h.device("D").with("c1").enrolls(t)
	d.user("u").enrolls(t)
	h.device("E").with("c2").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "token"))
	until := h.Clock.Now().Add(time.Hour)
	changed, err := h.Store.SetRenewal(t.Context(), everything, []string{"nobody", "D:u", "D", "E", "\x00"}, until)
	require.NoError(t, err)
	require.Equal(t, []string{"D", "E"}, changed)
	list, err := h.Store.Enrollments(t.Context(), everything, []string{"D", "D:u"})
	require.NoError(t, err)
	require.Equal(t, until, list[0].RenewalUntil)
	require.Zero(t, list[1].RenewalUntil)
	require.NoError(t, h.device("D").with("c3").authenticate(t))
	token, err := h.device("D").with("c3").bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "token", token)

	changed, err = h.Store.SetRenewal(t.Context(), everything, []string{"D"}, time.Time{})
	require.NoError(t, err)
	require.Equal(t, []string{"D"}, changed)
	require.NoError(t, h.device("D").with("c4").authenticate(t))
	token, err = h.device("D").with("c4").bootstrapToken(t)
	require.NoError(t, err)
	require.Empty(t, token)
}

func readTokens(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	d.user("u").enrolls(t)
	token, err := h.Store.BootstrapToken(t.Context(), everything, "D", auditRecord("b"))
	require.NoError(t, err)
	require.Nil(t, token)
	require.Zero(t, h.auditCount(t, "b"))
	require.NoError(t, d.setBootstrapToken(t, "secret"))
	_, err = d.apply(t, &storage.TokenUpdate{Src: d.source(), Message: &mdm.TokenUpdate{
		Enrollment: d.identity(), Topic: topicA, PushMagic: "magic", Token: []byte("token"), UnlockToken: []byte("unlock"), Raw: []byte("raw"),
	}})
	require.NoError(t, err)
	for i, id := range []string{"D", "D:u"} {
		token, err = h.Store.BootstrapToken(t.Context(), everything, id, auditRecord("b"))
		require.NoError(t, err)
		require.Equal(t, "secret", string(token))
		token, err = h.Store.UnlockToken(t.Context(), everything, id, auditRecord("u"))
		require.NoError(t, err)
		require.Equal(t, "unlock", string(token))
		require.Equal(t, i+1, h.auditCount(t, "b"))
		require.Equal(t, i+1, h.auditCount(t, "u"))
	}
	_, err = h.Store.UnlockToken(t.Context(), everything, "nobody", auditRecord("u"))
	require.ErrorIs(t, err, storage.ErrNotFound)
}

func steeringScope(t *testing.T, h *Harness) {
	inventory(t, h)
	h.asks(t, storage.Enqueue{}, "C1", "A", "mac", "phone")
	h.asks(t, storage.Enqueue{}, "C2", "A", "mac")
	b := storage.Scope{Topics: []string{topicB}}
	notFound := func(_ any, err error) { t.Helper(); require.ErrorIs(t, err, storage.ErrNotFound) }
	notFound(h.Store.CancelItem(t.Context(), b, "mac", "C1", auditRecord("n")))
	notFound(h.Store.ClearQueue(t.Context(), b, "mac"))
	notFound(h.Store.Requeue(t.Context(), b, "mac", "C1", auditRecord("n")))
	notFound(h.Store.SetDisabled(t.Context(), b, "mac", true, auditRecord("n")))
	notFound(h.Store.BootstrapToken(t.Context(), b, "mac", auditRecord("n")))
	notFound(h.Store.UnlockToken(t.Context(), b, "mac", auditRecord("n")))
	require.ErrorIs(t, h.Store.DeleteEnrollment(t.Context(), b, "mac", auditRecord("n")), storage.ErrNotFound)
	changed, err := h.Store.SetRenewal(t.Context(), b, []string{"mac", "phone"}, h.Clock.Now().Add(time.Hour))
	require.NoError(t, err)
	require.Equal(t, []string{"phone"}, changed)
	_, _, err = h.Store.CancelCommand(t.Context(), b, "C2")
	require.ErrorIs(t, err, storage.ErrNotFound)
	cancelled, _, err := h.Store.CancelCommand(t.Context(), b, "C1")
	require.NoError(t, err)
	require.EqualValues(t, 1, cancelled)
	require.Equal(t, "C1", h.device("mac").with("c-mac").polls(t))
	require.Zero(t, h.auditCount(t, "n"))
}
