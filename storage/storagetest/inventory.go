package storagetest

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func inventoryTests() []subtest {
	return []subtest{
		{"each filter finds what it says", inventoryFilters},
		{"filters are combined", inventoryCombined},
		{"pages miss nothing and repeat nothing", inventoryPages},
		{"a page looks at a bounded number of rows", inventoryBounded},
		{"who has very many commands waiting is found once", inventoryManyCommands},
		{"a scope hides enrollments of other topics", inventoryScope},
		{"what is known of an enrollment is read", inventoryRead},
		{"enrollments, commands and pushes are counted", inventoryStatistics},
		{"the state of a push certificate is read without its enrollments", inventoryPushCert},
	}
}

const topicB = "com.apple.mgmt.External.b"

// found is all that a filter chooses, sorted, in pages of a size.
func (h *Harness) found(t *testing.T, scope storage.Scope, f storage.EnrollmentFilter, limit int) []string {
	t.Helper()
	all := []string{}
	var after storage.EnrollmentKey
	for range 10_000 {
		ids, next, err := h.Store.FindEnrollments(t.Context(), scope, f, after, limit)
		require.NoError(t, err)
		require.LessOrEqual(t, len(ids), limit)
		all = append(all, ids...)
		if next == (storage.EnrollmentKey{}) {
			slices.Sort(all)
			return all
		}
		require.NotEqual(t, after, next, "the list goes on")
		after = next
	}
	t.Fatal("the list does not end")
	return nil
}

// facts begins an enrollment with facts of a device and a topic.
func (c *channel) facts(t *testing.T, topic string, m mdm.Authenticate) *channel {
	t.Helper()
	m.Enrollment, m.Topic, m.Raw = c.identity(), topic, []byte("authenticate")
	_, err := c.apply(t, &storage.Authenticate{Src: c.source(), Message: &m})
	require.NoError(t, err)
	return c.tokens(t, topic)
}

func (c *channel) tokens(t *testing.T, topic string) *channel {
	t.Helper()
	_, err := c.apply(t, &storage.TokenUpdate{Src: c.source(), Message: &mdm.TokenUpdate{
		Enrollment: c.identity(), Topic: topic, PushMagic: "magic", Token: []byte("token"), Raw: []byte("token update"),
	}})
	require.NoError(t, err)
	return c
}

// inventory enrolls a few devices that differ in every field of the filter.
func inventory(t *testing.T, h *Harness) {
	t.Helper()
	mac := h.device("mac").with("c-mac").facts(t, topicA, mdm.Authenticate{SerialNumber: "S1", Model: "M1LL/A", ModelName: "MacBook Air", ProductName: "Mac14,2", OSVersion: "15.1"})
	mac.user("anna").tokens(t, topicA)
	h.device("phone").with("c-phone").facts(t, topicB, mdm.Authenticate{SerialNumber: "S2", Model: "P1LL/A", ModelName: "iPhone", ProductName: "iPhone14,5", OSVersion: "18.1"})
	h.Clock.Advance(time.Hour)
	h.device("pad").with("c-pad").facts(t, topicA, mdm.Authenticate{SerialNumber: "S3", Model: "P1LL/A", ModelName: "iPad", ProductName: "iPad14,1", OSVersion: "18.1"})
	h.device("gone").facts(t, topicA, mdm.Authenticate{SerialNumber: "S4"})
	require.NoError(t, h.device("gone").checkOut(t))
	h.device("off").facts(t, topicA, mdm.Authenticate{SerialNumber: "S5"})
	h.Exec(t, "UPDATE nano_enrollments SET operator_disabled = 1 WHERE id = 'off'")
	h.Exec(t, "UPDATE nano_enrollments SET type = ? WHERE id = 'pad'", string(mdm.UserEnrollmentDevice))
	require.NoError(t, h.Store.Flush(t.Context()))
}

