package storagetest

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func enrollTests() []subtest {
	return []subtest{
		{"a device enrolls", enrollDevice},
		{"a TokenUpdate changes what it brings", enrollTokenUpdate},
		{"without Authenticate there is nothing to update", enrollUnknown},
		{"user channels enroll with their device", enrollUsers},
		{"Authenticate begins anew", enrollAnew},
		{"what an operator disabled stays so", enrollOperatorDisabled},
		{"a renewal window keeps queue, tokens and user channels", enrollRenewal},
		{"CheckOut ends an enrollment", enrollCheckOut},
		{"a bootstrap token is kept, replaced and deleted", enrollBootstrapToken},
		{"UserAuthenticate is kept", enrollUserAuthenticate},
		{"any text of a device is taken", enrollOddTexts},
		{"what a device is owed is pushed once it has a new token", enrollRevives},
		{"a certificate acts for one device and all its channels", identityOneDevice},
		{"user channels of a device are bounded", enrollBoundedUsers},
		{"users that never enrolled are removed by age", enrollRemovedUsers},
		{"a device with many channels ends and is deleted in bounded steps", enrollManyUsers},
		{"an active enrollment is neither checked out nor disabled", identityActive},
		{"a retired certificate is dead", identityRetired},
		{"an unpinned certificate may only begin", identityUnpinned},
		{"a first certificate may be pinned later", identityRetro},
		{"without a certificate identity is not asked for", identityNone},
		{"one of two certificates that begin at once lives", identityRace},
		{"an operation that fails leaves the others of its batch alone", identityFailsAlone},
	}
}

// topicA is the APNs topic of enrolled devices.
const topicA = "com.apple.mgmt.External.a"

// channel is one enrollment of a simulated device.
type channel struct {
	h      *Harness
	store  storage.Devices
	enroll mdm.EnrollID
	pin    *storage.Pin
	events []storage.Event
}

// device is a device's own channel. It has no certificate.
func (h *Harness) device(id string) *channel {
	return &channel{h: h, store: h.Store, enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}
}

// user is a user's channel on the device, with the same certificate.
func (c *channel) user(name string) *channel {
	u := *c
	u.enroll = mdm.EnrollID{Type: mdm.User, ID: c.enroll.ID + ":" + name, ParentID: c.enroll.ID}
	return &u
}

// with is the channel with a certificate.
func (c *channel) with(certificate string) *channel {
	w := *c
	w.pin = &storage.Pin{Hash: certificate, Certificate: []byte("DER of " + certificate), NotAfter: c.h.Clock.Now().Add(365 * 24 * time.Hour)}
	return &w
}

// retro is the channel with a certificate that may be pinned later.
func (c *channel) retro(certificate string) *channel {
	w := c.with(certificate)
	w.pin.Retro = true
	return w
}

// on is the channel at another store.
func (c *channel) on(s storage.Devices) *channel {
	w := *c
	w.store = s
	return &w
}

// withEvents is the channel with events for its next operation.
func (c *channel) withEvents(events ...storage.Event) *channel {
	w := *c
	w.events = events
	return &w
}

func (c *channel) source() storage.Source {
	return storage.Source{Enroll: c.enroll, Pin: c.pin, Events: c.events}
}

func (c *channel) identity() mdm.Enrollment {
	if c.enroll.ParentID != "" {
		return mdm.Enrollment{UDID: c.enroll.ParentID, UserID: c.enroll.ID[len(c.enroll.ParentID)+1:], UserShortName: "short", UserLongName: "long"}
	}
	return mdm.Enrollment{UDID: c.enroll.ID}
}

func (c *channel) apply(t *testing.T, op storage.Op) (*storage.Outcome, error) {
	t.Helper()
	return c.store.Apply(t.Context(), op)
}

func (c *channel) authenticate(t *testing.T) error {
	t.Helper()
	_, err := c.apply(t, &storage.Authenticate{Src: c.source(), Message: &mdm.Authenticate{
		Enrollment: c.identity(), Topic: topicA, SerialNumber: "S-" + c.enroll.ID, Raw: []byte("authenticate"),
	}})
	return err
}

func (c *channel) tokenUpdate(t *testing.T) (tally int, err error) {
	t.Helper()
	out, err := c.apply(t, &storage.TokenUpdate{Src: c.source(), Message: &mdm.TokenUpdate{
		Enrollment: c.identity(), Topic: topicA, PushMagic: "magic", Token: []byte("token"), Raw: []byte("token update"),
	}})
	if err != nil {
		return 0, err
	}
	return out.Tally, nil
}

func (c *channel) checkOut(t *testing.T) error {
	t.Helper()
	_, err := c.apply(t, &storage.CheckOut{Src: c.source()})
	return err
}

