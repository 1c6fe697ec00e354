package storagetest

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func importTests() []subtest {
	return []subtest{
		{"an import leaves what the record says", importWhole},
		{"a repeated import changes nothing", importRepeated},
		{"an imported device goes on with its certificate and its queue", importGoesOn},
		{"an imported device with commands is pushed, spread over time", importOwes},
		{"a device that spoke here since is kept", importNewer},
		{"a second import brings what changed", importSecond},
		{"a row without its command is refused", importNoCommand},
		{"a certificate of another device is refused", importOthersPin},
		{"a certificate that was renewed here stays", importRenewed},
		{"imported secrets are sealed", importSealed},
		{"a push certificate gives way to a later one", importPushCert},
		{"pages of an export follow each other", exportPages},
		{"an imported device keeps from its tenant what was before it came", importMoved},
		{"an import that brings another topic leaves nothing in sight", importMoves},
	}
}

// past is a time before the harness's clock.
func past(minutes int) time.Time {
	return NewClock().Now().Add(-time.Hour + time.Duration(minutes)*time.Minute)
}

// importedHash is a hash as the store keeps them.
func importedHash(n int) string { return fmt.Sprintf("%064x", n) }

func importedCommands(uuids ...string) (list []storage.CommandRecord) {
	for _, uuid := range uuids {
		c := command(uuid)
		list = append(list, storage.CommandRecord{UUID: uuid, RequestType: c.RequestType, Raw: c.Raw, CreatedAt: past(1)})
	}
	return list
}

// importedDevice is a device with a user channel, where everything is set.
func importedDevice(id string) *storage.DeviceRecord {
	user := id + ":U"
	return &storage.DeviceRecord{
		SerialNumber: "SERIAL", Model: "MODEL", ModelName: "MacBook Pro", DeviceName: "Name", OSVersion: "26.1", BuildVersion: "25B1",
		ProductName: "Mac16,1", IMEI: "IMEI", MEID: "MEID",
		Authenticate: storage.Checkin{Raw: []byte("authenticate-secret"), At: past(2)}, TokenUpdate: storage.Checkin{Raw: []byte("token-update-secret"), At: past(3)},
		UnlockToken: storage.Token{Value: []byte("unlock-secret"), At: past(3)}, BootstrapToken: storage.Token{Value: []byte("bootstrap-secret"), At: past(4)},
		Channel: storage.ChannelRecord{ID: id, Type: mdm.Device, Topic: topicA, PushMagic: "magic", Token: []byte{0, 1, 0xff}, TokenAt: past(3), Enabled: true, Tally: 3,
			AwaitingConfiguration: true, RenewalUntil: past(100), EnrolledAt: past(2), LastSeenAt: past(5),
			Queue: []storage.ItemRecord{
				{CommandUUID: "done", State: storage.Acknowledged, CreatedAt: past(1), FinishedAt: past(6),
					Result: &storage.CommandResult{Status: "Acknowledged", CreatedAt: past(6), Raw: []byte("report")}},
				{CommandUUID: "gone", State: storage.Cancelled, CreatedAt: past(1), FinishedAt: past(6)},
				{CommandUUID: "later", State: storage.NotNow, CreatedAt: past(1), NotNowCount: 2, NotNowAt: past(7)},
				{CommandUUID: "next", State: storage.Queued, CreatedAt: past(2)},
				{CommandUUID: "last", State: storage.Queued, CreatedAt: past(2), ExpiresAt: past(1000), SupersedeKey: "key"},
			}},
		Pins: []storage.PinRecord{
			{SHA256: importedHash(1), CreatedAt: past(1), RetiredAt: past(2)},
			{SHA256: importedHash(2), CreatedAt: past(2), Certificate: []byte("certificate"), NotAfter: past(5000)},
		},
		Users: []storage.UserRecord{{UserID: "U", UserShortName: "short", UserLongName: "Long Name",
			TokenUpdate: storage.Checkin{Raw: []byte("user-token-update-secret"), At: past(4)}, UserAuthenticate: storage.Checkin{Raw: []byte("user-authenticate-secret"), At: past(3)},
			Channel: storage.ChannelRecord{ID: user, Type: mdm.User, Topic: topicA, PushMagic: "user magic", Token: []byte("user token"), TokenAt: past(4), Enabled: true, Tally: 1,
				EnrolledAt: past(4), LastSeenAt: past(5), Queue: []storage.ItemRecord{{CommandUUID: "next", State: storage.Queued, CreatedAt: past(2)}}}}},
	}
}

