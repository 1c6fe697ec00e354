package mdm_test

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/groob/plist"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
)

func decodeJSON(t testing.TB, text string) (keys map[string]any) {
	t.Helper()
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	require.NoError(t, dec.Decode(&keys))
	return keys
}

// encoded is the Command of a property list that was made from JSON.
func encoded(t *testing.T, requestType, keys string) map[string]any {
	t.Helper()
	c, err := mdm.EncodeCommand("U", requestType, decodeJSON(t, keys))
	require.NoError(t, err)
	require.Equal(t, "U", c.CommandUUID)
	require.Equal(t, requestType, c.RequestType)
	var whole struct {
		CommandUUID string
		Command     map[string]any
	}
	require.NoError(t, plist.Unmarshal(c.Raw, &whole), string(c.Raw))
	require.Equal(t, "U", whole.CommandUUID)
	require.Equal(t, requestType, whole.Command["RequestType"])
	delete(whole.Command, "RequestType")
	return whole.Command
}

func TestEncodeCommand(t *testing.T) {
	data := []byte("data")
	for _, tc := range []struct {
		name, requestType, keys string
		want                    map[string]any
	}{
		{"nothing", "ProfileList", `{}`, map[string]any{}},
		{"null", "ProfileList", `null`, map[string]any{}},
		{"text", "RemoveProfile", `{"Identifier":"a <b> & \"c\"\r\n\t\u00e9"}`, map[string]any{"Identifier": "a <b> & \"c\"\r\n\té"}},
		{"numbers", "X", `{"A":1,"B":-9223372036854775808,"C":1.5,"D":1e3,"E":18446744073709551615}`, map[string]any{
			"A": uint64(1), "B": int64(-9223372036854775808), "C": 1.5, "D": 1000.0, "E": uint64(18446744073709551615),
		}},
		{"truth", "RestartDevice", `{"NotifyUser":true,"X":false}`, map[string]any{"NotifyUser": true, "X": false}},
		{"lists and dicts", "DeviceInformation", `{"Queries":["UDID","OSVersion"],"D":{"E":[]}}`, map[string]any{
			"Queries": []any{"UDID", "OSVersion"}, "D": map[string]any{"E": []any{}},
		}},
		{"data", "InstallProfile", `{"Payload":"ZGF0YQ=="}`, map[string]any{"Payload": data}},
		{"data without padding, with line ends", "InstallProfile", `{"Payload":"ZG\nF0Y\r\nQ"}`, map[string]any{"Payload": data}},
		{"no data", "DeclarativeManagement", `{"Data":""}`, map[string]any{"Data": []byte(nil)}},
		{"data in a list", "InstallEnterpriseApplication", `{"ManifestURLPinningCerts":["ZGF0YQ==","ZGF0YQ=="]}`, map[string]any{"ManifestURLPinningCerts": []any{data, data}}},
		{"data in a dict", "EraseDevice", `{"ReturnToService":{"Enabled":true,"WiFiProfileData":"ZGF0YQ=="}}`, map[string]any{
			"ReturnToService": map[string]any{"Enabled": true, "WiFiProfileData": data},
		}},
		{"data in a dict in a list", "Settings", `{"Settings":[{"Item":"Wallpaper","Image":"ZGF0YQ==","Where":1}]}`, map[string]any{
			"Settings": []any{map[string]any{"Item": "Wallpaper", "Image": data, "Where": uint64(1)}},
		}},
		{"a key of that name elsewhere", "Settings", `{"Image":"ZGF0YQ=="}`, map[string]any{"Image": "ZGF0YQ=="}},
		{"of another command", "X", `{"Payload":"ZGF0YQ=="}`, map[string]any{"Payload": "ZGF0YQ=="}},
		{"explicit data", "X", `{"A":{"$data":"ZGF0YQ=="},"B":[{"$data":""}]}`, map[string]any{"A": data, "B": []any{[]byte(nil)}}},
		{"explicit data where it is known", "InstallProfile", `{"Payload":{"$data":"ZGF0YQ=="}}`, map[string]any{"Payload": data}},
		{"explicit date", "X", `{"A":{"$date":"2026-03-01T13:00:00.5+01:00"}}`, map[string]any{"A": time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}},
		{"no explicit form", "X", `{"A":{"$data":"ZGF0YQ==","B":1},"C":{"$data":1}}`, map[string]any{
			"A": map[string]any{"$data": "ZGF0YQ==", "B": uint64(1)}, "C": map[string]any{"$data": uint64(1)},
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, encoded(t, tc.requestType, tc.keys))
		})
	}
}

