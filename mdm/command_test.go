package mdm

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// commands are what operators send, and what is wrong with it, if anything.
var commands = []struct {
	name string
	raw  string
	want Command
	err  error
	text string
}{
	{name: "plain", raw: string(wrap(str("CommandUUID", "0001_DeviceLock") + "<key>Command</key><dict>" + str("RequestType", "DeviceLock") + str("PIN", "123456") + "</dict>")),
		want: Command{CommandUUID: "0001_DeviceLock", RequestType: "DeviceLock"}},
	{name: "byte order mark", raw: "\xef\xbb\xbf" + string(wrap("<key>Command</key><dict>"+str("RequestType", "ProfileList")+"</dict>"+str("CommandUUID", "a"))),
		want: Command{CommandUUID: "a", RequestType: "ProfileList"}},
	{name: "unknown request type, all elements", raw: string(wrap(str("CommandUUID", "a") + "<key>Command</key><dict>" + str("RequestType", "Tomorrow") +
		"<key>a</key><array><integer>-1</integer><integer> 18446744073709551615 </integer><real>1.5</real><real/><date>2026-01-02T03:04:05Z</date><data>\n\tAAEC\n</data><data/><true/></array></dict>")),
		want: Command{CommandUUID: "a", RequestType: "Tomorrow"}},
	{name: "nested request type does not count", raw: string(wrap(str("CommandUUID", "a") + "<key>Command</key><dict><key>x</key><dict>" + str("RequestType", "Inner") + "</dict></dict>")),
		err: ErrMissingKey, text: "Command.RequestType"},
	{name: "the last Command counts", raw: string(wrap(str("CommandUUID", "a") + "<key>Command</key><dict>" + str("RequestType", "First") + "</dict><key>Command</key><dict/>")),
		err: ErrMissingKey, text: "Command.RequestType"},
	{name: "binary", raw: "bplist00\xd1", err: ErrMalformed, text: "binary property list"},
	{name: "no UUID", raw: string(wrap("<key>Command</key><dict>" + str("RequestType", "ProfileList") + "</dict>")), err: ErrMissingKey, text: "CommandUUID"},
	{name: "empty UUID", raw: string(wrap("<key>CommandUUID</key><string/><key>Command</key><dict>" + str("RequestType", "ProfileList") + "</dict>")), err: ErrMissingKey, text: "CommandUUID"},
	{name: "UUID is integer", raw: string(wrap("<key>CommandUUID</key><integer>1</integer>")), err: ErrMalformed, text: "CommandUUID is integer, not string"},
	{name: "long UUID", raw: string(wrap(str("CommandUUID", strings.Repeat("é", 128)) + "<key>Command</key><dict>" + str("RequestType", "ProfileList") + "</dict>")), err: ErrMalformed, text: "more than 255 bytes in CommandUUID"},
	{name: "tab in UUID", raw: string(wrap(str("CommandUUID", "a\tb") + "<key>Command</key><dict>" + str("RequestType", "ProfileList") + "</dict>")), err: ErrMalformed, text: "control characters in CommandUUID"},
	{name: "no Command", raw: string(wrap(str("CommandUUID", "a"))), err: ErrMissingKey, text: "Command"},
	{name: "Command is array", raw: string(wrap(str("CommandUUID", "a") + "<key>Command</key><array/>")), err: ErrMalformed, text: "Command is array, not dict"},
	{name: "newline in request type", raw: string(wrap(str("CommandUUID", "a") + "<key>Command</key><dict>" + str("RequestType", "A\n") + "</dict>")), err: ErrMalformed, text: "control characters in Command.RequestType"},
	{name: "bad data", raw: string(wrap(str("CommandUUID", "a") + "<key>x</key><data>A</data>")), err: ErrMalformed, text: "invalid base64"},
	{name: "bad integer", raw: string(wrap(str("CommandUUID", "a") + "<key>x</key><integer>+1</integer>")), err: ErrMalformed, text: "invalid integer"},
	{name: "huge negative integer", raw: string(wrap(str("CommandUUID", "a") + "<key>x</key><integer>-9223372036854775809</integer>")), err: ErrMalformed, text: "invalid integer"},
	{name: "empty integer", raw: string(wrap(str("CommandUUID", "a") + "<key>x</key><integer/>")), err: ErrMalformed, text: "invalid integer"},
	{name: "bad real", raw: string(wrap(str("CommandUUID", "a") + "<key>x</key><real>1,5</real>")), err: ErrMalformed, text: "invalid real"},
	{name: "bad date", raw: string(wrap(str("CommandUUID", "a") + "<key>x</key><date>2026-01-02</date>")), err: ErrMalformed, text: "invalid date"},
}

func TestDecodeCommand(t *testing.T) {
	for _, tt := range commands {
		t.Run(tt.name, func(t *testing.T) {
			c, err := DecodeCommand([]byte(tt.raw))
			if tt.err != nil {
				require.ErrorIs(t, err, tt.err)
				require.ErrorContains(t, err, tt.text)
				require.Nil(t, c)
				return
			}
			require.NoError(t, err)
			tt.want.Raw = []byte(tt.raw)
			require.Equal(t, &tt.want, c)
		})
	}
}

func TestEncodePlist(t *testing.T) {
	b, err := EncodePlist(struct {
		BootstrapToken []byte
		Omitted        string `plist:",omitempty"`
	}{BootstrapToken: []byte("boot")})
	require.NoError(t, err)
	require.Contains(t, string(b), "<dict><key>BootstrapToken</key><data>Ym9vdA==</data></dict>")

	b, err = EncodePlist(map[string]string{"DigestChallenge": "", "Status": "a<b"})
	require.NoError(t, err)
	require.Contains(t, string(b), "<key>DigestChallenge</key><string></string>")
	r, err := DecodeReport(b)
	require.NoError(t, err)
	require.Equal(t, Status("a<b"), r.Status)

	_, err = EncodePlist(map[string]any{"f": func() {}})
	require.Error(t, err)
}