var importedUUIDs = []string{"done", "gone", "later", "next", "last"}

// imports imports devices with the commands of importedDevice, all of which
// must be taken.
func (h *Harness) imports(t *testing.T, store storage.Importer, devices ...*storage.DeviceRecord) storage.Imported {
	t.Helper()
	done, err := store.ImportCommands(t.Context(), importedCommands(importedUUIDs...))
	require.NoError(t, err)
	require.Empty(t, done.Refused)
	done, err = store.ImportDevices(t.Context(), devices)
	require.NoError(t, err)
	require.Empty(t, done.Refused)
	return done
}

func (h *Harness) exports(t *testing.T, ids ...string) []*storage.DeviceRecord {
	t.Helper()
	list, err := h.Store.ExportDevices(t.Context(), ids)
	require.NoError(t, err)
	return list
}

func importWhole(t *testing.T, h *Harness) {
	blocked := importedDevice("BLOCKED")
	blocked.Channel.OperatorDisabled, blocked.Channel.Enabled, blocked.Channel.Token, blocked.Users = true, false, nil, nil
	blocked.Pins, blocked.UnlockToken, blocked.BootstrapToken, blocked.TokenUpdate = nil, storage.Token{}, storage.Token{}, storage.Checkin{}
	blocked.Channel.TokenAt, blocked.Channel.Queue = time.Time{}, nil
	want := []*storage.DeviceRecord{blocked, importedDevice("D")}
	done := h.imports(t, h.Store, importedDevice("D"), blocked)
	require.Equal(t, storage.Imported{Written: 2}, done)
	require.Equal(t, want, h.exports(t, "D", "BLOCKED", "nobody"))
	commands, err := h.Store.ExportCommands(t.Context(), "", 100)
	require.NoError(t, err)
	require.ElementsMatch(t, importedCommands(importedUUIDs...), commands)
}

func importRepeated(t *testing.T, h *Harness) {
	h.imports(t, h.Store, importedDevice("D"))
	before := h.exports(t, "D")
	_, pushAt := push(t, h, "D")
	h.Clock.Advance(time.Minute)
	h.imports(t, h.Store, importedDevice("D"))
	require.Equal(t, before, h.exports(t, "D"))
	_, again := push(t, h, "D")
	require.Equal(t, pushAt, again)
}

func importGoesOn(t *testing.T, h *Harness) {
	h.imports(t, h.Store, importedDevice("D"))
	d := h.device("D").with(importedHash(2))
	require.Equal(t, "later", d.polls(t), "what was refused comes first again")
	require.Equal(t, "next", d.reports(t, mdm.StatusAcknowledged, "later"))
	require.Equal(t, "last", d.reports(t, mdm.StatusAcknowledged, "next"))
	h.enqueue(t, []string{"D"}, "new")
	require.Equal(t, "new", d.reports(t, mdm.StatusAcknowledged, "last"))
	require.Empty(t, d.reports(t, mdm.StatusAcknowledged, "new"))
	require.Equal(t, "next", d.user("U").polls(t))
	refused(t, h.device("D").with(importedHash(1)), storage.ErrIdentity)
	refused(t, h.device("D").with(importedHash(3)), storage.ErrIdentity)
	tally, err := d.tokenUpdate(t)
	require.NoError(t, err)
	require.Equal(t, 4, tally)
}

