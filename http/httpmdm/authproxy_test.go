package httpmdm_test

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/certverify"
	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
)

// proxied is an AuthProxy before a target that keeps the last request.
type proxied struct {
	*site
	target *httptest.Server
	front  *httptest.Server
	got    *http.Request
	answer func(w http.ResponseWriter, body []byte)
}

func newProxied(t *testing.T, identity func(httpmdm.Verifier) *httpmdm.Identity) *proxied {
	t.Helper()
	p := &proxied{site: newSite(t, siteConfig{}), answer: func(w http.ResponseWriter, body []byte) { _, _ = w.Write(append([]byte("echo "), body...)) }}
	p.target = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.got = r
		body, _ := io.ReadAll(r.Body)
		p.answer(w, body)
	}))
	t.Cleanup(p.target.Close)
	verifier, err := certverify.New(p.ca.PEM(), nil, certverify.Config{})
	require.NoError(t, err)
	u, err := url.Parse(p.target.URL + "/base/")
	require.NoError(t, err)
	h := httpmdm.New(nil, identity(verifier), httpmdm.Config{})
	p.front = httptest.NewServer(requestlog.Middleware(slog.New(slog.DiscardHandler), requestlog.Config{}, h.AuthProxy("/authproxy/", u, p.store)))
	t.Cleanup(p.front.Close)
	return p
}

// asks sends a signed request as it is, line by line, and returns the status and
// the body of the answer.
func (p *proxied) asks(t *testing.T, id *mdmtest.Identity, method, path, body string, options mdmtest.SignOptions, headers ...string) (int, string) {
	t.Helper()
	signature, err := mdmtest.Sign(id, []byte(body), options)
	require.NoError(t, err)
	target, err := url.Parse(p.front.URL)
	require.NoError(t, err)
	conn := dial(t, target.Host)
	headers = append(headers, "Host: x", "Mdm-Signature: "+signature, fmt.Sprint("Content-Length: ", len(body)))
	_, err = fmt.Fprintf(conn, "%s %s HTTP/1.1\r\n%s\r\n\r\n%s", method, path, strings.Join(headers, "\r\n"), body)
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), &http.Request{Method: method})
	require.NoError(t, err)
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	require.NoError(t, err)
	return resp.StatusCode, string(answer)
}

func TestAuthProxy(t *testing.T) {
	p := newProxied(t, httpmdm.SignatureIdentity)
	d := p.enrolled("D1", mdmtest.Config{})
	ask := func(id *mdmtest.Identity) (int, string) {
		return p.asks(t, id, "POST", "/authproxy/some/f%20ile?x=1", "hello", mdmtest.SignOptions{},
			"X-Enrollment-ID: forged", "X_Enrollment_ID: forged", "x_enrollment-id: forged", "X-Trace-ID: forged", "Cookie: a=b",
			"Authorization: Basic Zm9yZ2Vk", "Traceparent: forged", "X-Forwarded-For: 192.0.2.9", "Forwarded: for=192.0.2.9",
			"Connection: X-Enrollment-ID, close", "Content-Type: text/x", "If-None-Match: x")
	}
	status, answer := ask(d.Identity())
	require.Equal(t, 200, status)
	require.Equal(t, "echo hello", answer)
	require.Equal(t, "/base/some/f ile", p.got.URL.Path)
	require.Equal(t, "x=1", p.got.URL.RawQuery)
	require.Equal(t, strings.TrimPrefix(p.target.URL, "http://"), p.got.Host)
	require.NotEmpty(t, p.got.Header.Get("X-Trace-ID"))
	require.Equal(t, "127.0.0.1", p.got.Header.Get("X-Forwarded-For"))
	for name, values := range p.got.Header {
		require.NotContains(t, name, "_")
		require.NotContains(t, fmt.Sprint(values), "forged", name)
	}
	require.Equal(t, []string{"D1"}, p.got.Header.Values("X-Enrollment-ID"))
	require.Equal(t, "text/x", p.got.Header.Get("Content-Type"))
	require.Equal(t, "x", p.got.Header.Get("If-None-Match"))
	for _, name := range []string{"Mdm-Signature", "Cookie", "Authorization", "Forwarded", "Traceparent"} {
		require.Empty(t, p.got.Header.Get(name), name)
	}

	status, _ = ask(p.identity("stranger"))
	require.Equal(t, 400, status)
	p.target.Close()
	status, _ = ask(d.Identity())
	require.Equal(t, 502, status)
}

