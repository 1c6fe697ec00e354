package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/release"
)

// daemon is the real program, run in the test's process on a port of its own.
type daemon struct {
	t       *testing.T
	ca      *mdmtest.CA
	dir     string
	url     string
	log     *syncBuffer
	stdout  *syncBuffer
	signals chan os.Signal
	code    chan int
}

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

const testKey = "test-key"

var listenAttr = regexp.MustCompile(`\blisten(?:=|":")([^\s",]+)`) // of either log format

// start runs the daemon with a new CA and SQLite file and waits until it
// answers. It is stopped, and must leave with 0, when the test ends.
func start(t *testing.T, scheme string, args ...string) *daemon {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	d := &daemon{t: t, ca: ca, dir: t.TempDir(), log: &syncBuffer{}, stdout: &syncBuffer{}}
	require.NoError(t, os.WriteFile(filepath.Join(d.dir, "ca.pem"), ca.PEM(), 0o600))
	d.launch(scheme, args...)
	t.Cleanup(d.stop)
	return d
}

func (d *daemon) launch(scheme string, args ...string) {
	d.t.Helper()
	d.signals, d.code = make(chan os.Signal, 2), make(chan int, 1)
	args = append([]string{"-ca", filepath.Join(d.dir, "ca.pem"), "-listen", "127.0.0.1:0"}, args...)
	if !slices.Contains(args, "-storage-dsn") {
		args = append(args, "-storage-dsn", filepath.Join(d.dir, "mdm.db"))
	}
	before := len(d.log.String())
	go func() {
		d.code <- run(context.Background(), args, []string{"NANOMDM_API=" + testKey}, d.stdout, d.log, d.signals)
	}()
	require.Eventually(d.t, func() bool {
		m := listenAttr.FindStringSubmatch(d.log.String()[before:])
		if m == nil {
			return false
		}
		d.url = scheme + "://" + m[1]
		return true
	}, 30*time.Second, 5*time.Millisecond, "the daemon did not start")
}

func (d *daemon) stop() {
	d.t.Helper()
	if d.signals == nil {
		return
	}
	d.signals <- syscall.SIGTERM
	select {
	case code := <-d.code:
		require.Zero(d.t, code, d.log.String())
	case <-time.After(30 * time.Second):
		d.t.Error("the daemon does not stop")
	}
	d.signals = nil
}

func (d *daemon) device(udid string, cfg mdmtest.Config) *mdmtest.Device {
	d.t.Helper()
	id, err := d.ca.Issue(udid)
	require.NoError(d.t, err)
	cfg.UDID = udid
	dev, err := mdmtest.NewDevice(d.url+"/mdm", id, cfg)
	require.NoError(d.t, err)
	return dev
}