func importOwes(t *testing.T, h *Harness) {
	a, b, idle := importedDevice("A"), importedDevice("B"), importedDevice("IDLE")
	b.Pins, idle.Pins = nil, nil
	idle.Channel.Queue, idle.Users = nil, nil
	h.imports(t, h.Store, a, b, idle)
	owed, at := push(t, h, "A")
	require.True(t, owed)
	_, other := push(t, h, "B")
	require.NotEqual(t, at, other)
	now := h.Clock.Now().UnixMicro()
	for _, due := range []int64{at, other} {
		require.GreaterOrEqual(t, due, now)
		require.Less(t, due, now+(15*time.Minute).Microseconds())
	}
	owed, _ = push(t, h, "IDLE")
	require.False(t, owed)
	h.Clock.Advance(15 * time.Minute)
	require.Equal(t, []string{"A", "A:U", "B", "B:U"}, h.claim(t, pushLease(t, h), nil))
}

func importNewer(t *testing.T, h *Harness) {
	h.imports(t, h.Store, importedDevice("D"), importedDevice2("E"))
	d := h.device("D").with(importedHash(2))
	require.NoError(t, d.setBootstrapToken(t, "own"))
	require.Equal(t, "later", d.polls(t))
	require.Equal(t, "next", d.reports(t, mdm.StatusAcknowledged, "later"))
	h.imports(t, h.Store, importedDevice("D"))
	require.Equal(t, "next", d.polls(t), "a row that ended here stays ended")
	token, err := d.bootstrapToken(t)
	require.NoError(t, err)
	require.Equal(t, "own", token, "and so does a token that came here")

	_, err = d.tokenUpdate(t)
	require.NoError(t, err)
	before := h.exports(t, "D")
	record := importedDevice("D")
	record.Channel.PushMagic, record.Channel.Enabled = "stale", false
	done := h.imports(t, h.Store, record, importedDevice2("E"))
	require.Equal(t, storage.Imported{Written: 1, Kept: 1}, done)
	require.Equal(t, before, h.exports(t, "D"))
}

// importedDevice2 is importedDevice without pins and users.
func importedDevice2(id string) *storage.DeviceRecord {
	d := importedDevice(id)
	d.Pins, d.Users = nil, nil
	return d
}

func importSecond(t *testing.T, h *Harness) {
	h.imports(t, h.Store, importedDevice("D"))
	h.enqueue(t, []string{"D"}, "own")
	record := importedDevice("D")
	record.TokenUpdate.At, record.Channel.TokenAt = past(20), past(20)
	record.Channel.PushMagic, record.Channel.Tally, record.Channel.LastSeenAt = "new", 4, past(20)
	queue := record.Channel.Queue
	queue[2].State, queue[2].FinishedAt = storage.Failed, past(20)
	queue[2].Result = &storage.CommandResult{Status: "Error", CreatedAt: past(20), Raw: []byte("error")}
	record.Channel.Queue = queue[:4] // "last" was deleted there
	h.imports(t, h.Store, record)
	got := h.exports(t, "D")[0]
	require.Equal(t, "new", got.Channel.PushMagic)
	require.Equal(t, 4, got.Channel.Tally)
	require.Equal(t, past(20), got.Channel.LastSeenAt)
	require.Equal(t, "done acknowledged, gone cancelled, later error, next queued, last cancelled, own queued", queueStates(t, h, "D"))
	d := h.device("D").with(importedHash(2))
	require.Equal(t, "next", d.polls(t))
	require.Equal(t, "own", d.reports(t, mdm.StatusAcknowledged, "next"))
}

func importNoCommand(t *testing.T, h *Harness) {
	record := importedDevice2("D")
	done, err := h.Store.ImportCommands(t.Context(), importedCommands("later", "last"))
	require.NoError(t, err)
	require.Equal(t, 2, done.Written)
	done, err = h.Store.ImportDevices(t.Context(), []*storage.DeviceRecord{record})
	require.NoError(t, err)
	require.Equal(t, []storage.Refusal{{Kind: "queue", Key: "D next", Reason: "its command was not imported"}}, done.Refused)
	d := h.device("D").retro(importedHash(9))
	require.Equal(t, "later", d.polls(t))
	require.Equal(t, "last", d.reports(t, mdm.StatusAcknowledged, "later"))

	other := importedCommands("last")
	other[0].Raw = []byte("<plist>another</plist>")
	done, err = h.Store.ImportCommands(t.Context(), other)
	require.NoError(t, err)
	require.Len(t, done.Refused, 1)
}

