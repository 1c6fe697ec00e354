package main

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

var update = flag.Bool("update", false, "write the generated files anew")

// present is a stat that knows these names; one that ends with a slash is a
// directory.
func present(names ...string) func(string) (fs.FileInfo, error) {
	files := fstest.MapFS{}
	for _, name := range names {
		if dir, ok := strings.CutSuffix(name, "/"); ok {
			files[dir] = &fstest.MapFile{Mode: fs.ModeDir}
		} else {
			files[name] = &fstest.MapFile{}
		}
	}
	return func(name string) (fs.FileInfo, error) { return fs.Stat(files, name) }
}

func parse(t *testing.T, args, environ []string) (options, []string) {
	t.Helper()
	o, warnings, err := parseOptions(args, environ, present("ca.pem", "cert.pem", "key.pem"))
	require.NoError(t, err)
	return o, warnings
}

func TestDefaults(t *testing.T) {
	o, warnings := parse(t, []string{"-ca", "ca.pem"}, nil)
	require.Empty(t, warnings)
	require.Equal(t, "https://api.push.apple.com", o.apnsURL.String())
	o.apnsURL = nil
	require.Equal(t, options{
		clockSkew: time.Minute, renewal: storage.RenewalWindow,
		listen: ":9000", ca: "ca.pem", storage: "sqlite", storageDSN: "nanomdm.db",
		pushWorkers: 1000, pushExpiration: 7 * 24 * time.Hour, pushTimeout: 10 * time.Second,
		pushRetry:    []time.Duration{3 * time.Minute, time.Hour, 24 * time.Hour},
		secretParams: []string{"ticket"}, webhookWorkers: 32, webhookTimeout: 30 * time.Second, webhookMaxAge: 3 * 24 * time.Hour, webhookMaxBacklog: 1_000_000,
		expiryNotice: 30 * 24 * time.Hour, retainEvents: 7 * 24 * time.Hour, retainUsers: 90 * 24 * time.Hour, maxEventBytes: 16 << 30,
		maxBody: 16 << 20, maxCheckin: 256 << 10, maxStatus: 4 << 20, maxHourlyBytes: 1 << 30, maxInFlight: 256 << 20, maxRequests: 4096, maxUserChannels: 200, drainTimeout: 30 * time.Second, logFormat: logText,
	}, o)
}

func TestPrecedence(t *testing.T) {
	for _, c := range []struct {
		name    string
		args    []string
		environ []string
		want    string
	}{
		{"default", nil, nil, ":9000"},
		{"environment", nil, []string{"NANOMDM_LISTEN=:1"}, ":1"},
		{"empty environment", nil, []string{"NANOMDM_LISTEN="}, ":9000"},
		{"flag", []string{"-listen", ":2"}, nil, ":2"},
		{"flag over environment", []string{"-listen=:2"}, []string{"NANOMDM_LISTEN=:1"}, ":2"},
		{"flag over a bad environment", []string{"--listen", ":2"}, []string{"NANOMDM_LISTEN=no"}, ":2"},
		{"last flag", []string{"-listen", ":2", "-listen", ":3"}, nil, ":3"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o, _ := parse(t, append(c.args, "-ca", "ca.pem"), c.environ)
			require.Equal(t, c.want, o.listen)
		})
	}
	t.Run("switch", func(t *testing.T) {
		environ := []string{"NANOMDM_CHECKIN=true", "NANOMDM_CA=ca.pem"}
		o, _ := parse(t, nil, environ)
		require.True(t, o.checkin)
		o, _ = parse(t, []string{"-checkin=false"}, environ)
		require.False(t, o.checkin)
	})
	t.Run("empty flag takes a value of the environment away", func(t *testing.T) {
		o, _ := parse(t, []string{"-webhook-url="}, []string{"NANOMDM_WEBHOOK_URL=http://h/", "NANOMDM_CA=ca.pem"})
		require.Nil(t, o.webhookURL)
	})
}

