package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// A dry run says what it would do, writes nothing, and remembers nothing.
func TestDryRun(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "")
	f := newFleet(t, 20)
	fixture.create()
	fixture.write(f)
	fixture.exec("UPDATE enrollments SET type = 'Toaster' WHERE id = ?", f.devices[1].Channel.ID)
	x := newTrial(t, "mysql", dsn)
	require.Equal(t, exitPartial, x.run("-dry-run"), "%s", x.out)
	require.Contains(t, x.out, "Would move: ")
	require.Contains(t, x.out, "Left out: 1 of kind device.")
	require.NoFileExists(t, x.target.DSN)
	require.NoFileExists(t, filepath.Join(filepath.Dir(x.target.DSN), "state"))
}

// A second run brings what changed since, and leaves what the device did here.
func TestSecondRun(t *testing.T) {
	fixture, dsn := sqlSource(t, "mysql", "")
	f := newFleet(t, 30)
	fixture.create()
	fixture.write(f)
	x := newTrial(t, "mysql", dsn)
	require.Zero(t, x.run(), "%s", x.out)

	x.now = x.now.Add(time.Hour)
	changed, other := f.devices[1], f.devices[2]
	uuid := changed.Channel.Queue[4].CommandUUID
	fixture.exec("INSERT INTO command_results (id, command_uuid, status, result, not_now_tally, created_at, updated_at) VALUES (?, ?, 'Acknowledged', '<?xml', 0, ?, ?)",
		changed.Channel.ID, uuid, fixture.at(x.now), fixture.at(x.now))
	fixture.exec("UPDATE enrollments SET push_magic = 'new magic', updated_at = ? WHERE id = ?", fixture.at(x.now), other.Channel.ID)
	fixture.exec("UPDATE enrollments SET push_magic = 'unseen' WHERE id = ?", f.devices[3].Channel.ID)
	require.Zero(t, x.run(), "%s", x.out)
	require.Contains(t, x.out, "Moved: 2 devices,")
	require.Equal(t, "new magic", x.device(other.Channel.ID).Channel.PushMagic)
	require.NotEqual(t, "unseen", x.device(f.devices[3].Channel.ID).Channel.PushMagic)
	for _, item := range x.device(changed.Channel.ID).Channel.Queue {
		if item.CommandUUID == uuid {
			require.Equal(t, storage.Acknowledged, item.State)
		}
	}

	require.Equal(t, exitPartial, x.run("-check"), "%s", x.out)
	require.Contains(t, x.out, "differs: device "+f.devices[3].Channel.ID+": push magic")
	fixture.exec("DELETE FROM devices WHERE id = ?", f.devices[3].Channel.ID)
	require.Zero(t, x.run("-check"), "%s", x.out)
	require.Contains(t, x.out, "only here: device "+f.devices[3].Channel.ID)
}

// The state of a run is that of one source and one target.
func TestStateOfAnotherRun(t *testing.T) {
	f := newFleet(t, 1)
	dir := t.TempDir()
	files{t, dir}.writeFile(f)
	x := newTrial(t, "file", dir)
	require.Zero(t, x.run(), "%s", x.out)
	require.Equal(t, exitUsage, x.run("-history", "none"))
	require.Contains(t, x.out, "another source, target or history")
}

