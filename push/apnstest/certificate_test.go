package apnstest_test

import (
	"bytes"
	"crypto/tls"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/push/apnstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A client that trusts the authority trusts each server that has it, and push
// certificates of one are good for the other.
func TestServersShareAnAuthority(t *testing.T) {
	ca, err := apnstest.NewCA()
	require.NoError(t, err)
	first, err := apnstest.NewServer(apnstest.Config{CA: ca})
	require.NoError(t, err)
	client, err := first.ClientCertificate("com.apple.mgmt.External.test")
	require.NoError(t, err)
	first.Close()

	second, err := apnstest.NewServer(apnstest.Config{CA: ca})
	require.NoError(t, err)
	defer second.Close()
	require.True(t, bytes.Equal(first.CAPEM(), second.CAPEM()))
	conn, err := tls.Dial("tcp", second.URL()[len("https://"):], &tls.Config{
		RootCAs: first.RootCAs(), Certificates: []tls.Certificate{client}, NextProtos: []string{"h2"},
	})
	require.NoError(t, err)
	defer conn.Close()
	// In TLS 1.3 the client learns only by reading whether it was taken; the
	// server begins with its SETTINGS.
	_, err = conn.Read(make([]byte, 9))
	require.NoError(t, err)
}

func TestConfigRefusesWhatIsNoAuthority(t *testing.T) {
	ca, err := apnstest.NewCA()
	require.NoError(t, err)
	srv, err := apnstest.NewServer(apnstest.Config{})
	require.NoError(t, err)
	defer srv.Close()
	leaf, err := srv.ClientCertificate("com.apple.mgmt.External.test")
	require.NoError(t, err)
	for name, c := range map[string]tls.Certificate{
		"a leaf":          leaf,
		"no key":          {Certificate: ca.Certificate},
		"not certificate": {Certificate: [][]byte{[]byte("x")}, PrivateKey: ca.PrivateKey},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := apnstest.NewServer(apnstest.Config{CA: c})
			require.ErrorContains(t, err, "Config.CA")
		})
	}
}
