package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/service/callout"
)

// makeCA returns a self-signed certificate that change has changed, in DER.
func makeCA(t *testing.T, name string, change func(*x509.Certificate)) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(5, 0, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return der
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// TestCAThatCannotWork: a file from which no device could be let in stops the
// start, and the message names the file and what helps.
func TestCAThatCannotWork(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "ca.pem")
	good := makeCA(t, "Good", func(*x509.Certificate) {})
	leaf := certPEM(makeCA(t, "Leaf", func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature }))
	expired := certPEM(makeCA(t, "Old", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }))
	_, key, err := pushPEM()
	require.NoError(t, err)
	for name, tc := range map[string]struct {
		data []byte
		want string
	}{
		"leaf":           {leaf, "CN=Leaf is not a CA"},
		"expired":        {expired, "CN=Old expired on "},
		"not yet valid":  {certPEM(makeCA(t, "New", func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Hour) })), "CN=New is not valid before "},
		"no signing":     {certPEM(makeCA(t, "Mute", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })), "key usage"},
		"two":            {append(leaf, expired...), "CN=Leaf is not a CA"},
		"key":            {key, "holds a private key"},
		"with a key":     {append(certPEM(good), key...), "holds a private key"},
		"DER":            {good, "openssl x509 -inform der"},
		"PKCS #12":       {[]byte("\x30\x80\x02\x01\x03\x30\x80"), "openssl pkcs12 -in"},
		"text":           {[]byte("hello"), "no PEM block"},
		"empty":          {nil, "no PEM block"},
		"cut":            {append(certPEM(good), "-----BEGIN CERTIFICATE-----\nMII"...), "only 1 of 2 PEM blocks"},
		"not a CA's PEM": {pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: []byte("x")}), `PEM block "X509 CRL"`},
	} {
		t.Run(name, func(t *testing.T) {
			require.NoError(t, os.WriteFile(file, tc.data, 0o600))
			var stderr strings.Builder
			code := run(t.Context(), []string{"-ca", file, "-listen", "127.0.0.1:0", "-storage-dsn", ":memory:"}, nil, io.Discard, &stderr, nil)
			require.Equal(t, exitFailure, code)
			require.Contains(t, stderr.String(), "-ca: "+file+": ")
			require.Contains(t, stderr.String(), tc.want)
		})
	}
}

// pushPEM returns a certificate and a key in PEM.
func pushPEM() (cert, key []byte, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(k)
	return nil, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), err
}

// TestCABesideGoodOnes: one bad certificate in a bundle is an error in the log,
// one near its end a warning. Marks, carriage returns and glued blocks are read.
func TestCABesideGoodOnes(t *testing.T) {
	good := bytes.TrimSpace(certPEM(makeCA(t, "Good", func(*x509.Certificate) {})))
	leaf := bytes.TrimSpace(certPEM(makeCA(t, "Leaf", func(c *x509.Certificate) { c.IsCA = false })))
	ending := certPEM(makeCA(t, "Ending", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(9*24*time.Hour + time.Hour) }))
	data := bytes.Join([][]byte{[]byte("\xef\xbb\xbf"), good, leaf, bytes.ReplaceAll(ending, []byte("\n"), []byte("\r\n"))}, nil)
	file := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(file, data, 0o600))
	var log bytes.Buffer
	var side deviceSide
	require.NoError(t, side.loadVerifiers(options{ca: file}, nil, slog.New(slog.NewTextHandler(&log, nil))))
	require.WithinDuration(t, time.Now().Add(9*24*time.Hour), side.caNotAfter, 2*time.Hour)
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	require.Len(t, lines, 2)
	require.Contains(t, lines[0], "level=WARN")
	require.Contains(t, lines[0], "subject=\"CN=Ending\"")
	require.Contains(t, lines[0], "days_left=9")
	require.Contains(t, lines[1], "level=ERROR")
	require.Contains(t, lines[1], "file="+file)
	require.Contains(t, lines[1], "CN=Leaf is not a CA")
}

func TestServerCertificateFiles(t *testing.T) {
	dir := t.TempDir()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	id, err := ca.Issue("127.0.0.1", mdmtest.WithHosts("127.0.0.1"))
	require.NoError(t, err)
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, data, 0o600))
		return path
	}
	der, err := x509.MarshalPKCS8PrivateKey(id.Key)
	require.NoError(t, err)
	keyPEM := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	cert, key := write("cert.pem", certPEM(id.Cert.Raw)), write("key.pem", keyPEM)
	load := func(cert, key string) error {
		_, err := loadServerCertificate(options{tlsCert: cert, tlsKey: key}, slog.New(slog.DiscardHandler))
		return err
	}
	require.NoError(t, load(cert, key))
	both := write("both.pem", bytes.Join([][]byte{[]byte("\xef\xbb\xbf"), bytes.TrimSpace(certPEM(id.Cert.Raw)), certPEM(ca.Cert().Raw), keyPEM}, nil))
	require.NoError(t, load(both, both))

	encrypted := write("encrypted.pem", pem.EncodeToMemory(&pem.Block{Type: "ENCRYPTED PRIVATE KEY", Bytes: []byte("x")}))
	require.ErrorContains(t, load(cert, encrypted), "-tls-key: "+encrypted+": the private key is encrypted")
	p12 := write("server.p12", []byte("\x30\x80\x02\x01\x03\x30\x80"))
	require.ErrorContains(t, load(p12, key), "-tls-cert: "+p12+": the data is PKCS #12")
	_, other, err := pushPEM()
	require.NoError(t, err)
	require.ErrorContains(t, load(cert, write("other.pem", other)), filepath.Join(dir, "other.pem"))
}

// TestPrivateCAs: the CAs of an option are trusted beside the system's.
func TestPrivateCAs(t *testing.T) {
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) }))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "private.pem")
	require.NoError(t, os.WriteFile(file, certPEM(server.Certificate().Raw), 0o600))
	log := slog.New(slog.DiscardHandler)
	roots, err := loadRoots("dm-ca", file, log)
	require.NoError(t, err)
	client := callout.Client(callout.Transport(roots))
	defer client.CloseIdleConnections()
	res, err := client.Get(server.URL)
	require.NoError(t, err)
	res.Body.Close()
	system, err := x509.SystemCertPool()
	require.NoError(t, err)
	require.False(t, roots.Equal(system))
	system.AddCert(server.Certificate())
	require.True(t, roots.Equal(system), "the system's CAs stay")

	none, err := loadRoots("dm-ca", "", log)
	require.NoError(t, err)
	require.Nil(t, none)
	require.NoError(t, os.WriteFile(file, []byte("hello"), 0o600))
	_, err = loadRoots("webhook-ca", file, log)
	require.ErrorContains(t, err, "-webhook-ca: "+file)
}

// TestWebhookOverPrivateCA: -webhook-ca reaches the sender.
func TestWebhookOverPrivateCA(t *testing.T) {
	t.Parallel()
	got := make(chan struct{}, 100)
	server := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { got <- struct{}{} }))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "private.pem")
	require.NoError(t, os.WriteFile(file, certPEM(server.Certificate().Raw), 0o600))
	u, err := url.Parse(server.URL)
	require.NoError(t, err)
	d := start(t, "http", "-webhook-url", u.String(), "-webhook-ca", file)
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(context.Background()))
	within(t, got)
}
