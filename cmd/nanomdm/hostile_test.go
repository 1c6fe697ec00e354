package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// startProcess runs the daemon as a process of its own, whose memory is its
// own, too.
func startProcess(t *testing.T, args ...string) (d *daemon, pid int) {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	d = &daemon{t: t, ca: ca, dir: t.TempDir(), log: &syncBuffer{}}
	require.NoError(t, os.WriteFile(filepath.Join(d.dir, "ca.pem"), ca.PEM(), 0o600))
	cmd := exec.Command(os.Args[0], append([]string{"-ca", filepath.Join(d.dir, "ca.pem"), "-listen", "127.0.0.1:0",
		"-storage-dsn", filepath.Join(d.dir, "mdm.db")}, args...)...)
	cmd.Env = append(os.Environ(), asDaemon+"=1", "NANOMDM_API="+testKey)
	cmd.Stdout, cmd.Stderr = io.Discard, d.log
	require.NoError(t, cmd.Start())
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		require.NoError(t, within(t, exited), "the daemon left with an error")
	})
	require.Eventually(t, func() bool {
		m := listenAttr.FindStringSubmatch(d.log.String())
		if m != nil {
			d.url = "http://" + m[1]
		}
		return m != nil
	}, 30*time.Second, 5*time.Millisecond, "the daemon does not start: %s", d.log)
	return d, cmd.Process.Pid
}

// memory reads a line of /proc/PID/status, in MiB.
func memory(t *testing.T, pid int, field string) int {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Skip("no /proc here")
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, field+":"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			require.NoError(t, err)
			return n >> 10
		}
	}
	t.Fatalf("no %s", field)
	return 0
}

// honest are devices that go on polling.
type honest struct {
	cancel  context.CancelFunc
	done    sync.WaitGroup
	refused atomic.Int64

	mu   sync.Mutex
	took []time.Duration
}

func (d *daemon) honest(n int) *honest {
	ctx, cancel := context.WithCancel(d.t.Context())
	h := &honest{cancel: cancel}
	for i := range n {
		client := &http.Client{Transport: &http.Transport{}}
		udid := fmt.Sprintf("HONEST-%d", i)
		id, err := d.ca.Issue(udid)
		require.NoError(d.t, err)
		dev, err := mdmtest.NewDevice(d.url+"/mdm", id, mdmtest.Config{UDID: udid, Client: client})
		require.NoError(d.t, err)
		require.NoError(d.t, dev.Enroll(ctx))
		h.done.Go(func() {
			defer client.CloseIdleConnections()
			for ctx.Err() == nil {
				begun := time.Now()
				if _, err := dev.Poll(ctx); err != nil && ctx.Err() == nil {
					h.refused.Add(1)
				}
				h.mu.Lock()
				h.took = append(h.took, time.Since(begun))
				h.mu.Unlock()
				select {
				case <-time.After(20 * time.Millisecond): // a pace, not a wait for something
				case <-ctx.Done():
				}
			}
		})
	}
	return h
}

// lap returns how many polls there were since the last lap, and their p99.
func (h *honest) lap() (int, time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	took := h.took
	h.took = nil
	if len(took) == 0 {
		return 0, 0
	}
	slices.Sort(took)
	return len(took), took[len(took)*99/100]
}

// wait lasts until the devices have polled n more times.
func (h *honest) wait(t *testing.T, n int) (int, time.Duration) {
	t.Helper()
	h.lap()
	require.Eventually(t, func() bool {
		h.mu.Lock()
		defer h.mu.Unlock()
		return len(h.took) >= n
	}, time.Minute, 10*time.Millisecond, "honest devices are starved")
	return h.lap()
}

func (h *honest) stop() {
	h.cancel()
	h.done.Wait()
}

