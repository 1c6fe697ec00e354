package storagetest

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func tenantTests() []subtest {
	return []subtest{
		{"a device's word moves it to no other topic", topicIsSetAtAuthenticate},
		{"a topic is that of some CAs' devices", topicOfCA},
		{"a user channel has its device's topic", userChannelInheritsTopic},
		{"a re-enrollment to another topic leaves nothing in sight", topicMove},
		{"a move between topics ends a renewal window", topicMoveIgnoresRenewal},
		{"an Authenticate without a topic leaves it to the TokenUpdate", topicOfTokenUpdate},
		{"a copy from another server takes nothing back", copyTakesNothingBack},
		{"a report of another tenant's command is one of an unknown command", reportOfOtherTenant},
	}
}

var (
	tenantA = storage.Scope{Topics: []string{topicA}}
	tenantB = storage.Scope{Topics: []string{topicB}}
)

// saysToken is a TokenUpdate with a topic.
func (c *channel) saysToken(t *testing.T, topic string) error {
	t.Helper()
	_, err := c.apply(t, &storage.TokenUpdate{Src: c.source(), Message: &mdm.TokenUpdate{
		Enrollment: c.identity(), Topic: topic, PushMagic: "magic", Token: []byte("token"), UnlockToken: []byte("unlock"), Raw: []byte("token update"),
	}})
	return err
}

// begins is an Authenticate with a topic.
func (c *channel) begins(t *testing.T, topic string) error {
	t.Helper()
	_, err := c.apply(t, &storage.Authenticate{Src: c.source(), Message: &mdm.Authenticate{
		Enrollment: c.identity(), Topic: topic, SerialNumber: "S-" + c.enroll.ID, Raw: []byte("authenticate " + topic),
	}})
	return err
}

func (h *Harness) sees(t *testing.T, scope storage.Scope, id string) bool {
	t.Helper()
	list, err := h.Store.Enrollments(t.Context(), scope, []string{id})
	require.NoError(t, err)
	return len(list) == 1
}

func topicIsSetAtAuthenticate(t *testing.T, h *Harness) {
	d := h.device("D").with("cert").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "secret"))
	for range 3 {
		require.ErrorIs(t, d.saysToken(t, topicB), storage.ErrTopic)
	}
	require.True(t, h.sees(t, tenantA, "D"))
	require.False(t, h.sees(t, tenantB, "D"))
	_, err := h.Store.BootstrapToken(t.Context(), tenantB, "D", auditRecord("read"))
	require.ErrorIs(t, err, storage.ErrNotFound)

	records, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{Target: "D"}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 1, "a device cannot fill the audit")
	require.Equal(t, "enrollment.topic.refuse", records[0].Action)
	require.Contains(t, records[0].Detail, topicB)
	h.Clock.Advance(2 * time.Hour)
	require.ErrorIs(t, d.saysToken(t, topicB), storage.ErrTopic)
	require.Equal(t, 2, h.auditCount(t, "enrollment.topic.refuse"))
	require.NoError(t, d.saysToken(t, topicA))
}

// ofTenantB is the channel with a certificate of a CA that enrolls to no topic but
// that of tenant B.
func (c *channel) ofTenantB(certificate string) *channel {
	w := c.with(certificate)
	w.pin.EnrollsTo = func(topic string) bool { return topic == topicB }
	return w
}

func topicOfCA(t *testing.T, h *Harness) {
	d := h.device("D").with("a").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "secret"))
	h.enqueue(t, []string{"D"}, "C1")
	rogue := h.device("D").ofTenantB("b")
	for _, topic := range []string{topicA, ""} {
		require.ErrorIs(t, rogue.begins(t, topic), storage.ErrTopicCA, "a re-enrollment as %q", topic)
	}
	retro := rogue.ofTenantB("b")
	retro.pin.Renewal = storage.RenewalWindow
	_, err := h.Store.SetRenewal(t.Context(), everything, []string{"D"}, h.Clock.Now().Add(time.Hour))
	require.NoError(t, err)
	refused(t, retro, storage.ErrTopicCA)
	require.Equal(t, "C1", d.polls(t), "its certificate is not retired")
	require.Equal(t, 1, h.auditCount(t, "enrollment.topic.refuse"))

	unpinned := h.device("U").enrolls(t)
	require.NoError(t, unpinned.saysToken(t, topicA))
	taker := unpinned.ofTenantB("b")
	taker.pin.Retro = true
	refused(t, taker, storage.ErrTopicCA)

	silent := h.device("S").ofTenantB("s")
	require.NoError(t, silent.begins(t, ""))
	require.ErrorIs(t, silent.saysToken(t, topicA), storage.ErrTopicCA)
	require.False(t, h.sees(t, tenantA, "S"))
	require.NoError(t, silent.saysToken(t, topicB))

	for i := range 120 {
		require.ErrorIs(t, h.device(fmt.Sprint("X", i)).ofTenantB("x").begins(t, topicA), storage.ErrTopicCA)
	}
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_devices WHERE id LIKE 'X%'"))
	require.Equal(t, 100, h.auditCount(t, "enrollment.topic.refuse"), "made-up devices do not fill the audit")
	require.NoError(t, rogue.begins(t, topicB), "it may take the device to its own topic, with nothing in sight")
	require.False(t, h.sees(t, tenantA, "D"))
}

