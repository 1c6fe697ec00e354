package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
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

func TestHostileClients(t *testing.T) {
	if testing.Short() {
		t.Skip("takes some seconds")
	}
	d, pid := startProcess(t)
	honest := d.honest(10)
	defer honest.stop()
	n, quietP99 := honest.wait(t, 500)
	before := memory(t, pid, "VmRSS")
	t.Logf("at ease: p99 of %d honest polls %v, %d MiB", n, quietP99, before)
	address := strings.TrimPrefix(d.url, "http://")

	hostile := d.device("HOSTILE", mdmtest.Config{})
	require.NoError(t, hostile.Enroll(t.Context()))
	report := func(what string) {
		t.Helper()
		n, p99 := honest.wait(t, 300)
		now := memory(t, pid, "VmRSS")
		t.Logf("%s: p99 of %d honest polls %v, %d MiB", what, n, p99, now)
		require.Zero(t, honest.refused.Load(), "honest devices are refused")
		require.Less(t, p99, 2*time.Second)
		// In units of a daemon at ease, since the race detector multiplies all.
		require.Less(t, now, 64+8*before, "memory grows")
		require.Equal(t, 200, d.probe("/healthz"))
		require.Equal(t, 200, d.probe("/readyz"))
	}

	// 200 requests that announce a megabyte and send some bytes of it, half
	// of them with a signature that is good for another body.
	signature, err := mdmtest.Sign(hostile.Identity(), []byte("x"), mdmtest.SignOptions{})
	require.NoError(t, err)
	for i := range 200 {
		conn := dialTCP(t, address)
		head := "PUT /mdm HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
		if i%2 == 0 {
			head += "Mdm-Signature: " + strings.ReplaceAll(signature, "\n", "") + "\r\n"
		}
		_, err := io.WriteString(conn, head+"\r\nhalf of it")
		require.NoError(t, err)
	}
	report("200 half-sent requests")

	// 2,000 connections: idle, or stuck in their header.
	for i := range 2000 {
		conn := dialTCP(t, address)
		if i%2 == 0 {
			_, err := io.WriteString(conn, "PUT /mdm HTTP/1.1\r\nHost: x\r\nX-Slow: ")
			require.NoError(t, err)
		}
	}
	report("2,000 connections")

	// Every hostile body, from several clients at once, over and over.
	var attackers sync.WaitGroup
	for name, body := range hostileBodies() {
		attackers.Go(func() {
			for range 3 {
				resp, err := hostile.Do(t.Context(), "", "", body)
				if err != nil { // the answer came while the body was being sent
					continue
				}
				if resp.Status < 400 || resp.Status >= 500 {
					t.Errorf("%s: %d", name, resp.Status)
				}
			}
		})
	}
	n, p99 := honest.wait(t, 300)
	t.Logf("during hostile bodies: p99 of %d honest polls %v", n, p99)
	require.Less(t, p99, 3*time.Second)
	attackers.Wait()
	report("after hostile bodies")
	t.Logf("peak memory %d MiB", memory(t, pid, "VmHWM"))

	status, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	require.Equal(t, 200, status)
	require.Contains(t, text, "nanomdm_http_panics_total 0")
	for _, reason := range []string{"malformed", "too_large", "certificate_not_pinned"} {
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

// The certificate of one device with the body of another, for every message.
func TestNoDeviceSpeaksForAnother(t *testing.T) {
	d := start(t, "http")
	victim := d.device("VICTIM", mdmtest.Config{})
	require.NoError(t, victim.Enroll(t.Context()))
	attacker := d.device("ATTACKER", mdmtest.Config{})
	require.NoError(t, attacker.Enroll(t.Context()))
	plist := func(kind, more string) string {
		return `<plist version="1.0"><dict><key>MessageType</key><string>` + kind + `</string><key>UDID</key><string>VICTIM</string>` + more + `</dict></plist>`
	}
	data := "<data>" + base64.StdEncoding.EncodeToString([]byte("token")) + "</data>"
	messages := map[string]string{
		"Authenticate":          plist("Authenticate", "<key>Topic</key><string>t</string>"),
		"GetToken":              plist("GetToken", "<key>TokenServiceType</key><string>com.apple.maid</string>"),
		"ReturnToService":       plist("ReturnToService", ""),
		"TokenUpdate":           plist("TokenUpdate", "<key>Topic</key><string>t</string><key>PushMagic</key><string>m</string><key>Token</key>"+data),
		"CheckOut":              plist("CheckOut", ""),
		"SetBootstrapToken":     plist("SetBootstrapToken", "<key>BootstrapToken</key>"+data),
		"GetBootstrapToken":     plist("GetBootstrapToken", ""),
		"DeclarativeManagement": plist("DeclarativeManagement", "<key>Endpoint</key><string>tokens</string>"),
		"UserAuthenticate":      plist("UserAuthenticate", "<key>UserID</key><string>U</string><key>UserShortName</key><string>u</string>"),
		"user's TokenUpdate":    plist("TokenUpdate", "<key>UserID</key><string>U</string><key>UserShortName</key><string>u</string><key>Topic</key><string>t</string><key>PushMagic</key><string>m</string><key>Token</key>"+data),
	}
	for _, status := range []string{"Idle", "Acknowledged", "Error", "NotNow", "CommandFormatError"} {
		messages["report "+status] = `<plist version="1.0"><dict><key>Status</key><string>` + status + `</string><key>CommandUUID</key><string>C</string><key>UDID</key><string>VICTIM</string></dict></plist>`
	}
	for name, body := range messages {
		resp, err := attacker.Do(t.Context(), "", "", []byte(body))
		require.NoError(t, err)
		require.Equal(t, 400, resp.Status, name)
		require.Empty(t, resp.Body, name)
	}
	_, err := victim.Poll(t.Context())
	require.NoError(t, err)
}

// A certificate header is refused where the mode does not use it, and counted.
func TestUnusedCertificateHeader(t *testing.T) {
	d := start(t, "http")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	for i, name := range []string{"Client-Cert", "x-forwarded-client-cert", "X-Amzn-Mtls-Clientcert-Leaf", "X-ARR-ClientCert"} {
		body := []byte(`<plist version="1.0"><dict><key>Status</key><string>Idle</string><key>UDID</key><string>D1</string></dict></plist>`)
		signature, err := mdmtest.Sign(dev.Identity(), body, mdmtest.SignOptions{})
		require.NoError(t, err)
		req, err := http.NewRequest("PUT", d.url+"/mdm", bytes.NewReader(body))
		require.NoError(t, err)
		req.Header.Set("Mdm-Signature", signature)
		req.Header.Set(name, "x")
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
