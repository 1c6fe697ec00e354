package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/stretchr/testify/require"
)

// pusher is how the fake server pushes: as simply as APNs allows.
type pusher struct {
	url, caFile string
	wrongMagic  bool
}

func (p *pusher) send(ctx context.Context, certificate []byte, to pushToken) error {
	pair, err := tls.X509KeyPair(certificate, certificate)
	if err != nil {
		return err
	}
	caPEM, err := os.ReadFile(p.caFile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(caPEM)
	transport := &http.Transport{
		ForceAttemptHTTP2: true,
		TLSClientConfig:   &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}},
	}
	defer transport.CloseIdleConnections()
	magic := to.magic
	if p.wrongMagic {
		magic = "wrong"
	}
	body, err := json.Marshal(map[string]string{"mdm": magic})
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/3/device/%x", p.url, to.token), bytes.NewReader(body))
	if err != nil {
		return err
	}
	request.Header.Set("Apns-Topic", to.topic)
	request.Header.Set("Apns-Push-Type", "mdm")
	reply, err := transport.RoundTrip(request)
	if err != nil {
		return err
	}
	defer reply.Body.Close()
	if reply.StatusCode != http.StatusOK {
		return fmt.Errorf("APNs: %s", reply.Status)
	}
	return nil
}

// newAPNsServer starts a fake server that will push to the fake APNs of a
// coming run, and returns the arguments of that run.
func newAPNsServer(t *testing.T) (*fakeServer, *api, []string) {
	t.Helper()
	dir := t.TempDir()
	ca, _, err := openCA(dir)
	require.NoError(t, err)
	address, err := freeAddress()
	require.NoError(t, err)
	fake := newFakeServer(ca.Pool(), "key")
	fake.push = &pusher{url: "https://" + address, caFile: filepath.Join(dir, "apns-ca.pem")}
	server := httptest.NewServer(fake)
	t.Cleanup(server.Close)
	a := &api{client: server.Client(), base: server.URL, key: "key"}
	return fake, a, []string{
		"apns", "-api", "key", "-url", server.URL, "-ca-dir", dir, "-listen", address, "-latency", "1ms", "-devices", "2",
	}
}

func TestAPNsTimesCommands(t *testing.T) {
	_, _, args := newAPNsServer(t)
	got := mdmsim(t.Context(), nil, append(args, "-time", "10", "-connections", "2")...)
	require.Zero(t, got.code, got.out+got.err)
	require.Contains(t, got.out, "-apns-url https://127.0.0.1:")
	require.Contains(t, got.out, "10 pushes, 10 accepted")
	fields := strings.Join(strings.Fields(got.out), " ")
	require.Contains(t, fields, "enqueue to acknowledged 10 ")
	require.Contains(t, fields, " Acknowledged 10 ")
}

func TestAPNsReportsWhatIsWrong(t *testing.T) {
	t.Run("push", func(t *testing.T) {
		fake, _, args := newAPNsServer(t)
		fake.push.wrongMagic = true
		got := mdmsim(t.Context(), nil, append(args, "-time", "1", "-timeout", "300ms")...)
		require.Equal(t, 1, got.code)
		require.Contains(t, got.out, "a push with a wrong magic or topic")
		require.Contains(t, got.out, "not acknowledged in 300ms")
	})
	t.Run("no push", func(t *testing.T) {
		fake, _, args := newAPNsServer(t)
		fake.push.url = "https://127.0.0.1:1"
		got := mdmsim(t.Context(), nil, append(args, "-time", "1", "-timeout", "300ms")...)
		require.Equal(t, 1, got.code)
		require.Contains(t, got.out, "connection refused")
	})
}

func TestAPNsShowsPushesUntilInterrupted(t *testing.T) {
	fake, server, args := newAPNsServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out syncBuffer
	var code int
	var program sync.WaitGroup
	program.Go(func() {
		code = run(ctx, streams{out: &out, err: &out, env: func(string) string { return "" }}, args)
	})
	require.Eventually(t, func() bool { return strings.Contains(out.String(), "asleep") }, 10*time.Second, 5*time.Millisecond)
	fake.mu.Lock()
	var ids []string
	for id := range fake.enrolled {
		ids = append(ids, id)
	}
	fake.mu.Unlock()
	require.NoError(t, server.enqueue(t.Context(), ids, mdmtest.NewCommand("", "ProfileList", nil), true))
	require.Eventually(t, func() bool {
		return strings.Count(out.String(), "ProfileList Acknowledged") == 2
	}, 10*time.Second, 5*time.Millisecond)
	cancel()
	program.Wait()
	require.Zero(t, code, out.String())
	require.Contains(t, out.String(), "p99 ms")
}

func TestAPNsWithoutServer(t *testing.T) {
	address, err := freeAddress()
	require.NoError(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	got := mdmsim(ctx, nil, "apns", "-api", "k", "-url", "http://"+address, "-listen", "127.0.0.1:0", "-ca-dir", t.TempDir())
	require.Equal(t, 1, got.code)
	require.Contains(t, got.err, "the server did not answer")
}

// The authority stays the same, so that a server that was started with it
// believes in the fake APNs of each later run.
func TestAPNsKeepsItsAuthority(t *testing.T) {
	_, _, args := newAPNsServer(t)
	dir := args[slices.Index(args, "-ca-dir")+1]
	require.Zero(t, mdmsim(t.Context(), nil, "ca", "-dir", dir).code)
	before, err := os.ReadFile(filepath.Join(dir, "apns-ca.pem"))
	require.NoError(t, err)
	args = append(args, "-time", "1")
	for range 2 {
		got := mdmsim(t.Context(), nil, args...)
		require.Zero(t, got.code, got.out+got.err)
		require.Contains(t, got.out, "1 accepted")
	}
	after, err := os.ReadFile(filepath.Join(dir, "apns-ca.pem"))
	require.NoError(t, err)
	require.Equal(t, before, after)

	require.NoError(t, os.Remove(filepath.Join(dir, "apns-ca.key")))
	got := mdmsim(t.Context(), nil, args...)
	require.Equal(t, 1, got.code)
	require.Contains(t, got.err, "not both of")
}

// syncBuffer is read while a program writes to it.
type syncBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// Devices behind a proxy show their certificates in a header, and the address
// that they speak to is printed.
func TestAPNsWithCertificateHeader(t *testing.T) {
	_, server, args := newAPNsServer(t)
	got := mdmsim(t.Context(), nil, append(args, "-time", "4", "-cert-header", "X-Cert")...)
	require.Zero(t, got.code, got.out+got.err)
	require.Contains(t, got.out, "4 pushes, 4 accepted")
	require.Contains(t, got.out, "-url is "+server.base+", devices speak to "+server.base+"/mdm.")
}