func importOthersPin(t *testing.T, h *Harness) {
	h.imports(t, h.Store, importedDevice("A"))
	done, err := h.Store.ImportDevices(t.Context(), []*storage.DeviceRecord{importedDevice("B")})
	require.NoError(t, err)
	require.Len(t, done.Refused, 2)
	require.Equal(t, "B "+importedHash(1), done.Refused[0].Key)
	require.Empty(t, h.exports(t, "B")[0].Pins)
	require.Len(t, h.exports(t, "A")[0].Pins, 2)
}

func importRenewed(t *testing.T, h *Harness) {
	record := importedDevice("D")
	record.Channel.RenewalUntil = h.Clock.Now().Add(time.Hour)
	h.imports(t, h.Store, record)
	d := h.device("D").with(importedHash(3))
	d.pin.Renewal = storage.RenewalWindow
	require.Equal(t, "later", d.polls(t))
	h.imports(t, h.Store, record)
	require.Equal(t, "later", h.device("D").with(importedHash(3)).polls(t))
	refused(t, h.device("D").with(importedHash(2)), storage.ErrIdentity)
}

func importSealed(t *testing.T, h *Harness) {
	store := h.sealing(t, true, "first")
	h.imports(t, store, importedDevice("D"))
	_, err := store.ImportPushCerts(t.Context(), []storage.PushCert{{Topic: topicA, CertPEM: []byte("certificate"), KeyPEM: []byte("key-secret"), NotAfter: past(9000)}})
	require.NoError(t, err)
	for _, column := range []string{"authenticate FROM nano_devices", "token_update FROM nano_devices", "unlock_token FROM nano_devices", "bootstrap_token FROM nano_devices",
		"token_update FROM nano_users", "user_authenticate FROM nano_users", "key_pem FROM nano_push_certs", "command FROM nano_commands"} {
		values := h.Strings(t, "SELECT "+column)
		require.NotEmpty(t, values, column)
		for _, value := range values {
			require.False(t, bytes.Contains([]byte(value), []byte("secret")), column)
		}
	}
	list, err := store.ExportDevices(t.Context(), []string{"D"})
	require.NoError(t, err)
	require.Equal(t, []*storage.DeviceRecord{importedDevice("D")}, list)
	require.Error(t, h.refused(t), "without the key")
}

func importPushCert(t *testing.T, h *Harness) {
	cert := func(text string, end int) []storage.PushCert {
		return []storage.PushCert{{Topic: topicA, CertPEM: []byte(text), KeyPEM: []byte("key of " + text), NotAfter: past(end)}}
	}
	for _, step := range []struct {
		certs []storage.PushCert
		want  storage.Imported
		stays string
	}{
		{cert("first", 1000), storage.Imported{Written: 1}, "first"},
		{cert("first", 1000), storage.Imported{Kept: 1}, "first"},
		{cert("second", 2000), storage.Imported{Written: 1}, "second"},
		{cert("first", 1000), storage.Imported{Kept: 1}, "second"},
	} {
		done, err := h.Store.ImportPushCerts(t.Context(), step.certs)
		require.NoError(t, err)
		require.Equal(t, step.want, done)
		list, err := h.Store.ExportPushCerts(t.Context())
		require.NoError(t, err)
		require.Len(t, list, 1)
		require.Equal(t, step.stays, string(list[0].CertPEM))
	}
}

func exportPages(t *testing.T, h *Harness) {
	var want []string
	for n := range 5 {
		id := fmt.Sprintf("D%d", n)
		want = append(want, id)
		h.imports(t, h.Store, importedDevice2(id))
	}
	var got []string
	after := ""
	for {
		ids, err := h.Store.ExportDeviceIDs(t.Context(), after, 2)
		require.NoError(t, err)
		if len(ids) == 0 {
			break
		}
		got, after = append(got, ids...), ids[len(ids)-1]
	}
	require.Equal(t, want, got)
}