func inventoryFilters(t *testing.T, h *Harness) {
	inventory(t, h)
	h.enqueue(t, []string{"mac", "pad"}, "C1")
	h.device("pad").reports(t, mdm.StatusNotNow, "C1")
	h.device("mac").polls(t)
	require.NoError(t, h.Store.Flush(t.Context()))
	h.Clock.Advance(time.Hour)
	now := h.Clock.Now()
	h.tags(t, everything, []string{"mac", "pad"}, []string{"lab"}, nil)
	for id, class := range map[string]string{"phone": "retry_later", "mac": storage.PushAccepted} {
		require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{ID: id, At: now, Class: class, Attempts: 1, NextAt: now.Add(time.Hour)}}))
	}
	h.enqueue(t, []string{"phone"}, "C2")
	h.dies(t, h.target(t, "mac:anna"), now)
	expiry := h.Clock.Now().Add(365*24*time.Hour - 90*time.Minute) // of mac and phone, but not of pad
	seen := now.Add(-90 * time.Minute)                             // only phone and the user were not seen since
	all := []string{"gone", "mac", "mac:anna", "off", "pad", "phone"}
	for name, tc := range map[string]struct {
		f    storage.EnrollmentFilter
		want string
	}{
		"all":                    {storage.EnrollmentFilter{}, strings.Join(all, " ")},
		"type":                   {storage.EnrollmentFilter{Type: mdm.User}, "mac:anna"},
		"other type":             {storage.EnrollmentFilter{Type: mdm.UserEnrollmentDevice}, "pad"},
		"enabled":                {storage.EnrollmentFilter{Enabled: new(true)}, "mac mac:anna pad phone"},
		"not enabled":            {storage.EnrollmentFilter{Enabled: new(false)}, "gone off"},
		"topic":                  {storage.EnrollmentFilter{Topic: topicB}, "phone"},
		"serial":                 {storage.EnrollmentFilter{Serial: "S1"}, "mac mac:anna"},
		"serial of nobody":       {storage.EnrollmentFilter{Serial: "S9"}, ""},
		"user id":                {storage.EnrollmentFilter{User: "anna"}, "mac:anna"},
		"user short name":        {storage.EnrollmentFilter{User: "short"}, "mac:anna"},
		"tag":                    {storage.EnrollmentFilter{Tag: "lab"}, "mac mac:anna pad"},
		"tag of nobody":          {storage.EnrollmentFilter{Tag: "Lab"}, ""},
		"model":                  {storage.EnrollmentFilter{Model: "P1LL/A"}, "pad phone"},
		"model name":             {storage.EnrollmentFilter{Model: "MacBook Air"}, "mac mac:anna"},
		"product name":           {storage.EnrollmentFilter{Model: "iPad14,1"}, "pad"},
		"OS version":             {storage.EnrollmentFilter{OSVersion: "18.1"}, "pad phone"},
		"seen before":            {storage.EnrollmentFilter{LastSeenBefore: seen}, "mac:anna phone"},
		"seen after":             {storage.EnrollmentFilter{LastSeenAfter: seen}, "gone mac off pad"},
		"seen between":           {storage.EnrollmentFilter{LastSeenAfter: seen, LastSeenBefore: now.Add(-24 * time.Hour)}, ""},
		"waiting":                {storage.EnrollmentFilter{Waiting: new(true)}, "mac pad phone"},
		"not waiting":            {storage.EnrollmentFilter{Waiting: new(false)}, "gone mac:anna off"},
		"push owed":              {storage.EnrollmentFilter{Push: storage.PushOwed}, "phone"},
		"push unanswered":        {storage.EnrollmentFilter{Push: storage.PushUnanswered}, "mac"},
		"push refused":           {storage.EnrollmentFilter{Push: storage.PushRefused}, "mac:anna phone"},
		"push to be tried again": {storage.EnrollmentFilter{Push: "retry_later"}, "phone"},
		"dead token":             {storage.EnrollmentFilter{Push: storage.PushTokenDead}, "mac:anna"},
		"certificate expires":    {storage.EnrollmentFilter{CertificateExpiresBefore: expiry}, "mac mac:anna phone"},
	} {
		for _, limit := range []int{1, 2, 100} {
			require.Equal(t, strings.Fields(tc.want), h.found(t, storage.Scope{}, tc.f, limit), "%s, %d a page", name, limit)
		}
	}

	// Commands that have ended do not count.
	h.device("mac").reports(t, mdm.StatusAcknowledged, "C1")
	h.device("mac").user("anna").tokens(t, topicA)
	h.device("phone").with("c-phone-2").facts(t, topicB, mdm.Authenticate{SerialNumber: "S2"})
	require.Equal(t, []string{"pad"}, h.found(t, storage.Scope{}, storage.EnrollmentFilter{Waiting: new(true)}, 1))
	require.Empty(t, h.found(t, storage.Scope{}, storage.EnrollmentFilter{Push: storage.PushTokenDead}, 1))
	require.Equal(t, []string{"mac", "mac:anna"}, h.found(t, storage.Scope{}, storage.EnrollmentFilter{CertificateExpiresBefore: expiry}, 1), "a retired certificate says nothing")
}

