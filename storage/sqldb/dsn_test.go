package sqldb

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestCheckDSN(t *testing.T) {
	for _, tc := range []struct{ driver, dsn, want string }{
		{"pgsql", "postgres://u:hunter2@h/d", ""},
		{"pgsql", "postgresql://u:hunter2@h1,h2:5433/d?target_session_attrs=read-write", ""},
		{"pgsql", "host=h dbname=d password='hunter2'", ""},
		{"pgsql", "postgressql://u:hunter2@h/d", "begins with postgressql://: write postgres://"},
		{"pgsql", "jdbc:postgresql://h/d?password=hunter2", "is a JDBC URL: write postgres://"},
		{"pgsql", `"postgres://u:hunter2@h/d"`, "in quotation marks"},
		{"pgsql", `'host=h dbname=d password=hunter2'`, "in quotation marks"},
		{"pgsql", "u:hunter2@tcp(h:3306)/d", "is one of mysql"},
		{"pgsql", "mysql://u:hunter2@h/d", "is one of mysql, and the storage is pgsql"},
		{"pgsql", "sqlite3:///hunter2.db", "is one of sqlite"},
		{"pgsql", "https://u:hunter2@h/d", "begins with https://"},
		{"pgsql", "postgres://u:hunter2@h:port/d", "is not a PostgreSQL URL"},
		{"pgsql", "postgres://u:p@h/d?sslmode=require&sslinline=true&sslcert=hunter2&sslkey=k", "sslinline is a parameter of another driver"},
		{"mysql", "u:hunter2@tcp(h:3306)/d?tls=true", ""},
		{"mysql", "u:hunter2@unix(/run/mysqld/mysqld.sock)/d", ""},
		{"mysql", "mysql://u:hunter2@h/d", "begins with mysql://: write user:password@tcp("},
		{"mysql", "jdbc:mysql://h/d?password=hunter2", "is a JDBC URL: write user:password@tcp("},
		{"mysql", "postgres://u:hunter2@h/d", "is one of pgsql, and the storage is mysql"},
		{"mysql", "host=h dbname=d password=hunter2", "is one of pgsql"},
		{"mysql", "u:hunter2@h:3306", "is not user:password@tcp("},
		{"mysql", "u:hunter2@tcp(h:3306)/d?tls=custom", "write tls=true"},
		{"sqlite", "nanomdm.db", ""},
		{"sqlite", "file:nanomdm.db?_pragma=synchronous(NORMAL)", ""},
		{"sqlite", "file:///var/lib/nanomdm.db", ""},
		{"sqlite", ":memory:", ""},
		{"sqlite", "sqlite:///var/lib/nanomdm.db", "begins with sqlite://: write the path of a file"},
		{"sqlite", "postgres://u:hunter2@h/d", "is one of pgsql, and the storage is sqlite"},
		{"sqlite", "u:hunter2@tcp(h:3306)/d", "is one of mysql"},
	} {
		t.Run(tc.driver+" "+tc.dsn, func(t *testing.T) {
			err := CheckDSN(tc.driver, tc.dsn)
			if tc.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, tc.want)
			require.NotContains(t, err.Error(), "hunter2")
		})
	}
	require.Error(t, CheckDSN("oracle", "x"))
}

func TestSQLiteFile(t *testing.T) {
	for dsn, want := range map[string]string{
		":memory:": "", "a.db": "a.db", "file:a.db?x=1": "a.db", "file:///var/a.db": "/var/a.db", "/var/a.db": "/var/a.db",
	} {
		require.Equal(t, want, SQLiteFile(dsn), dsn)
	}
}

func FuzzCheckDSN(f *testing.F) {
	for _, dsn := range []string{"postgres://u:p@h/d", "u:p@tcp(h)/d?tls=custom", `"x"`, "jdbc:x", "host=h dbname=d"} {
		f.Add(dsn)
	}
	f.Fuzz(func(t *testing.T, dsn string) {
		for _, driver := range []string{"pgsql", "mysql", "sqlite"} {
			_ = CheckDSN(driver, dsn)
		}
	})
}

