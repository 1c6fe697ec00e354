package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// The log of a start names each setting that opens more than it has to, and none
// that does not.
func TestStartWarnsOfOpenSettings(t *testing.T) {
	sinks := filepath.Join(t.TempDir(), "sinks.json")
	require.NoError(t, os.WriteFile(sinks, []byte(`{"sinks": [{"name": "clear", "url": "http://hook.example.org/", "tokens": true},
		{"name": "sealed", "url": "https://hook.example.org/", "tokens": true}, {"name": "plain", "url": "http://hook.example.org/"}]}`), 0o644))
	d := start(t, "http", "-retro", "-dump", "-cert-header", "X-Cert", "-webhook-config", sinks, "-mirror-url", "http://old.example.org/migration")
	for _, warning := range []string{
		"any certificate of -ca may enroll a known device anew",
		"-retro lets any certificate of -ca speak for an enrollment that has none pinned",
		"-dump writes every message of devices",
		"every peer that can reach the listener is believed to set the certificate header",
		"the key of -api can be guessed",
		"every user can read " + sinks,
		"push keys and devices' tokens are stored unsealed",
	} {
		require.Contains(t, d.log.String(), warning)
	}
	require.Regexp(t, `level=WARN .*an event sink sends tokens over http, .* sink=clear\n`, d.log.String())
	require.Regexp(t, `level=WARN .*an event sink sends tokens over http, .* sink=mirror\n`, d.log.String())
	require.NotRegexp(t, `tokens over http.* sink=(sealed|plain)`, d.log.String())

	seal := filepath.Join(t.TempDir(), "seal")
	require.NoError(t, os.WriteFile(seal, []byte("MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDE=\n"), 0o600))
	require.NoError(t, os.Chmod(sinks, 0o600))
	key := filepath.Join(t.TempDir(), "key")
	require.NoError(t, os.WriteFile(key, []byte(longKey), 0o600))
	d.stop()
	before := len(d.log.String())
	d.launch("http", "-reenroll", "deny", "-seal-key-file", seal, "-storage-dsn", filepath.Join(t.TempDir(), "new.db"))
	require.NotContains(t, d.log.String()[before:], "may enroll a known device anew")
	require.NotContains(t, d.log.String()[before:], "unsealed")
	_, warnings, err := parseOptions([]string{"-ca", filepath.Join(d.dir, "ca.pem"), "-api-file", key}, nil, os.Stat)
	require.NoError(t, err)
	require.Empty(t, warnings)
}
