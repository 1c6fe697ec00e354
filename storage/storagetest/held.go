package storagetest

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func heldTests() []subtest {
	return []subtest{
		{"a row that is held stops its device alone", heldStopsOne},
		{"a row that stays held is too busy", heldStays},
		{"a message that its client gave up changes nothing", heldGivenUp},
		{"a message that is given up while it waits changes nothing", heldGivenUpLater},
	}
}

// hold locks rows, as a transaction of a stopped replica does. The function
// that it returns ends the transaction.
func (h *Harness) hold(t *testing.T, table, where string, args ...any) (release func()) {
	t.Helper()
	if h.Engine.driver == "sqlite" {
		t.Skip("one writer at a time, and its locks end with the process")
	}
	query := h.bind(t, "SELECT 1 FROM "+table+" WHERE "+where+" FOR UPDATE")
	db := connect(t, h.cfg)
	tx, err := db.BeginTx(context.Background(), nil)
	require.NoError(t, err)
	rows, err := tx.QueryContext(context.Background(), query, args...)
	require.NoError(t, err)
	n := 0
	for rows.Next() {
		n++
	}
	require.NoError(t, rows.Err())
	require.NoError(t, rows.Close())
	require.Positive(t, n, "nothing to hold in %s", table)
	released := false
	release = func() {
		if !released {
			released = true
			require.NoError(t, tx.Rollback())
			require.NoError(t, db.Close())
		}
	}
	t.Cleanup(release)
	return release
}

// heldStopsOne locks each row that a message of D changes. The messages of
// others go on, and so does D's once the row is free.
func heldStopsOne(t *testing.T, h *Harness) {
	acknowledge := func(d *channel) error {
		_, err := d.report(t, mdm.StatusAcknowledged, "C")
		return err
	}
	refuse := func(d *channel) error { // behind it waits a command that was refused: a push is owed
		_, err := d.report(t, mdm.StatusError, "C")
		return err
	}
	answer := func(d *channel) error {
		return d.answer(t, mdm.StatusAcknowledged, "C", mdm.Inventory{Information: &mdm.DeviceInformation{OSVersion: "new"}})
	}
	update := func(d *channel) error {
		_, err := d.tokenUpdate(t)
		return err
	}
	leave := func(d *channel) error { return d.checkOut(t) }
	begin := func(d *channel) error { return d.authenticate(t) }
	for _, tc := range []struct {
		name, table, key string
		message          func(*channel) error
	}{
		{"report, queue row", "nano_enrollment_queue", "id", acknowledge},
		{"report, push row", "nano_enrollment_push", "id", refuse},
		{"answer, inventory", "nano_device_inventory", "id", answer},
		{"first answer, push row", "nano_enrollment_push", "id", answer},
		{"answer, device", "nano_devices", "id", answer},
		{"TokenUpdate, device", "nano_devices", "id", update},
		{"TokenUpdate, enrollment", "nano_enrollments", "id", update},
		{"TokenUpdate, push row", "nano_enrollment_push", "id", update},
		{"CheckOut, enrollment", "nano_enrollments", "id", leave},
		{"CheckOut, push row", "nano_enrollment_push", "id", leave},
		{"Authenticate, device", "nano_devices", "id", begin},
		{"Authenticate, push row", "nano_enrollment_push", "id", begin},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := NewHarness(t, h.Engine)
			h.Enroll(t, "D", "E")
			h.enqueue(t, []string{"D"}, "B", "C")
			require.Equal(t, "C", h.device("D").reports(t, mdm.StatusNotNow, "B"))
			if tc.table == "nano_device_inventory" {
				h.Exec(t, "INSERT INTO nano_device_inventory (id) VALUES ('D')")
			}
			release := h.hold(t, tc.table, tc.key+" = ?", "D")
			held := make(chan error, 1)
			go func() { held <- tc.message(h.device("D")) }()
			// A batch that waits for the row does so for at least 4 seconds.
			ctx, cancel := context.WithTimeout(t.Context(), 3500*time.Millisecond)
			defer cancel()
			for range 4 {
				_, err := h.Store.Apply(ctx, &storage.TokenUpdate{Src: h.device("E").source(), Message: &mdm.TokenUpdate{
					Enrollment: h.device("E").identity(), Topic: topicA, PushMagic: "magic", Token: []byte("token"),
				}})
				require.NoError(t, err, "another device waits for the row")
			}
			release()
			if err := <-held; err != nil { // a slow machine
				require.ErrorIs(t, err, storage.ErrBusy)
				require.NoError(t, tc.message(h.device("D")))
			}
		})
	}
}