// hostileBodies are signed by an enrolled device, so that nothing but their
// contents can be why they are refused.
func hostileBodies() map[string][]byte {
	const head = `<?xml version="1.0" encoding="UTF-8"?><plist version="1.0">`
	idle := `<dict><key>Status</key><string>Idle</string><key>UDID</key><string>HOSTILE</string></dict></plist>`
	var bomb strings.Builder
	bomb.WriteString(`<?xml version="1.0"?><!DOCTYPE plist [<!ENTITY a0 "aaaaaaaaaa">`)
	for i := range 12 {
		fmt.Fprintf(&bomb, `<!ENTITY a%d "%s">`, i+1, strings.Repeat(fmt.Sprintf("&a%d;", i), 10))
	}
	bomb.WriteString(`]><plist version="1.0"><dict><key>Status</key><string>&a12;</string></dict></plist>`)
	return map[string][]byte{
		"20 MB":                  bytes.Repeat([]byte("x"), 20<<20),
		"8 MB of nested arrays":  []byte(head + strings.Repeat("<array>", 8<<20/7)),
		"8 MB of nested dicts":   []byte(head + strings.Repeat("<dict><key>k</key>", 8<<20/18)),
		"cyclic binary plist":    []byte("bplist00\xa1\x00\x08\x00\x00\x00\x00\x00\x00\x01\x01\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x0a"),
		"entity bomb":            []byte(bomb.String()),
		"truncated XML":          []byte((head + idle)[:len(head)+30]),
		"NULs":                   make([]byte, 4096),
		"NUL inside":             []byte(head + strings.Replace(idle, "HOSTILE", "HOST\x00ILE", 1)),
		"gzip":                   []byte("\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff\x4b\x4c\x04\x00"),
		"nothing":                nil,
		"a UDID of another user": []byte(head + strings.Replace(idle, "HOSTILE", "HONEST-0:user", 1)),
		"another device":         []byte(head + strings.Replace(idle, "HOSTILE", "HONEST-0", 1)),
	}
}

// watcher scrapes and probes until it is stopped.
type watcher struct {
	cancel  context.CancelFunc
	done    sync.WaitGroup
	rounds  atomic.Int64
	trouble atomic.Pointer[string]
}

func (d *daemon) watch() *watcher {
	ctx, cancel := context.WithCancel(d.t.Context())
	w := &watcher{cancel: cancel}
	client := &http.Client{Transport: &http.Transport{}}
	w.done.Go(func() {
		defer client.CloseIdleConnections()
		for ctx.Err() == nil {
			for _, path := range []string{"/healthz", "/readyz", "/metrics"} {
				req, err := http.NewRequestWithContext(ctx, "GET", d.url+path, nil)
				if err != nil {
					panic(err)
				}
				req.SetBasicAuth("nanomdm", testKey)
				trouble := ""
				if resp, err := client.Do(req); err != nil {
					trouble = err.Error()
				} else {
					_, _ = io.Copy(io.Discard, resp.Body)
					resp.Body.Close()
					if resp.StatusCode != 200 {
						trouble = resp.Status
					}
				}
				if trouble != "" && ctx.Err() == nil {
					text := path + ": " + trouble
					w.trouble.Store(&text)
				}
			}
			w.rounds.Add(1)
			select {
			case <-time.After(50 * time.Millisecond): // a pace
			case <-ctx.Done():
			}
		}
	})
	return w
}

func (w *watcher) stop() {
	w.cancel()
	w.done.Wait()
}