func (c *channel) setBootstrapToken(t *testing.T, token string) error {
	t.Helper()
	_, err := c.apply(t, &storage.SetBootstrapToken{Src: c.source(), Token: []byte(token)})
	return err
}

func (c *channel) bootstrapToken(t *testing.T) (string, error) {
	t.Helper()
	out, err := c.apply(t, &storage.GetBootstrapToken{Src: c.source()})
	if err != nil {
		return "", err
	}
	return string(out.BootstrapToken), nil
}

func (c *channel) userAuthenticate(t *testing.T) error {
	t.Helper()
	_, err := c.apply(t, &storage.UserAuthenticate{Src: c.source(), Message: &mdm.UserAuthenticate{
		Enrollment: c.identity(), Raw: []byte("user authenticate"),
	}})
	return err
}

func (c *channel) seen(t *testing.T) error {
	t.Helper()
	_, err := c.apply(t, &storage.Seen{Src: c.source()})
	return err
}

// report reports and returns the UUID of the next command, "" if none.
func (c *channel) report(t *testing.T, status mdm.Status, uuid string) (string, error) {
	t.Helper()
	out, err := c.apply(t, &storage.Report{Src: c.source(), Status: status, CommandUUID: uuid, Raw: []byte(string(status) + " " + uuid)})
	if err != nil || out.Command == nil {
		return "", err
	}
	return out.Command.CommandUUID, nil
}

// reports is report where it must not fail.
func (c *channel) reports(t *testing.T, status mdm.Status, uuid string) string {
	t.Helper()
	next, err := c.report(t, status, uuid)
	require.NoError(t, err)
	return next
}

// polls reports Idle.
func (c *channel) polls(t *testing.T) string {
	t.Helper()
	return c.reports(t, mdm.StatusIdle, "")
}

// enrolls enrolls the channel and returns it.
func (c *channel) enrolls(t *testing.T) *channel {
	t.Helper()
	if !c.enroll.IsUserChannel() {
		require.NoError(t, c.authenticate(t))
	}
	_, err := c.tokenUpdate(t)
	require.NoError(t, err)
	return c
}

// Enroll enrolls devices, without certificates, with a push token each.
func (h *Harness) Enroll(t *testing.T, ids ...string) {
	t.Helper()
	for _, id := range ids {
		h.device(id).enrolls(t)
	}
}

// command makes a command.
func command(uuid string) *mdm.Command {
	return &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte("<plist>" + uuid + "</plist>")}
}

// event makes an event of a topic.
func event(id, topic string) storage.Event {
	return storage.Event{ID: id, Topic: topic, CreatedAt: time.Unix(1_700_000_000, 0), UDID: "udid", Raw: []byte("raw " + id)}
}

// enqueue queues commands one after the other for all of ids.
func (h *Harness) enqueue(t *testing.T, ids []string, uuids ...string) {
	t.Helper()
	for _, uuid := range uuids {
		failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command(uuid), IDs: ids})
		require.NoError(t, err)
		require.Empty(t, failed)
	}
}

func enrollDevice(t *testing.T, h *Harness) {
	d := h.device("D")
	require.NoError(t, d.authenticate(t))
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("C"), IDs: []string{"D"}})
	require.NoError(t, err)
	require.ErrorIs(t, failed["D"], storage.ErrNotEnrolled, "before the first TokenUpdate")
	for want := 1; want <= 3; want++ {
		tally, err := d.tokenUpdate(t)
		require.NoError(t, err)
		require.Equal(t, want, tally)
	}
	require.Empty(t, d.polls(t))
	h.enqueue(t, []string{"D"}, "C")
	require.Equal(t, "C", d.polls(t))

	now := h.Clock.Now().UnixMicro()
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, []string{"S-D"}, h.Strings(t, "SELECT serial_number FROM nano_devices WHERE id = 'D' AND authenticate_at = ? AND token_update_at = ?", now, now))
	require.Equal(t, []string{topicA}, h.Strings(t, `SELECT topic FROM nano_enrollments
WHERE id = 'D' AND device_id = 'D' AND type = 'Device' AND enabled = 1 AND push_magic = 'magic' AND enrolled_at = ? AND token_update_tally = 3`, now))
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_activity WHERE id = 'D' AND last_seen_at = ?", now))
}