// api calls the operator's side; user "" sends no credentials.
func (d *daemon) api(method, path, user, key string, body []byte) (int, string, http.Header) {
	d.t.Helper()
	req, err := http.NewRequest(method, d.url+path, bytes.NewReader(body))
	require.NoError(d.t, err)
	if user != "" {
		req.SetBasicAuth(user, key)
	}
	if bytes.HasPrefix(body, []byte("{")) {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := http.DefaultClient.Do(req)
	require.NoError(d.t, err)
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	require.NoError(d.t, err)
	return resp.StatusCode, string(b), resp.Header
}

func TestEnrollEnqueuePollAcrossRestart(t *testing.T) {
	d := start(t, "http")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	status, body, _ := d.api("PUT", "/v1/enqueue/D1?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status, body)
	require.JSONEq(t, `{"no_push":true,"command_uuid":"C1","request_type":"ProfileList"}`, body)
	require.Contains(t, body, "\n\t\"no_push\"", "NanoMDM indents by tabs")

	// Queued commands survive the process.
	d.stop()
	d.launch("http")
	moved, err := mdmtest.NewDevice(d.url+"/mdm", dev.Identity(), mdmtest.Config{UDID: "D1"})
	require.NoError(t, err)
	visit, err := moved.Poll(t.Context())
	require.NoError(t, err)
	require.Len(t, visit.Exchanges, 1)
	require.Equal(t, "C1", visit.Exchanges[0].Command.UUID)
}

func TestEnqueueStatuses(t *testing.T) {
	d := start(t, "http")
	require.NoError(t, d.device("D1", mdmtest.Config{}).Enroll(t.Context()))
	require.NoError(t, d.device("D2", mdmtest.Config{}).Enroll(t.Context()))
	command := mdmtest.NewCommand("C1", "ProfileList", nil)
	for _, c := range []struct {
		name, method, path string
		body               []byte
		want               int
		contains           string
	}{
		{"two ids", "PUT", "/v1/enqueue/D1,D2?nopush=1", command, 200, `"no_push"`},
		{"the same bytes again", "POST", "/v1/enqueue/D1,D2?nopush=1", command, 200, `"C1"`},
		{"other bytes", "PUT", "/v1/enqueue/D1?nopush=1", append(command, '\n'), 500, "other contents"},
		{"one unknown id", "PUT", "/v1/enqueue/D1,nobody?nopush=1", mdmtest.NewCommand("C2", "ProfileList", nil), 207, "not enrolled"},
		{"all unknown", "PUT", "/v1/enqueue/nobody?nopush=1", mdmtest.NewCommand("C3", "ProfileList", nil), 500, "not enrolled"},
		{"not a plist", "PUT", "/v1/enqueue/D1", []byte("hello"), 500, "command_error"},
		{"no command uuid", "PUT", "/v1/enqueue/D1", []byte(`<plist version="1.0"><dict><key>Command</key><dict><key>RequestType</key><string>X</string></dict></dict></plist>`), 500, "CommandUUID"},
		{"no ids", "PUT", "/v1/enqueue/,", command, 500, "ids"},
		{"a megabyte of ids", "PUT", "/v1/enqueue/D1," + strings.Repeat("00008030-001A2B3C4D5E6F70,", 38_000) + "?nopush=1", mdmtest.NewCommand("C4", "ProfileList", nil), 207, "not enrolled"},
	} {
		t.Run(c.name, func(t *testing.T) {
			status, body, _ := d.api(c.method, c.path, "nanomdm", testKey, c.body)
			require.Equal(t, c.want, status, body)
			require.Contains(t, body, c.contains)
			require.True(t, json.Valid([]byte(body)))
		})
	}
}

func TestAPIKey(t *testing.T) {
	d := start(t, "http")
	for _, c := range [][2]string{{"", ""}, {"nanomdm", ""}, {"nanomdm", "wrong"}, {"root", testKey}} {
		status, _, header := d.api("PUT", "/v1/enqueue/D1", c[0], c[1], nil)
		require.Equal(t, 401, status)
		require.Equal(t, `Basic realm="nanomdm"`, header.Get("WWW-Authenticate"))
	}
	status, body, _ := d.api("GET", "/version", "", "", nil)
	require.Equal(t, 200, status)
	require.JSONEq(t, `{"version":"`+release.String()+`"}`, body)
	require.NotContains(t, d.log.String(), testKey)
}

func TestMigrationNeedsTheFlagAndTheKey(t *testing.T) {
	message := []byte(`<plist version="1.0"><dict><key>MessageType</key><string>Authenticate</string><key>UDID</key><string>M1</string><key>Topic</key><string>t</string></dict></plist>`)
	off := start(t, "http")
	status, _, _ := off.api("PUT", "/migration", "nanomdm", testKey, message)
	require.Equal(t, 404, status)
	on := start(t, "http", "-migration")
	status, _, _ = on.api("PUT", "/migration", "", "", message)
	require.Equal(t, 401, status)
	status, _, _ = on.api("PUT", "/migration", "nanomdm", testKey, message)
	require.Equal(t, 200, status)
}

func TestSeparateCheckin(t *testing.T) {
	d := start(t, "http", "-checkin")
	split := d.device("D1", mdmtest.Config{CheckinURL: d.url + "/checkin"})
	require.NoError(t, split.Enroll(t.Context()))
	_, err := split.Poll(t.Context())
	require.NoError(t, err)
	require.Error(t, d.device("D2", mdmtest.Config{}).Enroll(t.Context()), "/mdm takes reports only")
}

func TestDisableMDM(t *testing.T) {
	d := start(t, "http", "-disable-mdm")
	status, _, _ := d.api("PUT", "/mdm", "", "", []byte("x"))
	require.Equal(t, 404, status)
}

func TestTLSClientCertificates(t *testing.T) {
	serverCA, err := mdmtest.NewCA()
	require.NoError(t, err)
	id, err := serverCA.Issue("127.0.0.1", mdmtest.WithHosts("127.0.0.1"), mdmtest.WithExtKeyUsage(x509.ExtKeyUsageServerAuth))
	require.NoError(t, err)
	pem, err := id.PEM()
	require.NoError(t, err)
	file := filepath.Join(t.TempDir(), "tls.pem")
	require.NoError(t, os.WriteFile(file, pem, 0o600))
	d := start(t, "https", "-tls-cert", file, "-tls-key", file, "-tls-client-auth")

	issue := func(udid string) *mdmtest.Identity {
		id, err := d.ca.Issue(udid)
		require.NoError(t, err)
		return id
	}
	devID := issue("D1")
	dev, err := mdmtest.NewDevice(d.url+"/mdm", devID, mdmtest.Config{UDID: "D1", Auth: mdmtest.AuthTLS, Client: mdmtest.TLSClient(devID, serverCA.Pool())})
	require.NoError(t, err)
	require.NoError(t, dev.Enroll(t.Context()))
	_, err = dev.Poll(t.Context())
	require.NoError(t, err)

	// A signature does not stand in for the certificate, and the API needs none.
	plain := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: serverCA.Pool()}}}
	defer plain.CloseIdleConnections()
	other, err := mdmtest.NewDevice(d.url+"/mdm", issue("D2"), mdmtest.Config{UDID: "D2", Client: plain})
	require.NoError(t, err)
	require.Error(t, other.Enroll(t.Context()))
	resp, err := plain.Get(d.url + "/version")
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
	require.Equal(t, 200, resp.StatusCode)

	// A client without TLS is named in the log, once a minute.
	for range 3 {
		resp, err = http.Get(strings.Replace(d.url, "https:", "http:", 1) + "/version")
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, 400, resp.StatusCode)
	}
	const hint = "a client speaks plain HTTP to the TLS port: give it a URL with https://"
	require.Eventually(t, func() bool { return strings.Contains(d.log.String(), hint) }, 10*time.Second, time.Millisecond)
	require.Equal(t, 1, strings.Count(d.log.String(), hint))
	require.Contains(t, d.log.String(), "peer=127.0.0.1:")
}