func TestIgnoredParameters(t *testing.T) {
	params := "binary_parameters=yes&disable_prepared_binary_result=no&gssencmode=disable&keepalives=1&keepalives_idle=30" +
		"&load_balance_hosts=random&pgbouncer=true&fallback_application_name=mdm&statement_timeout=5"
	for name, dsn := range map[string]string{
		"URL":      "postgres://u:p@h/d?" + params,
		"keywords": "host=h dbname=d " + strings.ReplaceAll(params, "&", " "),
	} {
		t.Run(name, func(t *testing.T) {
			pc, err := parsePgSQL(dsn)
			require.NoError(t, err)
			var log bytes.Buffer
			dropParams(pc, slog.New(slog.NewTextHandler(&log, nil)))
			require.Equal(t, map[string]string{"application_name": "mdm", "statement_timeout": "5"}, pc.RuntimeParams)
			require.Contains(t, log.String(), "load_balance_hosts")
			require.Equal(t, 1, strings.Count(log.String(), "\n"))
		})
	}
	pc, err := parsePgSQL("postgres://u:p@h/d")
	require.NoError(t, err)
	var log bytes.Buffer
	dropParams(pc, slog.New(slog.NewTextHandler(&log, nil)))
	require.Empty(t, log.String())
}

// certified returns a pair for 127.0.0.1 that its own pool verifies.
func certified(t *testing.T) (*tls.Config, *x509.CertPool) {
	server := httptest.NewTLSServer(nil)
	defer server.Close()
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	return &tls.Config{Certificates: server.TLS.Certificates}, roots
}

// pgsqlOverTLS is a server that takes TLS alone, and refuses every start-up
// with a message of its own.
func pgsqlOverTLS(t *testing.T, cfg *tls.Config) (address string) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			greetPgSQL(c, cfg)
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
	return l.Addr().String()
}

func greetPgSQL(c net.Conn, cfg *tls.Config) {
	if _, err := io.ReadFull(c, make([]byte, 8)); err != nil { // SSLRequest
		return
	}
	if _, err := c.Write([]byte("S")); err != nil {
		return
	}
	tc := tls.Server(c, cfg)
	size := make([]byte, 4)
	if _, err := io.ReadFull(tc, size); err != nil {
		return
	}
	if _, err := io.ReadFull(tc, make([]byte, binary.BigEndian.Uint32(size)-4)); err != nil {
		return
	}
	fields := "SFATAL\x00C28000\x00Mthe handshake is done\x00\x00"
	_, _ = tc.Write(append(binary.BigEndian.AppendUint32([]byte("E"), uint32(len(fields)+4)), fields...))
}

func TestRootCAs(t *testing.T) {
	serverTLS, roots := certified(t)
	address := pgsqlOverTLS(t, serverTLS)
	open := func(dsn string, roots *x509.CertPool) error {
		db, err := Open(t.Context(), Config{Driver: "pgsql", DSN: dsn, RootCAs: roots})
		if err == nil {
			db.Close()
		}
		return err
	}
	for _, mode := range []string{"", "?sslmode=prefer", "?sslmode=require", "?sslmode=verify-ca", "?sslmode=verify-full"} {
		dsn := "postgres://u:p@" + address + "/d" + mode
		require.ErrorContains(t, open(dsn, roots), "the handshake is done", mode)
		require.ErrorContains(t, open(dsn, x509.NewCertPool()), "x509", mode)
	}
	require.ErrorContains(t, open("postgres://u:p@"+address+"/d?sslmode=disable", roots), "contradict")

	mc, err := parseMySQL("u:p@tcp(db.example.org:3306)/d")
	require.NoError(t, err)
	require.NoError(t, trustMySQL(mc, roots))
	require.Same(t, roots, mc.TLS.RootCAs)
	require.False(t, mc.TLS.InsecureSkipVerify)
	mc, err = parseMySQL("u:p@tcp(db.example.org:3306)/d?tls=skip-verify")
	require.NoError(t, err)
	require.ErrorContains(t, trustMySQL(mc, roots), "contradict")
}

func TestNewSQLiteFileIsPrivate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "new.db")
	db, err := Open(t.Context(), Config{Driver: "sqlite", DSN: file})
	require.NoError(t, err)
	defer db.Close()
	_, err = db.write.ExecContext(t.Context(), "CREATE TABLE a (b INTEGER)")
	require.NoError(t, err)
	for _, name := range []string{file, file + "-wal", file + "-shm"} {
		info, err := os.Stat(name)
		require.NoError(t, err)
		require.Zero(t, info.Mode().Perm()&0o077, name)
	}
}