func enrollTokenUpdate(t *testing.T, h *Harness) {
	d := h.device("D")
	require.NoError(t, d.authenticate(t))
	began := h.Clock.Now().UnixMicro()
	update := func(m mdm.TokenUpdate) {
		_, err := d.apply(t, &storage.TokenUpdate{Src: d.source(), Message: &m})
		require.NoError(t, err)
		h.Clock.Advance(time.Minute)
	}
	unlock := func() string { return h.Strings(t, "SELECT unlock_token FROM nano_devices WHERE id = 'D'")[0] }
	update(mdm.TokenUpdate{Topic: topicA, PushMagic: "1", Token: []byte("t1"), UnlockToken: []byte("u1"), AwaitingConfiguration: true, Raw: []byte("r1")})
	require.Equal(t, "u1", unlock())
	require.EqualValues(t, 1, h.Int(t, "SELECT awaiting_configuration FROM nano_enrollments WHERE id = 'D'"))
	update(mdm.TokenUpdate{Topic: topicA, PushMagic: "2", Token: []byte("t2"), Raw: []byte("r2")})
	require.Equal(t, "u1", unlock(), "one without an unlock token leaves it")
	update(mdm.TokenUpdate{Topic: topicA, PushMagic: "3", Token: []byte("t3"), UnlockToken: []byte("u3"), Raw: []byte("r3")})
	require.Equal(t, "u3", unlock())
	require.Equal(t, []string{"t3"}, h.Strings(t, `SELECT token FROM nano_enrollments
WHERE id = 'D' AND topic = ? AND push_magic = '3' AND awaiting_configuration = 0 AND enrolled_at = ? AND created_at = ?`, topicA, began, began))
	require.Equal(t, []string{"r3"}, h.Strings(t, "SELECT token_update FROM nano_devices WHERE id = 'D'"))
	require.Equal(t, []string{"authenticate"}, h.Strings(t, "SELECT authenticate FROM nano_devices WHERE id = 'D' AND authenticate_at = ?", began))
}

func enrollUnknown(t *testing.T, h *Harness) {
	for _, d := range []*channel{h.device("D"), h.device("D").with("c"), h.device("D").user("U"), h.device("D").user("U").with("c")} {
		_, err := d.tokenUpdate(t)
		require.ErrorIs(t, err, storage.ErrNotEnrolled)
		require.ErrorIs(t, d.setBootstrapToken(t, "b"), storage.ErrNotEnrolled)
		require.ErrorIs(t, d.userAuthenticate(t), storage.ErrNotEnrolled)
	}
	require.NoError(t, h.device("D").checkOut(t))
	require.NoError(t, h.device("D").with("c").checkOut(t))
	require.Empty(t, h.device("D").polls(t))
	require.Empty(t, h.device("D").reports(t, mdm.StatusAcknowledged, "C"))
	for _, table := range []string{"nano_devices", "nano_users", "nano_enrollments", "nano_enrollment_push", "nano_cert_auth_associations", "nano_command_results"} {
		require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM "+table), table)
	}
}

func enrollUsers(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	u, v := d.user("U"), d.user("V")
	for want := 1; want <= 2; want++ {
		tally, err := u.tokenUpdate(t)
		require.NoError(t, err)
		require.Equal(t, want, tally)
	}
	v.enrolls(t)
	h.enqueue(t, []string{"D", "D:U"}, "C")
	h.enqueue(t, []string{"D:V"}, "V")
	require.Equal(t, "C", d.polls(t))
	require.Equal(t, "C", u.polls(t))
	require.Equal(t, "V", v.polls(t))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "C"))
	require.Equal(t, "C", u.polls(t), "a command of one channel is not the other's")
	require.Equal(t, []string{"D"}, h.Strings(t, "SELECT device_id FROM nano_users WHERE id = 'D:U' AND user_id = 'U' AND user_short_name = 'short' AND user_long_name = 'long'"))
	require.Equal(t, []string{"User"}, h.Strings(t, "SELECT type FROM nano_enrollments WHERE id = 'D:U' AND device_id = 'D'"))
}

// queueStates reads an enrollment's rows in the order of their numbers.
func queueStates(t *testing.T, h *Harness, id string) string {
	t.Helper()
	var words []string
	all := states(t, h, id)
	for _, uuid := range h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE id = ? ORDER BY seq, command_uuid", id) {
		words = append(words, uuid+" "+all[uuid].String())
	}
	return strings.Join(words, ", ")
}

