package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/google/uuid"

	"github.com/nanomdm/nanomdm/mdm"
)

// list is a flag that may be given several times.
type list []string

func (l *list) String() string     { return strings.Join(*l, ",") }
func (l *list) Set(s string) error { *l = append(*l, s); return nil }

// payload gathers a command's own keys from flags.
type payload struct {
	uuid    string
	queries list
	sets    list
	data    list
	json    string
}

func (p *payload) flags(flags *flag.FlagSet) {
	flags.StringVar(&p.uuid, "uuid", "", "CommandUUID; one is made if empty")
	flags.Var(&p.queries, "query", "`name` to ask DeviceInformation for; may be repeated")
	flags.Var(&p.sets, "set", "`Key=text`, or Key:=JSON for numbers, true, false, lists and objects; may be repeated")
	flags.Var(&p.data, "data", "`Key=file` whose bytes become data; may be repeated")
	flags.StringVar(&p.json, "keys", "", "the command's own keys as a JSON `object`; data as base64, or {\"$data\": base64} and {\"$date\": time} for any key")
}

// keys adds what the flags say to the command's own keys.
func (p *payload) keys(keys map[string]any) error {
	if p.json != "" {
		given, err := decodeJSON(p.json)
		object, ok := given.(map[string]any)
		if err != nil || !ok {
			return usage("-keys: a JSON object such as {\"Key\": \"value\"} is wanted")
		}
		for k, v := range object {
			keys[k] = v
		}
	}
	if len(p.queries) > 0 {
		keys["Queries"] = texts(p.queries)
	}
	for _, set := range p.sets {
		name, value, err := parseSet(set)
		if err != nil {
			return err
		}
		keys[name] = value
	}
	for _, d := range p.data {
		name, file, ok := strings.Cut(d, "=")
		if !ok || name == "" {
			return usage("-data %q: want Key=file", d)
		}
		content, err := os.ReadFile(file)
		if err != nil {
			return usage("-data %s: %w", name, err)
		}
		keys[name] = data(content)
	}
	return nil
}

// parseSet reads Key=text or Key:=JSON. Text stays text, so that a PIN of six
// digits is not taken for a number; what reads like a truth value is refused,
// since Apple's commands have no text of that kind and a device would not take
// it for one.
func parseSet(set string) (name string, value any, err error) {
	name, text, ok := strings.Cut(set, "=")
	typed := strings.HasSuffix(name, ":")
	name = strings.TrimSuffix(name, ":")
	switch {
	case !ok || name == "":
		return "", nil, usage("-set %q: want Key=text or Key:=JSON", set)
	case typed:
		if value, err = decodeJSON(text); err != nil {
			return "", nil, usage("-set %q: what follows := is no JSON", set)
		}
		return name, value, nil
	case text == "true" || text == "false":
		return "", nil, usage("-set %q: write %s:=%s, or %s:=%q if it is to be text", set, name, text, name, text)
	}
	return name, text, nil
}

// decodeJSON keeps numbers as they are written.
func decodeJSON(text string) (any, error) {
	decoder := json.NewDecoder(strings.NewReader(text))
	decoder.UseNumber()
	var value any
	if err := decoder.Decode(&value); err != nil {
		return nil, err
	}
	if decoder.More() {
		return nil, fmt.Errorf("something follows the JSON value")
	}
	return value, nil
}

// simpleCommands need no keys. They are here for the help; any other request
// type works too.
var simpleCommands = []string{
	"ProfileList", "ProvisioningProfileList", "CertificateList", "SecurityInfo", "InstalledApplicationList", "RestartDevice",
	"ShutDownDevice", "StopMirroring", "ClearRestrictionsPassword", "UserList", "LogOutUser", "PlayLostModeSound",
	"DisableLostMode", "DeviceLocation", "ManagedMediaList", "DeviceConfigured", "AvailableOSUpdates",
	"NSExtensionMappings", "OSUpdateStatus", "EnableRemoteDesktop", "DisableRemoteDesktop",
	"ActivationLockBypassCode", "ScheduleOSUpdateScan", "AccountConfiguration",
}

