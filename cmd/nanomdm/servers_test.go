package main

import (
	"bufio"
	"context"
	"crypto/x509"
	"database/sql"
	"io"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-sql-driver/mysql"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

var testDSN = regexp.MustCompile(`^NANOMDM_(PGSQL|MARIADB|MYSQL)_STORAGE_TEST_DSN=(.*)$`)

// ownServers starts database servers for this test alone, which speak TLS with
// server.pem and server.key of a folder, and returns the DSN of an administrator
// for each engine.
func ownServers(t *testing.T, folder string) map[string]string {
	t.Helper()
	if os.Getenv("CI") != "true" && (os.Geteuid() != 0 || os.Getenv("NANOMDM_MYSQL_STORAGE_TEST_DSN") == "") {
		t.Skip("no database servers: as root, run storage/engines/with-engines.sh go test ./...")
	}
	cmd := exec.Command("../../storage/engines/with-engines.sh", "sh", "-c", "env; echo; exec cat")
	cmd.Env = slices.DeleteFunc(os.Environ(), testDSN.MatchString)
	cmd.Env = append(cmd.Env, "ENGINES_TLS="+folder)
	said := &syncBuffer{}
	cmd.Stderr = said
	input, err := cmd.StdinPipe()
	require.NoError(t, err)
	output, err := cmd.StdoutPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		_ = input.Close() // cat ends, and with it the servers
		_, _ = io.Copy(io.Discard, output)
		require.NoError(t, cmd.Wait(), said)
	})
	servers := make(map[string]string)
	lines := bufio.NewScanner(output)
	for lines.Scan() && lines.Text() != "" {
		if m := testDSN.FindStringSubmatch(lines.Text()); m != nil {
			servers[strings.ToLower(m[1])] = m[2]
		}
	}
	require.Len(t, servers, 3, said)
	return servers
}

// ownServer is one of ownServers, and a database there with a user of its own.
type ownServer struct {
	t       *testing.T
	engine  string
	storage string // -storage
	admin   *sql.DB
	dsn     string // of the administrator
}

const (
	ownDatabase = "mdm"
	ownUser     = "mdm_user"
	ownPassword = "mdm-password"
)

func openOwnServer(t *testing.T, engine, dsn string) *ownServer {
	t.Helper()
	s := &ownServer{t: t, engine: engine, storage: "mysql", dsn: dsn}
	driver := "mysql"
	if engine == "pgsql" {
		s.storage, driver = "pgsql", "pgx"
	}
	var err error
	s.admin, err = sql.Open(driver, dsn)
	require.NoError(t, err)
	t.Cleanup(func() { s.admin.Close() })
	for _, statement := range documentedStatements(t, engine) {
		s.exec(statement)
	}
	return s
}

// documentedStatements are what docs/clusters.md has an administrator run for an
// engine, with the names of this test.
func documentedStatements(t *testing.T, engine string) []string {
	t.Helper()
	page, err := os.ReadFile("../../docs/clusters.md")
	require.NoError(t, err)
	heading := map[string]string{"pgsql": "PostgreSQL", "mysql": "MySQL", "mariadb": "MariaDB"}[engine]
	m := regexp.MustCompile("### " + heading + "\n\n```sql\n((?:.+;\n)+)```\n").FindStringSubmatch(string(page))
	require.NotNil(t, m)
	text := regexp.MustCompile(`DATABASE nanomdm\b|\bnanomdm\.\*`).ReplaceAllStringFunc(m[1], func(name string) string {
		return strings.Replace(name, "nanomdm", ownDatabase, 1)
	})
	text = strings.NewReplacer("nanomdm", ownUser, "secret", ownPassword).Replace(text)
	return strings.Split(strings.TrimSpace(text), "\n")
}

// within is the server for a subtest.
func (s *ownServer) within(t *testing.T) *ownServer {
	c := *s
	c.t = t
	return &c
}

func (s *ownServer) exec(statement string) {
	s.t.Helper()
	_, err := s.admin.ExecContext(s.t.Context(), statement)
	require.NoError(s.t, err, statement)
}

// as is the data source name for a user and database, without a word about TLS.
func (s *ownServer) as(user, password, database string) string {
	if s.engine == "pgsql" {
		u, err := url.Parse(s.dsn)
		require.NoError(s.t, err)
		u.User, u.Path, u.RawQuery = url.UserPassword(user, password), "/"+database, ""
		return u.String()
	}
	mc, err := mysql.ParseDSN(s.dsn)
	require.NoError(s.t, err)
	mc.User, mc.Passwd, mc.DBName = user, password, database
	return mc.FormatDSN()
}