// exported is a device as an Exporter reads it from a store where it came from one
// tenant to another, with its commands.
func (h *Harness) exported(t *testing.T, id string) (d *storage.DeviceRecord, commands []storage.CommandRecord) {
	t.Helper()
	commands, err := h.Store.ExportCommands(t.Context(), "", 100)
	require.NoError(t, err)
	list := h.exports(t, id)
	require.Len(t, list, 1)
	return list[0], commands
}

func importMoved(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	require.NoError(t, d.user("U").saysToken(t, topicA))
	h.tags(t, tenantA, []string{"D"}, []string{"secret"}, nil)
	h.enqueue(t, []string{"D", "D:U"}, "before")
	d.reports(t, mdm.StatusAcknowledged, "before")
	h.Clock.Advance(time.Minute)
	require.NoError(t, d.begins(t, topicB))
	require.NoError(t, d.saysToken(t, topicB))
	require.NoError(t, d.user("U").saysToken(t, topicB))
	h.Clock.Advance(time.Minute)
	h.tags(t, tenantB, []string{"D"}, []string{"own"}, nil)
	h.enqueue(t, []string{"D"}, "after")
	d.reports(t, mdm.StatusAcknowledged, "after")
	record, commands := h.exported(t, "D")
	require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("delete")))

	for range 2 {
		h.Clock.Advance(time.Hour)
		done, err := h.Store.ImportCommands(t.Context(), commands)
		require.NoError(t, err)
		require.Empty(t, done.Refused)
		done, err = h.Store.ImportDevices(t.Context(), []*storage.DeviceRecord{record})
		require.NoError(t, err)
		require.Empty(t, done.Refused)
		require.Equal(t, []string{"own"}, h.tagsOf(t, tenantB, "D"))
		require.Equal(t, []string{"own", "secret"}, h.tagsOf(t, everything, "D"))
		require.Equal(t, map[string]int64{"own": 1}, h.tagCounts(t, tenantB))
		require.Empty(t, h.found(t, tenantB, storage.EnrollmentFilter{Tag: "secret"}, 10))
		for _, id := range []string{"D", "D:U"} {
			_, err = h.Store.QueueItem(t.Context(), tenantB, id, "before")
			require.ErrorIs(t, err, storage.ErrNotFound, id)
		}
		_, err = h.Store.CommandResult(t.Context(), tenantB, "D", "before")
		require.ErrorIs(t, err, storage.ErrNotFound)
		_, err = h.Store.CommandResult(t.Context(), tenantB, "D", "after")
		require.NoError(t, err)
	}
}

func importMoves(t *testing.T, h *Harness) {
	record := importedDevice("D")
	record.Tags = []string{"secret"}
	h.imports(t, h.Store, record)
	require.Equal(t, []string{"secret"}, h.tagsOf(t, tenantA, "D"))

	h.Clock.Advance(time.Hour)
	at := h.Clock.Now().Add(-time.Minute)
	moved := importedDevice("D")
	moved.Channel.Topic, moved.Users[0].Channel.Topic = topicB, topicB
	moved.Authenticate.At, moved.TokenUpdate.At, moved.Users[0].TokenUpdate.At = at, at, at
	moved.Channel.Queue = append(moved.Channel.Queue, storage.ItemRecord{CommandUUID: "new", State: storage.Queued, CreatedAt: h.Clock.Now()})
	_, err := h.Store.ImportCommands(t.Context(), importedCommands("new"))
	require.NoError(t, err)
	h.imports(t, h.Store, moved)
	require.True(t, h.sees(t, tenantB, "D"))
	require.Empty(t, h.tagsOf(t, tenantB, "D"))
	for _, uuid := range importedUUIDs {
		_, err := h.Store.QueueItem(t.Context(), tenantB, "D", uuid)
		require.ErrorIs(t, err, storage.ErrNotFound, uuid)
	}
	_, err = h.Store.QueueItem(t.Context(), tenantB, "D:U", "next")
	require.ErrorIs(t, err, storage.ErrNotFound)
	_, err = h.Store.QueueItem(t.Context(), tenantB, "D", "new")
	require.NoError(t, err)
}
