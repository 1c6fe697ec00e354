package cryptoutil

import (
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/textinput"
)

// Errors of a push certificate and its key. [ParsePushPair] returns errors that
// match one of these, or [ErrNoCertificate], and never contain key material.
var (
	ErrNoKey         = errors.New("no private key in the PEM data (the certificate and its key go together, in any order)")
	ErrSeveralKeys   = errors.New("more than one private key in the PEM data")
	ErrEncryptedKey  = errors.New("the private key is encrypted; decrypt it first, for example with openssl pkey")
	ErrBadKey        = errors.New("the private key cannot be parsed (PKCS#1, PKCS#8 and EC keys are understood)")
	ErrKeyMismatch   = errors.New("the private key does not belong to the certificate")
	ErrNoTopic       = errors.New("the certificate has no APNs topic (no UID in its subject); is it a push certificate?")
	ErrForeignTopic  = errors.New("the certificate's APNs topic is not for MDM (it must begin with " + topicPrefix + ")")
	ErrPushExpired   = errors.New("the push certificate has expired")
	ErrPushNotYet    = errors.New("the push certificate is not valid yet")
	oidSubjectUserID = asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}
)

// topicPrefix begins the topic of every MDM push certificate that Apple issues.
const topicPrefix = "com.apple.mgmt."

// PushPair is an APNs push certificate with its private key. KeyPEM and TLS
// hold the key: neither may be logged.
type PushPair struct {
	// Topic is the UID of the certificate's subject, which the enrollment
	// profile names too.
	Topic string
	// Certificate is the push certificate itself.
	Certificate *x509.Certificate
	// CertPEM is the certificate, followed by whatever other certificates came
	// with it, re-encoded.
	CertPEM []byte
	// KeyPEM is the unencrypted private key, re-encoded in the form it came.
	KeyPEM []byte
	// TLS is the pair as a TLS client presents it.
	TLS tls.Certificate
}

// ParsePushPair reads a push certificate and its private key from PEM data, in
// any order, with or without a newline between them. The certificate is the one
// that the key belongs to; others are taken for its chain. now decides about
// expiry. The errors are the sentinels of this package.
func ParsePushPair(pemData []byte, now time.Time) (*PushPair, error) {
	certBlocks, keyBlock, err := splitPushPEM(pemData)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(keyBlock)
	if err != nil {
		return nil, err
	}
	pair := &PushPair{KeyPEM: pem.EncodeToMemory(&pem.Block{Type: keyBlock.Type, Bytes: keyBlock.Bytes})}
	pair.TLS.PrivateKey = key
	var chain [][]byte
	for i, der := range certBlocks {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parsing certificate %d: %w", i+1, err)
		}
		if pair.Certificate == nil && samePublicKey(cert.PublicKey, key.Public()) {
			pair.Certificate = cert
			continue
		}
		chain = append(chain, der)
	}
	if pair.Certificate == nil {
		return nil, ErrKeyMismatch
	}
	if pair.Topic, err = PushTopic(pair.Certificate); err != nil {
		return nil, err
	}
	if now.After(pair.Certificate.NotAfter) {
		return nil, fmt.Errorf("%w on %s", ErrPushExpired, pair.Certificate.NotAfter.UTC().Format(time.RFC3339))
	}
	if now.Before(pair.Certificate.NotBefore) {
		return nil, fmt.Errorf("%w: it begins on %s", ErrPushNotYet, pair.Certificate.NotBefore.UTC().Format(time.RFC3339))
	}
	pair.TLS.Leaf = pair.Certificate
	pair.TLS.Certificate = append([][]byte{pair.Certificate.Raw}, chain...)
	for _, der := range pair.TLS.Certificate {
		pair.CertPEM = append(pair.CertPEM, pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})...)
	}
	return pair, nil
}

// splitPushPEM sorts the PEM blocks into certificates and the one key.
func splitPushPEM(pemData []byte) (certs [][]byte, key *pem.Block, err error) {
	blocks := 0
	for block, rest := pem.Decode(textinput.PEM(pemData)); block != nil; block, rest = pem.Decode(rest) {
		blocks++
		switch {
		case block.Type == pemCertificate:
			certs = append(certs, block.Bytes)
		case block.Type == "ENCRYPTED PRIVATE KEY", strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED"):
			return nil, nil, ErrEncryptedKey
		case strings.HasSuffix(block.Type, "PRIVATE KEY") && key != nil:
			return nil, nil, ErrSeveralKeys
		case strings.HasSuffix(block.Type, "PRIVATE KEY"):
			key = block
		}
	}
	switch {
	case blocks == 0:
		return nil, nil, NotPEM(pemData)
	case len(certs) == 0:
		return nil, nil, ErrNoCertificate
	case key == nil:
		return nil, nil, ErrNoKey
	}
	return certs, key, nil
}

// parseKey drops the parser's own error, so that no byte of the key can get
// into a message.
func parseKey(block *pem.Block) (crypto.Signer, error) {
	var key any
	var err error
	switch block.Type {
	case "RSA PRIVATE KEY":
		key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
	case "EC PRIVATE KEY":
		key, err = x509.ParseECPrivateKey(block.Bytes)
	default:
		key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
	}
	signer, ok := key.(crypto.Signer)
	if err != nil || !ok {
		return nil, ErrBadKey
	}
	return signer, nil
}

func samePublicKey(a, b crypto.PublicKey) bool {
	comparable, ok := a.(interface{ Equal(crypto.PublicKey) bool })
	return ok && comparable.Equal(b)
}

// PushTopic returns the APNs topic of a push certificate: the UID
// (0.9.2342.19200300.100.1.1) of its subject. The error is [ErrNoTopic] or
// [ErrForeignTopic].
func PushTopic(cert *x509.Certificate) (string, error) {
	for _, name := range cert.Subject.Names {
		if !name.Type.Equal(oidSubjectUserID) {
			continue
		}
		topic, _ := name.Value.(string)
		if !strings.HasPrefix(topic, topicPrefix) || topic == topicPrefix {
			return "", fmt.Errorf("%w: %q", ErrForeignTopic, topic)
		}
		return topic, nil
	}
	return "", ErrNoTopic
}