// attacks are what a daemon has to bear while others go on. Each begins and
// returns what ends it.
func attacks(hostile *mdmtest.Device, address string) map[string]func(t *testing.T) (end func()) {
	sign := func(t *testing.T, body string) string {
		signature, err := mdmtest.Sign(hostile.Identity(), []byte(body), mdmtest.SignOptions{})
		require.NoError(t, err)
		return "Mdm-Signature: " + strings.ReplaceAll(signature, "\n", "") + "\r\n"
	}
	// connect opens connections that stay as they are.
	connect := func(t *testing.T, n int, send func(i int) string) func() {
		conns := make([]net.Conn, n)
		for i := range conns {
			conns[i] = dialTCP(t, address)
			_, err := io.WriteString(conns[i], send(i))
			require.NoError(t, err)
		}
		return func() {
			for _, conn := range conns {
				conn.Close()
			}
		}
	}
	// storm sends bodies from a client each, over and over.
	storm := func(t *testing.T, bodies map[string][]byte, send func(ctx context.Context, body []byte) (int, error)) func() {
		ctx, cancel := context.WithCancel(t.Context())
		var attackers sync.WaitGroup
		for name, body := range bodies {
			attackers.Go(func() {
				for ctx.Err() == nil {
					status, err := send(ctx, body)
					if err != nil { // the answer came while the body was being sent
						continue
					}
					if status < 400 || status >= 500 {
						t.Errorf("%s: %d", name, status)
					}
				}
			})
		}
		return func() {
			cancel()
			attackers.Wait()
		}
	}
	return map[string]func(t *testing.T) func(){
		"200 half-sent requests": func(t *testing.T) func() {
			// Half of them with a signature that is good for another body.
			signature := sign(t, "x")
			return connect(t, 200, func(i int) string {
				return "PUT /mdm HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n" + []string{"", signature}[i%2] + "\r\nhalf of it"
			})
		},
		"2,000 connections": func(t *testing.T) func() {
			return connect(t, 2000, func(i int) string { // idle, or stuck in their header
				return []string{"", "PUT /mdm HTTP/1.1\r\nHost: x\r\nX-Slow: "}[i%2]
			})
		},
		"hostile bodies": func(t *testing.T) func() {
			return storm(t, hostileBodies(), func(ctx context.Context, body []byte) (int, error) {
				resp, err := hostile.Do(ctx, "", "", body)
				if err != nil {
					return 0, err
				}
				return resp.Status, nil
			})
		},
		"hostile bodies of nobody": func(t *testing.T) func() {
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 16}}
			end := storm(t, hostileBodies(), func(ctx context.Context, body []byte) (int, error) {
				req, err := http.NewRequestWithContext(ctx, "PUT", "http://"+address+"/mdm", bytes.NewReader(body))
				if err != nil {
					return 0, err
				}
				req.Header.Set("Content-Encoding", "gzip")
				resp, err := client.Do(req)
				if err != nil {
					return 0, err
				}
				resp.Body.Close()
				return resp.StatusCode, nil
			})
			return func() {
				end()
				client.CloseIdleConnections()
			}
		},
	}
}

// Honest devices get their answers, probes and scrapes theirs, and memory
// stays bounded, whatever others do meanwhile. Times are compared with those
// of the same daemon at ease, since machines differ and the race detector
// multiplies all.
func TestHostileClients(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	d, pid := startProcess(t, "-max-in-flight", "256M")
	honest := d.honest(10)
	defer honest.stop()
	watcher := d.watch()
	defer watcher.stop()
	n, quiet := honest.wait(t, 500)
	before := memory(t, pid, "VmRSS")
	t.Logf("at ease: p99 of %d honest polls %v, %d MiB", n, quiet, before)

	hostile := d.device("HOSTILE", mdmtest.Config{})
	require.NoError(t, hostile.Enroll(t.Context()))
	for name, attack := range attacks(hostile, strings.TrimPrefix(d.url, "http://")) {
		scrapes := watcher.rounds.Load()
		end := attack(t)
		n, p99 := honest.wait(t, 400)
		now := memory(t, pid, "VmRSS")
		end()
		t.Logf("%s: p99 of %d honest polls %v, %d MiB", name, n, p99, now)
		require.Zero(t, honest.refused.Load(), "honest devices are refused during %s", name)
		require.Less(t, p99, time.Second+50*quiet, name)
		require.Less(t, now, 256+8*before, name)
		require.Eventually(t, func() bool { return watcher.rounds.Load() > scrapes }, time.Minute, 5*time.Millisecond)
		if trouble := watcher.trouble.Load(); trouble != nil {
			t.Errorf("during %s: %s", name, *trouble)
		}
	}
	n, p99 := honest.wait(t, 300)
	t.Logf("afterwards: p99 of %d honest polls %v; peak memory %d MiB", n, p99, memory(t, pid, "VmHWM"))
	require.Zero(t, honest.refused.Load())
	require.Less(t, memory(t, pid, "VmHWM"), 512+8*before)

	status, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Equal(t, 200, status)
	require.Contains(t, text, "nanomdm_http_panics_total 0")
	for _, reason := range []string{"malformed", "too_large", "certificate_not_pinned", "identity"} {
		require.Contains(t, text, `nanomdm_device_refusals_total{reason="`+reason+`"}`)
	}
	require.NotContains(t, d.log.String(), "panic")
}