func userChannelInheritsTopic(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	require.NoError(t, d.setBootstrapToken(t, "secret"))
	require.NoError(t, d.user("U").saysToken(t, topicB))
	require.True(t, h.sees(t, tenantA, "D:U"))
	require.False(t, h.sees(t, tenantB, "D:U"))
	for id, scope := range map[string]storage.Scope{"D": tenantB, "D:U": tenantB} {
		_, err := h.Store.BootstrapToken(t.Context(), scope, id, auditRecord("read"))
		require.ErrorIs(t, err, storage.ErrNotFound, id)
	}
	token, err := h.Store.BootstrapToken(t.Context(), tenantA, "D:U", auditRecord("read"))
	require.NoError(t, err)
	require.Equal(t, "secret", string(token))
}

func topicMove(t *testing.T, h *Harness) {
	d := h.device("D").with("a").enrolls(t)
	u := d.user("U")
	require.NoError(t, d.saysToken(t, topicA))
	require.NoError(t, h.Store.RecordRefusals(t.Context(), []storage.DeviceRefusal{
		{Certificate: "a", Enrollment: "D", Cause: "malformed", Count: 3, First: h.Clock.Now(), Last: h.Clock.Now(), Detail: "of the former tenant"}}))
	require.NoError(t, u.saysToken(t, topicA))
	require.NoError(t, d.setBootstrapToken(t, "secret"))
	h.enqueue(t, []string{"D", "D:U"}, "done", "waiting")
	d.reports(t, mdm.StatusAcknowledged, "done")
	u.reports(t, mdm.StatusAcknowledged, "done")

	h.Clock.Advance(time.Minute)
	require.NoError(t, d.begins(t, topicB))
	require.NoError(t, d.saysToken(t, topicB))
	require.False(t, h.sees(t, tenantA, "D"))
	require.False(t, h.sees(t, tenantA, "D:U"), "nor its users")
	require.False(t, h.sees(t, tenantB, "D:U"), "until they come themselves")
	require.NoError(t, u.saysToken(t, topicB))
	require.True(t, h.sees(t, tenantB, "D:U"))

	ctx := t.Context()
	for _, id := range []string{"D", "D:U"} {
		for _, state := range append(storage.States(), 0) {
			items, err := h.Store.Queue(ctx, tenantB, id, state, storage.QueueKey{}, 10)
			require.NoError(t, err)
			require.Empty(t, items, "%s %s", id, state)
		}
		for _, uuid := range []string{"done", "waiting"} {
			_, err := h.Store.QueueItem(ctx, tenantB, id, uuid)
			require.ErrorIs(t, err, storage.ErrNotFound)
			_, err = h.Store.CancelItem(ctx, tenantB, id, uuid, auditRecord("x"))
			require.ErrorIs(t, err, storage.ErrNotFound)
			_, err = h.Store.Requeue(ctx, tenantB, id, uuid, auditRecord("x"))
			require.ErrorIs(t, err, storage.ErrNotFound)
			_, err = h.Store.Command(ctx, tenantB, uuid)
			require.ErrorIs(t, err, storage.ErrNotFound)
			items, err := h.Store.CommandItems(ctx, tenantB, uuid, 0, "", 10)
			require.NoError(t, err)
			require.Empty(t, items)
		}
		_, err := h.Store.CommandResult(ctx, tenantB, id, "done")
		require.ErrorIs(t, err, storage.ErrNotFound)
	}
	require.Empty(t, h.commands(t, tenantB, storage.CommandFilter{}, 10))
	require.Empty(t, h.commands(t, tenantB, storage.CommandFilter{State: storage.Acknowledged}, 10))
	token, err := h.Store.BootstrapToken(ctx, tenantB, "D", auditRecord("read"))
	require.NoError(t, err)
	require.Empty(t, token)

	refusals, err := h.Store.EnrollmentRefusals(ctx, "D")
	require.NoError(t, err)
	require.Empty(t, refusals)

	// Administrators of all topics still do.
	result, err := h.Store.CommandResult(ctx, everything, "D", "done")
	require.NoError(t, err)
	require.NotEmpty(t, result.Raw)

	h.Clock.Advance(time.Minute)
	h.enqueue(t, []string{"D", "D:U"}, "new")
	require.Equal(t, []string{"new"}, h.commands(t, tenantB, storage.CommandFilter{}, 10))
	d.reports(t, mdm.StatusAcknowledged, "new")
	_, err = h.Store.CommandResult(ctx, tenantB, "D", "new")
	require.NoError(t, err)
	require.Equal(t, "new", u.polls(t))
}

