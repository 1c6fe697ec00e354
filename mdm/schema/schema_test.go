package schema

import (
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/groob/plist"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
)

// command makes a command's property list.
func command(t *testing.T, requestType string, keys map[string]any) *mdm.Command {
	t.Helper()
	all := maps.Clone(keys)
	if all == nil {
		all = make(map[string]any)
	}
	all["RequestType"] = requestType
	raw, err := plist.Marshal(map[string]any{"CommandUUID": "u", "Command": all})
	require.NoError(t, err)
	cmd, err := mdm.DecodeCommand(raw)
	require.NoError(t, err)
	return cmd
}

// example makes a value that a key's schema allows.
func example(k *Key) any {
	text := "x"
	if len(k.Values) > 0 {
		text = k.Values[0]
	}
	switch k.Kind {
	case Boolean:
		return true
	case Integer:
		var n int64
		for _, r := range strings.TrimPrefix(text, "-") {
			if r >= '0' && r <= '9' {
				n = 10*n + int64(r-'0')
			}
		}
		if strings.HasPrefix(text, "-") {
			n = -n
		}
		return n
	case Real:
		return 1.5
	case Data:
		return []byte("x")
	case Date:
		return time.Unix(0, 0).UTC()
	case Array:
		var items []any
		for i := range k.Keys {
			items = append(items, example(&k.Keys[i]))
		}
		return items
	case Dictionary:
		return examples(k.Keys)
	}
	return text
}

func examples(keys []Key) map[string]any {
	all := make(map[string]any)
	for i := range keys {
		if keys[i].Name != "ANY" {
			all[keys[i].Name] = example(&keys[i])
		}
	}
	return all
}

// Each request type of Apple's takes a command with all its keys, and is
// warned about without a required one, with an unknown one and with one of the
// wrong type.
func TestEveryRequestType(t *testing.T) {
	require.Len(t, commands(), 66, "Apple's schemas of autumn 2024")
	for requestType, c := range commands() {
		t.Run(requestType, func(t *testing.T) {
			keys := examples(c.Keys)
			require.Empty(t, Check(command(t, requestType, keys)))
			for i := range c.Keys {
				k := &c.Keys[i]
				without := maps.Clone(keys)
				delete(without, k.Name)
				if k.Required {
					require.Equal(t, []string{k.Name + ": this required key is missing"}, Check(command(t, requestType, without)))
				} else {
					require.Empty(t, Check(command(t, requestType, without)))
				}
				wrong := maps.Clone(keys)
				wrong[k.Name] = any(time.Unix(0, 0).UTC()) // no command has a date
				require.Equal(t, []string{k.Name + ": the type is date, and " + string(k.Kind) + " is expected"}, Check(command(t, requestType, wrong)))
			}
			more := maps.Clone(keys)
			more["Zzyzx"] = "x"
			require.Equal(t, []string{"Zzyzx: there is no such key"}, Check(command(t, requestType, more)))
		})
	}
}

func TestFindings(t *testing.T) {
	item := func(name string, more map[string]any) map[string]any {
		all := map[string]any{"Item": name}
		maps.Copy(all, more)
		return map[string]any{"Settings": []any{all}}
	}
	for _, c := range []struct {
		requestType string
		keys        map[string]any
		want        []string
	}{
		{"InstallProfile", nil, []string{"Payload: this required key is missing"}},
		{"InstallProfile", map[string]any{"payload": []byte("x")}, []string{
			"Payload: this required key is missing", "payload: there is no such key; did you mean Payload?"}},
		{"DeviceInfo", nil, []string{"DeviceInfo: this request type is not known; did you mean DeviceInformation?"}},
		{"deviceinformation", nil, []string{"deviceinformation: this request type is not known; did you mean DeviceInformation?"}},
		{"RestartDevcie", nil, []string{"RestartDevcie: this request type is not known; did you mean RestartDevice?"}},
		{"SomethingElse", nil, []string{"SomethingElse: this request type is not known"}},
		{"TriggerEnhancedLogCollection", map[string]any{"X": "y"}, nil},
		{"DeviceInformation", map[string]any{"Queries": []any{"OSVersion", "OsVerson", int64(1)}}, []string{
			`Queries[1]: the value "OsVerson" is not known; did you mean OSVersion?`, "Queries[2]: the type is integer, and string is expected"}},
		{"DeviceLock", map[string]any{"PIN": int64(123456)}, []string{"PIN: the type is integer, and string is expected"}},
		{"DeviceLock", map[string]any{"RequestRequiresNetworkTether": true}, nil},
		{"EraseDevice", map[string]any{"ReturnToService": map[string]any{"Enabled": true, "BootstrapToken": []byte("x")}}, nil},
		{"InstallApplication", map[string]any{"ManifestURL": "https://x", "Configuration": map[string]any{"Whatever": int64(1)}}, nil},
		{"Settings", item("Wallpaper", map[string]any{"Image": []byte("x"), "Where": int64(4)}), []string{
			`Settings[0].Where: the value "4" is not one of 1, 2, 3`}},
		{"Settings", item("Wallpapre", nil), []string{`Settings[0].Item: the value "Wallpapre" is not known; did you mean Wallpaper?`}},
		{"Settings", map[string]any{"Settings": []any{"x", map[string]any{}}}, []string{
			"Settings[0]: the type is string, and dictionary is expected", "Settings[1].Item: this required key is missing"}},
	} {
		require.Equal(t, c.want, Check(command(t, c.requestType, c.keys)), "%s %v", c.requestType, c.keys)
	}
}