func TestValues(t *testing.T) {
	o, warnings := parse(t, []string{
		"-ca", "ca.pem", "-cert-header", ":Client-Cert", "-trusted-proxies", "10.1.2.3/8, ::1",
		"-storage", "mysql", "-storage-options", "delete=1,conn_max_lifetime=3m,conn_max_idle_time=30s,max_open_conns=7,max_total_conns=80",
		"-push-retry", "0", "-push-rate", "2.5", "-max-body", "2k", "-max-in-flight", "1G", "-dm", "http://h/dm/",
	}, []string{"NANOMDM_STORAGE_DSN=u:p@tcp(h)/d"})
	require.Empty(t, warnings)
	require.Equal(t, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}, o.trustedProxies)
	require.Equal(t, storageOptions{
		deleteAcked: true, connMaxLifetime: 3 * time.Minute, connMaxIdleTime: 30 * time.Second, maxOpenConns: 7, maxTotalConns: 80,
	}, o.storageOptions)
	require.Equal(t, secret("u:p@tcp(h)/d"), o.storageDSN)
	require.Empty(t, o.pushRetry)
	require.Equal(t, 2.5, o.pushRate)
	require.Equal(t, int64(2048), o.maxBody)
	require.Equal(t, int64(1<<30), o.maxInFlight)
	require.Equal(t, "http://h/dm/", o.dm.String())
	require.Equal(t, ":Client-Cert", o.certHeader)

	o, _ = parse(t, []string{"-ca", "ca.pem", "-dsn", "old.db"}, nil)
	require.Equal(t, secret("old.db"), o.storageDSN)
}

func TestAllMistakesAtOnce(t *testing.T) {
	_, _, err := parseOptions([]string{
		"-listne", ":1", "---x", "-tls-cert", "cert.pem", "-tls-client-auth", "-cert-header", "X-Cert", "-trusted-proxies", "10/8",
		"-checkin=maybe", "-migration", "-dm", "https://user:hunter2@/", "-max-body", "1k", "stray", "-max-in-flight", "1",
		"-storage", "pgsql", "-storage", "mysql", "-storage-options", "size=1", "-drain-timeout",
	}, []string{"NANOMDM_PUSH_WORKERS=0", "NANOMDM_PUSH_TIMEOUT=10"}, present("cert.pem"))
	require.Equal(t, mistakes{
		`-listne is not an option: did you mean -listen? (-help lists all)`,
		`"---x" is not an option: remove it`,
		`"stray" is not an option: remove it`,
		`-drain-timeout: give it a value`,
		`-trusted-proxies: "10/8" is not a network such as 10.0.0.0/8`,
		`-checkin: "maybe" is neither true nor false`,
		`-dm: not a URL with http or https and a host, such as https://mdm.example.org/`,
		`-storage-options: "size" is not a setting: use delete, conn_max_lifetime, conn_max_idle_time, max_open_conns, max_total_conns`,
		`NANOMDM_PUSH_WORKERS: "0" is not a number of 1 or more`,
		`NANOMDM_PUSH_TIMEOUT: "10" is not a time above zero, such as 30s, 5m or 168h`,
		`-tls-cert needs the key too: give -tls-key`,
		`-tls-client-auth and -cert-header are two ways to identify a device: keep one`,
		`-max-in-flight is smaller than 16 times -max-body: it counts the copies of a body, too`,
		`-storage is given 2 times: this daemon writes to one store, keep one`,
		`-storage mysql needs to know the database: give -storage-dsn or -storage-dsn-file`,
		`-ca: name the PEM file of the CAs that issue device identities (or give -disable-mdm)`,
		`-migration needs the API: give -api`,
	}, err)
	require.True(t, strings.HasPrefix(err.Error(), "configuration: 17 mistakes:\n  -listne is"))
	require.NotContains(t, err.Error(), "hunter2")
}