// inventoryQueries are the queries of DeviceInformation that every platform
// knows and an inventory needs.
var inventoryQueries = []string{
	"UDID", "SerialNumber", "DeviceName", "OSVersion", "BuildVersion", "SupplementalBuildVersion", "ModelName", "Model", "ProductName",
	"DeviceCapacity", "AvailableDeviceCapacity", "IsSupervised", "WiFiMAC", "EthernetMAC", "LocalHostName", "HostName",
}

// harmlessCommands are those that -random picks from.
var harmlessCommands = []string{"SecurityInfo", "CertificateList", "ProfileList", "ProvisioningProfileList"}

// updateFlags are the keys of a ScheduleOSUpdate.
type updateFlags struct {
	version, key, priority string
	deferrals              int
}

func (u *updateFlags) given() bool { return *u != updateFlags{} }

// positional turns the arguments that follow a request type into keys, for
// those request types that people use most.
func positional(requestType string, args []string, u *updateFlags, allowBST bool) (map[string]any, error) {
	keys := make(map[string]any)
	if u.given() && requestType != "ScheduleOSUpdate" {
		return nil, usage("command: -version, -key, -deferrals and -priority are ScheduleOSUpdate's")
	}
	if allowBST && requestType != "Settings" {
		return nil, usage("command: -allowbst is one of Settings")
	}
	need := func(what string, least, most int) error {
		if len(args) < least || len(args) > most {
			return usage("command %s: %s is wanted after it", requestType, what)
		}
		return nil
	}
	switch requestType {
	case "DeviceInformation":
		if len(args) > 0 {
			keys["Queries"] = texts(args)
		}
		return keys, nil
	case "InstallProfile":
		if err := need("the profile's file", 1, 1); err != nil {
			return nil, err
		}
		content, err := os.ReadFile(args[0])
		if err != nil {
			return nil, usage("command InstallProfile: %w", err)
		}
		keys["Payload"] = data(content)
		return keys, nil
	case "RemoveProfile":
		keys["Identifier"] = strings.Join(args, "")
		return keys, need("the profile's identifier", 1, 1)
	case "EraseDevice", "DeviceLock":
		if len(args) == 1 {
			keys["PIN"] = args[0]
		}
		return keys, need("a PIN, or nothing,", 0, 1)
	case "ScheduleOSUpdate":
		if err := need("the install action, such as InstallASAP,", 1, 1); err != nil {
			return nil, err
		}
		keys["Updates"] = []any{u.update(args[0])}
		return keys, nil
	case "Settings":
		if allowBST {
			keys["Settings"] = []any{map[string]any{
				"Item": "MDMOptions", "MDMOptions": map[string]any{"BootstrapTokenAllowed": true},
			}}
		}
	}
	return keys, need("nothing", 0, 0)
}

func (u *updateFlags) update(action string) map[string]any {
	update := map[string]any{"InstallAction": action}
	for key, value := range map[string]string{"ProductVersion": u.version, "ProductKey": u.key, "Priority": u.priority} {
		if value != "" {
			update[key] = value
		}
	}
	if u.deferrals != 0 {
		update["MaxUserDeferrals"] = json.Number(strconv.Itoa(u.deferrals))
	}
	return update
}