func dialTCP(t *testing.T, address string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	require.NoError(t, err)
	t.Cleanup(func() { conn.Close() })
	return conn
}

// Past -max-requests a request is turned away before its body is read, and
// the API is not affected.
func TestTooManyRequests(t *testing.T) {
	d := start(t, "http", "-max-requests", "3")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	address := strings.TrimPrefix(d.url, "http://")
	signature, err := mdmtest.Sign(dev.Identity(), []byte("x"), mdmtest.SignOptions{})
	require.NoError(t, err)
	var held []net.Conn
	require.Eventually(t, func() bool {
		// One more each time: the poll may have had the place of one before.
		conn := dialTCP(t, address)
		_, err := io.WriteString(conn, "PUT /mdm HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nMdm-Signature: "+strings.ReplaceAll(signature, "\n", "")+"\r\n\r\nhalf")
		require.NoError(t, err)
		held = append(held, conn)
		status, retry, _ := poll(t, dev)
		return status == 503 && retry == "5"
	}, 20*time.Second, 5*time.Millisecond)
	status, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Equal(t, 200, status)
	require.Contains(t, text, `nanomdm_http_turned_away_total{reason="limit",side="device"}`)
	status, _, _ = d.api("PUT", "/v1/enqueue/D1?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status)
	for _, conn := range held {
		conn.Close()
	}
	require.Eventually(t, func() bool { status, _, _ := poll(t, dev); return status == 200 }, 20*time.Second, 5*time.Millisecond)
}

// Clients that stop in the middle of their header or body are cut.
func TestSlowClientsAreCut(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for timeouts")
	}
	d := start(t, "http")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	signature, err := mdmtest.Sign(dev.Identity(), []byte("x"), mdmtest.SignOptions{})
	require.NoError(t, err)
	send := func(text string) net.Conn {
		conn := dialTCP(t, strings.TrimPrefix(d.url, "http://"))
		_, err := io.WriteString(conn, text)
		require.NoError(t, err)
		require.NoError(t, conn.SetReadDeadline(time.Now().Add(30*time.Second)))
		return conn
	}
	header := send("PUT /mdm HTTP/1.1\r\nHost: x\r\nX-Slow: ")
	body := send("PUT /mdm HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nMdm-Signature: " + strings.ReplaceAll(signature, "\n", "") + "\r\n\r\nhalf")
	begun := time.Now()
	_, err = bufio.NewReader(header).ReadString(0)
	require.ErrorIs(t, err, io.EOF, "the server closes")
	require.Greater(t, time.Since(begun), readHeaderTimeout-time.Second)
	answer, err := io.ReadAll(body)
	require.NoError(t, err)
	require.True(t, strings.HasPrefix(string(answer), "HTTP/1.1 408 "), "%s", answer)
	_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Contains(t, text, `nanomdm_device_refusals_total{reason="slow_body"} 1`)
}

// messageKinds are the kinds of messages that package mdm declares, from its
// source, so that a new one is not forgotten here.
func messageKinds(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../../mdm/mdm.go", nil, 0)
	require.NoError(t, err)
	var kinds []string
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return true
		}
		if typ, ok := spec.Type.(*ast.Ident); ok && typ.Name == "Kind" {
			kind, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
			require.NoError(t, err)
			kinds = append(kinds, kind)
		}
		return true
	})
	require.Greater(t, len(kinds), 9)
	return kinds
}