func TestMistakes(t *testing.T) {
	for _, c := range []struct {
		args string
		want string
	}{
		{"-disable-mdm", "-disable-mdm without -api leaves nothing to do: give -api, or remove -disable-mdm"},
		{"-ca=", "-ca: name the PEM file of the CAs that issue device identities (or give -disable-mdm)"},
		{"-ca gone.pem", "-ca: no such file: gone.pem"},
		{"-ca dir", "-ca: no such file: dir"},
		{"-ca ca.pem -topic-ca t=gone.pem", "-topic-ca: no such file: gone.pem"},
		{"-ca ca.pem -topic-ca ca.pem", `-topic-ca: "ca.pem" is not TOPIC=FILE, such as com.apple.mgmt.External.1=ca.pem`},
		{"-ca ca.pem -topic-ca t=ca.pem,t=ca.pem", "-topic-ca: t is there twice: name one file with all of its CAs"},
		{"-ca ca.pem -tls-key key.pem", "-tls-key needs the certificate too: give -tls-cert"},
		{"-ca ca.pem -tls-client-auth", "-tls-client-auth needs TLS: give -tls-cert and -tls-key"},
		{"-ca ca.pem -dsn a -storage-dsn b", "-dsn is the old name of -storage-dsn, and both are given: keep -storage-dsn"},
		{"-ca ca.pem -cert-header X:Y", `-cert-header: "X:Y" is not the name of a header`},
		{"-ca ca.pem -listen 9000", `-listen: "9000" is not HOST:PORT, such as :9000 or 127.0.0.1:9000, and not unix:PATH`},
		{"-ca ca.pem -listen unix:", `-listen: "unix:" names no socket: write unix:/run/nanomdm/nanomdm.sock`},
		{"-ca ca.pem -drain-delay -1s", `-drain-delay: "-1s" is not a time of 0 or more, such as 0, 15s or 1m`},
		{"-ca ca.pem -api-listen :9001", "-api-listen needs the API: give -api"},
		{"-ca ca.pem -apns-url http://h", "-apns-url: not a URL with https and a host, such as https://api.push.apple.com"},
		{"-ca ca.pem -webhook-url ftp://h", "-webhook-url: not a URL with http or https and a host, such as https://mdm.example.org/"},
		{"-ca ca.pem -webhook-url http://:80", "-webhook-url: not a URL with http or https and a host, such as https://mdm.example.org/"},
		{"-ca ca.pem -webhook-workers -1", `-webhook-workers: "-1" is not a number of 0 or more`},
		{"-ca ca.pem -webhook-max-age 0", `-webhook-max-age: "0" is not an age above zero, such as 3d or 12h`},
		{"-ca ca.pem -webhook-max-age 8d", "-retain-events is shorter than -webhook-max-age: make it at least as long"},
		{"-ca ca.pem -retain-events 1h", "-retain-events is shorter than -webhook-max-age: make it at least as long"},
		{"-ca ca.pem -webhook-old-key x", "-webhook-old-key is a second key: give -webhook-hmac-key, too"},
		{"-ca ca.pem -push-rate NaN", `-push-rate: "NaN" is not a number of 0 or more`},
		{"-ca ca.pem -push-retry 1h,x", `-push-retry: "x" is not a time above zero, such as 30s, 5m or 168h`},
		{"-ca ca.pem -push-retry=", "-push-retry: empty: give times such as 3m,1h,24h, or 0 for off"},
		{"-ca ca.pem -max-body 9223372036854775807k", `-max-body: "9223372036854775807k" is not a size in bytes, such as 65536, 512k or 16M`},
		{"-ca ca.pem -max-body k", `-max-body: "k" is not a size in bytes, such as 65536, 512k or 16M`},
		{"-ca ca.pem -storage-options delete=1,delete=0", "-storage-options: delete is given twice: keep one"},
		{"-ca ca.pem -storage-options max_open_conns=x", `-storage-options: max_open_conns: "x" is not a number of 1 or more`},
		{"-ca ca.pem -storage oracle", `-storage: "oracle" is not a database: use sqlite, pgsql (PostgreSQL) or mysql (MySQL, MariaDB)`},
	} {
		t.Run(c.args, func(t *testing.T) {
			_, _, err := parseOptions(strings.Fields(c.args), nil, present("ca.pem", "key.pem", "dir/"))
			require.Equal(t, mistakes{c.want}, err)
			require.Equal(t, "configuration: "+c.want, err.Error())
		})
	}
}