func inventoryCombined(t *testing.T, h *Harness) {
	inventory(t, h)
	h.enqueue(t, []string{"mac", "mac:anna", "phone"}, "C1")
	for name, tc := range map[string]struct {
		f    storage.EnrollmentFilter
		want string
	}{
		"topic and enabled":       {storage.EnrollmentFilter{Topic: topicA, Enabled: new(true)}, "mac mac:anna pad"},
		"serial and type":         {storage.EnrollmentFilter{Serial: "S1", Type: mdm.Device}, "mac"},
		"OS version and model":    {storage.EnrollmentFilter{OSVersion: "18.1", Model: "iPhone"}, "phone"},
		"waiting and user":        {storage.EnrollmentFilter{Waiting: new(true), User: "short"}, "mac:anna"},
		"waiting and topic":       {storage.EnrollmentFilter{Waiting: new(true), Topic: topicB}, "phone"},
		"idle, enabled and topic": {storage.EnrollmentFilter{Waiting: new(false), Topic: topicA, Enabled: new(true)}, "pad"},
		"owed and OS version":     {storage.EnrollmentFilter{Push: storage.PushOwed, OSVersion: "15.1"}, "mac mac:anna"},
		"what cannot be":          {storage.EnrollmentFilter{Topic: topicB, Serial: "S1"}, ""},
	} {
		for _, limit := range []int{1, 100} {
			require.Equal(t, strings.Fields(tc.want), h.found(t, storage.Scope{}, tc.f, limit), "%s, %d a page", name, limit)
		}
	}
}

// plantEnrollments inserts enrollments of devices of their own.
func plantEnrollments(t *testing.T, h *Harness, ids []string) {
	t.Helper()
	for chunk := range slices.Chunk(ids, 500) {
		var devices, enrollments, seen []any
		for _, id := range chunk {
			devices = append(devices, id, []byte("raw"), "15.1")
			enrollments = append(enrollments, id, id, string(mdm.Device), topicA)
			seen = append(seen, id)
		}
		n := len(chunk)
		h.Exec(t, "INSERT INTO nano_devices (id, authenticate, os_version, authenticate_at, created_at, updated_at) VALUES "+
			strings.TrimSuffix(strings.Repeat("(?, ?, ?, 1, 1, 1), ", n), ", "), devices...)
		h.Exec(t, "INSERT INTO nano_enrollments (id, device_id, type, topic, enabled, created_at, updated_at) VALUES "+
			strings.TrimSuffix(strings.Repeat("(?, ?, ?, ?, 1, 1, 1), ", n), ", "), enrollments...)
		h.Exec(t, "INSERT INTO nano_enrollment_activity (id, last_seen_at) VALUES "+
			strings.TrimSuffix(strings.Repeat("(?, 5), ", n), ", "), seen...)
	}
}

func inventoryPages(t *testing.T, h *Harness) {
	ids := make([]string, 230)
	for i := range ids {
		ids[i] = fmt.Sprintf("D%03d", i)
	}
	plantEnrollments(t, h, ids)
	for i := range 50 { // with several users on some of the devices
		for u := range i % 3 {
			id := fmt.Sprintf("%s:%d", ids[i], u)
			h.Exec(t, "INSERT INTO nano_enrollments (id, device_id, type, topic, created_at, updated_at) VALUES (?, ?, 'User', ?, 1, 1)", id, ids[i], topicA)
		}
	}
	everybody := h.Strings(t, "SELECT id FROM nano_enrollments")
	slices.Sort(everybody)
	for _, f := range []storage.EnrollmentFilter{{}, {OSVersion: "15.1"}, {Topic: topicA}} {
		require.Equal(t, everybody, h.found(t, storage.Scope{}, f, 7))
	}
	require.Equal(t, ids, h.found(t, storage.Scope{}, storage.EnrollmentFilter{LastSeenBefore: time.UnixMicro(6)}, 7), "all of one time")

	_, next, err := h.Store.FindEnrollments(t.Context(), storage.Scope{}, storage.EnrollmentFilter{Topic: topicA}, storage.EnrollmentKey{}, 7)
	require.NoError(t, err)
	_, _, err = h.Store.FindEnrollments(t.Context(), storage.Scope{}, storage.EnrollmentFilter{OSVersion: "15.1"}, next, 7)
	require.ErrorIs(t, err, storage.ErrPlace)
}