func commandCommand() command {
	return command{
		name: "command", args: "[REQUEST_TYPE] [ARGUMENT...]", offline: true,
		short: "Print a command's plist",
		long: `The plist goes to standard output, for PUT /v1/enqueue/ID or any other MDM server.
Some request types take arguments:

  DeviceInformation [QUERY...]     InstallProfile FILE    RemoveProfile IDENTIFIER
  EraseDevice [PIN]                DeviceLock [PIN]       Settings -allowbst
  ScheduleOSUpdate INSTALL_ACTION [-version V] [-key K] [-deferrals N] [-priority P]

All others take their keys by -set, -data and -keys. These need none:

` + wrapped(simpleCommands),
		example: `nanoctl command DeviceInformation OSVersion | curl -T - -u nanomdm:KEY https://mdm.example.org/v1/enqueue/UDID
nanoctl command InstallApplication -set ManifestURL=https://example.org/app.plist
nanoctl command -r | nanoctl send -file - -all`,
		prepare: func(flags *flag.FlagSet) runner {
			var p payload
			var u updateFlags
			p.flags(flags)
			flags.StringVar(&p.uuid, "u", "", "the same as -uuid")
			random := flags.Bool("random", false, "one of "+strings.Join(harmlessCommands, ", ")+" by chance, instead of a request type")
			flags.BoolVar(random, "r", false, "the same as -random")
			allowBST := flags.Bool("allowbst", false, "Settings: allow the Mac to use its bootstrap token")
			flags.StringVar(&u.version, "version", "", "ScheduleOSUpdate: `ProductVersion`, such as 15.1")
			flags.StringVar(&u.key, "key", "", "ScheduleOSUpdate: `ProductKey`")
			flags.StringVar(&u.priority, "priority", "", "ScheduleOSUpdate: `Low or High`")
			flags.IntVar(&u.deferrals, "deferrals", 0, "ScheduleOSUpdate: MaxUserDeferrals")
			return func(_ context.Context, e *env, args []string) error {
				if *random == (len(args) > 0) {
					return usage("command: give one request type, or -random")
				}
				if *random {
					args = []string{harmlessCommands[rand.IntN(len(harmlessCommands))]}
				}
				keys, err := positional(args[0], args[1:], &u, *allowBST)
				if err != nil {
					return err
				}
				if err := p.keys(keys); err != nil {
					return err
				}
				cmd, err := plistCommand(args[0], p.uuid, keys)
				if err != nil {
					return err
				}
				_, err = e.out.Write(cmd.Raw)
				return err
			}
		},
	}
}

// wrapped sets words in lines for the help.
func wrapped(words []string) string {
	var b strings.Builder
	line := 0
	for i, word := range words {
		if i < len(words)-1 {
			word += ","
		}
		if line+len(word) > 76 {
			b.WriteString("\n")
			line = 0
		}
		if line == 0 {
			b.WriteString("  ")
		} else {
			b.WriteString(" ")
		}
		b.WriteString(word)
		line += len(word) + 1
	}
	return b.String()
}

// plistCommand makes the plist of a command.
func plistCommand(requestType, commandUUID string, keys map[string]any) (*mdm.Command, error) {
	if pin, given := keys["PIN"]; given && slices.Contains([]string{"EraseDevice", "DeviceLock"}, requestType) {
		if text, ok := pin.(string); !ok || len(text) != 6 {
			return nil, usage("%s: PIN: six characters of text are wanted", requestType)
		}
	}
	if commandUUID == "" {
		commandUUID = strings.ToUpper(uuid.NewString()) // as Apple's own tools write them
	}
	cmd, err := mdm.EncodeCommand(commandUUID, requestType, keys)
	if err != nil {
		return nil, usage("%s: %w", requestType, err)
	}
	return cmd, nil
}

// data is how JSON has bytes, for any key.
func data(content []byte) map[string]any {
	return map[string]any{"$data": base64.StdEncoding.EncodeToString(content)}
}

// texts is a list of texts as JSON decodes one.
func texts(list []string) []any {
	out := make([]any, len(list))
	for i, text := range list {
		out[i] = text
	}
	return out
}

// given says whether any of the flags was used.
func (p *payload) given() bool {
	return p.uuid != "" || p.json != "" || len(p.queries) > 0 || len(p.sets) > 0 || len(p.data) > 0
}
