package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// proxy is a program with an example in docs/proxies.
type proxy struct {
	program string
	example string
	listen  string // what the example listens on
	// frame makes a whole configuration of the example, for a folder.
	frame func(example, dir string) string
	args  func(config, dir string) []string
	// header is the part of the example that sets the certificate header, and
	// forms are others that operators use in its place.
	header string
	forms  map[string]string
}

var proxies = []proxy{
	{
		program: "nginx", example: "nginx.conf", listen: "listen 443",
		frame: func(example, dir string) string {
			temp := ""
			for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
				temp += fmt.Sprintf("%s_temp_path %s/%s;\n", kind, dir, kind)
			}
			return "user root;\ndaemon off;\npid " + dir + "/pid;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n" + temp + example + "\n}\n"
		},
		args:   func(config, dir string) []string { return []string{"-p", dir, "-c", config} },
		header: "$ssl_client_escaped_cert",
		forms:  map[string]string{"ssl_client_cert": "$ssl_client_cert"},
	},
	{
		program: "haproxy", example: "haproxy.cfg", listen: "bind :443",
		frame:  func(example, _ string) string { return example },
		args:   func(config, _ string) []string { return []string{"-db", "-f", config} },
		header: ":%[ssl_c_der,base64]:",
		forms: map[string]string{
			"Base64":           "%[ssl_c_der,base64]",
			"PEM in one line":  `-----BEGIN\ CERTIFICATE-----\ %[ssl_c_der,base64]\ -----END\ CERTIFICATE-----`,
			"PEM in one piece": `-----BEGIN\ CERTIFICATE-----%[ssl_c_der,base64]-----END\ CERTIFICATE-----`,
			"PEM with slashes": `-----BEGIN\ CERTIFICATE-----\\n%[ssl_c_der,base64]\\n-----END\ CERTIFICATE-----\\n`,
		},
	},
	{
		program: "apache2", example: "apache.conf", listen: "*:443",
		frame: func(example, dir string) string {
			modules := ""
			for _, name := range []string{"mpm_event", "authz_core", "ssl", "headers", "proxy", "proxy_http"} {
				modules += fmt.Sprintf("LoadModule %s_module /usr/lib/apache2/modules/mod_%s.so\n", name, name)
			}
			port := regexp.MustCompile(`<VirtualHost ([^>]+)>`).FindStringSubmatch(example)[1]
			return modules + "ServerRoot " + dir + "\nServerName mdm.example.org\nListen " + port + "\nPidFile " + dir + "/pid\nErrorLog /dev/stderr\nMutex posixsem\n" + example
		},
		args:   func(config, _ string) []string { return []string{"-DFOREGROUND", "-f", config} },
		header: `"expr=%{base64:%{SSL_CLIENT_CERT}}"`,
		forms: map[string]string{
			"SSL_CLIENT_CERT": `"%{SSL_CLIENT_CERT}s"`,
			"escaped":         `"expr=%{escape:%{SSL_CLIENT_CERT}}"`,
		},
	},
	{
		program: "caddy", example: "Caddyfile", listen: "https://mdm.example.org",
		frame: func(example, _ string) string {
			return "{\n\tadmin off\n\tauto_https off\n\tdefault_bind 127.0.0.1\n}\n" + example
		},
		args: func(config, _ string) []string { return []string{"run", "--adapter", "caddyfile", "--config", config} },
	},
}

// The examples of docs/proxies, as they are but for paths and the port, in
// front of the daemon, and each other form of the certificate header.
// installed finds a program that a test runs. Without it the test is skipped, and
// fails in CI.
func installed(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed: in CI every example is tested", program)
		}
		t.Skipf("no %s: install it, or run storage/engines/with-engines.sh go test ./...", program)
	}
	return path
}

func TestProxiesOfTheDocumentation(t *testing.T) {
	for _, p := range proxies {
		t.Run(p.program, func(t *testing.T) {
			program := installed(t, p.program)
			t.Run("example", func(t *testing.T) { p.test(t, program, p.header) })
			for name, form := range p.forms {
				t.Run(name, func(t *testing.T) { p.test(t, program, form) })
			}
		})
	}
}

// test runs the proxy with a form of the certificate header.
func (p *proxy) test(t *testing.T, program, form string) {
	dir := t.TempDir()
	socket := filepath.Join(dir, "mdm.sock")
	d := start(t, "http", "-listen", "unix:"+socket, "-cert-header", "Client-Cert", "-debug")
	serverCA := writeTLS(t, dir, d.ca)
	address := freePort(t)

	example, err := os.ReadFile(filepath.Join("../../docs/proxies", p.example))
	require.NoError(t, err)
	text := string(example)
	require.Contains(t, text, p.listen)
	require.Contains(t, text, p.header)
	text = strings.ReplaceAll(text, p.header, form)
	port := address[strings.LastIndexByte(address, ':')+1:]
	listen := strings.Replace(strings.Replace(p.listen, "*:443", address, 1), "443", address, 1)
	text = strings.ReplaceAll(text, p.listen, strings.Replace(listen, ":127", "127", 1))
	text = strings.ReplaceAll(text, "https://mdm.example.org", "https://mdm.example.org:"+port)
	text = regexp.MustCompile(`/etc/[a-z0-9]+/tls`).ReplaceAllString(text, dir)
	text = strings.ReplaceAll(text, "/run/nanomdm/nanomdm.sock", socket)
	config := filepath.Join(dir, "config")
	require.NoError(t, os.WriteFile(config, []byte(p.frame(text, dir)), 0o600))
	runProxy(t, address, dir, program, p.args(config, dir)...)

	tryProxy(t, d, "https://mdm.example.org:"+port, address, serverCA)
}

