package httpapi_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// enrollMac enrolls a device whose product name and OS are known.
func (o *operators) enrollMac(id, product, version string) {
	o.t.Helper()
	o.enroll(id, "com.apple.mgmt.a")
	who := mdm.Enrollment{UDID: id}
	for _, op := range []storage.Op{
		&storage.Authenticate{Src: storage.Source{Enroll: enrollID(id)}, Message: &mdm.Authenticate{
			Enrollment: who, Topic: "com.apple.mgmt.a", ProductName: product, OSVersion: version,
			SerialNumber: "serial of " + id, DeviceName: "Mac of " + id, Raw: []byte("raw")}},
		&storage.TokenUpdate{Src: storage.Source{Enroll: enrollID(id)}, Message: &mdm.TokenUpdate{
			Enrollment: who, Topic: "com.apple.mgmt.a", PushMagic: "m", Token: tokenOf(id), Raw: []byte("raw")}},
	} {
		_, err := o.store.Apply(o.t.Context(), op)
		require.NoError(o.t, err)
	}
}

func TestWarnings(t *testing.T) {
	o := newOperators(t)
	o.enrollMac("old", "MacBookPro18,3", "10.13.6")
	o.enrollMac("new", "MacBookPro18,3", "15.1")
	o.enrollMac("phone", "iPhone16,1", "18.1")
	const toAll = `"ids":["old","new","phone"],`
	for _, c := range []struct {
		name, path, body string
		want             []string // in the answer; none if empty
	}{
		{"sound", "/v1/commands", toAll + `"request_type":"DeviceInformation","Queries":["OSVersion"]`, nil},
		{"unknown type", "/v1/commands", toAll + `"request_type":"DeviceInfo"`, []string{"did you mean DeviceInformation?"}},
		{"missing key", "/v1/commands", toAll + `"request_type":"InstallProfile"`, []string{"Payload: this required key is missing"}},
		{"unknown key and wrong type", "/v1/commands", toAll + `"request_type":"DeviceLock","PIN":123456,"Pin":"x"`,
			[]string{"PIN: the type is integer, and string is expected", "Pin: there is no such key; did you mean PIN?"}},
		{"platform", "/v1/commands", toAll + `"request_type":"EnableLostMode","Message":"m"`, []string{"EnableLostMode: macOS does not have it: 2 enrollments, such as new"}},
		{"version", "/v1/commands", `"ids":["old","new"],"request_type":"EnableRemoteDesktop"`,
			[]string{"EnableRemoteDesktop: macOS has it from 10.14.4 on, and the device has 10.13.6: old"}},
		{"selector", "/v1/commands", `"selector":{"enabled":true},"request_type":"EnableLostMode","Message":"m"`, []string{"2 enrollments, such as new"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := o.asks(o.admin(), 200, "POST", c.path, "{"+c.body+"}")
			requireWarnings(t, c.want, v)
			want := 200
			if len(c.want) > 0 {
				want = 400
			}
			v = o.asks(o.admin(), want, "POST", c.path+"?strict=1", "{"+c.body+`,"command_uuid":"`+c.name+`"}`)
			requireWarnings(t, c.want, v)
			if want == 400 {
				require.Contains(t, v["error"], "strict: ")
				o.asks(o.admin(), 404, "GET", "/v1/commands/"+strings.ReplaceAll(c.name, " ", "%20"), "")
			}
		})
	}
}

func requireWarnings(t *testing.T, want []string, v map[string]any) {
	t.Helper()
	if len(want) == 0 {
		require.NotContains(t, v, "warnings")
		return
	}
	text, err := json.Marshal(v["warnings"])
	require.NoError(t, err)
	require.Len(t, v["warnings"], len(want), string(text))
	for i, sentence := range want {
		require.Contains(t, v["warnings"].([]any)[i], sentence)
	}
}

// A property list is queued byte for byte, whatever its warnings are, and
// NanoMDM's endpoint looks at enrollments only when it is asked to be strict.
func TestWarningsOfPropertyLists(t *testing.T) {
	o := newOperators(t)
	o.enrollMac("mac", "MacBookPro18,3", "15.1")
	raw := func(uuid string) string {
		return fmt.Sprintf("<plist version=\"1.0\"><dict>\n <key>CommandUUID</key><string>%s</string><key>Command</key><dict><key>RequestType</key><string>PlayLostModeSound</string><key>Odd</key><true/></dict></dict></plist>", uuid)
	}
	odd, platform := "Odd: there is no such key", "PlayLostModeSound: macOS does not have it: mac"
	requireWarnings(t, []string{odd}, o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac", raw("A")))
	_, got := o.report("mac", "Idle", "")
	require.Equal(t, raw("A"), got)
	requireWarnings(t, []string{odd, platform}, o.asks(o.admin(), 400, "PUT", "/v1/enqueue/mac?strict=1", raw("B")))
	body := fmt.Sprintf(`{"ids":["mac"],"plist":%q}`, base64.StdEncoding.EncodeToString([]byte(raw("C"))))
	requireWarnings(t, []string{odd, platform}, o.asks(o.admin(), 200, "POST", "/v1/enqueue", body))
	requireWarnings(t, []string{odd, platform}, o.asks(o.admin(), 400, "POST", "/v1/enqueue?strict=1", body))
	status, answer, _ := o.do(o.admin(), "POST", "/v1/enqueue?strict=yes", body)
	require.Equal(t, 400, status)
	require.Contains(t, answer, "strict: use 0 or 1")
}

// MicroMDM's keys are in lower case.
func TestMicroMDMsKeys(t *testing.T) {
	o := newOperators(t)
	o.enrollMac("mac", "MacBookPro18,3", "15.1")
	for body, want := range map[string]string{
		`"request_type":"InstallProfile","payload":"cHJvZmlsZQ=="`:                                     "<key>Payload</key><data>cHJvZmlsZQ==</data>",
		`"request_type":"DeviceInformation","queries":["OSVersion"]`:                                   "<key>Queries</key><array><string>OSVersion</string></array>",
		`"request_type":"Settings","settings":[{"item":"DeviceName","device_name":"Ann"}]`:             "<key>DeviceName</key><string>Ann</string><key>Item</key><string>DeviceName</string>",
		`"request_type":"InstallApplication","manifest_url":"https://example.org/a","ITunesStoreID":1`: "<key>ManifestURL</key><string>https://example.org/a</string>",
	} {
		v := o.asks(o.admin(), 200, "POST", "/v1/commands", `{"udid":"mac",`+body+`}`)
		next, raw := o.report("mac", "Idle", "")
		require.Equal(t, v["command_uuid"], next)
		require.Contains(t, strings.ReplaceAll(raw, "\n", ""), want)
		o.report("mac", "Acknowledged", next)
	}
}
