package callout_test

import (
	"crypto/x509"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/service/callout"
)

// The vector is test case 2 of RFC 4231.
func TestSignature(t *testing.T) {
	const signature = "W9zBRr9gdU5qBCQmCJV1x1oAPwidJzmDnexYuWTsOEM="
	key, body := []byte("Jefe"), []byte("what do ya want for nothing?")
	h := make(http.Header)
	callout.Sign(h, nil, body)
	require.Empty(t, h)
	require.True(t, callout.Signed(h, nil, body), "without a key nothing is checked")
	require.False(t, callout.Signed(h, key, body))
	callout.Sign(h, key, body)
	require.Equal(t, signature, h.Get("X-Hmac-Signature"))
	require.True(t, callout.Signed(h, key, body))
	require.False(t, callout.Signed(h, key, body[1:]))
	require.False(t, callout.Signed(h, key[1:], body))
	h.Set(callout.HeaderSignature, "not Base64")
	require.False(t, callout.Signed(h, key, body))
	require.Equal(t, callout.MAC(key, body), callout.MAC(key, body[:5], nil, body[5:]))
}

func TestClientFollowsNoRedirect(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("the redirect was followed") }))
	defer elsewhere.Close()
	for _, status := range []int{301, 302, 303, 307, 308} {
		srv := httptest.NewServer(http.RedirectHandler(elsewhere.URL, status))
		resp, err := callout.Client(nil).Post(srv.URL, "text/plain", http.NoBody)
		require.NoError(t, err)
		_, _ = io.Copy(io.Discard, resp.Body)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, status, resp.StatusCode)
		srv.Close()
	}
}

func TestTransportWithPrivateCA(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer server.Close()
	_, err := callout.Client(callout.Transport(nil)).Get(server.URL)
	require.ErrorContains(t, err, "x509", "the system does not know the server's CA")
	roots := x509.NewCertPool()
	roots.AddCert(server.Certificate())
	client := callout.Client(callout.Transport(roots))
	defer client.CloseIdleConnections()
	resp, err := client.Get(server.URL)
	require.NoError(t, err)
	require.NoError(t, resp.Body.Close())
}

func TestErrorsDoNotShowTheURL(t *testing.T) {
	srv := httptest.NewServer(nil)
	srv.Close()
	_, err := callout.Client(nil).Get(srv.URL + "/?secret=1")
	require.ErrorContains(t, err, "secret")
	require.NotContains(t, callout.WithoutURL(err).Error(), "secret")
	require.ErrorIs(t, callout.WithoutURL(io.EOF), io.EOF)
}