// refuses runs a daemon whose start fails, with each of the words in its log.
func (s *ownServer) refuses(code int, dsn, ca string, words ...string) {
	s.t.Helper()
	dir := s.t.TempDir()
	devices, err := mdmtest.NewCA()
	require.NoError(s.t, err)
	require.NoError(s.t, os.WriteFile(filepath.Join(dir, "ca.pem"), devices.PEM(), 0o600))
	log := &syncBuffer{}
	ended := make(chan int, 1)
	go func() {
		ended <- run(context.Background(), []string{"-ca", filepath.Join(dir, "ca.pem"), "-listen", "127.0.0.1:0",
			"-storage", s.storage, "-storage-dsn", dsn, "-storage-ca", ca}, nil, io.Discard, log, nil)
	}()
	require.Equal(s.t, code, within(s.t, ended), log)
	for _, word := range words {
		require.Contains(s.t, log.String(), word)
	}
	require.NotContains(s.t, log.String(), ownPassword)
}

// TestOwnDatabaseServers is what needs a database server that no other test uses:
// one with TLS, one that is read-only, one whose users lack something.
func TestOwnDatabaseServers(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	server, err := ca.Issue("database", mdmtest.WithHosts("127.0.0.1"), mdmtest.WithExtKeyUsage(x509.ExtKeyUsageServerAuth))
	require.NoError(t, err)
	both, err := server.PEM()
	require.NoError(t, err)
	for name, data := range map[string][]byte{"server.pem": both, "server.key": both, "ca.pem": ca.PEM()} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	stranger, err := mdmtest.NewCA()
	require.NoError(t, err)
	right, wrong := filepath.Join(dir, "ca.pem"), filepath.Join(dir, "wrong.pem")
	require.NoError(t, os.WriteFile(wrong, stranger.PEM(), 0o600))
	for engine, dsn := range ownServers(t, dir) {
		t.Run(engine, func(t *testing.T) {
			t.Parallel()
			s := openOwnServer(t, engine, dsn)
			own := s.as(ownUser, ownPassword, ownDatabase)
			t.Run("TLS", func(t *testing.T) { s.within(t).testTLS(own, right, wrong) })
			t.Run("causes", func(t *testing.T) { s.within(t).testCauses(right) })
			if engine == "mysql" {
				t.Run("Group Replication", func(t *testing.T) { s.within(t).testGroupReplication(own, right) })
			}
			if engine != "pgsql" { // see TestReadOnlyServer
				t.Run("read-only", func(t *testing.T) { s.within(t).testReadOnly(own, right) })
			}
		})
	}
}

// testTLS: the server is verified by the CA of -storage-ca, and by its name.
func (s *ownServer) testTLS(dsn, right, wrong string) {
	d := start(s.t, "http", "-storage", s.storage, "-storage-dsn", dsn, "-storage-ca", right)
	d.eventually("/readyz", 200)
	if s.engine == "pgsql" { // the others' user has to use TLS
		var plain, encrypted int
		require.NoError(s.t, s.admin.QueryRowContext(s.t.Context(), `SELECT count(*) FILTER (WHERE NOT ssl), count(*) FILTER (WHERE ssl)
			FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE usename = $1`, ownUser).Scan(&plain, &encrypted))
		require.Zero(s.t, plain)
		require.Positive(s.t, encrypted)
	}
	s.refuses(1, dsn, wrong, "certificate signed by unknown authority", "in -storage-ca")
	s.refuses(1, strings.Replace(dsn, "127.0.0.1", "localhost", 1), right, "127.0.0.1", "as its certificate does")
	if s.engine != "pgsql" {
		s.refuses(2, dsn+"?tls=custom", right, "write tls=true, and name the file of a private CA in -storage-ca")
	}
}

// testCauses: a start that cannot succeed names the cause and what helps.
func (s *ownServer) testCauses(ca string) {
	s.refuses(1, s.as(ownUser, "wrong", ownDatabase), ca, "check user and password in -storage-dsn")
	if s.engine == "pgsql" {
		s.exec("CREATE USER poor PASSWORD 'poor'")
		s.refuses(1, s.as(ownUser, ownPassword, "absent"), ca, "create the database")
		s.refuses(1, s.as("poor", "poor", ownDatabase), ca, "make the user of -storage-dsn the owner of its database")
		return
	}
	s.exec("CREATE USER 'poor'@'%' IDENTIFIED BY 'poor'")
	s.exec("GRANT SELECT ON " + ownDatabase + ".* TO 'poor'@'%'")
	s.exec("CREATE DATABASE bare")
	s.exec("GRANT SELECT ON bare.* TO 'poor'@'%'")
	s.exec("GRANT ALL ON `absent`.* TO '" + ownUser + "'@'%'")
	s.refuses(1, s.as(ownUser, ownPassword, "absent"), ca, "create the database")
	s.refuses(1, s.as("poor", "poor", "bare"), ca, "GRANT ALL ON name.*")
}