func TestEncodeCommandRefuses(t *testing.T) {
	for _, tc := range []struct{ name, uuid, requestType, keys, want string }{
		{"null", "U", "X", `{"A":{"B":[null]}}`, "A.B.[]: null has no place"},
		{"no base64", "U", "InstallProfile", `{"Payload":"<plist>"}`, "Payload: base64 is wanted"},
		{"no explicit base64", "U", "X", `{"A":{"$data":"?"}}`, "A: base64 is wanted"},
		{"no date", "U", "X", `{"A":{"$date":"yesterday"}}`, "A: a date such as"},
		{"too large", "U", "X", `{"A":18446744073709551616}`, "A: 18446744073709551616 is out of the range of an integer"},
		{"far too large", "U", "X", `{"A":1e999}`, "A: 1e999 is out of the range of a real"},
		{"no XML", "U", "X", `{"A":"\u0001"}`, "A: it has a character that XML does not have"},
		{"no XML key", "U", "X", `{"A\u0000":1}`, `"A\x00": it has a character that XML does not have`},
		{"nested", "U", "X", `{"A":` + strings.Repeat("[", 80) + strings.Repeat("]", 80) + `}`, "it nests too deep"},
		{"RequestType twice", "U", "X", `{"RequestType":"Y"}`, "RequestType is given twice"},
		{"no RequestType", "U", "", `{}`, "RequestType"},
		{"no CommandUUID", "", "X", `{}`, "CommandUUID"},
		{"a bad CommandUUID", "U\u0001", "X", `{}`, "XML"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := mdm.EncodeCommand(tc.uuid, tc.requestType, decodeJSON(t, tc.keys))
			require.ErrorContains(t, err, tc.want)
		})
	}
}

func TestEncodeCommandIsTheSameAgain(t *testing.T) {
	keys := `{"b":1,"a":{"z":[1,2],"y":true},"c":"x"}`
	first, err := mdm.EncodeCommand("U", "X", decodeJSON(t, keys))
	require.NoError(t, err)
	for range 20 {
		again, err := mdm.EncodeCommand("U", "X", decodeJSON(t, keys))
		require.NoError(t, err)
		require.Equal(t, string(first.Raw), string(again.Raw))
	}
}

// A property list made of any JSON is one for other parsers, too.
func FuzzEncodeCommand(f *testing.F) {
	f.Add("InstallProfile", `{"Payload":"ZGF0YQ=="}`)
	f.Add("Settings", `{"Settings":[{"Item":"Wallpaper","Image":"","Where":1.5e3}]}`)
	f.Add("X", `{"A":{"$date":"2026-03-01T13:00:00Z"},"B":[true,null],"\u0000":"]]>"}`)
	f.Fuzz(func(t *testing.T, requestType, text string) {
		dec := json.NewDecoder(strings.NewReader(text))
		dec.UseNumber()
		var keys map[string]any
		if dec.Decode(&keys) != nil {
			return
		}
		c, err := mdm.EncodeCommand("U", requestType, keys)
		if err != nil {
			require.True(t, errors.Is(err, mdm.ErrMalformed) || errors.Is(err, mdm.ErrMissingKey), err)
			return
		}
		var whole map[string]any
		require.NoError(t, plist.Unmarshal(c.Raw, &whole), string(c.Raw))
		require.Equal(t, "U", whole["CommandUUID"])
		command := whole["Command"].(map[string]any)
		require.Len(t, command, len(keys)+1)
		require.Equal(t, requestType, command["RequestType"])
	})
}