func topicMoveIgnoresRenewal(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	require.NoError(t, d.saysToken(t, topicA))
	require.NoError(t, d.setBootstrapToken(t, "secret"))
	h.enqueue(t, []string{"D"}, "C1")
	_, err := h.Store.SetRenewal(t.Context(), everything, []string{"D"}, h.Clock.Now().Add(time.Hour))
	require.NoError(t, err)
	require.NoError(t, d.begins(t, topicB))
	_, err = h.Store.UnlockToken(t.Context(), tenantB, "D", auditRecord("read"))
	require.NoError(t, err)
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_devices WHERE unlock_token IS NOT NULL OR bootstrap_token IS NOT NULL"))
	require.NoError(t, d.saysToken(t, topicB))
	require.Empty(t, d.polls(t), "the former tenant's command is cancelled")
}

func topicOfTokenUpdate(t *testing.T, h *Harness) {
	d := h.device("D")
	require.NoError(t, d.begins(t, ""))
	require.False(t, h.sees(t, tenantB, "D"))
	require.NoError(t, d.saysToken(t, topicB))
	require.True(t, h.sees(t, tenantB, "D"))
	require.ErrorIs(t, d.saysToken(t, topicA), storage.ErrTopic)
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_topic_moves"))
}

// An exporter that runs a second time wiped tokens that were escrowed since.
func copyTakesNothingBack(t *testing.T, h *Harness) {
	d := h.device("D")
	copied := func(op storage.Op) error {
		op.Source().Copy = true
		_, err := d.apply(t, op)
		return err
	}
	authenticate := func(raw string) storage.Op {
		return &storage.Authenticate{Src: d.source(), Message: &mdm.Authenticate{Enrollment: d.identity(), Topic: topicA, Raw: []byte(raw)}}
	}
	tokenUpdate := func(raw string) storage.Op {
		return &storage.TokenUpdate{Src: d.source(), Message: &mdm.TokenUpdate{
			Enrollment: d.identity(), Topic: topicA, PushMagic: raw, Token: []byte(raw), Raw: []byte(raw)}}
	}
	bootstrap := func(token string) storage.Op {
		return &storage.SetBootstrapToken{Src: d.source(), Token: []byte(token)}
	}
	for range 2 {
		require.NoError(t, copied(authenticate("a1")))
		require.NoError(t, copied(tokenUpdate("t1")))
		require.NoError(t, copied(bootstrap("b1")))
	}
	h.enqueue(t, []string{"D"}, "C1")
	require.NoError(t, copied(authenticate("a1")))
	require.Equal(t, "C1", d.polls(t), "it had no effect")

	// The device speaks here itself: its certificate is pinned.
	_, err := d.retro("cert").report(t, mdm.StatusIdle, "")
	require.NoError(t, err)
	require.NoError(t, d.with("cert").setBootstrapToken(t, "b2"))
	require.NoError(t, copied(authenticate("a1")))
	require.NoError(t, copied(tokenUpdate("t1")))
	require.ErrorIs(t, copied(bootstrap("b1")), storage.ErrOwnWord)
	require.NoError(t, copied(bootstrap("b2")))
	require.ErrorIs(t, copied(authenticate("a2")), storage.ErrOwnWord)
	require.ErrorIs(t, copied(tokenUpdate("t2")), storage.ErrOwnWord)
	require.ErrorIs(t, copied(&storage.CheckOut{Src: d.source()}), storage.ErrOwnWord)
	token, err := d.with("cert").bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "b2", token)
	require.Equal(t, "C1", d.polls(t))
}

func reportOfOtherTenant(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	e := h.device("E")
	require.NoError(t, e.begins(t, topicB))
	require.NoError(t, e.saysToken(t, topicB))
	h.enqueue(t, []string{"D"}, "C")
	h.enqueue(t, []string{"E"}, "own")
	h.putSink(t, hook())
	for _, uuid := range []string{"C", "unknown"} {
		for _, status := range []mdm.Status{mdm.StatusNotNow, mdm.StatusAcknowledged, mdm.StatusError} {
			said := event("", storage.TopicConnect)
			said.ID = string(status) + uuid
			require.Equal(t, "own", e.withEvents(said).reports(t, status, uuid))
		}
	}
	for _, stored := range storedEvents(t, h) {
		require.Empty(t, stored.RequestType)
	}
	require.Equal(t, "C queued", queueStates(t, h, "D"))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_command_results"))
	require.Equal(t, "C", d.polls(t))
}
