package storagetest

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func answerTests() []subtest {
	return []subtest{
		{"answers become the inventory, each part with its time", answersKept},
		{"an answer to a few queries leaves the other values", answersMerged},
		{"an answer updates names, model and OS of the device", answersUpdateDevice},
		{"only a report that ends its row counts", answersOfEndedRows},
		{"a list of some applications is no inventory", answersOfSome},
		{"the filters find what devices answered", answersFiltered},
		{"devices answer at once, on two stores", answersAtOnce},
		{"answers from before a move to another topic are out of sight", answersMove},
		{"the inventory goes with the device", answersDeleted},
	}
}

// answers acknowledges a command with an inventory.
func (c *channel) answers(t *testing.T, uuid string, inv mdm.Inventory) {
	t.Helper()
	require.NoError(t, c.answer(t, mdm.StatusAcknowledged, uuid, inv))
}

func (c *channel) answer(t *testing.T, status mdm.Status, uuid string, inv mdm.Inventory) error {
	t.Helper()
	_, err := c.apply(t, &storage.Report{Src: c.source(), Status: status, CommandUUID: uuid, Raw: []byte("answer to " + uuid), Inventory: &inv})
	return err
}

// inventoryOf reads what a device answered.
func (h *Harness) inventoryOf(t *testing.T, scope storage.Scope, id string) storage.DeviceInventory {
	t.Helper()
	inv, err := h.Store.DeviceInventory(t.Context(), scope, id)
	require.NoError(t, err)
	return *inv
}

// asksApplications queues an InstalledApplicationList with further keys.
func (h *Harness) asksApplications(t *testing.T, uuid, keys string, ids ...string) {
	t.Helper()
	raw := fmt.Sprintf(`<plist version="1.0"><dict><key>CommandUUID</key><string>%s</string><key>Command</key><dict>`+
		`<key>RequestType</key><string>InstalledApplicationList</string>%s</dict></dict></plist>`, uuid, keys)
	failed, err := h.Store.Enqueue(t.Context(), everything, &storage.Enqueue{
		Command: &mdm.Command{CommandUUID: uuid, RequestType: "InstalledApplicationList", Raw: []byte(raw)}, IDs: ids,
	})
	require.NoError(t, err)
	require.Empty(t, failed)
}

var someApplications = mdm.Applications{Count: 2, Items: []mdm.Application{{Identifier: "com.example.a", Name: "Ä", Version: "1.2", Build: "12"}, {Name: "b"}}}

func answersKept(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	d := h.device("D")
	d.user("anna").enrolls(t)
	require.Equal(t, storage.DeviceInventory{}, h.inventoryOf(t, everything, "D"))
	_, err := h.Store.DeviceInventory(t.Context(), everything, "nobody")
	require.ErrorIs(t, err, storage.ErrNotFound)

	h.enqueue(t, []string{"D"}, "C1", "C2")
	h.asksApplications(t, "C3", "", "D")
	information := mdm.DeviceInformation{OSVersion: "15.1", Supervised: new(true), Capacity: new(494.38)}
	security := mdm.SecurityInfo{FileVault: new(false), SecureBoot: "full"}
	first := h.Clock.Advance(time.Minute)
	d.answers(t, "C1", mdm.Inventory{Information: &information})
	second := h.Clock.Advance(time.Minute)
	d.answers(t, "C2", mdm.Inventory{Security: &security})
	third := h.Clock.Advance(time.Minute)
	d.answers(t, "C3", mdm.Inventory{Applications: &someApplications})
	want := storage.DeviceInventory{
		Information: &information, InformationAt: first, Security: &security, SecurityAt: second,
		Applications: &someApplications, ApplicationsAt: third,
	}
	require.Equal(t, want, h.inventoryOf(t, everything, "D"))
	require.Equal(t, want, h.inventoryOf(t, everything, "D:anna"), "that of its device")
	list, err := h.Store.Enrollments(t.Context(), everything, []string{"D", "D:anna"})
	require.NoError(t, err)
	for _, e := range list {
		require.True(t, *e.Supervised)
		require.False(t, *e.FileVault)
	}
	result, err := h.Store.CommandResult(t.Context(), everything, "D", "C2")
	require.NoError(t, err)
	require.Equal(t, "answer to C2", string(result.Raw), "the raw answer stays")
}

func answersMerged(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	d := h.device("D")
	h.enqueue(t, []string{"D"}, numbered("C", 3)...)
	d.answers(t, "C00", mdm.Inventory{Information: &mdm.DeviceInformation{OSVersion: "15.1", HostName: "host", Supervised: new(true)}})
	d.answers(t, "C01", mdm.Inventory{Information: &mdm.DeviceInformation{OSVersion: "15.2", BatteryLevel: new(0.5)}})
	require.Equal(t, mdm.DeviceInformation{OSVersion: "15.2", HostName: "host", Supervised: new(true), BatteryLevel: new(0.5)}, *h.inventoryOf(t, everything, "D").Information)
	require.Equal(t, []string{"D"}, h.found(t, everything, storage.EnrollmentFilter{Supervised: new(true)}, 10))
	d.answers(t, "C02", mdm.Inventory{Information: &mdm.DeviceInformation{Supervised: new(false)}})
	require.Equal(t, []string{"D"}, h.found(t, everything, storage.EnrollmentFilter{Supervised: new(false)}, 10))
}