func enrollAnew(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	u := d.user("U").enrolls(t)
	other := h.device("E").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "b"))
	h.enqueue(t, []string{"D", "D:U", "E"}, "1", "2", "3", "4")
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("later"), IDs: []string{"D"}, NotBefore: h.Clock.Now().Add(time.Hour)})
	require.NoError(t, err)
	d.reports(t, mdm.StatusAcknowledged, "1")
	d.reports(t, mdm.StatusNotNow, "2")
	require.NoError(t, h.Store.Flush(t.Context()))

	now := h.Clock.Advance(time.Minute)
	require.NoError(t, d.authenticate(t))
	require.Equal(t, "1 acknowledged, 2 cancelled, 3 cancelled, 4 cancelled, later cancelled", queueStates(t, h, "D"))
	require.Equal(t, "1 cancelled, 2 cancelled, 3 cancelled, 4 cancelled", queueStates(t, h, "D:U"))
	require.EqualValues(t, 4, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE id = 'D' AND finished_at = ?", now.UnixMicro()))
	require.Empty(t, d.polls(t))
	require.Empty(t, u.polls(t))
	require.Equal(t, "1", other.polls(t), "others are left alone")
	token, err := d.bootstrapToken(t)
	require.NoError(t, err)
	require.Empty(t, token)
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE id <> 'E' AND (paid_seq < owed_seq OR push_at IS NOT NULL)"))
	for _, id := range []string{"D", "D:U"} {
		failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("X"), IDs: []string{id}})
		require.NoError(t, err)
		require.ErrorIs(t, failed[id], storage.ErrNotEnrolled)
	}
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_commands WHERE command_uuid = 'X'"), "a command for nobody is not kept")

	tally, err := d.tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, 1, tally)
	require.Equal(t, now.UnixMicro(), h.Int(t, "SELECT enrolled_at FROM nano_enrollments WHERE id = 'D'"))
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("X"), IDs: []string{"D", "D:U"}})
	require.NoError(t, err)
	require.Len(t, failed, 1)
	require.ErrorIs(t, failed["D:U"], storage.ErrNotEnrolled, "the user has yet to come")
	tally, err = u.tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, 1, tally)
	require.Equal(t, "X", d.polls(t))
}

func enrollOperatorDisabled(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "1")
	h.Exec(t, "UPDATE nano_enrollments SET operator_disabled = 1 WHERE id = 'D'")
	require.Empty(t, d.polls(t))
	_, err := d.tokenUpdate(t)
	require.NoError(t, err)
	require.Empty(t, d.polls(t))
	h.enqueue(t, []string{"D"}, "2")
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "1"), "its reports are taken")
	require.Equal(t, "1 acknowledged, 2 queued", queueStates(t, h, "D"))
	h.Exec(t, "UPDATE nano_enrollments SET operator_disabled = 0 WHERE id = 'D'")
	require.Equal(t, "2", d.polls(t))
}

func enrollRenewal(t *testing.T, h *Harness) {
	d := h.device("D").with("old").enrolls(t)
	u := d.user("U").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "b"))
	h.enqueue(t, []string{"D", "D:U"}, "C")
	h.Exec(t, "UPDATE nano_enrollments SET renewal_until = ? WHERE id = 'D'", h.Clock.Now().Add(time.Hour).UnixMicro())

	renewed := d.with("new")
	require.NoError(t, renewed.authenticate(t))
	require.Equal(t, "C queued", queueStates(t, h, "D"))
	_, err := u.report(t, mdm.StatusIdle, "")
	require.ErrorIs(t, err, storage.ErrIdentity, "the old certificate is dead all the same")
	require.Equal(t, "C", u.with("new").polls(t))
	tally, err := renewed.tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, 1, tally)
	require.Equal(t, "C", renewed.polls(t))
	token, err := renewed.bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "b", token)

	h.Clock.Advance(time.Hour)
	require.NoError(t, d.with("newer").authenticate(t))
	require.Equal(t, "C cancelled", queueStates(t, h, "D"), "the window is closed")
	require.Equal(t, "C cancelled", queueStates(t, h, "D:U"))
}

func enrollCheckOut(t *testing.T, h *Harness) {
	d := h.device("D").with("c").enrolls(t)
	u := d.user("U").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "b"))
	h.enqueue(t, []string{"D", "D:U"}, "1", "2")
	// Which a renewal window does not change.
	h.Exec(t, "UPDATE nano_enrollments SET renewal_until = ?", h.Clock.Now().Add(time.Hour).UnixMicro())
	require.NoError(t, d.checkOut(t))
	require.NoError(t, d.checkOut(t), "twice")
	require.Empty(t, d.polls(t))
	require.Empty(t, u.polls(t))
	require.Equal(t, "1 cancelled, 2 cancelled", queueStates(t, h, "D"))
	require.Equal(t, "1 cancelled, 2 cancelled", queueStates(t, h, "D:U"))
	token, err := d.bootstrapToken(t)
	require.NoError(t, err)
	require.Empty(t, token)
	failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("3"), IDs: []string{"D", "D:U"}})
	require.NoError(t, err)
	require.Len(t, failed, 2)
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "1"), "what it did before is still heard")
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_command_results WHERE id = 'D' AND command_uuid = '1' AND late = 1"))

	d.enrolls(t)
	h.enqueue(t, []string{"D"}, "3")
	require.Equal(t, "3", d.polls(t))
}