// heldStays: no message waits for ever, and the device has to come again.
func heldStays(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	h.enqueue(t, []string{"D"}, "C")
	h.hold(t, "nano_enrollment_queue", "id = ?", "D")
	_, err := h.device("D").report(t, mdm.StatusAcknowledged, "C")
	require.ErrorIs(t, err, storage.ErrBusy)
	require.EqualValues(t, 0, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
}

// ordered returns the messages whose order matters, with a function that says
// whether the client has given the message up.
func (c *channel) ordered(givenUp func() bool) map[string]storage.Op {
	src := c.source()
	src.GivenUp = givenUp
	return map[string]storage.Op{
		"Authenticate":             &storage.Authenticate{Src: src, Message: &mdm.Authenticate{Enrollment: c.identity(), Topic: topicA}},
		"TokenUpdate":              &storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{Enrollment: c.identity(), Topic: topicA, PushMagic: "old", Token: []byte("old")}},
		"CheckOut":                 &storage.CheckOut{Src: src},
		"an empty bootstrap token": &storage.SetBootstrapToken{Src: src},
		"a bootstrap token":        &storage.SetBootstrapToken{Src: src, Token: []byte("old")},
	}
}

// heldGivenUp: a stopped replica continues with a message of a device that has
// since enrolled at another replica.
func heldGivenUp(t *testing.T, h *Harness) {
	d := h.device("D").with("c1").under(func(p *storage.Pin) { p.Reenroll = storage.ReenrollAllow }).enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "token"))
	h.enqueue(t, []string{"D"}, "C")
	_, err := d.tokenUpdate(t)
	require.NoError(t, err)
	late := h.device("D").with("c2").under(func(p *storage.Pin) { p.Reenroll = storage.ReenrollAllow })
	for _, from := range []*channel{d, late} {
		for name, op := range from.ordered(func() bool { return true }) {
			_, err := h.Store.Apply(t.Context(), op)
			if from == late && name != "Authenticate" {
				require.ErrorIs(t, err, storage.ErrIdentity, name)
				continue
			}
			require.ErrorIs(t, err, storage.ErrGivenUp, name)
		}
	}
	require.Equal(t, "C", d.polls(t), "the certificate, the enrollment and its queue are as they were")
	token, err := d.bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "token", token)
	tally, err := d.tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, 3, tally)
	out, err := h.Store.Apply(t.Context(), d.ordered(func() bool { return false })["TokenUpdate"])
	require.NoError(t, err)
	require.Equal(t, 4, out.Tally)
}

// heldGivenUpLater: the client may give the message up until the device is
// locked.
func heldGivenUpLater(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	for name, op := range h.device("D").ordered(nil) {
		release := h.hold(t, "nano_devices", "id = ?", "D")
		var givenUp atomic.Bool
		op.Source().GivenUp = givenUp.Load
		done := make(chan error, 1)
		go func() {
			_, err := h.Store.Apply(t.Context(), op)
			done <- err
		}()
		h.Enroll(t, "E "+name) // by now the message has met the lock, or does so later
		givenUp.Store(true)
		release()
		require.ErrorIs(t, <-done, storage.ErrGivenUp, name)
	}
	tally, err := h.device("D").tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, 2, tally)
}
