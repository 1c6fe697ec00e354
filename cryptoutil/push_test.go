package cryptoutil

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

const testTopic = "com.apple.mgmt.External.b8fa2a3c-5a75-4b7b-9e2f-3d6b1f5c8a11"

var testNow = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// pushCertificate returns a certificate, valid around testNow, with the topic in
// its subject unless it is empty.
func pushCertificate(t testing.TB, key crypto.Signer, topic string) []byte {
	t.Helper()
	subject := pkix.Name{CommonName: "APSP:b8fa2a3c"}
	if topic != "" {
		subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: oidSubjectUserID, Value: topic}}
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7),
		Subject:      subject,
		NotBefore:    testNow.AddDate(0, -1, 0),
		NotAfter:     testNow.AddDate(0, 11, 0),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	return encodePEM("CERTIFICATE", der)
}

func encodePEM(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func pkcs8(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	return encodePEM("PRIVATE KEY", der)
}

func join(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

func TestParsePushPair(t *testing.T) {
	rsaSigner, ecSigner := rsaKey(t), ecKey(t)
	cert, ecCert := pushCertificate(t, rsaSigner, testTopic), pushCertificate(t, ecSigner, testTopic)
	key := pkcs8(t, rsaSigner)
	pkcs1 := encodePEM("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaSigner.(*rsa.PrivateKey)))
	ecDER, err := x509.MarshalECPrivateKey(ecSigner.(*ecdsa.PrivateKey))
	require.NoError(t, err)
	other := pushCertificate(t, ecKey(t), "")
	for name, test := range map[string]struct {
		data  []byte
		certs int
	}{
		"certificate first":  {join(cert, key), 1},
		"key first":          {join(key, cert), 1},
		"no newline between": {join(bytes.TrimSpace(cert), key), 1},
		"key first, glued":   {join(bytes.TrimSpace(key), cert), 1},
		"PKCS#1":             {join(cert, pkcs1), 1},
		"EC":                 {join(ecCert, encodePEM("EC PARAMETERS", []byte{6, 0}), encodePEM("EC PRIVATE KEY", ecDER)), 1},
		"chain after":        {join(cert, other, key), 2},
		"chain before":       {join(other, cert, key), 2},
		"CRLF and text":      {join([]byte("\xef\xbb\xbfBag Attributes\r\n"), bytes.ReplaceAll(join(cert, key), []byte("\n"), []byte("\r\n"))), 1},
		"BOM":                {join([]byte("\xef\xbb\xbf"), cert, key), 1},
	} {
		t.Run(name, func(t *testing.T) {
			pair, err := ParsePushPair(test.data, testNow)
			require.NoError(t, err)
			require.Equal(t, testTopic, pair.Topic)
			require.Equal(t, pair.Certificate, pair.TLS.Leaf)
			require.Len(t, pair.TLS.Certificate, test.certs)
			require.Equal(t, pair.Certificate.Raw, pair.TLS.Certificate[0])

			again, err := ParsePushPair(join(pair.CertPEM, pair.KeyPEM), testNow)
			require.NoError(t, err, "what is stored can be read again")
			require.Equal(t, pair, again)
		})
	}
}

func TestParsePushPairRefuses(t *testing.T) {
	signer := rsaKey(t)
	cert, key := pushCertificate(t, signer, testTopic), pkcs8(t, signer)
	secret := signer.(*rsa.PrivateKey).D.Bytes()
	mangled := x509.MarshalPKCS1PrivateKey(signer.(*rsa.PrivateKey))[1:]
	procType := pem.EncodeToMemory(&pem.Block{
		Type:    "RSA PRIVATE KEY",
		Headers: map[string]string{"Proc-Type": "4,ENCRYPTED", "DEK-Info": "AES-256-CBC,00"},
		Bytes:   []byte("x"),
	})
	for name, test := range map[string]struct {
		data []byte
		now  time.Time
		want error
	}{
		"nothing":            {nil, testNow, ErrNoCertificate},
		"no certificate":     {key, testNow, ErrNoCertificate},
		"PKCS #12":           {testPFX, testNow, ErrPKCS12},
		"PKCS #12 in BER":    {[]byte("\x30\x80\x02\x01\x03\x30\x80"), testNow, ErrPKCS12},
		"certificate in DER": {pemBytes(t, cert), testNow, ErrDERCertificate},
		"text":               {[]byte("hello"), testNow, ErrNoPEM},
		"no key":             {cert, testNow, ErrNoKey},
		"two keys":           {join(cert, key, key), testNow, ErrSeveralKeys},
		"encrypted PKCS#8":   {join(cert, encodePEM("ENCRYPTED PRIVATE KEY", []byte("x"))), testNow, ErrEncryptedKey},
		"encrypted PKCS#1":   {join(cert, procType), testNow, ErrEncryptedKey},
		"mangled key":        {join(cert, encodePEM("RSA PRIVATE KEY", mangled)), testNow, ErrBadKey},
		"unknown key type":   {join(cert, encodePEM("OPENSSH PRIVATE KEY", []byte("x"))), testNow, ErrBadKey},
		"key mismatch":       {join(cert, pkcs8(t, rsaKey(t))), testNow, ErrKeyMismatch},
		"key of other type":  {join(cert, pkcs8(t, ecKey(t))), testNow, ErrKeyMismatch},
		"no topic":           {join(pushCertificate(t, signer, ""), key), testNow, ErrNoTopic},
		"foreign topic":      {join(pushCertificate(t, signer, "com.example.app"), key), testNow, ErrForeignTopic},
		"only the prefix":    {join(pushCertificate(t, signer, topicPrefix), key), testNow, ErrForeignTopic},
		"expired":            {join(cert, key), testNow.AddDate(1, 0, 0), ErrPushExpired},
		"not yet valid":      {join(cert, key), testNow.AddDate(-1, 0, 0), ErrPushNotYet},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParsePushPair(test.data, test.now)
			require.ErrorIs(t, err, test.want)
			require.NotContains(t, err.Error(), hex.EncodeToString(secret)[:16])
			require.NotContains(t, err.Error(), string(secret[:8]))
		})
	}
	_, err := ParsePushPair(join(encodePEM("CERTIFICATE", []byte("x")), key), testNow)
	require.ErrorContains(t, err, "parsing certificate 1")
}

// testPFX begins as a file of openssl pkcs12 -export.
var testPFX = []byte("\x30\x0d\x02\x01\x03\x30\x08\x06\x06\x2a\x86\x48\x86\xf7\x0d")

func pemBytes(t *testing.T, data []byte) []byte {
	block, _ := pem.Decode(data)
	require.NotNil(t, block)
	return block.Bytes
}

func TestParseCertificates(t *testing.T) {
	one, two := pushCertificate(t, ecKey(t), ""), pushCertificate(t, ecKey(t), testTopic)
	certs, err := ParseCertificates(join([]byte("subject=x\n"), bytes.TrimSpace(one), encodePEM("X509 CRL", []byte("x")), two))
	require.NoError(t, err)
	require.Len(t, certs, 2)
	block, _ := pem.Decode(two)
	require.Equal(t, block.Bytes, certs[1].Raw)

	hash := CertificateHash(certs[0])
	require.Len(t, hash, 64)
	require.Equal(t, strings.ToLower(hash), hash)
	require.NotEqual(t, hash, CertificateHash(certs[1]))

	_, err = ParseCertificates([]byte("hello"))
	require.ErrorIs(t, err, ErrNoCertificate)
	_, err = ParseCertificates(join(one, encodePEM("CERTIFICATE", []byte("x"))))
	require.ErrorContains(t, err, "parsing certificate 2")
}

// TestCertificateHashValue pins the hash of a vector, as sha256sum prints it.
func TestCertificateHashValue(t *testing.T) {
	require.Equal(t, "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
		CertificateHash(&x509.Certificate{Raw: []byte("x")}))
}

func FuzzParsePushPair(f *testing.F) {
	signer := ecKey(f)
	f.Add(join(pushCertificate(f, signer, testTopic), pkcs8(f, signer)))
	f.Add([]byte("-----BEGIN PRIVATE KEY-----\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		pair, err := ParsePushPair(data, testNow)
		if err != nil {
			return
		}
		again, err := ParsePushPair(join(pair.CertPEM, pair.KeyPEM), testNow)
		require.NoError(t, err)
		require.Equal(t, pair.Topic, again.Topic)
	})
}