func TestStoresOfNanoMDM(t *testing.T) {
	for _, name := range []string{"file", "filekv", "inmem", "dbkv"} {
		_, _, err := parseOptions([]string{"-ca", "ca.pem", "-storage", name}, nil, present("ca.pem"))
		require.ErrorContains(t, err, "-storage: "+name+" is a store of NanoMDM's")
		require.ErrorContains(t, err, "bring the enrollments with nano2nano")
	}
	for _, c := range []struct {
		name  string
		files []string
		args  []string
		want  string
	}{
		{"dbkv", []string{"dbkv/"}, nil, "the directory dbkv looks like"},
		{"db", []string{"db/"}, nil, "the directory db looks like"},
		{"a file called db", []string{"db"}, nil, ""},
		{"our database is there", []string{"dbkv/", "nanomdm.db"}, nil, ""},
		{"told to start empty", []string{"dbkv/"}, []string{"-storage", "sqlite"}, ""},
		{"told which file", []string{"dbkv/"}, []string{"-storage-dsn", "x.db"}, ""},
		{"told by the old name", []string{"dbkv/"}, []string{"-dsn", "x.db"}, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := parseOptions(append(c.args, "-ca", "ca.pem"), nil, present(append(c.files, "ca.pem")...))
			if c.want == "" {
				require.NoError(t, err)
				return
			}
			require.ErrorContains(t, err, c.want)
			require.ErrorContains(t, err, "nano2nano")
		})
	}
}

func TestUnknownEnvironment(t *testing.T) {
	_, warnings := parse(t, []string{"-ca", "ca.pem"}, []string{
		"HOME=/", "NANOMDM_LISTNE=:1", "NANOMDM_API_FIEL=x", "NANOMDM_HELP=1", "NANOMDM_VERSION=1.2",
		"NANOMDM_MYSQL_STORAGE_TEST_DSN=x", "NANOMDM_PGSQL_STORAGE_TEST_DSN=x", "NANOMDM_MARIADB_STORAGE_TEST_DSN=x",
		"NANOMDM_SERVICE_HOST=10.0.0.1", "NANOMDM_SERVICE_PORT_HTTP=9000", "NANOMDM_PORT=tcp://10.0.0.1:9000",
		"NANOMDM_PORT_9000_TCP_ADDR=10.0.0.1",
	})
	require.Len(t, warnings, 3)
	require.Equal(t, "NANOMDM_API_FIEL in the environment is not an option and is ignored: did you mean NANOMDM_API_FILE?", warnings[0])
	require.Contains(t, warnings[1], "NANOMDM_HELP in the environment")
	require.Equal(t, "NANOMDM_LISTNE in the environment is not an option and is ignored: did you mean NANOMDM_LISTEN?", warnings[2])
}

// longKey is a key of the API that no warning is about.
const longKey = "hunter2-Vq3xT9wLk5ZpR7yB1nMc"

// TestValuesAsToolsWriteThem: byte order marks, carriage returns and newlines at
// the end of a value are no part of it, in files and in variables.
func TestValuesAsToolsWriteThem(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	for _, form := range []string{"%s\n", "%s\r\n", "\xef\xbb\xbf%s", "\xef\xbb\xbf%s\r\n\r\n"} {
		require.NoError(t, os.WriteFile(file, fmt.Appendf(nil, form, longKey), 0o600))
		o, warnings := parse(t, []string{"-api-file", file}, []string{
			"NANOMDM_CA=" + fmt.Sprintf(form, "ca.pem"), "NANOMDM_STORAGE=" + fmt.Sprintf(form, "pgsql"),
			"NANOMDM_STORAGE_DSN=" + fmt.Sprintf(form, "postgres://u:p@h/d"), "NANOMDM_CLOCK_SKEW=" + fmt.Sprintf(form, "2m"),
		})
		require.Empty(t, warnings)
		require.Equal(t, secret(longKey), o.api)
		require.Equal(t, secret("postgres://u:p@h/d"), o.storageDSN)
		require.Equal(t, "pgsql", o.storage)
		require.Equal(t, 2*time.Minute, o.clockSkew)
	}
}

