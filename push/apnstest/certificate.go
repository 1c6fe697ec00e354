package apnstest

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"time"
)

// oidUserID is the subject attribute that holds a push certificate's topic
// (RFC 4519, uid).
var oidUserID = asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}

// authority issues the server's certificate and the push certificates.
type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// NewCA makes an authority for [Config].CA, good for ten years, to be kept
// over several servers.
func NewCA() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("apnstest: making the authority: %w", err)
	}
	tmpl := template(pkix.Name{CommonName: "Fake APNs Authority"}, 10)
	tmpl.IsCA = true
	tmpl.BasicConstraintsValid = true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageCRLSign
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("apnstest: making the authority: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, nil
}

// newAuthority uses ca, or makes a new one if that is the zero value.
func newAuthority(ca tls.Certificate) (*authority, error) {
	if len(ca.Certificate) == 0 {
		var err error
		if ca, err = NewCA(); err != nil {
			return nil, err
		}
	}
	cert, err := x509.ParseCertificate(ca.Certificate[0])
	if err != nil {
		return nil, fmt.Errorf("apnstest: Config.CA: %w", err)
	}
	key, ok := ca.PrivateKey.(crypto.Signer)
	if !ok {
		return nil, errors.New("apnstest: Config.CA: no private key that signs")
	}
	if !cert.IsCA {
		return nil, errors.New("apnstest: Config.CA: not the certificate of an authority")
	}
	return &authority{cert: cert, key: key}, nil
}

// template returns the part that all certificates share.
func template(name pkix.Name, years int) *x509.Certificate {
	var serial [16]byte
	rand.Read(serial[:]) // never fails
	now := time.Now()
	return &x509.Certificate{
		SerialNumber: new(big.Int).SetBytes(serial[:]),
		Subject:      name,
		NotBefore:    now.Add(-time.Hour),
		NotAfter:     now.AddDate(years, 0, 0),
	}
}

func (a *authority) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(a.cert)
	return pool
}

func (a *authority) issue(tmpl *x509.Certificate) (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		return tls.Certificate{}, err
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return tls.Certificate{}, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}, nil
}

func (a *authority) serverCertificate(hosts []string) (tls.Certificate, error) {
	tmpl := template(pkix.Name{CommonName: "Fake APNs"}, 1)
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, h := range hosts {
		if ip := net.ParseIP(h); ip != nil {
			tmpl.IPAddresses = append(tmpl.IPAddresses, ip)
		} else {
			tmpl.DNSNames = append(tmpl.DNSNames, h)
		}
	}
	return a.issue(tmpl)
}

// RootCAs returns the pool that verifies the server.
func (s *Server) RootCAs() *x509.CertPool { return s.ca.pool() }

// CAPEM returns the certificate that verifies the server, in PEM.
func (s *Server) CAPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.ca.cert.Raw})
}

// ClientCertificate issues a push certificate for topic with a key of its
// own, good for a year, as identity.apple.com would.
func (s *Server) ClientCertificate(topic string) (tls.Certificate, error) {
	tmpl := template(pkix.Name{
		CommonName: "APSP:" + topic,
		ExtraNames: []pkix.AttributeTypeAndValue{{Type: oidUserID, Value: topic}},
	}, 1)
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	cert, err := s.ca.issue(tmpl)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("apnstest: issuing a push certificate: %w", err)
	}
	return cert, nil
}

// PushCertificate is [Server.ClientCertificate] in PEM, the key as PKCS #8.
func (s *Server) PushCertificate(topic string) (certPEM, keyPEM []byte, err error) {
	cert, err := s.ClientCertificate(topic)
	if err != nil {
		return nil, nil, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		return nil, nil, fmt.Errorf("apnstest: encoding the key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Certificate[0]}),
		pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), nil
}

// certificateTopic returns the topic of a push certificate, or "".
func certificateTopic(cert *x509.Certificate) string {
	for _, atv := range cert.Subject.Names {
		if atv.Type.Equal(oidUserID) {
			topic, _ := atv.Value.(string)
			return topic
		}
	}
	return ""
}