func answersUpdateDevice(t *testing.T, h *Harness) {
	d := h.device("D").facts(t, topicA, mdm.Authenticate{SerialNumber: "S", DeviceName: "old", Model: "m", OSVersion: "14.0", BuildVersion: "23A"})
	h.enqueue(t, []string{"D"}, "C1", "C2")
	d.answers(t, "C1", mdm.Inventory{Information: &mdm.DeviceInformation{DeviceName: "new " + strings.Repeat("ä", 255), OSVersion: "15.1", ProductName: "Mac14,2"}})
	list, err := h.Store.Enrollments(t.Context(), everything, []string{"D"})
	require.NoError(t, err)
	e := list[0]
	require.Equal(t, []string{"S", "new " + strings.Repeat("ä", 251), "m", "15.1", "23A", "Mac14,2"}, []string{e.SerialNumber, e.DeviceName, e.Model, e.OSVersion, e.BuildVersion, e.ProductName})
	require.Equal(t, []string{"D"}, h.found(t, everything, storage.EnrollmentFilter{OSVersion: "15.1", Model: "Mac14,2"}, 10))

	h.Clock.Advance(time.Minute)
	d.facts(t, topicA, mdm.Authenticate{SerialNumber: "S", OSVersion: "15.2"})
	require.Equal(t, []string{"D"}, h.found(t, everything, storage.EnrollmentFilter{OSVersion: "15.2"}, 10), "the last word counts")
}

func answersOfEndedRows(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	d := h.device("D")
	says := func(version string) mdm.Inventory {
		return mdm.Inventory{Information: &mdm.DeviceInformation{OSVersion: version}}
	}
	d.answers(t, "unknown", says("1"))
	h.enqueue(t, []string{"D"}, "C1", "C2")
	require.NoError(t, d.answer(t, mdm.StatusNotNow, "C1", says("2")))
	_, err := h.Store.CancelItem(t.Context(), everything, "D", "C2", auditRecord("c"))
	require.NoError(t, err)
	d.answers(t, "C2", says("3"))
	require.Equal(t, storage.DeviceInventory{}, h.inventoryOf(t, everything, "D"))
	d.answers(t, "C1", says("4"))
	d.answers(t, "C1", says("5"))
	require.Equal(t, "4", h.inventoryOf(t, everything, "D").Information.OSVersion, "repeated")
	u := d.user("anna").enrolls(t)
	h.enqueue(t, []string{"D:anna"}, "C3")
	u.answers(t, "C3", says("6"))
	require.Equal(t, "4", h.inventoryOf(t, everything, "D").Information.OSVersion, "a user says nothing of the device")
}

func answersOfSome(t *testing.T, h *Harness) {
	h.Enroll(t, "D")
	h.asksApplications(t, "C1", "<key>ManagedAppsOnly</key><true/>", "D")
	h.asksApplications(t, "C2", "<key>Identifiers</key><array><string>com.example.a</string></array>", "D")
	h.asksApplications(t, "C3", "<key>ManagedAppsOnly</key><false/><key>Identifiers</key><array/>", "D")
	h.enqueue(t, []string{"D"}, "C4") // another request type
	for _, uuid := range []string{"C1", "C2", "C4"} {
		h.device("D").answers(t, uuid, mdm.Inventory{Applications: &someApplications})
		require.Nil(t, h.inventoryOf(t, everything, "D").Applications, uuid)
	}
	h.device("D").answers(t, "C3", mdm.Inventory{Applications: &someApplications})
	require.Equal(t, 2, h.inventoryOf(t, everything, "D").Applications.Count)
}

func answersFiltered(t *testing.T, h *Harness) {
	versions := []string{"", "9.3.5", "14", "14.0", "14.7.2", "15.1", "15.10", "15.9 beta"}
	for i, version := range versions {
		h.device(fmt.Sprint("D", i)).facts(t, topicA, mdm.Authenticate{OSVersion: version})
	}
	h.device("D5").user("anna").enrolls(t)
	h.enqueue(t, []string{"D1", "D5", "D6"}, "C1")
	for id, on := range map[string]bool{"D1": false, "D5": true, "D6": true} {
		h.device(id).answers(t, "C1", mdm.Inventory{Security: &mdm.SecurityInfo{FileVault: &on}})
	}
	for name, c := range map[string]struct {
		f    storage.EnrollmentFilter
		want string
	}{
		"below":              {storage.EnrollmentFilter{OSVersionBelow: "14"}, "D1"},
		"below with a patch": {storage.EnrollmentFilter{OSVersionBelow: "14.7.2"}, "D1 D2 D3"},
		"from":               {storage.EnrollmentFilter{OSVersionFrom: "15.2"}, "D6"},
		"from itself":        {storage.EnrollmentFilter{OSVersionFrom: "15.1.0"}, "D5 D5:anna D6"},
		"within":             {storage.EnrollmentFilter{OSVersionFrom: "14", OSVersionBelow: "15"}, "D2 D3 D4"},
		"filevault":          {storage.EnrollmentFilter{FileVault: new(true)}, "D5 D5:anna D6"},
		"no filevault":       {storage.EnrollmentFilter{FileVault: new(false)}, "D1"},
		"both":               {storage.EnrollmentFilter{FileVault: new(true), OSVersionBelow: "15.2", Type: mdm.Device}, "D5"},
		"not supervised":     {storage.EnrollmentFilter{Supervised: new(false)}, ""},
	} {
		for _, limit := range []int{1, 100} {
			require.Equal(t, strings.Fields(c.want), h.found(t, everything, c.f, limit), "%s, %d a page", name, limit)
			require.Equal(t, strings.Fields(c.want), h.found(t, tenantA, c.f, limit), "%s, %d a page, with a scope", name, limit)
		}
	}
}