func TestSuspiciousSecrets(t *testing.T) {
	_, warnings := parse(t, []string{"-ca", "ca.pem"}, []string{"NANOMDM_API=\"" + longKey + "\""})
	require.Equal(t, []string{"the value of NANOMDM_API begins with a quotation mark: is that meant?"}, warnings)
	_, warnings = parse(t, []string{"-ca", "ca.pem", "-dm", "https://dm.example.org/"}, []string{"NANOMDM_DM_SEND_HMAC_KEY=k ", "NANOMDM_DM_RECV_HMAC_KEY= k"})
	require.Equal(t, []string{
		"the value of NANOMDM_DM_SEND_HMAC_KEY ends with white space: is that meant?",
		"the value of NANOMDM_DM_RECV_HMAC_KEY begins with white space: is that meant?",
	}, warnings)
	_, warnings = parse(t, []string{"-ca", "ca.pem"}, []string{"NANOMDM_API=secret"})
	require.Len(t, warnings, 1)
	require.Contains(t, warnings[0], "the key of -api can be guessed, it has about 16 bits")
	require.NotContains(t, warnings[0], "secret")
}

func TestWeakness(t *testing.T) {
	for range 1000 {
		raw := make([]byte, 16)
		_, _ = rand.Read(raw)
		for _, key := range []string{hex.EncodeToString(raw), base64.StdEncoding.EncodeToString(raw), rand.Text()} {
			require.Empty(t, weakness(key), key)
		}
	}
	for _, key := range []string{"nanomdm", "1234567890123456", strings.Repeat("a", 100), strings.Repeat("ab", 30)} {
		require.NotEmpty(t, weakness(key), key)
	}
	require.Empty(t, weakness(""), "no key, no API")
}

func TestReadableKeyFiles(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, mode fs.FileMode) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(longKey), 0o600))
		require.NoError(t, os.Chmod(path, mode))
		return path
	}
	shared, private, ca := write("shared", 0o644), write("private", 0o640), write("ca.pem", 0o644)
	_, warnings, err := parseOptions([]string{"-ca", ca, "-api-file", shared, "-tls-cert", ca, "-tls-key", shared}, nil, os.Stat)
	require.NoError(t, err)
	require.Len(t, warnings, 2)
	for _, w := range warnings {
		require.Contains(t, w, "every user can read "+shared)
	}
	_, warnings, err = parseOptions([]string{"-ca", ca, "-api-file", private, "-seal-key-file", private}, nil, os.Stat)
	require.NoError(t, err)
	require.Empty(t, warnings)
}

// TestDSNMistakes: a name that no database can be opened with is a mistake of
// usage, not a server that is away.
func TestDSNMistakes(t *testing.T) {
	dir := t.TempDir()
	for _, tc := range []struct{ storage, dsn, want string }{
		{"pgsql", "jdbc:postgresql://h/d", "JDBC"},
		{"pgsql", "'postgres://u:hunter2@h/d'", "in quotation marks"},
		{"pgsql", "postgressql://u:hunter2@h/d", "write postgres://"},
		{"mysql", "postgres://u:hunter2@h/d", "or give -storage pgsql"},
		{"mysql", "u:hunter2@tcp(h)/d?tls=custom", "-storage-ca"},
		{"sqlite", dir, "is a directory: name a file in it, such as " + filepath.Join(dir, "nanomdm.db")},
		{"sqlite", filepath.Join(dir, "no", "such.db"), "the folder " + filepath.Join(dir, "no") + " does not exist"},
		{"sqlite", "file:" + filepath.Join(dir, "no", "such.db") + "?x=1", "the folder " + filepath.Join(dir, "no") + " does not exist"},
	} {
		t.Run(tc.storage+" "+tc.want, func(t *testing.T) {
			var stdout, stderr strings.Builder
			code := run(t.Context(), []string{"-disable-mdm", "-storage", tc.storage},
				[]string{"NANOMDM_API=" + longKey, "NANOMDM_STORAGE_DSN=" + tc.dsn}, &stdout, &stderr, nil)
			require.Equal(t, exitUsage, code)
			require.Contains(t, stderr.String(), "-storage-dsn: ")
			require.Contains(t, stderr.String(), tc.want)
			require.NotContains(t, stderr.String(), "hunter2")
		})
	}
}

