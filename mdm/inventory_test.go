package mdm

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/stretchr/testify/require"
)

// answerWith is an acknowledgement with further keys.
func answerWith(keys string) []byte {
	return []byte(`<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict><key>UDID</key><string>D</string><key>Status</key><string>Acknowledged</string>` +
		`<key>CommandUUID</key><string>C</string>` + keys + `</dict></plist>`)
}

func inventoryOf(t *testing.T, keys string) *Inventory {
	t.Helper()
	m, err := DecodeReport(answerWith(keys))
	require.NoError(t, err)
	return m.Inventory()
}

func TestInventory(t *testing.T) {
	require.Nil(t, inventoryOf(t, ``))
	require.Nil(t, inventoryOf(t, `<key>QueryResponses</key><string>x</string><key>SecurityInfo</key><array/><key>InstalledApplicationList</key><dict/>`))
	require.Equal(t, &Inventory{Information: &DeviceInformation{}}, inventoryOf(t, `<key>QueryResponses</key><dict/><key>OSVersion</key><string>9</string>`), "what follows is not in it")

	inv := inventoryOf(t, `<key>QueryResponses</key><dict>
<key>OSVersion</key><string>15.1.1</string><key>BuildVersion</key><integer>24</integer><key>DeviceName</key><string>A&amp;B</string>
<key>IsSupervised</key><true/><key>DeviceCapacity</key><real>494.38</real><key>AvailableDeviceCapacity</key><integer>300</integer>
<key>BatteryLevel</key><real>nan</real><key>IsMultiUser</key><string>yes</string>
<key>ServiceSubscriptions</key><array><dict><key>OSVersion</key><string>no</string></dict></array>
<key>ProductName</key><string>Mac14,2</string></dict>`)
	require.Equal(t, &DeviceInformation{OSVersion: "15.1.1", BuildVersion: "24", DeviceName: "A&B", ProductName: "Mac14,2",
		Supervised: new(true), Capacity: new(494.38), Available: new(300.0)}, inv.Information)

	inv = inventoryOf(t, `<key>SecurityInfo</key><dict><key>FDE_Enabled</key><true/><key>FDE_PersonalRecoveryKeyCMS</key><data>c2VjcmV0</data>
<key>FirewallSettings</key><dict><key>FirewallEnabled</key><false/><key>Applications</key><array><dict><key>StealthMode</key><true/></dict></array></dict>
<key>FirmwarePasswordStatus</key><dict><key>PasswordExists</key><true/></dict><key>SecureBoot</key><dict><key>SecureBootLevel</key><string>full</string></dict>
<key>ManagementStatus</key><dict><key>EnrolledViaDEP</key><true/><key>UserApprovedEnrollment</key><true/></dict><key>RemoteDesktopEnabled</key><dict/></dict>`)
	require.Equal(t, &SecurityInfo{FileVault: new(true), Firewall: new(false), FirmwarePassword: new(true), SecureBoot: "full",
		EnrolledViaDEP: new(true), UserApproved: new(true)}, inv.Security)

	inv = inventoryOf(t, `<key>InstalledApplicationList</key><array><dict><key>Identifier</key><string>com.example.a</string><key>Name</key><string>A</string>
<key>ShortVersion</key><string>1.2</string><key>Version</key><string>1234</string><key>BundleSize</key><integer>5</integer></dict><string>odd</string><dict/></array>`)
	require.Equal(t, &Applications{Count: 3, Items: []Application{{"com.example.a", "A", "1.2", "1234"}}}, inv.Applications)
}

// What a device says costs bounded space, and a body that is no clean XML is
// read all the same.
func TestInventoryIsBounded(t *testing.T) {
	long := strings.Repeat("ä", 1000)
	item := `<dict><key>Name</key><string>` + long + `</string></dict>`
	inv := inventoryOf(t, `<key>InstalledApplicationList</key><array>`+strings.Repeat(item, 5000)+`</array>`)
	require.Equal(t, 5000, inv.Applications.Count)
	require.Len(t, inv.Applications.Items, (maxApplicationBytes+2*MaxInventoryText-1)/(2*MaxInventoryText))
	inv = inventoryOf(t, `<key>InstalledApplicationList</key><array>`+strings.Repeat(`<dict><key>Name</key><string>x</string></dict>`, 5000)+`</array>`)
	require.Len(t, inv.Applications.Items, MaxApplications)

	inv = inventoryOf(t, "<key>QueryResponses</key><dict><key>OSVersion</key><string>1\x01\xff</string><key>DeviceName</key><string>"+long+"</string></dict>")
	require.Equal(t, "1\uFFFD\uFFFD", inv.Information.OSVersion)
	require.Equal(t, strings.Repeat("ä", MaxInventoryText), inv.Information.DeviceName)
}