// keysOf are what each kind of message has besides who sends it.
func keysOf() map[string][]string {
	data := "<data>" + base64.StdEncoding.EncodeToString([]byte("stolen")) + "</data>"
	var reports []string
	for _, status := range []string{"Idle", "Acknowledged", "Error", "NotNow", "CommandFormatError", "Whatever"} {
		reports = append(reports, "<key>Status</key><string>"+status+"</string><key>CommandUUID</key><string>C1</string>")
	}
	var endpoints []string
	for _, endpoint := range []string{"tokens", "declaration-items", "declaration/configuration/x", "status"} {
		endpoints = append(endpoints, "<key>Endpoint</key><string>"+endpoint+"</string>")
	}
	return map[string][]string{
		"Authenticate":          {"<key>Topic</key><string>t</string>"},
		"TokenUpdate":           {"<key>Topic</key><string>t</string><key>PushMagic</key><string>stolen</string><key>Token</key>" + data},
		"CheckOut":              {""},
		"SetBootstrapToken":     {"<key>BootstrapToken</key>" + data, ""},
		"GetBootstrapToken":     {""},
		"UserAuthenticate":      {"", "<key>DigestResponse</key><string>x</string>"},
		"DeclarativeManagement": endpoints,
		"GetToken":              {"<key>TokenServiceType</key><string>com.apple.maid</string>"},
		"ReturnToService":       {""},
		"Report":                reports,
	}
}

// The certificate of one device with the body of another, for every kind of
// message, every channel and every way to have got hold of a certificate.
func TestNoDeviceSpeaksForAnother(t *testing.T) {
	called := make(chan string, 100)
	backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { called <- r.URL.Path }))
	defer backend.Close()
	d := start(t, "http", "-reenroll", "same-subject", "-renewal", "same-subject", "-retro", "-dm", backend.URL+"/")
	const victimID = "VICTIM-0123456789"
	victim := d.device(victimID, mdmtest.Config{})
	require.NoError(t, victim.Enroll(t.Context()))
	require.NoError(t, victim.User("alice").TokenUpdate(t.Context()))
	require.NoError(t, victim.SetBootstrapToken(t.Context(), []byte("bootstrap")))
	status, body, _ := d.api("PUT", "/v1/enqueue/"+victimID+"?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status, body)

	attackers := map[string]*mdmtest.Device{
		"enrolled":        d.device("ATTACKER-1", mdmtest.Config{}),
		"a stranger":      d.device("ATTACKER-2", mdmtest.Config{}),
		"has checked out": d.device("ATTACKER-3", mdmtest.Config{}),
	}
	require.NoError(t, attackers["enrolled"].Enroll(t.Context()))
	require.NoError(t, attackers["has checked out"].Enroll(t.Context()))
	require.NoError(t, attackers["has checked out"].CheckOut(t.Context()))
	// One that was the victim's until it enrolled anew.
	attackers["retired"] = d.device(victimID, mdmtest.Config{})
	require.NoError(t, attackers["retired"].Enroll(t.Context()))
	require.NoError(t, d.device(victimID, mdmtest.Config{}).Enroll(t.Context()))
	victim = d.device(victimID, mdmtest.Config{})
	require.NoError(t, victim.Enroll(t.Context()))
	require.NoError(t, victim.User("alice").TokenUpdate(t.Context()))
	require.NoError(t, victim.SetBootstrapToken(t.Context(), []byte("bootstrap")))
	status, body, _ = d.api("PUT", "/v1/enqueue/"+victimID+"?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C2", "ProfileList", nil))
	require.Equal(t, 200, status, body)

	bodies := keysOf()
	for _, kind := range messageKinds(t) {
		require.Contains(t, bodies, kind, "a kind that is not tried")
		for _, more := range bodies[kind] {
			if kind != "Report" {
				more += "<key>MessageType</key><string>" + kind + "</string>"
			}
			for channel, who := range map[string]string{
				"device":               "<key>UDID</key><string>" + victimID + "</string>",
				"user":                 "<key>UDID</key><string>" + victimID + "</string><key>UserID</key><string>alice</string><key>UserShortName</key><string>alice</string>",
				"Shared iPad":          "<key>UDID</key><string>" + victimID + "</string><key>UserID</key><string>FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF</string><key>UserShortName</key><string>alice</string>",
				"User Enrollment":      "<key>EnrollmentID</key><string>" + victimID + "</string>",
				"User Enrollment user": "<key>EnrollmentID</key><string>" + victimID + "</string><key>EnrollmentUserID</key><string>alice</string>",
			} {
				for name, attacker := range attackers {
					name := fmt.Sprintf("%s, %s, %s, %s", kind, channel, name, more)
					before := refusalsOf(t, d, "certificate_not_pinned")
					resp, err := attacker.Do(t.Context(), "", "", []byte(`<plist version="1.0"><dict>`+who+more+`</dict></plist>`))
					require.NoError(t, err)
					require.Equal(t, 400, resp.Status, name)
					require.Empty(t, resp.Body, name)
					if channel == "device" && kind != "UserAuthenticate" || channel == "user" && kind == "UserAuthenticate" {
						// And for no other reason.
						require.Equal(t, before+1, refusalsOf(t, d, "certificate_not_pinned"), name)
					}
				}
			}
		}
	}
	require.Empty(t, called, "the backend was asked")
	// Nothing of it left a trace.
	token, err := victim.GetBootstrapToken(t.Context())
	require.NoError(t, err)
	require.Equal(t, "bootstrap", string(token))
	visit, err := victim.Poll(t.Context())
	require.NoError(t, err)
	require.Len(t, visit.Exchanges, 1)
	require.Equal(t, "C2", visit.Exchanges[0].Command.UUID)
	_, err = victim.User("alice").Poll(t.Context())
	require.NoError(t, err)
	require.NoError(t, victim.Enroll(t.Context()), "and nothing is pinned that would keep it out")
}