func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
		return path
	}
	key, empty := write("key", longKey+"\n\n"), write("empty", "\n")
	dsn := write("dsn", "postgres://u:hunter2@h/d\r\n")

	t.Run("from files", func(t *testing.T) {
		o, warnings := parse(t, []string{"-ca", "ca.pem", "-api-file", key, "-storage", "pgsql"},
			[]string{"NANOMDM_STORAGE_DSN_FILE=" + dsn})
		require.Empty(t, warnings)
		require.Equal(t, secret(longKey), o.api, "the newlines at the end are the file's")
		require.Equal(t, secret("postgres://u:hunter2@h/d"), o.storageDSN)
	})
	t.Run("on the command line", func(t *testing.T) {
		o, warnings := parse(t, []string{"-ca", "ca.pem", "-api", longKey, "-storage", "pgsql", "-dsn", "postgres://u:hunter2@h/d"}, nil)
		require.Equal(t, secret(longKey), o.api)
		require.Equal(t, []string{
			"-api on the command line shows in the list of processes: use -api-file or NANOMDM_API_FILE",
			"-dsn on the command line shows in the list of processes: use -storage-dsn-file or NANOMDM_STORAGE_DSN_FILE",
		}, warnings)
	})
	t.Run("in the environment", func(t *testing.T) {
		_, warnings := parse(t, []string{"-ca", "ca.pem"}, []string{"NANOMDM_API=" + longKey})
		require.Empty(t, warnings)
	})
	t.Run("mistakes", func(t *testing.T) {
		_, _, err := parseOptions([]string{"-ca", "ca.pem", "-api", "hunter2", "-dm-send-hmac-key-file", empty,
			"-webhook-hmac-key-file", filepath.Join(dir, "gone"), "-dsn", "hunter2", "-storage-dsn-file", dsn},
			[]string{"NANOMDM_API_FILE=" + key}, present("ca.pem"))
		require.Len(t, err, 4)
		require.ErrorContains(t, err, "-api and NANOMDM_API_FILE are both given: keep one")
		require.ErrorContains(t, err, empty+" is empty: write the value into it")
		require.ErrorContains(t, err, "-webhook-hmac-key-file: open ")
		require.ErrorContains(t, err, "-dsn is the old name of -storage-dsn, and both are given")
		require.NotContains(t, err.Error(), "hunter2")
	})
	t.Run("shown nowhere", func(t *testing.T) {
		o, _ := parse(t, []string{"-ca", "ca.pem", "-api-file", key}, nil)
		var b bytes.Buffer
		newLogger(&b, options{}).Info("started", "api", o.api)
		fmt.Fprintf(&b, "%v %+v %#v %s %q %x", o, o, o, o.api, o.api, o.api)
		require.NotContains(t, b.String(), longKey)
		require.NotContains(t, b.String(), fmt.Sprintf("%x", longKey))
		require.Contains(t, b.String(), "api=[redacted]")
	})
}

func TestWarnings(t *testing.T) {
	_, warnings := parse(t, []string{"-ca", "ca.pem"},
		[]string{"NANOMDM_DM_RECV_HMAC_KEY=k", "NANOMDM_WEBHOOK_HMAC_KEY=k"})
	require.Equal(t, []string{
		"-dm-send-hmac-key and -dm-recv-hmac-key do nothing without -dm",
		"-webhook-hmac-key does nothing without -webhook-url",
	}, warnings)
}

func TestVersionAndHelpComeFirst(t *testing.T) {
	o, _, err := parseOptions([]string{"-version"}, []string{"NANOMDM_LISTEN=bad"}, present())
	require.NoError(t, err)
	require.True(t, o.version)
	for _, arg := range []string{"-h", "-help", "--help"} {
		_, _, err = parseOptions([]string{arg, "-nonsense"}, nil, present())
		require.ErrorIs(t, err, flag.ErrHelp)
	}
}

func TestHelp(t *testing.T) {
	var b bytes.Buffer
	writeHelp(&b)
	help := b.String()
	require.True(t, strings.HasPrefix(help, "nanomdm is an Apple MDM server.\n\nUsage: nanomdm -ca FILE"))
	require.Contains(t, help, `
Limits
  -max-body BYTES         Largest request body; k, M and G are powers of 1024.
                          (default 16M)
`)
	require.True(t, strings.HasSuffix(help, "-storage pgsql -storage-dsn-file dsn.txt\n"))
	lines, entry := strings.Split(help, "\n"), 0
	for _, line := range lines {
		require.LessOrEqual(t, len(line), 80, line)
		if entry++; !strings.HasPrefix(line, "         ") {
			entry = 0
		}
		if slices.ContainsFunc(new(options).table(), func(op option) bool { return line == "  -"+op.name+" "+op.arg }) {
			entry = -1 // its text begins on the next line
		}
		require.Less(t, entry, 2, "more than two lines: %s", line)
	}
	for _, op := range new(options).table() {
		require.True(t, slices.ContainsFunc(lines, func(line string) bool {
			return strings.HasPrefix(line+" ", "  -"+op.name+" ")
		}), op.name)
	}
}