func enrollBootstrapToken(t *testing.T, h *Harness) {
	d := h.device("D").with("c").enrolls(t)
	get := func(want string) {
		t.Helper()
		got, err := d.bootstrapToken(t)
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
	get("")
	require.NoError(t, d.setBootstrapToken(t, "one"))
	get("one")
	require.NoError(t, d.setBootstrapToken(t, "two"))
	get("two")
	_, err := d.tokenUpdate(t)
	require.NoError(t, err)
	get("two")
	require.NoError(t, d.setBootstrapToken(t, ""))
	get("")
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_devices WHERE bootstrap_token_at IS NOT NULL"))
	// One that is read together with a change.
	require.NoError(t, d.setBootstrapToken(t, "three"))
	out, err := d.apply(t, &storage.GetBootstrapToken{Src: d.withEvents(event("E", "mdm.GetBootstrapToken")).source()})
	require.NoError(t, err)
	require.Equal(t, "three", string(out.BootstrapToken))
}

func enrollUserAuthenticate(t *testing.T, h *Harness) {
	d := h.device("D").with("c")
	require.NoError(t, d.authenticate(t))
	u := d.user("U")
	require.NoError(t, u.userAuthenticate(t))
	require.NoError(t, u.userAuthenticate(t))
	require.Equal(t, []string{"user authenticate"}, h.Strings(t, "SELECT user_authenticate FROM nano_users WHERE id = 'D:U' AND device_id = 'D' AND token_update IS NULL"))
	_, err := u.tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, []string{"user authenticate"}, h.Strings(t, "SELECT user_authenticate FROM nano_users WHERE id = 'D:U' AND token_update IS NOT NULL"))
	require.ErrorIs(t, u.with("other").userAuthenticate(t), storage.ErrIdentity)
}

// Topic, magic and serial number are whole by then: mdm.Decode refuses others.
func enrollOddTexts(t *testing.T, h *Harness) {
	long := strings.Repeat("ä", 300)
	for i, text := range []string{"", long, "\x00", "\xff\xfe", "𝄞'\"\\?$1", "a\x00b", strings.Repeat("x", 100_000)} {
		d := h.device(fmt.Sprint("D", i))
		src := d.source()
		_, err := d.apply(t, &storage.Authenticate{Src: src, Message: &mdm.Authenticate{
			Topic: topicA, Model: text, ModelName: text, DeviceName: text, OSVersion: text, BuildVersion: text,
			ProductName: text, SerialNumber: "S", IMEI: text, MEID: text, Raw: []byte(text),
		}})
		require.NoError(t, err)
		_, err = d.apply(t, &storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{
			Topic: topicA, PushMagic: "magic", Token: []byte(text), UnlockToken: []byte(text), Raw: []byte(text)}})
		require.NoError(t, err)
		u := d.user("U")
		_, err = u.apply(t, &storage.TokenUpdate{Src: u.source(), Message: &mdm.TokenUpdate{
			Enrollment: mdm.Enrollment{UserID: text, UserShortName: text, UserLongName: text}, Topic: topicA}})
		require.NoError(t, err)
		for _, uuid := range []string{text, "unknown"} {
			_, err = d.report(t, mdm.StatusAcknowledged, uuid)
			require.NoError(t, err)
			_, err = d.report(t, mdm.StatusNotNow, uuid)
			require.NoError(t, err)
		}
		_, err = d.report(t, mdm.Status(text), text)
		require.NoError(t, err)
		failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("C"), IDs: []string{text, d.enroll.ID}})
		require.NoError(t, err)
		require.Len(t, failed, 1)
		require.ErrorIs(t, failed[text], storage.ErrNotEnrolled)
	}
	require.Equal(t, []string{strings.Repeat("ä", 255)}, h.Strings(t, "SELECT device_name FROM nano_devices WHERE id = 'D1'"))
	require.Equal(t, []string{"ab"}, h.Strings(t, "SELECT device_name FROM nano_devices WHERE id = 'D5'"))
	require.EqualValues(t, 100_000, h.Int(t, "SELECT LENGTH(authenticate) FROM nano_devices WHERE id = 'D6'"))
}

