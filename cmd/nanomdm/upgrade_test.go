package main

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// releaseBefore is the commit of the last release, or before the first one the
// first commit with a rule for the schemas of later ones.
const releaseBefore = "719f06fdc3f704bddfd7b698540fbd842fdfaf95"

// schemaBefore is the number of its migrations.
const schemaBefore = 5

// buildRelease builds the daemon of releaseBefore.
var buildRelease = sync.OnceValues(func() (program string, err error) {
	dir, err := os.MkdirTemp("", "nanomdm-release")
	if err != nil {
		return "", err
	}
	program = filepath.Join(dir, "nanomdm")
	script := fmt.Sprintf("git archive %s | tar -x -C %q && cd %[2]q && CGO_ENABLED=0 go build -o %[3]q ./cmd/nanomdm", releaseBefore, dir, program)
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building the daemon of %s: %w: %s", releaseBefore, err, out)
	}
	return program, nil
})

// TestRollingUpgrade replaces replicas of the release before by this program,
// and goes one step back, while a device is served.
func TestRollingUpgrade(t *testing.T) {
	if shallow, err := exec.Command("git", "rev-parse", "--is-shallow-repository").Output(); err != nil || string(shallow) != "false\n" {
		t.Skip("needs the history as far as the release before: git fetch --unshallow")
	}
	before, err := buildRelease()
	require.NoError(t, err)
	t.Cleanup(func() { _ = os.RemoveAll(filepath.Dir(before)) })
	migrations, err := os.ReadDir("../../storage/sqlstore/migrations")
	require.NoError(t, err)
	newer := len(migrations) > schemaBefore

	for _, e := range storagetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) {
			cfg := e.Unmigrated(t)
			ca, err := mdmtest.NewCA()
			require.NoError(t, err)
			dir := t.TempDir()
			require.NoError(t, os.WriteFile(filepath.Join(dir, "ca.pem"), ca.PEM(), 0o600))
			replica := func(program string) *mortal {
				m := &mortal{daemon: &daemon{t: t, ca: ca, dir: dir}, program: program, args: []string{"-storage", cfg.Driver, "-storage-dsn", cfg.DSN}}
				m.listen()
				m.begin()
				t.Cleanup(m.end)
				m.ready()
				return m
			}
			// A balancer sends the device to any replica.
			at := new(chosenReplica)
			next := 0
			serves := func(operator, devices *mortal, dev *mdmtest.Device) {
				t.Helper()
				next++
				uuid := fmt.Sprintf("C%d", next)
				command := mdmtest.NewCommand(uuid, "ProfileList", nil)
				status, body, _ := operator.api("PUT", "/v1/enqueue/"+dev.UDID()+"?nopush=1", "nanomdm", testKey, command)
				require.Equal(t, 200, status, body)
				at.url = devices.url
				visit, err := dev.Poll(t.Context())
				require.NoError(t, err)
				require.Len(t, visit.Exchanges, 1)
				require.Equal(t, uuid, visit.Exchanges[0].Command.UUID)
				status, body, _ = operator.api("GET", "/v1/commands/"+uuid, "nanomdm", testKey, nil)
				require.Equal(t, 200, status, body)
				require.Contains(t, body, `"acknowledged": 1`)
				require.Equal(t, 200, devices.probe("/readyz"), "%s", devices.log)
			}

			old := replica(before)
			at.url = old.url
			dev := old.device("UPGRADED-DEVICE", mdmtest.Config{Client: &http.Client{Transport: at}})
			require.NoError(t, dev.Enroll(t.Context()))
			serves(old, old, dev)
			if e.Name == "sqlite" { // one process
				old.end()
				old = nil
			}
			upgraded := replica(os.Args[0])
			serves(upgraded, upgraded, dev)
			if old != nil {
				serves(upgraded, old, dev)
				serves(old, upgraded, dev)
				if newer {
					require.Eventually(t, func() bool { return strings.Contains(old.metrics(), "nanomdm_store_schema_newer 1") }, time.Minute, 50*time.Millisecond)
				}
				old.end()
			}
			require.NoError(t, dev.Enroll(t.Context()), "a device that enrolls again with the new release")

			// One step back.
			if e.Name == "sqlite" {
				upgraded.end()
			}
			old = replica(before)
			serves(old, old, dev)
			if newer {
				require.Contains(t, old.metrics(), "nanomdm_store_schema_newer 1")
				require.Contains(t, old.log.String(), "level=WARN", "it says that the schema is newer")
			}
			require.NoError(t, dev.Enroll(t.Context()), "and with the old one on the new schema")
			serves(old, old, dev)
		})
	}
}

// chosenReplica sends requests to one replica.
type chosenReplica struct{ url string }

// RoundTrip implements http.RoundTripper.
func (c *chosenReplica) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Host = strings.TrimPrefix(c.url, "http://")
	return http.DefaultTransport.RoundTrip(r)
}