// TestTable checks what the rows promise each other.
func TestTable(t *testing.T) {
	var seen []string
	for _, op := range new(options).table() {
		for _, name := range op.names() {
			assert.NotContains(t, seen, name)
			assert.Regexp(t, `^[a-z-]+$`, name)
			seen = append(seen, name)
		}
		assert.True(t, strings.HasSuffix(op.help, "."), op.name)
		if op.def != "" {
			assert.NoError(t, op.set(op.def), op.name)
		}
	}
}

func TestParseRetention(t *testing.T) {
	const day = 24 * time.Hour
	for _, tc := range []struct {
		text string
		want storage.Retention
		err  string
	}{
		{text: ""},
		{text: "0"},
		{text: "30d", want: storage.Retention{Default: 30 * day}},
		{text: "12h", want: storage.Retention{Default: 12 * time.Hour}},
		{text: "30d, InstalledApplicationList=2d,DeviceLock=0", want: storage.Retention{
			Default: 30 * day, ByType: map[string]time.Duration{"InstalledApplicationList": 2 * day, "DeviceLock": 0},
		}},
		{text: "ProfileList=1h", want: storage.Retention{ByType: map[string]time.Duration{"ProfileList": time.Hour}}},
		{text: "30", err: `"30" is not an age`},
		{text: "-1d", err: `"-1d" is not an age`},
		{text: "-1h", err: `"-1h" is not an age`},
		{text: "99999d", err: `"99999d" is not an age`},
		{text: "1.5d", err: `"1.5d" is not an age`},
		{text: "ProfileList=", err: `"" is not an age`},
		{text: "Profile List=1d", err: `"Profile List" is not a request type`},
		{text: "=1d", err: `"" is not a request type`},
		{text: "1d,2d", err: `"2d" is a second age`},
		{text: "0,2d", err: `"2d" is a second age`},
		{text: "A=1d,A=2d", err: "A is given twice"},
	} {
		t.Run(tc.text, func(t *testing.T) {
			got, err := parseRetention(tc.text)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			require.Equal(t, tc.want, got)
		})
	}
}

func TestNearest(t *testing.T) {
	require.Equal(t, 3, distance("kitten", "sitting"))
	require.Equal(t, 4, distance("", "four"))
	require.Equal(t, "listen", nearest("lisen", []string{"api", "listen", "dm"}))
}

func TestLogLevels(t *testing.T) {
	var b bytes.Buffer
	newLogger(&b, options{}).Debug("quiet")
	require.Empty(t, b.String())
	newLogger(&b, options{debug: true}).Debug("loud", slog.Int("n", 1))
	require.Contains(t, b.String(), "level=DEBUG msg=loud n=1\n")
	b.Reset()
	newLogger(&b, options{logFormat: logJSON}).Info("hello", "n", 1)
	var line struct {
		Level, Msg string
		N          int
	}
	require.NoError(t, json.Unmarshal(b.Bytes(), &line))
	require.Equal(t, "INFO hello 1", fmt.Sprint(line.Level, " ", line.Msg, " ", line.N))
}

func FuzzParseOptions(f *testing.F) {
	f.Add("-ca\nca.pem\n-storage-options\ndelete=1", "NANOMDM_PUSH_RETRY=1h")
	f.Add("---\n-=\n--\n-\n-listen", "NANOMDM_=")
	f.Add("-max-body\n16M\n-trusted-proxies\n::1,10.0.0.0/8", "=x")
	f.Fuzz(func(t *testing.T, args, environ string) {
		if strings.Contains(args+environ, "FILE") || strings.Contains(args+environ, "file") {
			t.Skip() // reads what the input names
		}
		o, _, err := parseOptions(strings.Split(args, "\n"), strings.Split(environ, "\n"), present("ca.pem"))
		if err != nil || o.version {
			return
		}
		require.NotEmpty(t, o.storageDSN)
		require.Positive(t, o.maxBody)
		require.GreaterOrEqual(t, o.maxInFlight, o.maxBody)
		require.Positive(t, o.drainTimeout)
		require.Positive(t, o.pushWorkers)
	})
}

