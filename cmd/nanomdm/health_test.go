package main

import (
	"context"
	"database/sql"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// cable is a TCP proxy whose cable can be cut.
type cable struct {
	t      *testing.T
	addr   string
	target string

	mu       sync.Mutex
	moved    sync.Cond
	stalled  bool
	listener net.Listener
	conns    map[net.Conn]bool
	running  sync.WaitGroup
}

// newCable makes a cut one.
func newCable(t *testing.T, target string) *cable {
	t.Helper()
	c := &cable{t: t, target: target, conns: make(map[net.Conn]bool)}
	c.moved.L = &c.mu
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	c.addr = listener.Addr().String()
	require.NoError(t, listener.Close())
	t.Cleanup(c.cut)
	return c
}

// mend forwards from now on.
func (c *cable) mend() {
	c.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stalled = false
	c.moved.Broadcast()
	if c.listener != nil {
		return
	}
	listener, err := net.Listen("tcp", c.addr)
	require.NoError(c.t, err)
	c.listener = listener
	c.running.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			c.running.Go(func() { c.forward(conn) })
		}
	})
}

// stall keeps connections and forwards nothing, as a network does that loses
// everything.
func (c *cable) stall() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stalled = true
}

// cut closes everything and refuses connections.
func (c *cable) cut() {
	c.mu.Lock()
	if c.listener != nil {
		c.listener.Close()
		c.listener = nil
	}
	for conn := range c.conns {
		conn.Close()
	}
	clear(c.conns)
	c.stalled = false
	c.moved.Broadcast()
	c.mu.Unlock()
	c.running.Wait()
}

func (c *cable) forward(client net.Conn) {
	defer client.Close()
	server, err := net.Dial("tcp", c.target)
	if err != nil {
		return
	}
	defer server.Close()
	c.mu.Lock()
	c.conns[client], c.conns[server] = true, true
	c.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { c.pump(server, client) })
	both.Go(func() { c.pump(client, server) })
	both.Wait()
}

