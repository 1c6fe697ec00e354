package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// write makes a folder with a licence and one schema.
func write(t *testing.T, text string) string {
	t.Helper()
	dir := t.TempDir()
	require.NoError(t, os.Mkdir(filepath.Join(dir, "commands"), 0o700))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "LICENSE.txt"), []byte("the licence"), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "commands", "a.yaml"), []byte(text), 0o600))
	return dir
}

func TestGenerate(t *testing.T) {
	in, out := write(t, `
payload:
  requesttype: Blink
  supportedOS:
    macOS: {introduced: '10.9', removed: '12.0', devicechannel: true, userchannel: false, userenrollment: {mode: forbidden}}
    iOS: {introduced: n/a}
payloadkeys:
- {key: Times, type: <integer>, presence: required, rangelist: [1, 2]}
- key: Colours
  type: <array>
  subkeys:
  - {key: ColoursItem, type: <string>, subkeys: [{key: Red, type: <string>}, {key: Blue, type: <string>}]}
`), t.TempDir()
	require.NoError(t, run(in, out))
	data, err := os.ReadFile(filepath.Join(out, "commands.json"))
	require.NoError(t, err)
	require.Equal(t, `[
{"t":"Blink","os":{"iOS":{"never":true},"macOS":{"from":"10.9","until":"12.0","nouser":true,"noue":true}},"k":[{"n":"Times","t":"integer","r":true,"v":["1","2"]},{"n":"Colours","t":"array","k":[{"n":"ColoursItem","t":"string","v":["Red","Blue"]}]}]}
]
`, string(data))
	licence, err := os.ReadFile(filepath.Join(out, "LICENSE-APPLE.txt"))
	require.NoError(t, err)
	require.Equal(t, "the licence", string(licence))
}

func TestSchemasThatCannotBeRead(t *testing.T) {
	for text, want := range map[string]string{
		"payload: [":  "a.yaml: ",
		"payload: {}": "payload.requesttype is missing",
		"payload: {requesttype: X}\npayloadkeys: [{key: K, type: <colour>}]": `K: the type "<colour>" is not known`,
	} {
		require.ErrorContains(t, run(write(t, text), t.TempDir()), want)
	}
	require.ErrorContains(t, run("", ""), "-schemas is missing")
	require.ErrorContains(t, run(t.TempDir(), t.TempDir()), "LICENSE.txt")
	empty := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(empty, "LICENSE.txt"), nil, 0o600))
	require.ErrorContains(t, run(empty, t.TempDir()), "no commands")
}