func inventoryBounded(t *testing.T, h *Harness) {
	ids := make([]string, 12_000)
	for i := range ids {
		ids[i] = fmt.Sprintf("D%05d", i)
	}
	plantEnrollments(t, h, ids)
	f := storage.EnrollmentFilter{Topic: topicA, Type: mdm.User}
	found, next, err := h.Store.FindEnrollments(t.Context(), storage.Scope{}, f, storage.EnrollmentKey{}, 10)
	require.NoError(t, err)
	require.Empty(t, found)
	require.GreaterOrEqual(t, next.Key, "D09000")
	require.Less(t, next.Key, "D11000", "after some 10,000 rows")
	found, next, err = h.Store.FindEnrollments(t.Context(), storage.Scope{}, f, next, 10)
	require.NoError(t, err)
	require.Empty(t, found)
	require.Zero(t, next)
}

func inventoryManyCommands(t *testing.T, h *Harness) {
	h.Enroll(t, "a", "b", "c")
	for _, id := range []string{"b", "c"} {
		var rows []any
		for i := range 3000 {
			rows = append(rows, id, fmt.Sprintf("C%04d", i), i, int(storage.Queued), 1)
		}
		for chunk := range slices.Chunk(rows, 5*1000) {
			h.Exec(t, "INSERT INTO nano_enrollment_queue (id, command_uuid, seq, state, created_at) VALUES "+places(5, len(chunk)/5), chunk...)
		}
	}
	for _, limit := range []int{1, 2, 3, 100} {
		require.Equal(t, []string{"b", "c"}, h.found(t, storage.Scope{}, storage.EnrollmentFilter{Waiting: new(true)}, limit))
	}
}

func inventoryScope(t *testing.T, h *Harness) {
	inventory(t, h)
	a, b := storage.Scope{Topics: []string{topicA}}, storage.Scope{Topics: []string{topicB, "nobody's"}}
	require.Equal(t, []string{"phone"}, h.found(t, b, storage.EnrollmentFilter{}, 1))
	require.Equal(t, []string{"gone", "mac", "mac:anna", "off", "pad"}, h.found(t, a, storage.EnrollmentFilter{}, 1))
	require.Equal(t, []string{"phone"}, h.found(t, b, storage.EnrollmentFilter{Model: "P1LL/A"}, 10))
	require.Empty(t, h.found(t, b, storage.EnrollmentFilter{Topic: topicA}, 10))
	many := storage.Scope{Topics: append([]string{topicB}, numbered("t", 100)...)}
	require.Equal(t, []string{"phone"}, h.found(t, many, storage.EnrollmentFilter{}, 1))

	list, err := h.Store.Enrollments(t.Context(), b, []string{"mac", "phone"})
	require.NoError(t, err)
	require.Len(t, list, 1)
	require.Equal(t, "phone", list[0].ID)
	channels, err := h.Store.UserChannels(t.Context(), b, "mac", 10)
	require.NoError(t, err)
	require.Empty(t, channels)
}

func inventoryRead(t *testing.T, h *Harness) {
	began := h.Clock.Now()
	d := h.device("D").with("c1").facts(t, topicA, mdm.Authenticate{
		SerialNumber: "S", DeviceName: "name", Model: "m", ModelName: "mn", ProductName: "pn", OSVersion: "15.1", BuildVersion: "24B", IMEI: "i", MEID: "e",
	})
	u := d.user("anna").tokens(t, topicA)
	u.tokens(t, topicA)
	require.NoError(t, d.setBootstrapToken(t, "token"))
	h.enqueue(t, []string{"D"}, "C1", "C2", "C3")
	now := h.Clock.Advance(time.Minute)
	d.reports(t, mdm.StatusNotNow, "C1")
	d.reports(t, mdm.StatusAcknowledged, "C2")
	require.NoError(t, h.Store.Flush(t.Context()))
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{
		ID: "D", At: now, Class: "retry_later", Status: 503, Reason: "ServiceUnavailable", APNsID: "x", Attempts: 2, NextAt: now.Add(time.Hour),
	}}))

	list, err := h.Store.Enrollments(t.Context(), storage.Scope{}, []string{"nobody", u.enroll.ID, "D", "\x00"})
	require.NoError(t, err)
	require.Len(t, list, 2)
	device, user := list[1], list[0]
	pinned := storage.PinnedCertificate{Hash: "c1", DER: []byte("DER of c1"), NotAfter: began.Add(365 * 24 * time.Hour), PinnedAt: began}
	require.Equal(t, pinned, *device.Certificate)
	require.Equal(t, pinned, *user.Certificate, "that of its device")
	device.Certificate, user.Certificate = nil, nil
	require.Equal(t, "retry_later", device.Push.LastClass)
	require.Equal(t, 503, device.Push.LastStatus)
	require.Equal(t, "ServiceUnavailable", device.Push.LastReason)
	require.Equal(t, now, device.Push.LastAt)
	require.Equal(t, 2, device.Push.Attempts)
	device.Push, user.Push = storage.PushState{}, storage.PushState{}
	require.Equal(t, storage.Enrollment{
		ID: "D", DeviceID: "D", Type: mdm.Device, Topic: topicA, Enabled: true, Tally: 1, HasBootstrapToken: true,
		SerialNumber: "S", DeviceName: "name", Model: "m", ModelName: "mn", ProductName: "pn", OSVersion: "15.1", BuildVersion: "24B", IMEI: "i", MEID: "e",
		BegunAt: began, EnrolledAt: began, CreatedAt: began, LastSeenAt: now, Queue: map[storage.State]int64{storage.NotNow: 1, storage.Queued: 1},
	}, device)
	require.Equal(t, storage.Enrollment{
		ID: "D:anna", DeviceID: "D", Type: mdm.User, Topic: topicA, Enabled: true, Tally: 2, HasBootstrapToken: true,
		UserID: "anna", UserShortName: "short", UserLongName: "long",
		SerialNumber: "S", DeviceName: "name", Model: "m", ModelName: "mn", ProductName: "pn", OSVersion: "15.1", BuildVersion: "24B", IMEI: "i", MEID: "e",
		BegunAt: began, EnrolledAt: began, CreatedAt: began, LastSeenAt: began, Queue: map[storage.State]int64{},
	}, user)

	channels, err := h.Store.UserChannels(t.Context(), storage.Scope{}, "D", 10)
	require.NoError(t, err)
	require.Equal(t, []string{"D:anna"}, channels)
	list, err = h.Store.Enrollments(t.Context(), storage.Scope{}, nil)
	require.NoError(t, err)
	require.Empty(t, list)
}