func TestFindingsAreBounded(t *testing.T) {
	keys := make(map[string]any)
	for i := range 1000 {
		keys[strings.Repeat("k", i+1)] = "x"
	}
	found := Check(command(t, "ProfileList", keys))
	require.Len(t, found, maxFindings+1)
	require.Contains(t, found[maxFindings], "more findings")
	for _, sentence := range found {
		require.Less(t, len(sentence), 200)
	}
}

func TestTargets(t *testing.T) {
	for _, c := range []struct {
		requestType string
		target      Target
		want        string
	}{
		{"EraseDevice", Target{Platform: MacOS, OSVersion: "15.1"}, ""},
		{"EnableLostMode", Target{Platform: MacOS, OSVersion: "15.1"}, "macOS does not have it"},
		{"EnableRemoteDesktop", Target{Platform: MacOS, OSVersion: "10.13.6"}, "macOS has it from 10.14.4 on, and the device has 10.13.6"},
		{"EnableRemoteDesktop", Target{Platform: MacOS, OSVersion: "10.14.4.0"}, ""},
		{"EnableRemoteDesktop", Target{Platform: MacOS}, ""},
		{"EnableRemoteDesktop", Target{Platform: MacOS, OSVersion: "beta"}, ""},
		{"EnableRemoteDesktop", Target{Platform: IOS, OSVersion: "18.1"}, "iOS does not have it"},
		{"EraseDevice", Target{Platform: MacOS, User: true}, "it is not for the user channel"},
		{"EraseDevice", Target{User: true}, "it is not for the user channel"},
		{"ProfileList", Target{User: true}, ""},
		{"ActiveNSExtensions", Target{Platform: MacOS, OSVersion: "15.0"}, "it is for the user channel alone"},
		{"ActiveNSExtensions", Target{Platform: MacOS, OSVersion: "15.0", User: true}, ""},
		{"EraseDevice", Target{Platform: IOS, UserEnrollment: true}, "User Enrollment does not allow it"},
		{"Nonsense", Target{Platform: IOS}, ""},
		{"EraseDevice", Target{Platform: "Other"}, ""},
	} {
		require.Equal(t, c.want, CheckTarget(c.requestType, c.target), "%s %+v", c.requestType, c.target)
	}
	for product, want := range map[string]string{
		"MacBookPro18,3": MacOS, "iMac21,1": MacOS, "VirtualMac2,1": MacOS, "iPhone16,1": IOS, "iPad14,3": IOS, "iPod9,1": IOS,
		"AppleTV14,1": TVOS, "Watch7,1": WatchOS, "RealityDevice14,1": VisionOS, "MTUW3": "", "": "",
	} {
		require.Equal(t, want, Platform(product), product)
	}
}

func TestClosest(t *testing.T) {
	words := []string{"show", "send", "status", "stats", "enrollments ls"}
	for given, want := range map[string]string{
		"shwo": "show", "sned": "send", "statsu": "status", "enrollment": "enrollments ls", "frobnicate": "", "": "", strings.Repeat("s", 1000): "",
	} {
		require.Equal(t, want, Closest(given, words), given)
	}
}

// The notice has to come with the data.
func TestLicence(t *testing.T) {
	require.Contains(t, Licence, "Permission is hereby granted")
	require.True(t, slices.IsSorted(RequestTypes()))
}

func FuzzCheck(f *testing.F) {
	for requestType, c := range commands() {
		raw, err := plist.Marshal(map[string]any{"CommandUUID": "u", "Command": func() map[string]any {
			all := examples(c.Keys)
			all["RequestType"] = requestType
			return all
		}()})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(raw)
	}
	f.Fuzz(func(t *testing.T, raw []byte) {
		cmd, err := mdm.DecodeCommand(raw)
		if err != nil {
			return
		}
		found := Check(cmd)
		if len(found) > maxFindings+1 {
			t.Fatalf("%d findings", len(found))
		}
		if again := Check(cmd); !slices.Equal(found, again) {
			t.Fatalf("%q and then %q", found, again)
		}
		_ = CheckTarget(cmd.RequestType, Target{Platform: Platform(cmd.CommandUUID), OSVersion: cmd.CommandUUID})
	})
}

func TestAppleNames(t *testing.T) {
	given := map[string]any{
		"settings": []any{
			map[string]any{"item": "DeviceName", "device_name": "Ann's"},
			map[string]any{"item": "Nonsense", "device_name": "x"}, "text",
		},
		"zzyzx": "x",
	}
	require.Equal(t, map[string]any{
		"Settings": []any{
			map[string]any{"Item": "DeviceName", "DeviceName": "Ann's"},
			map[string]any{"item": "Nonsense", "device_name": "x"}, "text",
		},
		"zzyzx": "x",
	}, AppleNames("Settings", given))
	require.Contains(t, given, "settings", "it is not changed")

	require.Equal(t, map[string]any{"ManifestURL": "u", "Options": map[string]any{"PurchaseMethod": 1}},
		AppleNames("InstallApplication", map[string]any{"manifest_url": "u", "options": map[string]any{"purchase_method": 1}}))
	require.Equal(t, map[string]any{"Payload": "a", "payload": "b"},
		AppleNames("InstallProfile", map[string]any{"Payload": "a", "payload": "b"}), "a key that is there keeps its value")
	require.Equal(t, map[string]any{"Payload": map[string]any{"$data": "eA=="}},
		AppleNames("InstallProfile", map[string]any{"payload": map[string]any{"$data": "eA=="}}))
	require.Equal(t, map[string]any{"payload": 1}, AppleNames("Nonsense", map[string]any{"payload": 1}))
}