// tryProxy is what a proxy has to get right.
func tryProxy(t *testing.T, d *daemon, url, address string, serverCA *mdmtest.CA) {
	client := func(id *mdmtest.Identity) *http.Client {
		cfg := &tls.Config{RootCAs: serverCA.Pool()}
		if id != nil {
			cfg.Certificates = []tls.Certificate{id.TLS()}
		}
		transport := &http.Transport{TLSClientConfig: cfg, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", address)
		}}
		t.Cleanup(transport.CloseIdleConnections)
		return &http.Client{Transport: transport}
	}
	device := func(udid string) *mdmtest.Device {
		id, err := d.ca.Issue(udid)
		require.NoError(t, err)
		dev, err := mdmtest.NewDevice(url+"/mdm", id, mdmtest.Config{UDID: udid, Auth: mdmtest.AuthTLS, Client: client(id)})
		require.NoError(t, err)
		return dev
	}
	// The proxy may still be looking whether the daemon is ready.
	first := device("D1")
	require.Eventually(t, func() bool { return first.Enroll(t.Context()) == nil }, 20*time.Second, 100*time.Millisecond)
	second := device("D2")
	require.NoError(t, second.Enroll(t.Context()))
	for range 3 {
		_, err := first.Poll(t.Context())
		require.NoError(t, err)
	}
	require.Regexp(t, `msg=request .*path=/mdm status=200 .*client=127\.0\.0\.1`, d.log.String())

	// A forged header does not get past the proxy: neither without a
	// certificate of one's own, nor with another one.
	idle := `<plist version="1.0"><dict><key>Status</key><string>Idle</string><key>UDID</key><string>D1</string></dict></plist>`
	for name, forger := range map[string]*http.Client{"no certificate": client(nil), "another's certificate": client(second.Identity())} {
		for _, value := range headerForms(first.Identity().Cert) {
			req, err := http.NewRequest("PUT", url+"/mdm", strings.NewReader(idle))
			require.NoError(t, err)
			req.Header.Set("Client-Cert", value)
			req.Header.Set("X-Forwarded-For", "203.0.113.66")
			resp, err := forger.Do(req)
			require.NoError(t, err)
			resp.Body.Close()
			require.Equal(t, 400, resp.StatusCode, name)
		}
	}
	require.NotContains(t, d.log.String(), "client=203.0.113.66", "a forged address")

	// A certificate of another CA is refused, by whoever looks first.
	strangers, err := mdmtest.NewCA()
	require.NoError(t, err)
	stranger, err := strangers.Issue("D1")
	require.NoError(t, err)
	dev, err := mdmtest.NewDevice(url+"/mdm", stranger, mdmtest.Config{UDID: "D1", Auth: mdmtest.AuthTLS, Client: client(stranger)})
	require.NoError(t, err)
	require.Error(t, dev.Enroll(t.Context()))

	// Pages without a certificate may share the name, and the API does not, not
	// even with its key.
	for path, status := range map[string]int{"/version": 200, "/v1/enrollments": 403, "//v1/enrollments": 403, "/metrics": 403, "/v1": 403} {
		req, err := http.NewRequest("GET", url+path, nil)
		require.NoError(t, err)
		req.SetBasicAuth("nanomdm", testKey)
		resp, err := client(nil).Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, status, resp.StatusCode, path)
	}
}

// writeTLS writes the server's certificate and key and the devices' CA where
// the examples look for them.
func writeTLS(t *testing.T, dir string, devices *mdmtest.CA) *mdmtest.CA {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	id, err := ca.Issue("mdm.example.org", mdmtest.WithHosts("mdm.example.org"), mdmtest.WithExtKeyUsage(x509.ExtKeyUsageServerAuth))
	require.NoError(t, err)
	both, err := id.PEM()
	require.NoError(t, err)
	for name, data := range map[string][]byte{"server.pem": both, "server.key": both, "device-ca.pem": devices.PEM()} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	return ca
}

func freePort(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer listener.Close()
	return listener.Addr().String()
}

// runProxy starts a proxy, waits until it listens, and ends it with the test.
func runProxy(t *testing.T, address, dir, program string, args ...string) {
	t.Helper()
	log := &syncBuffer{}
	cmd := exec.Command(program, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr = dir, log, log
	cmd.Env = append(os.Environ(), "HOME="+dir, "XDG_DATA_HOME="+dir, "XDG_CONFIG_HOME="+dir)
	require.NoError(t, cmd.Start())
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may be gone
		select {
		case <-exited:
		case <-time.After(10 * time.Second):
			_ = cmd.Process.Kill()
			<-exited
		}
		if t.Failed() {
			t.Logf("%s said:\n%s", program, log)
		}
	})
	require.Eventually(t, func() bool {
		conn, err := net.Dial("tcp", address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}, 20*time.Second, 20*time.Millisecond, "%s does not listen: %s", program, log)
}

// headerForms are the encodings in which a forger might try.
func headerForms(cert *x509.Certificate) []string {
	der := base64.StdEncoding.EncodeToString(cert.Raw)
	return []string{":" + der + ":", der, url.PathEscape(string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})))}
}
