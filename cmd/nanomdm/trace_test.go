package main

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// A traceparent of the proxy's goes into the log and along with callouts.
func TestTraceParentIsCarried(t *testing.T) {
	const trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	got := make(chan [2]string, 1)
	backend := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got <- [2]string{r.URL.Path, r.Header.Get("Traceparent")}
	}))
	defer backend.Close()
	d := start(t, "http", "-dm", backend.URL+"/dm/", "-auth-proxy-url", backend.URL+"/files/", "-debug", "-trusted-proxies", "127.0.0.0/8")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	ask := func(method, path, trace string, body string) {
		t.Helper()
		signature, err := mdmtest.Sign(dev.Identity(), []byte(body), mdmtest.SignOptions{SignedAttributes: true})
		require.NoError(t, err)
		req, err := http.NewRequest(method, d.url+path, bytes.NewReader([]byte(body)))
		require.NoError(t, err)
		req.Header.Set("Mdm-Signature", signature)
		req.Header.Set("Traceparent", trace)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		_, err = io.Copy(io.Discard, resp.Body)
		require.NoError(t, err)
		resp.Body.Close()
		require.Equal(t, 200, resp.StatusCode)
	}
	tokens := `<plist version="1.0"><dict><key>MessageType</key><string>DeclarativeManagement</string><key>UDID</key><string>D1</string><key>Endpoint</key><string>tokens</string></dict></plist>`
	ask("PUT", "/mdm", trace, tokens)
	require.Equal(t, [2]string{"/dm/tokens", trace}, within(t, got))
	ask("GET", "/authproxy/x", trace, "")
	require.Equal(t, [2]string{"/files/x", trace}, within(t, got))
	require.Contains(t, d.log.String(), "traceparent="+trace)

	ask("PUT", "/mdm", "not a trace", tokens)
	require.Equal(t, [2]string{"/dm/tokens", ""}, within(t, got))
	ask("GET", "/authproxy/x", "not a trace", "")
	require.Equal(t, [2]string{"/files/x", ""}, within(t, got))
}