// A certificate header is believed from the proxy alone, once, and whole.
func TestForgedCertificateHeaders(t *testing.T) {
	idle := `<plist version="1.0"><dict><key>Status</key><string>Idle</string><key>UDID</key><string>D1</string></dict></plist>`
	send := func(d *daemon, header http.Header) int {
		req, err := http.NewRequest("PUT", d.url+"/mdm", strings.NewReader(idle))
		require.NoError(t, err)
		req.Header = header
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		if resp.StatusCode != 200 {
			require.Empty(t, body)
		}
		return resp.StatusCode
	}
	enroll := func(d *daemon) *mdmtest.Identity {
		id, err := d.ca.Issue("D1")
		require.NoError(t, err)
		message := `<plist version="1.0"><dict><key>MessageType</key><string>Authenticate</string><key>UDID</key><string>D1</string><key>Topic</key><string>t</string></dict></plist>`
		req, err := http.NewRequest("PUT", d.url+"/mdm", strings.NewReader(message))
		require.NoError(t, err)
		req.Header.Set("Client-Cert", headerForms(id.Cert)[0])
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, 200, resp.StatusCode)
		return id
	}

	// Of a peer that is not a trusted proxy, in whichever form, and whatever
	// it says of itself.
	outside := start(t, "http", "-cert-header", "Client-Cert", "-trusted-proxies", "192.0.2.0/24,2001:db8::/32")
	stolen, err := outside.ca.Issue("D1")
	require.NoError(t, err)
	n := 0
	for _, form := range headerForms(stolen.Cert) {
		for _, more := range []http.Header{{}, {"X-Forwarded-For": {"192.0.2.1"}}, {"Forwarded": {"for=192.0.2.1"}}, {"X-Real-Ip": {"192.0.2.1"}}} {
			more = more.Clone()
			more.Set("Client-Cert", form)
			require.Equal(t, 400, send(outside, more))
			n++
			require.Equal(t, n, refusalsOf(t, outside, "untrusted_peer"))
		}
	}
	require.NotContains(t, outside.log.String(), "client=192.0.2.1")
	refused := linesOf(outside.log.String(), `msg="device request refused"`)
	require.NotEmpty(t, refused)
	require.Contains(t, refused[0], "certificate header from a peer that is not in -trusted-proxies: 127.0.0.1:", "the address to add")

	// Of a trusted one.
	d := start(t, "http", "-cert-header", "Client-Cert", "-trusted-proxies", "127.0.0.0/8")
	id := enroll(d)
	other, err := d.ca.Issue("D2")
	require.NoError(t, err)
	strangers, err := mdmtest.NewCA()
	require.NoError(t, err)
	stranger, err := strangers.Issue("D1")
	require.NoError(t, err)
	good, second, foreign := headerForms(id.Cert), headerForms(other.Cert), headerForms(stranger.Cert)
	for _, form := range good {
		require.Equal(t, 200, send(d, http.Header{"Client-Cert": {form}}))
	}
	n = 0
	for name, values := range map[string][]string{
		"none":                       nil,
		"empty":                      {""},
		"twice":                      {good[0], good[0]},
		"twice, the proxy's last":    {second[0], good[0]},
		"twice, the proxy's first":   {good[0], second[0]},
		"an empty one first":         {"", good[0]},
		"of another CA":              {foreign[0]},
		"another's":                  {second[0]},
		"two in one, the other":      {second[1] + "," + good[1]},
		"two in one, RFC 9440":       {second[0] + ", " + good[0]},
		"cut":                        {good[0][:len(good[0])/2]},
		"cut, closed":                {good[0][:len(good[0])/2] + ":"},
		"no colon at the end":        {strings.TrimSuffix(good[0], ":")},
		"another's behind rubbish":   {"x" + good[0]},
		"parameters":                 {good[0] + ";a=1"},
		"broken escape":              {strings.Replace(good[2], "%20", "%2", 1)},
		"PEM of a key":               {url.PathEscape("-----BEGIN PRIVATE KEY-----\nMC4=\n-----END PRIVATE KEY-----\n")},
		"text before PEM":            {"x" + good[2]},
		"XFCC without a certificate": {"Hash=ab"},
		"XFCC with two":              {`Cert="` + second[2] + `",Cert="` + good[2] + `"`},
		"XFCC, quotes open":          {`Cert="` + good[2]},
		"the subject alone":          {"CN=D1"},
		"(null)":                     {"(null)"},
		"much of nothing":            {strings.Repeat("M", 60<<10)},
	} {
		header := http.Header{}
		if values != nil {
			header["Client-Cert"] = values
		}
		require.Equal(t, 400, send(d, header), name)
		n++
	}
	require.Equal(t, n-1, refusalsOf(t, d, "identity"))
	require.Equal(t, 1, refusalsOf(t, d, "certificate_not_pinned"), "another's is a good certificate")

	// A signature does not stand in for the header, and is not looked at.
	signature, err := mdmtest.Sign(id, []byte(idle), mdmtest.SignOptions{})
	require.NoError(t, err)
	require.Equal(t, 400, send(d, http.Header{"Mdm-Signature": {signature}}))
	require.Equal(t, 400, send(d, http.Header{"Mdm-Signature": {signature}, "Client-Cert": {second[0]}}))
	require.Equal(t, 200, send(d, http.Header{"Mdm-Signature": {"nonsense"}, "Client-Cert": {good[0]}}))
}

