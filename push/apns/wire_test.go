package apns_test

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

// The request, byte for byte, as a server without checks sees it.
func TestRequest(t *testing.T) {
	type seen struct {
		method, path, proto, body string
		header                    http.Header
		tls                       uint16
	}
	requests := make(chan seen, 1)
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		requests <- seen{r.Method, r.URL.Path, r.Proto, string(body), r.Header, r.TLS.Version}
	}))
	srv.EnableHTTP2 = true
	srv.TLS = &tls.Config{ClientAuth: tls.RequireAnyClientCert}
	srv.StartTLS()
	defer srv.Close()

	fake := newServer(t, apnstest.Config{})
	now := time.Unix(1700000000, 0)
	c, err := apns.New(newSource(t, fake), apns.Config{
		URL:     srv.URL,
		RootCAs: srv.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs,
		Now:     func() time.Time { return now },
		Proxy:   func(*url.URL) (*url.URL, error) { return nil, nil },
	})
	require.NoError(t, err)
	defer c.Close()

	for _, tt := range []struct{ magic, body string }{
		{"5F0E3A9C-0D0B-4E55-8E64-0B6D6E0A3C11", `{"mdm":"5F0E3A9C-0D0B-4E55-8E64-0B6D6E0A3C11"}`},
		{`a"b\c`, `{"mdm":"a\"b\\c"}`},
		{"<&>", `{"mdm":"<&>"}`},
		{"tab\tnewline\nü", `{"mdm":"tab\tnewline\nü"}`},
	} {
		o := c.Push(t.Context(), apns.Notification{
			Token: []byte{0xAB, 0x01, 0xFF}, Magic: tt.magic, Topic: topic, ID: "123e4567-e89b-12d3-a456-4266554400a0",
		})
		require.Equal(t, apns.Accepted, o.Class, "%+v", o)
		require.Equal(t, "123e4567-e89b-12d3-a456-4266554400a0", o.APNsID)
		got := <-requests
		require.Equal(t, tt.body, got.body)
		require.Equal(t, "POST", got.method)
		require.Equal(t, "/3/device/ab01ff", got.path)
		require.Equal(t, "HTTP/2.0", got.proto)
		require.GreaterOrEqual(t, got.tls, uint16(tls.VersionTLS12))
		require.Equal(t, []string{topic}, got.header["Apns-Topic"])
		require.Equal(t, []string{"mdm"}, got.header["Apns-Push-Type"])
		require.Equal(t, []string{"10"}, got.header["Apns-Priority"])
		require.Equal(t, []string{"1700604800"}, got.header["Apns-Expiration"])
		require.Equal(t, []string{"123e4567-e89b-12d3-a456-4266554400a0"}, got.header["Apns-Id"])
		require.NotContains(t, got.header, "Accept-Encoding")
	}

	o := c.Push(t.Context(), apns.Notification{Token: []byte{1}, Magic: "m", Topic: topic})
	require.Regexp(t, `^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`, o.APNsID)
	require.Equal(t, []string{o.APNsID}, (<-requests).header["Apns-Id"])
}

// proxy tunnels CONNECT requests, and can stop to.
type proxy struct {
	listener net.Listener
	answer   atomic.Pointer[string] // instead of a tunnel
	wg       sync.WaitGroup

	mu      sync.Mutex
	conns   []net.Conn
	tunnels []*tunnel
	seen    []http.Header
	targets []string
}

type tunnel struct{ frozen atomic.Bool }

func newProxy(t *testing.T) *proxy {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p := &proxy{listener: l}
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			p.keep(c)
			p.wg.Go(func() { p.serve(c) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.mu.Lock()
		for _, c := range p.conns {
			c.Close()
		}
		p.mu.Unlock()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) url(*url.URL) (*url.URL, error) {
	return &url.URL{Scheme: "http", Host: p.listener.Addr().String(), User: url.UserPassword("nano", "s3cret")}, nil
}

func (p *proxy) keep(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, c)
}

// freeze has the tunnels so far swallow what comes, as a firewall does that
// forgot a connection.
func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, tn := range p.tunnels {
		tn.frozen.Store(true)
	}
}

func (p *proxy) serve(c net.Conn) {
	defer c.Close()
	req, err := http.ReadRequest(bufio.NewReader(c))
	if err != nil {
		return
	}
	tn := &tunnel{}
	p.mu.Lock()
	p.seen = append(p.seen, req.Header)
	p.targets = append(p.targets, req.Method+" "+req.RequestURI)
	p.tunnels = append(p.tunnels, tn)
	p.mu.Unlock()
	if a := p.answer.Load(); a != nil {
		io.WriteString(c, *a)
		return
	}
	up, err := net.Dial("tcp", req.RequestURI)
	if err != nil {
		return
	}
	p.keep(up)
	defer up.Close()
	io.WriteString(c, "HTTP/1.1 200 Connection established\r\n\r\n")
	p.wg.Go(func() { tn.copy(up, c) })
	tn.copy(c, up)
}

func (tn *tunnel) copy(dst, src net.Conn) {
	defer dst.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := src.Read(buf)
		if err != nil {
			return
		}
		if tn.frozen.Load() {
			continue
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return
		}
	}
}

func TestProxy(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	p := newProxy(t)
	c := newClient(t, srv, newSource(t, srv), apns.Config{Proxy: p.url})
	requireAccepted(t, pushAll(c, 100))
	require.Equal(t, []string{"CONNECT " + srv.URL()[len("https://"):]}, p.targets)
	require.Equal(t, "Basic bmFubzpzM2NyZXQ=", p.seen[0].Get("Proxy-Authorization"))
}

func TestProxyFromEnvironment(t *testing.T) {
	// The environment never proxies loopback addresses, and is read once for
	// the whole process: that an unset Proxy consults it shows in New alone.
	srv := newServer(t, apnstest.Config{})
	c, err := apns.New(newSource(t, srv), apns.Config{URL: srv.URL(), RootCAs: srv.RootCAs()})
	require.NoError(t, err)
	defer c.Close()
	requireAccepted(t, []apns.Outcome{c.Push(t.Context(), notification(1))})
}

func TestProxyRefuses(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	for name, tt := range map[string]struct{ answer, err string }{
		"authentication": {"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "status 407"},
		"not HTTP":       {"SSH-2.0-OpenSSH_9.9\r\n", "malformed HTTP"},
		"early data":     {"HTTP/1.1 200 OK\r\n\r\nhello", "ahead of the TLS handshake"},
		"silent":         {"", "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			p := newProxy(t)
			p.answer.Store(&tt.answer)
			c := newClient(t, srv, newSource(t, srv), apns.Config{Proxy: p.url})
			o := c.Push(t.Context(), notification(1))
			require.Equal(t, apns.RetryLater, o.Class)
			require.ErrorContains(t, o.Err, tt.err)
			require.NotContains(t, o.Err.Error(), "s3cret")
		})
	}
	c := newClient(t, srv, newSource(t, srv), apns.Config{Proxy: func(*url.URL) (*url.URL, error) {
		return url.Parse("socks5://user:s3cret@localhost")
	}})
	o := c.Push(t.Context(), notification(1))
	require.ErrorContains(t, o.Err, `"socks5" is not supported`)
	require.NotContains(t, o.Err.Error(), "s3cret")
}