func enrollRevives(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "C")
	h.Exec(t, "UPDATE nano_enrollment_push SET push_at = NULL, token_dead_at = 1, attempts = 5 WHERE id = 'D'")
	_, err := d.tokenUpdate(t)
	require.NoError(t, err)
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_push WHERE token_dead_at IS NULL AND attempts = 0 AND push_at = ?", h.Clock.Now().UnixMicro()))
	require.Equal(t, "C", d.polls(t))
	require.NoError(t, h.Store.Flush(t.Context()))
	silent := h.Clock.Now().Add(3 * time.Minute).UnixMicro()
	_, err = d.tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, silent, h.Int(t, "SELECT push_at FROM nano_enrollment_push"), "nothing is owed, the plan stays")
}

func identityOneDevice(t *testing.T, h *Harness) {
	d := h.device("D").with("d").enrolls(t)
	e := h.device("E").with("e").enrolls(t)
	u := d.user("U").enrolls(t)
	h.enqueue(t, []string{"D", "D:U"}, "C")
	require.Equal(t, "C", d.polls(t))
	require.Equal(t, "C", u.polls(t))
	id, err := h.Store.EnrollmentByCertificate(t.Context(), "d")
	require.NoError(t, err)
	require.Equal(t, "D", id)
	_, err = h.Store.EnrollmentByCertificate(t.Context(), "x")
	require.ErrorIs(t, err, storage.ErrNotFound)

	// E's certificate is no use for anything of D's, nor for a third.
	for _, c := range []*channel{d.with("e"), u.with("e"), d.retro("e"), h.device("F").with("e"), h.device("F").retro("e"), e.user("U").with("d")} {
		refused(t, c, storage.ErrIdentity)
		if !c.enroll.IsUserChannel() {
			require.ErrorIs(t, c.authenticate(t), storage.ErrIdentity)
			require.ErrorIs(t, c.checkOut(t), storage.ErrIdentity)
		}
	}
	require.Equal(t, "C queued", queueStates(t, h, "D"))
	require.Equal(t, "C", d.polls(t))
	require.Equal(t, []string{"D", "E"}, h.Strings(t, "SELECT id FROM nano_devices ORDER BY id"))
	require.EqualValues(t, 2, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations"))
}

func enrollBoundedUsers(t *testing.T, h *Harness) {
	s := h.Open(t, func(c *sqlstore.Config) { c.MaxUserChannels = 3 })
	d, other := h.device("D").on(s).enrolls(t), h.device("E").on(s).enrolls(t)
	first := d.user("U1").enrolls(t)
	d.user("U2").enrolls(t)
	third := d.user("U3")
	require.NoError(t, third.userAuthenticate(t))
	for range 2 {
		_, err := d.user("U4").tokenUpdate(t)
		require.ErrorIs(t, err, storage.ErrTooManyChannels)
		require.ErrorIs(t, d.user("U5").userAuthenticate(t), storage.ErrTooManyChannels)
	}
	require.EqualValues(t, 3, h.Int(t, "SELECT COUNT(*) FROM nano_users"))
	require.EqualValues(t, 4, h.Int(t, "SELECT COUNT(*) FROM nano_enrollments"))
	require.NoError(t, third.userAuthenticate(t))
	third.enrolls(t)
	first.enrolls(t)
	d.enrolls(t)
	d.user("U2").enrolls(t)
	other.user("U1").enrolls(t)
}

func enrollRemovedUsers(t *testing.T, h *Harness) {
	s := h.Open(t, func(c *sqlstore.Config) { c.MaxUserChannels = 4 })
	d := h.device("D").on(s).enrolls(t)
	require.NoError(t, d.user("enrolled").userAuthenticate(t))
	d.user("enrolled").enrolls(t)
	for _, name := range []string{"gone", "gone too", "comes back"} {
		require.NoError(t, d.user(name).userAuthenticate(t))
	}
	require.ErrorIs(t, d.user("next").userAuthenticate(t), storage.ErrTooManyChannels)
	h.Clock.Advance(time.Hour)
	require.NoError(t, d.user("comes back").userAuthenticate(t))
	l := take(t, h.Store, "history", "a")
	for _, want := range []int{1, 1, 0} {
		n, err := h.Store.RemoveUsers(t.Context(), l, h.Clock.Now(), 1)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	require.Equal(t, []string{"D:comes back", "D:enrolled"}, h.Strings(t, "SELECT id FROM nano_users ORDER BY id"))
	require.NoError(t, d.user("next").userAuthenticate(t))
	l.Fence++
	_, err := h.Store.RemoveUsers(t.Context(), l, h.Clock.Now(), 1)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
}

func enrollManyUsers(t *testing.T, h *Harness) {
	const users = 1200
	plant := func() {
		var enrollments, names, push []string
		for i := range users {
			id := fmt.Sprintf("'D:%04d'", i)
			enrollments = append(enrollments, "("+id+", 'D', 'User', 1, 5, 1, 1)")
			names = append(names, "("+id+", 'D', 1, 1)")
			push = append(push, "("+id+")")
		}
		h.Exec(t, "INSERT INTO nano_enrollments (id, device_id, type, enabled, token_update_tally, created_at, updated_at) VALUES "+strings.Join(enrollments, ", "))
		h.Exec(t, "INSERT INTO nano_users (id, device_id, created_at, updated_at) VALUES "+strings.Join(names, ", "))
		h.Exec(t, "INSERT INTO nano_enrollment_push (id) VALUES "+strings.Join(push, ", "))
	}
	statements := func(do func()) int64 {
		before := h.Store.Stats().Statements
		do()
		return h.Store.Stats().Statements - before
	}
	d := h.device("D").enrolls(t)
	alone := statements(func() { d.enrolls(t) })
	plant()
	h.enqueue(t, []string{"D:0000", "D:1199"}, "C")
	require.NoError(t, d.seen(t))
	_, err := d.tokenUpdate(t)
	require.NoError(t, err)
	crowded := statements(func() { d.enrolls(t) })
	require.Less(t, crowded, alone+20*users/500, "in statements of many rows each")
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_enrollments WHERE enabled = 1"))
	require.Empty(t, h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue WHERE state < 10"))
	h.Exec(t, "UPDATE nano_enrollments SET enabled = 1")
	require.NoError(t, d.checkOut(t))
	require.EqualValues(t, 0, h.Int(t, "SELECT COUNT(*) FROM nano_enrollments WHERE enabled = 1"))
	deleted := statements(func() { require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("d"))) })
	require.Less(t, deleted, int64(3*users), "each channel is looked at once for commands and once for results")
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_enrollments")+h.Int(t, "SELECT COUNT(*) FROM nano_users"))
}

func identityActive(t *testing.T, h *Harness) {
	active := func(want error) {
		t.Helper()
		id, err := h.Store.ActiveEnrollmentByCertificate(t.Context(), "c")
		require.ErrorIs(t, err, want)
		if !errors.Is(want, storage.ErrNotFound) {
			require.Equal(t, "D", id)
		}
	}
	active(storage.ErrNotFound)
	d := h.device("D").with("c")
	require.NoError(t, d.authenticate(t))
	active(storage.ErrNotEnrolled)
	_, err := d.tokenUpdate(t)
	require.NoError(t, err)
	active(nil)
	for _, disabled := range []bool{true, false} {
		_, err := h.Store.SetDisabled(t.Context(), everything, "D", disabled, auditRecord("d"))
		require.NoError(t, err)
		active(map[bool]error{true: storage.ErrNotEnrolled}[disabled])
	}
	require.NoError(t, d.checkOut(t))
	active(storage.ErrNotEnrolled)
	h.device("D").with("next").enrolls(t)
	active(storage.ErrNotFound)
}

// refused checks that every message is refused but those that begin or end an
// enrollment.
func refused(t *testing.T, c *channel, want error) {
	t.Helper()
	_, err := c.tokenUpdate(t)
	require.ErrorIs(t, err, want)
	require.ErrorIs(t, c.setBootstrapToken(t, "stolen"), want)
	_, err = c.bootstrapToken(t)
	require.ErrorIs(t, err, want)
	require.ErrorIs(t, c.userAuthenticate(t), want)
	require.ErrorIs(t, c.seen(t), want)
	for _, status := range []mdm.Status{mdm.StatusIdle, mdm.StatusAcknowledged, mdm.StatusError, mdm.StatusCommandFormatError, mdm.StatusNotNow, "Whatever"} {
		_, err = c.report(t, status, "C")
		require.ErrorIs(t, err, want)
	}
}

func identityRetired(t *testing.T, h *Harness) {
	old := h.device("D").with("old").enrolls(t)
	require.NoError(t, old.authenticate(t), "the same certificate may begin anew")
	old.enrolls(t)
	require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE retired_at IS NULL"))
	next := h.device("D").with("next").enrolls(t)
	require.NoError(t, next.seen(t))
	for _, c := range []*channel{old, h.device("D").retro("old"), old.user("U"), h.device("E").with("old"), h.device("E").retro("old")} {
		refused(t, c, storage.ErrIdentity)
		if !c.enroll.IsUserChannel() {
			require.ErrorIs(t, c.authenticate(t), storage.ErrIdentity)
			require.ErrorIs(t, c.checkOut(t), storage.ErrIdentity)
		}
	}
	_, err := h.Store.EnrollmentByCertificate(t.Context(), "old")
	require.ErrorIs(t, err, storage.ErrNotFound)
	require.Equal(t, []string{"next", "old"}, h.Strings(t, "SELECT sha256 FROM nano_cert_auth_associations WHERE id = 'D' ORDER BY sha256"))
	require.Equal(t, []string{"old"}, h.Strings(t, "SELECT sha256 FROM nano_cert_auth_associations WHERE retired_at = ?", h.Clock.Now().UnixMicro()))
	require.Equal(t, []string{"DER of next"}, h.Strings(t, "SELECT certificate FROM nano_cert_auth_associations WHERE sha256 = 'next' AND not_after > ?", h.Clock.Now().UnixMicro()))
	require.NoError(t, next.seen(t))
}

func identityUnpinned(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t) // as by a migration
	c := d.with("c")
	refused(t, c, storage.ErrIdentity)
	refused(t, c.user("U"), storage.ErrIdentity)
	require.ErrorIs(t, c.checkOut(t), storage.ErrIdentity)
	require.NoError(t, c.authenticate(t))
	c.enrolls(t)
	require.NoError(t, c.seen(t))
	refused(t, d.with("other"), storage.ErrIdentity)
}