func (c *cable) pump(to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		c.mu.Lock()
		for c.stalled {
			c.moved.Wait()
		}
		c.mu.Unlock()
		if n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// behind returns the DSN of an empty database of an engine behind a cut cable.
func behind(t *testing.T, engine string) (dsn string, c *cable) {
	t.Helper()
	for _, e := range storagetest.Engines(t) {
		if e.Name != engine {
			continue
		}
		dsn := e.Unmigrated(t).DSN
		if engine == "pgsql" {
			u, err := url.Parse(dsn)
			require.NoError(t, err)
			c = newCable(t, u.Host)
			u.Host = c.addr
			return u.String(), c
		}
		mc, err := mysql.ParseDSN(dsn)
		require.NoError(t, err)
		c = newCable(t, mc.Addr)
		mc.Addr = c.addr
		return mc.FormatDSN(), c
	}
	panic("no engine called " + engine)
}

var addressAttr = regexp.MustCompile(`msg=listening server=http address=(\S+)`)

// begin runs the daemon and waits only until it listens.
func begin(t *testing.T, environ []string, args ...string) *daemon {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	d := &daemon{t: t, ca: ca, dir: t.TempDir(), log: &syncBuffer{}, stdout: &syncBuffer{}}
	require.NoError(t, os.WriteFile(filepath.Join(d.dir, "ca.pem"), ca.PEM(), 0o600))
	d.signals, d.code = make(chan os.Signal, 2), make(chan int, 1)
	args = append([]string{"-ca", filepath.Join(d.dir, "ca.pem"), "-listen", "127.0.0.1:0"}, args...)
	go func() {
		d.code <- run(context.Background(), args, append(environ, "NANOMDM_API="+testKey), d.stdout, d.log, d.signals)
	}()
	require.Eventually(t, func() bool {
		m := addressAttr.FindStringSubmatch(d.log.String())
		if m != nil {
			d.url = "http://" + m[1]
		}
		return m != nil
	}, 30*time.Second, 5*time.Millisecond, "the daemon does not listen")
	t.Cleanup(d.stop)
	return d
}

// probe returns the status of a GET.
func (d *daemon) probe(path string) int {
	d.t.Helper()
	resp, err := http.Get(d.url + path)
	require.NoError(d.t, err)
	_, err = io.Copy(io.Discard, resp.Body)
	require.NoError(d.t, err)
	require.NoError(d.t, resp.Body.Close())
	return resp.StatusCode
}

func (d *daemon) eventually(path string, status int) {
	d.t.Helper()
	require.Eventually(d.t, func() bool { return d.probe(path) == status }, 30*time.Second, 20*time.Millisecond, "%s never says %d\n%s", path, status, d.log.String())
}

// poll lets a device ask for its next command and says what it was told, and
// how long that took.
func poll(t *testing.T, dev *mdmtest.Device) (status int, retryAfter string, took time.Duration) {
	t.Helper()
	begun := time.Now()
	resp, err := dev.Do(t.Context(), "", "application/x-apple-aspen-mdm",
		[]byte(`<plist version="1.0"><dict><key>Status</key><string>Idle</string><key>UDID</key><string>`+dev.UDID()+`</string></dict></plist>`))
	require.NoError(t, err)
	return resp.Status, resp.Header.Get("Retry-After"), time.Since(begun)
}

func TestDatabaseThatComesAndGoes(t *testing.T) {
	for engine, storage := range map[string]string{"pgsql": "pgsql", "mysql": "mysql", "mariadb": "mysql"} {
		t.Run(engine, func(t *testing.T) { comeAndGo(t, engine, storage) })
	}
}

func comeAndGo(t *testing.T, engine, storage string) {
	dsn, cable := behind(t, engine)
	d := begin(t, []string{"NANOMDM_STORAGE_DSN=" + dsn}, "-storage", storage)
	dev := d.device("D1", mdmtest.Config{})

	// Away at the start: alive, not ready, devices are asked to come again.
	require.Equal(t, 200, d.probe("/healthz"))
	require.Equal(t, 503, d.probe("/readyz"))
	status, retry, _ := poll(t, dev)
	require.Equal(t, 503, status)
	require.Equal(t, "5", retry)
	require.Eventually(t, func() bool {
		return regexp.MustCompile(`waiting for the database.*connection refused`).MatchString(d.log.String())
	}, 20*time.Second, 10*time.Millisecond, "the log says what it waits for")

	cable.mend()
	d.eventually("/readyz", 200)
	require.NoError(t, dev.Enroll(t.Context()))
	status, _, _ = poll(t, dev)
	require.Equal(t, 200, status)

	for _, outage := range []struct {
		name  string
		begin func()
		limit time.Duration
	}{
		{"connections break and are refused", cable.cut, 6 * time.Second},
		{"nothing comes back", cable.stall, 8 * time.Second},
	} {
		outage.begin()
		status, retry, took := poll(t, dev)
		t.Logf("%s: first poll %d after %v", outage.name, status, took.Round(time.Millisecond))
		require.Equal(t, 503, status, outage.name)
		require.NotEmpty(t, retry)
		require.Less(t, took, outage.limit)
		d.eventually("/readyz", 503)
		status, _, took = poll(t, dev)
		t.Logf("%s: later poll %d after %v", outage.name, status, took.Round(time.Millisecond))
		require.Equal(t, 503, status)
		require.Less(t, took, time.Second, "while it is known to be away nobody waits")
		require.Equal(t, 200, d.probe("/healthz"))
		code, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
		require.Equal(t, 200, code, "metrics are there when they are needed most")
		require.Contains(t, text, "nanomdm_store_up 0")

		cable.mend()
		d.eventually("/readyz", 200)
		status, _, _ = poll(t, dev)
		require.Equal(t, 200, status, "recovered without a restart")
	}
	require.NotContains(t, d.log.String(), "insecure", "the database's password")
}

func TestSignalWhileWaitingForTheDatabase(t *testing.T) {
	dsn, _ := behind(t, "pgsql")
	path, messages := systemd(t)
	d := begin(t, []string{"NANOMDM_STORAGE_DSN=" + dsn, "NOTIFY_SOCKET=" + path}, "-storage", "pgsql")
	require.Contains(t, within(t, messages), "EXTEND_TIMEOUT_USEC=")
	d.signals <- syscall.SIGTERM
	require.Zero(t, within(t, d.code))
	d.signals = nil
}

// An error that waiting cannot mend ends the start with the reason.
func TestStartsThatCannotSucceed(t *testing.T) {
	dir := t.TempDir()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ca.pem"), ca.PEM(), 0o600))
	refused := func(t *testing.T, want string, args ...string) {
		t.Helper()
		log := &syncBuffer{}
		code := make(chan int, 1)
		go func() {
			code <- run(context.Background(), append([]string{"-ca", filepath.Join(dir, "ca.pem"), "-listen", "127.0.0.1:0"}, args...), nil, io.Discard, log, nil)
		}()
		require.Equal(t, 1, within(t, code), log.String())
		require.Contains(t, log.String(), want)
	}
	t.Run("foreign tables", func(t *testing.T) {
		file := filepath.Join(dir, "foreign.db")
		sqliteExec(t, file, "CREATE TABLE enrollments (id TEXT)")
		refused(t, "holds the table enrollments of NanoMDM", "-storage-dsn", file)
	})
	t.Run("a newer schema", func(t *testing.T) {
		file := filepath.Join(dir, "newer.db")
		sqliteExec(t, file, "CREATE TABLE nano_schema (version BIGINT, step BIGINT, applied_at BIGINT)")
		sqliteExec(t, file, "INSERT INTO nano_schema VALUES (9998, -1, 1), (9999, -1, 1), (9999, 1, 1)")
		refused(t, "made by a newer version", "-storage-dsn", file)
	})
	t.Run("a wrong password", func(t *testing.T) {
		dsn, cable := behind(t, "pgsql")
		cable.mend()
		u, err := url.Parse(dsn)
		require.NoError(t, err)
		u.User = url.UserPassword(u.User.Username(), "wrong-password")
		refused(t, "password authentication failed", "-storage", "pgsql", "-storage-dsn", u.String())
	})
	t.Run("a database that does not exist", func(t *testing.T) {
		dsn, cable := behind(t, "pgsql")
		cable.mend()
		u, err := url.Parse(dsn)
		require.NoError(t, err)
		u.Path = "/no_such_database"
		refused(t, "does not exist", "-storage", "pgsql", "-storage-dsn", u.String())
	})
}

// TestReadOnlyServer: a start that waits because the server takes no writes names
// the setting.
func TestReadOnlyServer(t *testing.T) {
	t.Parallel()
	dsn, cable := behind(t, "pgsql")
	cable.mend()
	db, err := sql.Open("pgx", dsn)
	require.NoError(t, err)
	defer db.Close()
	_, err = db.ExecContext(t.Context(), `DO $$BEGIN EXECUTE format('ALTER DATABASE %I SET default_transaction_read_only = on', current_database()); END$$`)
	require.NoError(t, err)
	d := begin(t, nil, "-storage", "pgsql", "-storage-dsn", dsn)
	require.Eventually(t, func() bool { return strings.Contains(d.log.String(), "default_transaction_read_only is on") }, 10*time.Second, 10*time.Millisecond)
	d.stop()
}

func TestSystemdIsTold(t *testing.T) {
	path, messages := systemd(t)
	d := begin(t, []string{"NOTIFY_SOCKET=" + path, "WATCHDOG_USEC=100000"}, "-storage-dsn", filepath.Join(t.TempDir(), "mdm.db"), "-drain-delay", "200ms")
	d.eventually("/readyz", 200)
	seen := map[string]bool{}
	for !seen[notifyReady] || !seen[notifyAlive] {
		seen[within(t, messages)] = true
	}
	d.signals <- syscall.SIGTERM
	d.eventually("/readyz", 503) // the delay, in which requests are served
	require.Zero(t, within(t, d.code))
	d.signals = nil
	for !seen[notifyStopping] {
		seen[within(t, messages)] = true
	}
}
