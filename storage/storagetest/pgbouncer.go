package storagetest

import (
	"fmt"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const pgbouncer = "/usr/sbin/pgbouncer"

// behindPgBouncer is PostgreSQL's engine as PgBouncer shows it.
func behindPgBouncer(t *testing.T) *Engine {
	t.Helper()
	var server *Engine
	for _, e := range Engines(t) {
		if e.Name == "pgsql" {
			server = e
		}
	}
	server.need(t)
	if _, err := os.Stat(pgbouncer); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("no PgBouncer: in CI it is tested; storage/engines/with-engines.sh installs it")
		}
		t.Skip("no PgBouncer: install Debian's pgbouncer, or run storage/engines/with-engines.sh go test ./...")
	}
	dsn, err := url.Parse(server.dsn)
	require.NoError(t, err)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	port := listener.Addr().(*net.TCPAddr).Port
	require.NoError(t, listener.Close())
	password, _ := dsn.User.Password()
	config := fmt.Sprintf("[databases]\n* = host=%s port=%s user=%s password=%s\n[pgbouncer]\nlisten_addr = 127.0.0.1\n"+
		"listen_port = %d\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\nmax_client_conn = 500\n"+
		"default_pool_size = 4\nignore_startup_parameters = extra_float_digits\n",
		dsn.Hostname(), dsn.Port(), dsn.User.Username(), password, port)
	dir, err := os.MkdirTemp("", "nanomdm-pgbouncer-") // its user cannot look into the test's own
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.RemoveAll(dir)) })
	require.NoError(t, os.Chmod(dir, 0o755))
	path := filepath.Join(dir, "pgbouncer.ini")
	require.NoError(t, os.WriteFile(path, []byte(config), 0o644))

	cmd := exec.Command(pgbouncer, "-q", path)
	cmd.Dir = dir
	if os.Geteuid() == 0 { // it refuses to be root
		nobody, err := user.Lookup("nobody")
		require.NoError(t, err)
		uid, err := strconv.ParseUint(nobody.Uid, 10, 32)
		require.NoError(t, err)
		gid, err := strconv.ParseUint(nobody.Gid, 10, 32)
		require.NoError(t, err)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		_ = cmd.Wait() // it ends by the signal
	})
	dsn.Host = net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", dsn.Host)
		if err != nil {
			return false
		}
		return conn.Close() == nil
	}, 10*time.Second, 20*time.Millisecond, "PgBouncer does not listen")

	e := &Engine{Name: "pgbouncer", driver: server.driver, variable: server.variable, dsn: server.dsn, via: dsn.Host}
	t.Cleanup(func() {
		for _, name := range e.idle {
			e.drop(t, name)
		}
	})
	return e
}