func identityRetro(t *testing.T, h *Harness) {
	for i, first := range []func(c *channel) error{
		func(c *channel) error { return c.seen(t) },
		func(c *channel) error { _, err := c.report(t, mdm.StatusIdle, ""); return err },
		func(c *channel) error { _, err := c.report(t, mdm.StatusAcknowledged, "C"); return err },
		func(c *channel) error { _, err := c.tokenUpdate(t); return err },
		func(c *channel) error { _, err := c.bootstrapToken(t); return err },
		func(c *channel) error { return c.setBootstrapToken(t, "b") },
		func(c *channel) error { return c.user("U").seen(t) },
	} {
		id := fmt.Sprint("D", i)
		h.device(id).enrolls(t)
		h.enqueue(t, []string{id}, "C")
		require.NoError(t, first(h.device(id).retro("c"+id)))
		pinned, err := h.Store.EnrollmentByCertificate(t.Context(), "c"+id)
		require.NoError(t, err)
		require.Equal(t, id, pinned)
		require.NoError(t, first(h.device(id).with("c"+id)))
		require.ErrorIs(t, first(h.device(id).retro("second"+id)), storage.ErrIdentity, "only where there is none")
	}
	h.device("E").enrolls(t)
	h.enqueue(t, []string{"E"}, "C")
	require.Equal(t, "C", h.device("E").retro("e").polls(t), "the first poll is answered")
	require.ErrorIs(t, h.device("nobody").retro("n").seen(t), storage.ErrIdentity)
	require.ErrorIs(t, h.device("D0").retro("e").seen(t), storage.ErrIdentity)
}