// refusalsOf counts the requests of devices that a daemon refused for a reason.
func refusalsOf(t *testing.T, d *daemon, reason string) int {
	t.Helper()
	_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	m := regexp.MustCompile(`nanomdm_device_refusals_total\{reason="` + reason + `"\} (\d+)`).FindStringSubmatch(text)
	if m == nil {
		return 0
	}
	return atoi(t, m[1])
}

func atoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	require.NoError(t, err)
	return n
}

// A header with a certificate is refused where the mode does not use it, and
// counted, whatever its name.
func TestUnusedCertificateHeader(t *testing.T) {
	d := start(t, "http")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	forms := headerForms(dev.Identity().Cert)
	for i, name := range []string{"Client-Cert", "X-Amzn-Mtls-Clientcert-Leaf", "X-Anything"} {
		body := []byte(`<plist version="1.0"><dict><key>Status</key><string>Idle</string><key>UDID</key><string>D1</string></dict></plist>`)
		signature, err := mdmtest.Sign(dev.Identity(), body, mdmtest.SignOptions{})
		require.NoError(t, err)
		req, err := http.NewRequest("PUT", d.url+"/mdm", bytes.NewReader(body))
		require.NoError(t, err)
		req.Header.Set("Mdm-Signature", signature)
		req.Header.Set(name, forms[i])
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, 400, resp.StatusCode, name)
		_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
		require.Contains(t, text, fmt.Sprintf(`nanomdm_device_refusals_total{reason="unused_certificate_header"} %d`, i+1))
	}
	_, err := dev.Poll(t.Context())
	require.NoError(t, err)
}
