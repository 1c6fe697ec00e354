// Package cryptoutil holds the few cryptographic readings that more than one
// part of the server needs, and nothing else:
//
//   - the Mdm-Signature header of a device ([ParseMdmSignature], [MdmSignature],
//     and [CertificateCache], which spares parsing known certificates again),
//   - the name of a certificate in storage and logs ([CertificateHash]),
//   - certificates in PEM ([ParseCertificates]), and what other data is ([NotPEM]),
//   - an APNs push certificate with its key ([ParsePushPair], [PushPair],
//     [PushTopic]),
//   - values sealed at rest ([SealKeys]).
//
// Package certverify decides whether a certificate is valid (chain, time,
// revocation).
package cryptoutil

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"

	"github.com/nanomdm/nanomdm/textinput"
)

// CertificateHash returns the lower-case hexadecimal SHA-256 of the
// certificate's DER encoding, the form in which a certificate is pinned to an
// enrollment.
func CertificateHash(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// Errors of [NotPEM]. Their text says how to convert the data.
var (
	ErrPKCS12         = errors.New("the data is PKCS #12, not PEM: convert it with openssl pkcs12 -in FILE.p12 -nodes -out FILE.pem (OpenSSL 3 may need -legacy, too)")
	ErrDERCertificate = errors.New("the data is a certificate in DER, not PEM: convert it with openssl x509 -inform der -in FILE.cer -out FILE.pem")
	ErrNoPEM          = fmt.Errorf("%w: the data holds no PEM block at all", ErrNoCertificate)
)

// ErrNoCertificate says that PEM input holds no CERTIFICATE block.
var ErrNoCertificate = errors.New("no certificate in the PEM data (expected -----BEGIN CERTIFICATE-----)")

// ParseCertificates reads every CERTIFICATE block of PEM data, in order. Other
// blocks and text between blocks are ignored, as in the bundles operators keep.
// Without any certificate the error is [ErrNoCertificate].
func ParseCertificates(pemData []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for block, rest := pem.Decode(textinput.PEM(pemData)); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != pemCertificate {
			continue
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parsing certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, ErrNoCertificate
	}
	return certs, nil
}

const pemCertificate = "CERTIFICATE"

// NotPEM explains PEM data without a block: the error is [ErrPKCS12],
// [ErrDERCertificate] or [ErrNoPEM]. It is nil if there is a block.
func NotPEM(data []byte) error {
	if block, _ := pem.Decode(textinput.PEM(data)); block != nil {
		return nil
	}
	if _, err := x509.ParseCertificate(data); err == nil {
		return ErrDERCertificate
	}
	if isPKCS12(data) {
		return ErrPKCS12
	}
	return ErrNoPEM
}

// isPKCS12 reports whether data begins as a PFX of RFC 7292, section 4: a
// sequence whose first element is the version 3.
func isPKCS12(data []byte) bool {
	input := cryptobyte.String(data)
	var pfx cryptobyte.String
	var version int
	if !input.ReadASN1(&pfx, asn1.SEQUENCE) { // BER of indefinite length
		return bytes.HasPrefix(data, []byte{0x30, 0x80, 0x02, 0x01, 0x03, 0x30})
	}
	return pfx.ReadASN1Integer(&version) && version == 3
}