func answersAtOnce(t *testing.T, h *Harness) {
	const rounds = 10
	ids := numbered("D", 12)
	h.Enroll(t, ids...)
	var uuids []string
	for round := range rounds {
		uuids = append(uuids, fmt.Sprint("info", round), fmt.Sprint("security", round))
	}
	h.enqueue(t, ids, uuids...)
	stores := h.stores(t)
	errs := together(2*len(ids), func(i int) error {
		d := h.device(ids[i/2]).on(stores[i%2])
		for round := range rounds {
			uuid, inv := fmt.Sprint("info", round), mdm.Inventory{Information: &mdm.DeviceInformation{OSVersion: fmt.Sprint(round)}}
			if i%2 == 1 {
				uuid, inv = fmt.Sprint("security", round), mdm.Inventory{Security: &mdm.SecurityInfo{FileVault: new(round%2 == 1)}}
			}
			if err := d.answer(t, mdm.StatusAcknowledged, uuid, inv); err != nil {
				return fmt.Errorf("%s: %w", uuid, err)
			}
		}
		return nil
	})
	require.NoError(t, errors.Join(errs...))
	for _, id := range ids {
		inv := h.inventoryOf(t, everything, id)
		require.Equal(t, fmt.Sprint(rounds-1), inv.Information.OSVersion, id)
		require.True(t, *inv.Security.FileVault, id)
	}
	require.Equal(t, ids, h.found(t, everything, storage.EnrollmentFilter{OSVersion: fmt.Sprint(rounds - 1)}, 100))
}

func answersMove(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.enqueue(t, []string{"D"}, "C1", "C2")
	h.asksApplications(t, "C3", "", "D")
	d.answers(t, "C1", mdm.Inventory{Information: &mdm.DeviceInformation{HostName: "secret", Supervised: new(true)}})
	d.answers(t, "C2", mdm.Inventory{Security: &mdm.SecurityInfo{FileVault: new(true)}})
	d.answers(t, "C3", mdm.Inventory{Applications: &someApplications})
	h.Clock.Advance(time.Minute)
	require.NoError(t, d.begins(t, topicB))
	require.NoError(t, d.saysToken(t, topicB))
	require.Equal(t, storage.DeviceInventory{}, h.inventoryOf(t, tenantB, "D"))
	_, err := h.Store.DeviceInventory(t.Context(), tenantA, "D")
	require.ErrorIs(t, err, storage.ErrNotFound)
	require.Empty(t, h.found(t, tenantB, storage.EnrollmentFilter{FileVault: new(true)}, 10))
	require.Empty(t, h.found(t, tenantB, storage.EnrollmentFilter{Supervised: new(true)}, 10))
	list, err := h.Store.Enrollments(t.Context(), tenantB, []string{"D"})
	require.NoError(t, err)
	require.Nil(t, list[0].FileVault)
	require.Nil(t, list[0].Supervised)
	require.Equal(t, []string{"D"}, h.found(t, everything, storage.EnrollmentFilter{FileVault: new(true)}, 10))

	h.Clock.Advance(time.Minute)
	h.enqueue(t, []string{"D"}, "C4")
	d.answers(t, "C4", mdm.Inventory{Security: &mdm.SecurityInfo{FileVault: new(false)}})
	require.Equal(t, []string{"D"}, h.found(t, tenantB, storage.EnrollmentFilter{FileVault: new(false)}, 10))
	require.Nil(t, h.inventoryOf(t, tenantB, "D").Information)
}

func answersDeleted(t *testing.T, h *Harness) {
	d := h.device("D").with("c1").enrolls(t)
	h.enqueue(t, []string{"D"}, "C1")
	d.answers(t, "C1", mdm.Inventory{Security: &mdm.SecurityInfo{FileVault: new(true)}})
	h.Clock.Advance(time.Minute)
	require.NoError(t, d.checkOut(t))
	require.NotNil(t, h.inventoryOf(t, everything, "D").Security)
	require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("delete")))
	require.Zero(t, h.Int(t, "SELECT COUNT(*) FROM nano_device_inventory"))
	h.device("D").with("c2").enrolls(t)
	require.Equal(t, storage.DeviceInventory{}, h.inventoryOf(t, everything, "D"))
}