// testReadOnly: a server that takes no writes is waited for, at the start and
// later, and the log names the setting.
func (s *ownServer) testReadOnly(dsn, ca string) {
	setting := "read_only"
	if s.engine == "mysql" {
		setting = "super_read_only"
	}
	s.exec("SET GLOBAL " + setting + " = 1")
	d := begin(s.t, nil, "-storage", s.storage, "-storage-dsn", dsn, "-storage-ca", ca)
	says := func(pattern string) {
		s.t.Helper()
		require.Eventually(s.t, func() bool { return regexp.MustCompile(pattern).MatchString(d.log.String()) },
			20*time.Second, 10*time.Millisecond, "the log never says %s", pattern)
	}
	says(`waiting for the database.*\b` + setting + ` is on: .*name the primary in -storage-dsn`)
	if s.engine == "mysql" {
		s.exec("SET GLOBAL super_read_only = 0") // read_only stays
		says(`waiting for the database.*[^_]read_only is on`)
	}
	s.exec("SET GLOBAL read_only = 0")
	d.eventually("/readyz", 200)
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(s.t, dev.Enroll(s.t.Context()))

	s.exec("SET GLOBAL read_only = 1")
	status, retry, _ := poll(s.t, dev)
	require.Equal(s.t, 200, status, "a poll of nothing writes later")
	require.Empty(s.t, retry)
	require.Error(s.t, dev.TokenUpdate(s.t.Context()))
	d.eventually("/readyz", 503)
	says(`the database cannot serve.*read-only.*name the primary in -storage-dsn`)
	s.exec("SET GLOBAL read_only = 0")
	d.eventually("/readyz", 200)
	require.NoError(s.t, dev.TokenUpdate(s.t.Context()))
}

// testGroupReplication: sessions on a member of a group read what other members
// have committed, as far as the group's mode needs it, whatever the server's
// own setting is.
func (s *ownServer) testGroupReplication(dsn, ca string) {
	s.exec("INSTALL PLUGIN group_replication SONAME 'group_replication.so'")
	s.exec("SET GLOBAL group_replication_group_name = '8d4bcbb6-6d3b-4f2d-8a6b-0d3a1f7f4a11'")
	for _, c := range []struct{ primaries, server, dsn, want string }{
		{"ON", "EVENTUAL", "", "BEFORE_ON_PRIMARY_FAILOVER"},
		{"ON", "AFTER", "", "AFTER"},
		{"OFF", "EVENTUAL", "", "BEFORE"},
		{"OFF", "BEFORE_ON_PRIMARY_FAILOVER", "", "BEFORE"},
		{"OFF", "BEFORE_AND_AFTER", "", "BEFORE_AND_AFTER"},
		{"ON", "EVENTUAL", "?group_replication_consistency='AFTER'", "AFTER"},
	} {
		s.t.Run(c.primaries+" "+c.server+c.dsn, func(t *testing.T) {
			s := s.within(t)
			s.exec("SET GLOBAL group_replication_single_primary_mode = " + c.primaries)
			s.exec("SET GLOBAL group_replication_consistency = '" + c.server + "'")
			d := start(t, "http", "-storage", s.storage, "-storage-dsn", dsn+c.dsn, "-storage-ca", ca)
			d.eventually("/readyz", 200)
			// The connection that asked for the server's kind may take its time to end.
			require.Eventually(t, func() bool { return slices.Equal(s.consistencies(), []string{c.want}) }, 10*time.Second, 20*time.Millisecond,
				"%s, and it is %s", c.want, s.consistencies())
		})
	}
}

// consistencies are the values of group_replication_consistency in sessions of
// the daemon.
func (s *ownServer) consistencies() (values []string) {
	rows, err := s.admin.QueryContext(s.t.Context(), `SELECT DISTINCT v.VARIABLE_VALUE FROM performance_schema.variables_by_thread v
		JOIN performance_schema.threads t USING (THREAD_ID)
		WHERE t.PROCESSLIST_USER = ? AND v.VARIABLE_NAME = 'group_replication_consistency'`, ownUser)
	if err != nil {
		return []string{err.Error()}
	}
	defer rows.Close()
	for rows.Next() {
		var value string
		if err := rows.Scan(&value); err != nil {
			return []string{err.Error()}
		}
		values = append(values, value)
	}
	return values
}