// The program is killed while it writes, and run again, until it ends: the
// target is the same as after one run, on each engine.
func TestKilledAndRunAgain(t *testing.T) {
	f := newFleet(t, max(*enrollments, 500))
	dir := t.TempDir()
	files{t, dir}.writeFileKV(f)
	binary := filepath.Join(t.TempDir(), "nano2nano")
	out, err := exec.Command("go", "build", "-o", binary, ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	intoEach(t, "filekv", dir, nil, func(x *trial) {
		store := x.store() // migrated: after a migration that was killed the next one waits for the lease
		require.NoError(x.t, store.Close())
		x.killedAndRunAgain(binary)
		x.holds(f, func(want, got *storage.DeviceRecord) string { return exactly(asFileKVKeeps(want), got) })
		require.Zero(x.t, x.run("-check"), "%s", x.out)
	})
}

// killedAndRunAgain kills the program while it moves devices, later each time,
// until a run ends.
func (x *trial) killedAndRunAgain(binary string) {
	x.t.Helper()
	args := append(append([]string{}, x.flags...), "-to", x.target.Driver, "-to-dsn", x.target.DSN)
	state := x.flags[len(x.flags)-1]
	kills := 0
	for after := time.Millisecond; ; after += after/2 + time.Millisecond {
		require.Less(x.t, after, time.Minute)
		var out bytes.Buffer
		cmd := exec.Command(binary, args...)
		cmd.Stdout, cmd.Stderr = &out, &out
		require.NoError(x.t, cmd.Start())
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		if err, done := x.awaitDevices(state, ended); done || waitFor(ended, after, &err) {
			require.NoError(x.t, err, "%s", out.String())
			break
		}
		require.NoError(x.t, cmd.Process.Kill())
		if <-ended == nil {
			break // it ended meanwhile
		}
		kills++
	}
	x.t.Logf("killed %d times", kills)
	require.Positive(x.t, kills)
}

// awaitDevices waits until the program moves devices, or has ended.
func (x *trial) awaitDevices(state string, ended chan error) (err error, done bool) {
	x.t.Helper()
	for {
		if said, err := os.ReadFile(state); err == nil && strings.Contains(string(said), `"phase":"devices"`) {
			return nil, false
		}
		if waitFor(ended, time.Millisecond, &err) {
			return err, true
		}
	}
}

// waitFor says whether a program ended within a time.
func waitFor(ended chan error, within time.Duration, err *error) bool {
	select {
	case *err = <-ended:
		return true
	case <-time.After(within):
		return false
	}
}

// migrationEndpoint is a server that takes check-ins.
type migrationEndpoint struct {
	mu       sync.Mutex
	failures int
	refuse   string // devices whose id has this are refused
	got      []string
}

func (e *migrationEndpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	e.mu.Lock()
	defer e.mu.Unlock()
	user, key, _ := r.BasicAuth()
	body, _ := io.ReadAll(r.Body)
	m, err := mdm.DecodeCheckin(body)
	switch {
	case user != "nanomdm" || key != "secret":
		w.WriteHeader(http.StatusUnauthorized)
	case r.Method != http.MethodPut || err != nil:
		w.WriteHeader(http.StatusBadRequest)
	case e.failures > 0:
		e.failures--
		w.WriteHeader(http.StatusServiceUnavailable)
	case e.refuse != "" && strings.Contains(string(body), e.refuse):
		w.WriteHeader(http.StatusBadRequest)
	default:
		id, err := m.Identity().Resolve()
		if err == nil {
			e.got = append(e.got, string(m.Kind())+" "+id.ID)
		}
	}
}

func (e *migrationEndpoint) sent() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return strings.Join(e.got, "\n") + "\n"
}

func serve(t *testing.T, h http.Handler) (address string) {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server.URL
}

func TestMovesToAnEndpoint(t *testing.T) {
	f := newFleet(t, 30)
	dir := t.TempDir()
	files{t, dir}.writeFileKV(f)
	refused := f.devices[2].Channel.ID
	endpoint := &migrationEndpoint{refuse: refused, failures: 1}
	address := serve(t, endpoint)
	x := newTrial(t, "filekv", dir)
	require.Equal(t, exitPartial, x.run("-url", address, "-key", "secret"), "%s", x.out)
	require.Contains(t, x.out, "left out: device "+refused+": the endpoint answered 400")
	require.Contains(t, x.out, "Lost through -url")
	for _, d := range f.devices {
		if d.Channel.ID == refused {
			continue
		}
		require.Contains(t, endpoint.sent(), "Authenticate "+d.Channel.ID+"\n")
		require.Equal(t, d.Channel.Enabled, strings.Contains(endpoint.sent(), "TokenUpdate "+d.Channel.ID+"\n"))
		for _, u := range d.Users {
			require.Contains(t, endpoint.sent(), "TokenUpdate "+u.Channel.ID+"\n")
		}
	}

	x = newTrial(t, "filekv", dir)
	require.Equal(t, exitFailure, x.run("-url", address, "-key", "wrong"), "%s", x.out)
	require.Contains(t, x.out, "check -url, -key")
	require.NotContains(t, x.out, "wrong")
}

func TestUsage(t *testing.T) {
	for name, flags := range map[string][]string{
		"nothing":            {},
		"no such kind":       {"-storage", "x", "-storage-dsn", "y", "-to", "sqlite", "-to-dsn", "z"},
		"two targets":        {"-storage", "file", "-storage-dsn", "y", "-to", "sqlite", "-to-dsn", "z", "-url", "http://x", "-key", "k"},
		"no target":          {"-storage", "file", "-storage-dsn", "y"},
		"no data source":     {"-storage", "file", "-storage-dsn", "y", "-to", "sqlite"},
		"no key":             {"-storage", "file", "-storage-dsn", "y", "-url", "http://x"},
		"check of a server":  {"-storage", "file", "-storage-dsn", "y", "-url", "http://x", "-key", "k", "-check"},
		"history":            {"-storage", "file", "-storage-dsn", "y", "-to", "sqlite", "-to-dsn", "z", "-history", "some"},
		"zone":               {"-storage", "file", "-storage-dsn", "y", "-to", "sqlite", "-to-dsn", "z", "-source-zone", "Nowhere/No"},
		"argument":           {"-storage", "file", "-storage-dsn", "y", "-to", "sqlite", "-to-dsn", "z", "more"},
		"no file with a key": {"-storage", "file", "-storage-dsn", "y", "-to", "sqlite", "-to-dsn", "z", "-fleet-key-file", "/nowhere/key"},
	} {
		t.Run(name, func(t *testing.T) {
			var said strings.Builder
			require.Equal(t, exitUsage, run(t.Context(), &env{out: &said, err: &said, now: time.Now}, flags))
			require.NotEmpty(t, said.String())
		})
	}
}