func TestDump(t *testing.T) {
	d := start(t, "http", "-dump", "-debug", "-dm", "http://127.0.0.1:1/", "-dm-send-hmac-key", "a-key-of-the-daemon")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	require.NoError(t, dev.SetBootstrapToken(t.Context(), []byte("the bootstrap token")))
	status, _, _ := d.api("PUT", "/v1/enqueue/D1?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status)
	_, err := dev.Poll(t.Context())
	require.NoError(t, err)
	token := base64.StdEncoding.EncodeToString([]byte("the bootstrap token"))
	for _, want := range []string{"<string>Authenticate</string>", "<string>ProfileList</string>", token} {
		require.Contains(t, d.stdout.String(), want)
		// They go there alone: logs are kept and sent about.
		require.NotContains(t, d.log.String(), want)
	}
	require.Contains(t, d.log.String(), "-dump writes")
	// Secrets of the daemon's own are no part of what devices say.
	for _, secret := range []string{testKey, "a-key-of-the-daemon"} {
		require.NotContains(t, d.stdout.String(), secret)
		require.NotContains(t, d.log.String(), secret)
	}
}

func TestBadFilesAreNamedAtOnce(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad.pem")
	require.NoError(t, os.WriteFile(bad, []byte("not PEM"), 0o600))
	var stdout, stderr strings.Builder
	code := run(t.Context(), []string{"-ca", bad, "-return-to-service", bad, "-tls-cert", bad, "-tls-key", bad, "-storage-dsn", filepath.Join(dir, "x.db")},
		nil, &stdout, &stderr, nil)
	require.Equal(t, 1, code)
	for _, flag := range []string{"-ca", "-tls-cert", "-return-to-service"} {
		require.Contains(t, stderr.String(), flag)
	}
}

// The paths of another server take check-ins and reports alike.
func TestPathsOfAnotherServer(t *testing.T) {
	d := start(t, "http", "-mdm-paths", "/mdm/apple/mdm,/mdm/checkin", "-checkin")
	for udid, path := range map[string]string{"D1": "/mdm/apple/mdm", "D2": "/mdm/checkin"} {
		id, err := d.ca.Issue(udid)
		require.NoError(t, err)
		dev, err := mdmtest.NewDevice(d.url+path, id, mdmtest.Config{UDID: udid})
		require.NoError(t, err)
		require.NoError(t, dev.Enroll(t.Context()))
		_, err = dev.Poll(t.Context())
		require.NoError(t, err)
	}
	for _, bad := range []string{"mdm", "/", "/a/", "/a/../mdm", "/a b", "/{x}", "/a//b", "/mdm", "/checkin", "/v1/x", "/metrics", "/a,/a"} {
		_, err := parsePaths(bad)
		require.Error(t, err, bad)
	}
}
