package mdmtest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"time"
)

// The files that Save writes.
const (
	caCertFile = "ca.pem"
	caKeyFile  = "ca.key"
)

// CA issues identities for simulated devices. It is safe for concurrent use.
type CA struct {
	cert  *x509.Certificate
	key   *ecdsa.PrivateKey
	chain []*x509.Certificate // this CA and those above it, without the root
}

// Identity is a certificate with its private key.
type Identity struct {
	Cert *x509.Certificate
	Key  crypto.Signer
	// Chain holds the intermediates between Cert and the root, if any.
	Chain []*x509.Certificate
}

// NewCA makes a root CA that is valid for ten years.
func NewCA() (*CA, error) {
	return newCA("Simulated Device CA", nil)
}

// Intermediate makes a CA that this one has certified.
func (ca *CA) Intermediate() (*CA, error) {
	return newCA("Simulated Device Intermediate CA", ca)
}

func newCA(commonName string, parent *CA) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making a CA key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	template := &x509.Certificate{
		SerialNumber: serial,
		// The serial number keeps the names of two CAs apart, and with them
		// the issuers of their certificates.
		Subject:               pkix.Name{CommonName: commonName, SerialNumber: serial.Text(16)},
		NotBefore:             now.Add(-time.Hour),
		NotAfter:              now.AddDate(10, 0, 0),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	issuer, issuerKey := template, key
	if parent != nil {
		issuer, issuerKey = parent.cert, parent.key
	}
	cert, err := createCertificate(template, issuer, &key.PublicKey, issuerKey)
	if err != nil {
		return nil, err
	}
	ca := &CA{cert: cert, key: key}
	if parent != nil {
		ca.chain = append([]*x509.Certificate{cert}, parent.chain...)
	}
	return ca, nil
}

// LoadCA reads the CA that Save wrote into dir. The error is fs.ErrNotExist
// if there is none.
func LoadCA(dir string) (*CA, error) {
	certPEM, err := os.ReadFile(filepath.Join(dir, caCertFile))
	if err != nil {
		return nil, fmt.Errorf("reading the CA: %w", err)
	}
	keyPEM, err := os.ReadFile(filepath.Join(dir, caKeyFile))
	if err != nil {
		return nil, fmt.Errorf("reading the CA: %w", err)
	}
	pair, err := tls.X509KeyPair(certPEM, keyPEM)
	if err != nil {
		return nil, fmt.Errorf("reading the CA in %s: %w", dir, err)
	}
	key, ok := pair.PrivateKey.(*ecdsa.PrivateKey)
	if !ok || !pair.Leaf.IsCA {
		return nil, fmt.Errorf("reading the CA in %s: not a CA made by Save", dir)
	}
	return &CA{cert: pair.Leaf, key: key}, nil
}

// Save writes a root CA to dir, which it makes if need be: ca.pem for the
// server's -ca, and ca.key, readable by the owner only, for LoadCA.
func (ca *CA) Save(dir string) error {
	if len(ca.chain) > 0 {
		return errors.New("saving the CA: only a root can be saved")
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("saving the CA: %w", err)
	}
	keyPEM, err := marshalKey(ca.key)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, caKeyFile), keyPEM, 0o600); err != nil {
		return fmt.Errorf("saving the CA: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, caCertFile), ca.PEM(), 0o644); err != nil {
		return fmt.Errorf("saving the CA: %w", err)
	}
	return nil
}

// Cert is the CA's own certificate.
func (ca *CA) Cert() *x509.Certificate { return ca.cert }

// PEM is the CA's own certificate, as the server's -ca (or, for an
// intermediate, its -intermediate) takes it.
func (ca *CA) PEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})
}

// Pool holds this CA's certificate alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// IssueOption changes what Issue makes.
type IssueOption func(*issueRequest)

type issueRequest struct {
	template *x509.Certificate
	rsaBits  int
}

// WithRSA asks for an RSA key of 2,048 bits, which takes a thousand times
// longer to make than the default, ECDSA on P-256.
func WithRSA() IssueOption {
	return func(r *issueRequest) { r.rsaBits = 2048 }
}

// WithValidity sets both ends; the default is an hour ago and a year ahead.
func WithValidity(notBefore, notAfter time.Time) IssueOption {
	return func(r *issueRequest) {
		r.template.NotBefore, r.template.NotAfter = notBefore, notAfter
	}
}