func TestAuthProxyRefusesPathsThatLeaveTheBase(t *testing.T) {
	p := newProxied(t, httpmdm.SignatureIdentity)
	d := p.enrolled("D1", mdmtest.Config{})
	for path, want := range map[string]int{
		"/authproxy/../admin":                 400,
		"/authproxy/%2e%2e/admin":             400,
		"/authproxy/a/%2E./%2e%2e/admin":      400,
		"/authproxy/a%2f..%2f..%2fadmin":      400,
		"/authproxy/%252e%252e/admin":         400,
		"/authproxy/%25252e%25252e%25252f":    400,
		"/authproxy/..;/admin":                400,
		"/authproxy/..;x=1/admin":             400,
		"/authproxy/..%5cadmin":               400,
		"/authproxy/a%5c..%5c..%5cadmin":      400,
		"/authproxy/a\\b":                     400,
		"/authproxy/a%255cb":                  400,
		"/authproxy/a%00b":                    400,
		"/authproxy/a%0d%0aX-Enrollment-ID:b": 400,
		"/authproxy/..a/b..c/...":             200,
		"/authproxy/100%25":                   200,
		"/authproxy/a%2fb":                    200,
	} {
		p.got = nil
		status, _ := p.asks(t, d.Identity(), "POST", path, "hello", mdmtest.SignOptions{})
		require.Equal(t, want, status, path)
		if want == 200 {
			require.True(t, strings.HasPrefix(p.got.URL.Path, "/base/"), p.got.URL.Path)
		} else {
			require.Nil(t, p.got, path)
		}
	}
	for _, method := range []string{"TRACE", "CONNECT", "PROPFIND"} {
		p.got = nil
		status, _ := p.asks(t, d.Identity(), method, "/authproxy/x", "hello", mdmtest.SignOptions{})
		require.Equal(t, 405, status)
		require.Nil(t, p.got)
	}
}

// An upgrade would be a tunnel to the target, on which anything may be sent.
func TestAuthProxyOpensNoTunnel(t *testing.T) {
	p := newProxied(t, httpmdm.SignatureIdentity)
	d := p.enrolled("D1", mdmtest.Config{})
	upgrade := []string{"Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x"}
	status, _ := p.asks(t, d.Identity(), "POST", "/authproxy/x", "hello", mdmtest.SignOptions{}, upgrade...)
	require.Equal(t, 200, status)
	require.Empty(t, p.got.Header.Get("Upgrade"))
	require.Empty(t, p.got.Header.Get("Connection"))
	require.Empty(t, p.got.Header.Get("Sec-Websocket-Key"))

	for _, more := range []string{"", "Connection: Upgrade\r\nUpgrade: websocket\r\n"} {
		p.answer = func(w http.ResponseWriter, _ []byte) {
			conn, _, err := w.(http.Hijacker).Hijack()
			if err == nil {
				_, _ = io.WriteString(conn, "HTTP/1.1 101 Switching Protocols\r\n"+more+"\r\nsecret")
				_ = conn.Close()
			}
		}
		status, answer := p.asks(t, d.Identity(), "POST", "/authproxy/x", "hello", mdmtest.SignOptions{}, upgrade...)
		require.Equal(t, 502, status)
		require.NotContains(t, answer, "secret")
	}
}

func TestAuthProxyWantsAnActiveEnrollment(t *testing.T) {
	p := newProxied(t, httpmdm.SignatureIdentity)
	d := p.device("D1", mdmtest.Config{})
	ask := func() int {
		status, _ := p.asks(t, d.Identity(), "POST", "/authproxy/x", "hello", mdmtest.SignOptions{})
		return status
	}
	require.Equal(t, 400, ask(), "not enrolled")
	require.NoError(t, d.Authenticate(t.Context()))
	require.Equal(t, 400, ask(), "not enrolled yet")
	require.NoError(t, d.TokenUpdate(t.Context()))
	require.Equal(t, 200, ask())
	disable := func(disabled bool) {
		_, err := p.store.SetDisabled(t.Context(), storage.Scope{}, "D1", disabled, &storage.AuditRecord{})
		require.NoError(t, err)
	}
	disable(true)
	require.Equal(t, 400, ask(), "disabled by an operator")
	disable(false)
	require.Equal(t, 200, ask())
	require.NoError(t, d.CheckOut(t.Context()))
	require.Equal(t, 400, ask(), "checked out")
}

// The signature of an empty body is the same for every path and for ever.
func TestAuthProxyAndEmptyBodies(t *testing.T) {
	p := newProxied(t, httpmdm.SignatureIdentity)
	d := p.enrolled("D1", mdmtest.Config{})
	for name, c := range map[string]struct {
		options mdmtest.SignOptions
		want    int
	}{
		"as devices sign":         {mdmtest.AppleSign(), 400},
		"no signing time":         {mdmtest.SignOptions{}, 400},
		"recorded an hour ago":    {mdmtest.SignOptions{SignedAttributes: true, SigningTime: time.Now().Add(-time.Hour)}, 400},
		"made for later":          {mdmtest.SignOptions{SignedAttributes: true, SigningTime: time.Now().Add(time.Hour)}, 400},
		"signed just now":         {mdmtest.SignOptions{SignedAttributes: true}, 200},
		"signed four minutes ago": {mdmtest.SignOptions{SignedAttributes: true, SigningTime: time.Now().Add(-4 * time.Minute)}, 200},
	} {
		status, _ := p.asks(t, d.Identity(), "GET", "/authproxy/x", "", c.options)
		require.Equal(t, c.want, status, name)
	}

	header := newProxied(t, func(v httpmdm.Verifier) *httpmdm.Identity { return httpmdm.HeaderIdentity(v, "X-Cert", nil) })
	dev := header.enrolled("D1", mdmtest.Config{})
	req, err := http.NewRequest("GET", header.front.URL+"/authproxy/x", nil)
	require.NoError(t, err)
	certPEM, err := dev.Identity().PEM()
	require.NoError(t, err)
	certPEM, _, _ = bytes.Cut(certPEM, []byte("-----BEGIN PRIVATE"))
	req.Header.Set("X-Cert", url.PathEscape(string(certPEM)))
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 200, resp.StatusCode, "TLS proved the key a moment ago")
}
