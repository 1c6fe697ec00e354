package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// kills is how often TestKilled kills the daemon on each engine.
var kills = flag.Int("kills", 3, "how often the daemon is killed, on each engine")

// mortal is a daemon, in a process of its own, that is killed and started
// again, always at the same address and with the same database.
type mortal struct {
	*daemon
	program string // the daemon, or the test binary as the daemon
	address string
	args    []string
	cmd     *exec.Cmd
}

func (m *mortal) begin() {
	m.t.Helper()
	m.log = &syncBuffer{}
	m.cmd = exec.Command(m.program, append([]string{"-ca", filepath.Join(m.dir, "ca.pem"), "-listen", m.address}, m.args...)...)
	m.cmd.Env = append(os.Environ(), asDaemon+"=1", "NANOMDM_API="+testKey)
	m.cmd.Stdout, m.cmd.Stderr = io.Discard, m.log
	require.NoError(m.t, m.cmd.Start())
}

func (m *mortal) kill() {
	m.t.Helper()
	require.NoError(m.t, m.cmd.Process.Kill())
	_ = m.cmd.Wait() // it was killed
}

// fleet are devices that ask for commands and answer them, without end.
type fleet struct {
	devices []*mdmtest.Device
	pause   time.Duration

	mu    sync.Mutex
	taken map[string][]string // commands whose results got their 200, by device
}

func (f *fleet) poll(ctx context.Context, d *mdmtest.Device) {
	visit, _ := d.Poll(ctx)
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, x := range append(visit.Resent, visit.Exchanges...) {
		f.taken[d.UDID()] = append(f.taken[d.UDID()], x.Command.UUID)
	}
}

func (f *fleet) count() (n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, list := range f.taken {
		n += len(list)
	}
	return n
}

// Whatever got its 200 reaches the receiver, in order for its enrollment,
// however often the daemon is killed. Run with -args -kills=100 for longer.
func TestKilled(t *testing.T) {
	for _, e := range storagetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) {
			t.Parallel()
			cfg := e.Config(t)
			c := newConsumer(t, func(n int) bool { return n%5 == 0 })
			m := newMortal(t, "-storage", cfg.Driver, "-storage-dsn", cfg.DSN, "-webhook-url", c.URL)
			f := &fleet{pause: 50 * time.Millisecond, taken: make(map[string][]string)}
			var ids []string
			for i := range 12 {
				d := m.device(fmt.Sprintf("D%02d", i), mdmtest.Config{
					Client: &http.Client{Transport: &http.Transport{}, Timeout: 20 * time.Second}, MaxCommands: 10,
				})
				require.NoError(t, d.Enroll(t.Context()))
				f.devices, ids = append(f.devices, d), append(ids, d.UDID())
			}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			var busy sync.WaitGroup
			for _, d := range f.devices {
				busy.Go(func() {
					for ctx.Err() == nil {
						f.poll(ctx, d)
						pace(ctx, f.pause)
					}
				})
			}
			busy.Go(func() { m.feed(ctx, ids) })

			for range *kills {
				begun, delivered := f.count(), len(c.events())
				withDeliveries := rand.N(3) > 0 // else it dies before it takes the lease over
				require.Eventually(t, func() bool {
					return f.count() > begun+50 && (!withDeliveries || len(c.events()) > delivered+100)
				}, 2*time.Minute, time.Millisecond, "nothing goes on: %s", m.log)
				pace(ctx, rand.N(300*time.Millisecond)) // any moment will do
				m.kill()
				m.begin()
			}
			// A device repeats a report that the daemon has stored and not answered.
			stop()
			busy.Wait()
			for _, d := range f.devices {
				require.Eventually(t, func() bool {
					_, err := d.Idle(t.Context())
					return err == nil
				}, time.Minute, 50*time.Millisecond)
				f.poll(t.Context(), d)
			}
			t.Logf("%d results taken over %d kills, %d deliveries", f.count(), *kills, len(c.events()))
			for _, id := range ids {
				for want, begun, last := len(f.taken[id]), time.Now(), 0; len(reported(c, id)) < want; pace(t.Context(), 200*time.Millisecond) {
					if n := len(c.events()); n > last {
						begun, last = time.Now(), n
					}
					require.Less(t, time.Since(begun), time.Minute, "%s: %d of %d results arrived, and no more come: %s", id, len(reported(c, id)), want, m.log)
				}
				require.Equal(t, f.taken[id], reported(c, id))
			}
		})
	}
}

// pace waits, so that the machine is left to others, too.
func pace(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// reported are the commands of an enrollment whose results a consumer took, by
// the first time.
func reported(c *consumer, id string) (commands []string) {
	seen := make(map[string]bool)
	for _, e := range c.events() {
		if a := e.Acknowledge; a != nil && a.IDs.ID == id && a.CommandUUID != "" && !seen[e.EventID] {
			seen[e.EventID] = true
			commands = append(commands, a.CommandUUID)
		}
	}
	return commands
}

func newMortal(t *testing.T, args ...string) *mortal {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	m := &mortal{daemon: &daemon{t: t, ca: ca, dir: t.TempDir()}, program: os.Args[0], args: args}
	require.NoError(t, os.WriteFile(filepath.Join(m.dir, "ca.pem"), ca.PEM(), 0o600))
	m.listen()
	m.begin()
	t.Cleanup(m.end)
	m.ready()
	return m
}

// listen chooses a free address.
func (m *mortal) listen() {
	m.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(m.t, err)
	m.address = l.Addr().String()
	m.url = "http://" + m.address
	require.NoError(m.t, l.Close())
}

// ready waits until the daemon can serve.
func (m *mortal) ready() {
	m.t.Helper()
	require.Eventually(m.t, func() bool {
		resp, err := http.Get(m.url + "/readyz")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		return resp.StatusCode == 200
	}, time.Minute, 20*time.Millisecond, "the daemon does not start: %s", m.log)
}

// end stops the daemon, which has to leave with 0.
func (m *mortal) end() {
	m.t.Helper()
	if m.cmd.ProcessState == nil {
		require.NoError(m.t, m.cmd.Process.Signal(syscall.SIGTERM))
		require.NoError(m.t, m.cmd.Wait(), "the daemon left with an error: %s", m.log)
	}
}

// feed queues a command for all, again and again. Calls that fail are repeated
// with the same command.
func (m *mortal) feed(ctx context.Context, ids []string) {
	for n := 0; ctx.Err() == nil; {
		command := mdmtest.NewCommand(fmt.Sprintf("C%06d", n), "ProfileList", nil)
		req, err := http.NewRequestWithContext(ctx, "PUT", m.url+"/v1/enqueue/"+strings.Join(ids, ",")+"?nopush=1", strings.NewReader(string(command)))
		if err != nil {
			m.t.Error(err)
			return
		}
		req.SetBasicAuth("nanomdm", testKey)
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode == 200 {
				n++
			}
		}
		pace(ctx, 100*time.Millisecond)
	}
}
