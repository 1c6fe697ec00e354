package main

import (
	"crypto/tls"
	"encoding/pem"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
)

// Devices show their certificates to a server whose certificate is of a private
// CA, each over connections of its own.
func TestLoadOverTLS(t *testing.T) {
	dir := t.TempDir()
	ca, _, err := openCA(dir)
	require.NoError(t, err)
	fake := newFakeServer(ca.Pool(), "key")
	server := httptest.NewUnstartedServer(fake)
	server.TLS = &tls.Config{ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: ca.Pool()}
	server.StartTLS()
	t.Cleanup(server.Close)
	serverCA := filepath.Join(dir, "server.pem")
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	require.NoError(t, os.WriteFile(serverCA, certificate, 0o600))

	args := []string{"load", "-url", server.URL, "-ca-dir", dir, "-devices", "5", "-commands-per-device", "2", "-tls-client-auth"}
	key := map[string]string{"NANOMDM_API": "key"}
	got := mdmsim(t.Context(), key, append(args, "-server-ca", serverCA)...)
	require.Zero(t, got.code, got.out+got.err)
	require.Contains(t, got.out, "5 devices, 5 channels")
	require.Len(t, fake.enrolled, 5)

	got = mdmsim(t.Context(), key, args...)
	require.Equal(t, 1, got.code)
	require.Contains(t, got.out+got.err, "certificate signed by unknown authority")
}

// The push certificate is replaced while commands are under way.
func TestAPNsRotates(t *testing.T) {
	fake, _, args := newAPNsServer(t)
	got := mdmsim(t.Context(), nil, append(args, "-time", "200", "-rotate", "1ms")...)
	require.Zero(t, got.code, got.out+got.err)
	require.Contains(t, got.out, "200 pushes, 200 accepted")
	require.Contains(t, got.out, "push certificate")
	first, err := os.ReadFile(filepath.Join(args[6], "push.pem"))
	require.NoError(t, err)
	fake.mu.Lock()
	defer fake.mu.Unlock()
	require.NotEqual(t, string(first), string(fake.pushCert))
}