func inventoryStatistics(t *testing.T, h *Harness) {
	none, err := h.Store.Statistics(t.Context(), storage.Scope{})
	require.NoError(t, err)
	require.Equal(t, storage.Statistics{ByType: map[mdm.EnrollType]int64{}, Queue: map[storage.State]int64{}}, *none)

	inventory(t, h)
	began := h.Clock.Now()
	h.enqueue(t, []string{"mac", "phone", "pad"}, "C1")
	h.Clock.Advance(time.Minute)
	h.enqueue(t, []string{"mac", "pad"}, "C2")
	h.device("mac").reports(t, mdm.StatusAcknowledged, "C1")
	h.device("pad").reports(t, mdm.StatusNotNow, "C1")
	h.device("pad").polls(t)
	h.device("pad").reports(t, mdm.StatusNotNow, "C1")
	require.NoError(t, h.Store.Flush(t.Context()))
	h.Clock.Advance(time.Minute)
	h.accepted(t, "pad", time.Hour)
	all, err := h.Store.Statistics(t.Context(), storage.Scope{})
	require.NoError(t, err)
	require.Equal(t, storage.Statistics{
		ByType:  map[mdm.EnrollType]int64{mdm.Device: 4, mdm.User: 1, mdm.UserEnrollmentDevice: 1},
		Enabled: 4, Disabled: 1, NotEnrolled: 1,
		Queue:         map[storage.State]int64{storage.Queued: 3, storage.NotNow: 1, storage.Acknowledged: 1},
		OldestWaiting: began, PushesOwed: all.PushesOwed, PushesUnanswered: 1,
	}, *all)
	require.Positive(t, all.PushesOwed)

	b, err := h.Store.Statistics(t.Context(), storage.Scope{Topics: []string{topicB}})
	require.NoError(t, err)
	require.Equal(t, storage.Statistics{
		ByType: map[mdm.EnrollType]int64{mdm.Device: 1}, Enabled: 1, Queue: map[storage.State]int64{storage.Queued: 1}, OldestWaiting: began, PushesOwed: 1,
	}, *b)
}

func inventoryPushCert(t *testing.T, h *Harness) {
	_, err := h.Store.PushCertState(t.Context(), topicA)
	require.ErrorIs(t, err, storage.ErrNotFound)
	now := h.Clock.Now()
	stored := &storage.PushCert{Topic: topicA, CertPEM: []byte("c"), KeyPEM: []byte("k"), NotAfter: now.Add(time.Hour)}
	require.NoError(t, h.Store.StorePushCert(t.Context(), stored))
	require.NoError(t, h.Store.RecordPushCertOutcome(t.Context(), topicA, "certificate_fault", now))
	state, err := h.Store.PushCertState(t.Context(), topicA)
	require.NoError(t, err)
	require.Equal(t, storage.PushCertInfo{Topic: topicA, NotAfter: now.Add(time.Hour), Version: stored.Version, UpdatedAt: now, LastClass: "certificate_fault", LastAt: now}, *state)
}