func identityNone(t *testing.T, h *Harness) {
	d := h.device("D").with("c").enrolls(t)
	h.enqueue(t, []string{"D"}, "C")
	require.Equal(t, "C", h.device("D").polls(t))
	require.NoError(t, h.device("D").authenticate(t))
	require.NoError(t, d.seen(t), "which retires no certificate")
}

func identityRace(t *testing.T, h *Harness) {
	for round := range 4 {
		id := fmt.Sprint("D", round)
		errs := together(8, func(i int) error { return h.device(id).with(fmt.Sprint(id, "-", i)).authenticate(t) })
		for _, err := range errs {
			require.NoError(t, err)
		}
		require.EqualValues(t, 1, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ? AND retired_at IS NULL", id))
		require.EqualValues(t, 8, h.Int(t, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ?", id))
		// Two devices want the same certificate.
		errs = together(8, func(i int) error { return h.device(fmt.Sprint("E", round, i)).with("shared" + id).authenticate(t) })
		accepted := 0
		for _, err := range errs {
			if err == nil {
				accepted++
			} else {
				require.ErrorIs(t, err, storage.ErrIdentity)
			}
		}
		require.Equal(t, 1, accepted)
	}
}

func identityFailsAlone(t *testing.T, h *Harness) {
	h.device("D").with("d").enrolls(t)
	errs := together(60, func(i int) error {
		id := fmt.Sprintf("X%02d", i)
		switch i % 3 {
		case 0:
			return h.device(id).with("d").authenticate(t)
		case 1:
			_, err := h.device(id).tokenUpdate(t)
			return err
		}
		return h.device(id).with(id).authenticate(t)
	})
	for i, err := range errs {
		switch i % 3 {
		case 0:
			require.ErrorIs(t, err, storage.ErrIdentity)
		case 1:
			require.ErrorIs(t, err, storage.ErrNotEnrolled)
		default:
			require.NoError(t, err)
		}
	}
	require.EqualValues(t, 21, h.Int(t, "SELECT COUNT(*) FROM nano_devices"))
}

// together runs n functions at once and returns their errors.
func together(n int, fn func(i int) error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	return errs
}