const docsFile = "../../docs/configuration.md"

func TestConfigurationPage(t *testing.T) {
	page := configurationPage()
	if *update {
		require.NoError(t, os.WriteFile(docsFile, []byte(page), 0o644))
	}
	committed, err := os.ReadFile(docsFile)
	require.NoError(t, err)
	require.Equal(t, page, string(committed), "run: go test ./cmd/nanomdm -run TestConfigurationPage -update")
}

// configurationPage renders docs/configuration.md.
func configurationPage() string {
	var b strings.Builder
	b.WriteString(pageHead)
	group := ""
	for _, op := range new(options).table() {
		if op.group != group {
			group = op.group
			fmt.Fprintf(&b, "\n## %s\n\n| flag | environment | default | meaning |\n|---|---|---|---|\n", group)
		}
		var flags, env []string
		for i, name := range op.names() {
			arg := op.arg
			if i > 0 {
				arg = "FILE"
			}
			flags = append(flags, "`"+strings.TrimSpace("-"+name+" "+arg)+"`")
			env = append(env, "`"+envName(name)+"`")
		}
		if op.flagOnly {
			env = nil
		}
		def := ""
		if op.def != "" {
			def = "`" + op.def + "`"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", strings.Join(flags, "<br>"), strings.Join(env, "<br>"), def,
			strings.TrimSpace(op.help+" "+op.detail))
	}
	b.WriteString(pageFoot)
	return b.String()
}

const pageHead = `# Configuration

<!-- Generated from the table in cmd/nanomdm/options.go:
     go test ./cmd/nanomdm -run TestConfigurationPage -update -->

Every option is a flag and, but for two, an environment variable. A flag beats
the environment, which beats the default. An empty variable counts as not set.
` + "`nanomdm -help`" + ` prints the same table.

- **Secrets** (KEY, DSN) can be read from a file: the flag and the variable with
  ` + "`-file`, `_FILE`" + ` at the end. One newline at the file's end is dropped. Giving
  both the value and the file is a mistake. A secret on the command line works,
  but every user of the machine can see it; the daemon says so at start.
- **Switches** have no value: ` + "`-checkin`" + `, or ` + "`-checkin=false`" + ` against the
  environment's ` + "`NANOMDM_CHECKIN=true`" + `.
- **Times** are Go durations: ` + "`30s`, `5m`, `168h`" + `. **Lists** are separated by commas.
- **Sizes** are bytes, with ` + "`k`, `M`, `G`" + ` for powers of 1024.
- **Mistakes** are reported all at once, each with what to change, and the exit
  code is 2. A variable that begins with ` + "`NANOMDM_`" + ` and is no option is named in
  a warning, with the option that is nearest.
`

const pageFoot = `
## Keys of -storage-options

| key | meaning |
|---|---|
| ` + "`delete=1`" + ` | Keep nothing of a command once a device has acknowledged it. |
| ` + "`conn_max_lifetime=TIME`" + ` | Replace a database connection of this age. |
| ` + "`conn_max_idle_time=TIME`" + ` | Close a database connection that was idle for so long. |
| ` + "`max_open_conns=N`" + ` | Database connections at once, at most. |
| ` + "`max_total_conns=N`" + ` | Database connections of all replicas together, at most: see [clusters](clusters.md#connections). |

A key that is not given leaves the choice to the engine's own default.

## Coming from NanoMDM

The flags of NanoMDM mean the same here, with two differences. The stores
` + "`file`, `filekv`, `dbkv` and `inmem`" + ` do not exist: the default is SQLite in
` + "`nanomdm.db`" + `, and enrollments come over with [nano2nano](nano2nano.md). And there is
one store: repeated ` + "`-storage`" + ` flags are refused.
A start without storage flags in a directory that holds NanoMDM's ` + "`dbkv` or `db`" + `,
and no ` + "`nanomdm.db`" + `, is refused too, so that nobody takes an empty server for a
full one; ` + "`-storage sqlite`" + ` says that it is meant.
`