// FuzzInventory compares with the tree of the whole body.
func FuzzInventory(f *testing.F) {
	f.Add(answerWith(`<key>QueryResponses</key><dict><key>OSVersion</key><string>1</string><key>IsSupervised</key><true/><key>DeviceCapacity</key><real>1e999</real></dict>`))
	f.Add(answerWith(`<key>SecurityInfo</key><dict><key>FDE_Enabled</key><true/><key>FirewallSettings</key><dict><key>FirewallEnabled</key><false/></dict></dict>`))
	f.Add(answerWith(`<key>InstalledApplicationList</key><array><dict><key>Name</key><string>a<![CDATA[<]]>&#x41;</string></dict><array/><dict/></array>`))
	f.Add([]byte("<dict><key>Status</key><string>Idle</string><key>QueryResponses</key><dict /><key>SecurityInfo</key><dict>\xff</dict></dict>"))
	f.Fuzz(func(t *testing.T, body []byte) {
		m, err := DecodeReport(body)
		if err != nil {
			return
		}
		inv := m.Inventory()
		if inv == nil {
			return
		}
		tree, err := DecodePlist(body)
		require.NoError(t, err)
		text, err := json.Marshal(inv)
		require.NoError(t, err)
		require.True(t, utf8.Valid(text))
		if d := inv.Information; d != nil {
			answers := tree["QueryResponses"].(map[string]any)
			sameText(t, answers, "OSVersion", d.OSVersion)
			sameText(t, answers, "DeviceName", d.DeviceName)
			if supervised, ok := answers["IsSupervised"].(bool); ok {
				require.Equal(t, supervised, *d.Supervised)
			}
		}
		if s := inv.Security; s != nil {
			info := tree["SecurityInfo"].(map[string]any)
			if filevault, ok := info["FDE_Enabled"].(bool); ok {
				require.Equal(t, filevault, *s.FileVault)
			}
		}
		if list := inv.Applications; list != nil {
			items := tree["InstalledApplicationList"].([]any)
			require.Len(t, items, list.Count)
			if len(items) > 0 && len(list.Items) > 0 {
				if first, ok := items[0].(map[string]any); ok && len(first) > 0 {
					sameText(t, first, "Name", list.Items[0].Name)
				}
			}
		}
	})
}

func sameText(t *testing.T, dict map[string]any, key, got string) {
	t.Helper()
	require.LessOrEqual(t, utf8.RuneCountInString(got), MaxInventoryText)
	if want, ok := dict[key].(string); ok && got != "" {
		require.Equal(t, clipText(want), got)
	}
}

// BenchmarkReport shows what reading an answer costs, and what its inventory
// adds.
func BenchmarkReport(b *testing.B) {
	var apps strings.Builder
	for i := range 200 {
		fmt.Fprintf(&apps, `<dict><key>BundleSize</key><integer>%d</integer><key>Identifier</key><string>com.example.app%d</string><key>Name</key><string>App &amp; Tool %d</string>`+
			`<key>ShortVersion</key><string>1.0</string><key>Version</key><string>1.0.%d</string></dict>`, i, i, i, i)
	}
	for name, keys := range map[string]string{
		"empty":        "",
		"information":  `<key>QueryResponses</key><dict><key>OSVersion</key><string>15.1</string><key>DeviceName</key><string>Mac</string><key>IsSupervised</key><true/></dict>`,
		"applications": `<key>InstalledApplicationList</key><array>` + apps.String() + `</array>`,
	} {
		body := answerWith(keys)
		for _, read := range []bool{false, true} {
			b.Run(fmt.Sprintf("%s/inventory=%t", name, read), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					m, err := DecodeReport(body)
					if err != nil {
						b.Fatal(err)
					}
					if read {
						m.Inventory()
					}
				}
			})
		}
	}
}