// WithExtKeyUsage replaces the default, client authentication. Without
// arguments the certificate has no extended key usage.
func WithExtKeyUsage(usage ...x509.ExtKeyUsage) IssueOption {
	return func(r *issueRequest) { r.template.ExtKeyUsage = usage }
}

// WithHosts adds names and IP addresses, for a server's certificate.
func WithHosts(hosts ...string) IssueOption {
	return func(r *issueRequest) {
		for _, host := range hosts {
			if ip := net.ParseIP(host); ip != nil {
				r.template.IPAddresses = append(r.template.IPAddresses, ip)
			} else {
				r.template.DNSNames = append(r.template.DNSNames, host)
			}
		}
	}
}

// WithPushTopic puts an APNs topic where an MDM push certificate has it, in
// the subject's user ID (RFC 4519, 2.39).
func WithPushTopic(topic string) IssueOption {
	userID := asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}
	return func(r *issueRequest) {
		r.template.Subject.ExtraNames = append(r.template.Subject.ExtraNames,
			pkix.AttributeTypeAndValue{Type: userID, Value: topic})
	}
}

// Issue makes a key and certifies it.
func (ca *CA) Issue(commonName string, options ...IssueOption) (*Identity, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	request := &issueRequest{template: &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: commonName},
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.AddDate(1, 0, 0),
		KeyUsage:     x509.KeyUsageDigitalSignature,
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}}
	for _, option := range options {
		option(request)
	}
	key, err := newKey(request.rsaBits)
	if err != nil {
		return nil, fmt.Errorf("making a key: %w", err)
	}
	cert, err := createCertificate(request.template, ca.cert, key.Public(), ca.key)
	if err != nil {
		return nil, err
	}
	return &Identity{Cert: cert, Key: key, Chain: ca.chain}, nil
}

// TLS is the identity as crypto/tls takes it, with its intermediates.
func (id *Identity) TLS() tls.Certificate {
	raw := [][]byte{id.Cert.Raw}
	for _, cert := range id.Chain {
		raw = append(raw, cert.Raw)
	}
	return tls.Certificate{Certificate: raw, PrivateKey: id.Key, Leaf: id.Cert}
}

// PEM is the certificate followed by the unencrypted private key.
func (id *Identity) PEM() ([]byte, error) {
	keyPEM, err := marshalKey(id.Key)
	if err != nil {
		return nil, err
	}
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: id.Cert.Raw}), keyPEM...), nil
}

// ParseIdentities reads any number of identities, each as PEM writes it.
func ParseIdentities(data []byte) ([]*Identity, error) {
	var identities []*Identity
	for len(bytes.TrimSpace(data)) > 0 {
		certBlock, rest := pem.Decode(data)
		if certBlock == nil {
			return nil, errors.New("reading identities: not PEM")
		}
		keyBlock, rest := pem.Decode(rest)
		if keyBlock == nil {
			return nil, errors.New("reading identities: a key is missing")
		}
		data = rest
		cert, err := x509.ParseCertificate(certBlock.Bytes)
		if err != nil {
			return nil, fmt.Errorf("reading identities: %w", err)
		}
		key, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
		if err != nil {
			// Not wrapped: the error might quote the key.
			return nil, errors.New("reading identities: a key cannot be read")
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, errors.New("reading identities: a key cannot sign")
		}
		identities = append(identities, &Identity{Cert: cert, Key: signer})
	}
	return identities, nil
}

func newKey(rsaBits int) (crypto.Signer, error) {
	if rsaBits > 0 {
		return rsa.GenerateKey(rand.Reader, rsaBits)
	}
	return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
}

func newSerial() (*big.Int, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 126))
	if err != nil {
		return nil, fmt.Errorf("making a serial number: %w", err)
	}
	return serial.Add(serial, big.NewInt(1)), nil // zero is not allowed
}

func createCertificate(template, parent *x509.Certificate, public any, signer crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, template, parent, public, signer)
	if err != nil {
		return nil, fmt.Errorf("issuing a certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("issuing a certificate: %w", err)
	}
	return cert, nil
}

func marshalKey(key crypto.Signer) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encoding a private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
