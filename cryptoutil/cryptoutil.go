// Package cryptoutil holds the few cryptographic readings that more than one
// part of the server needs, and nothing else:
//
//   - the Mdm-Signature header of a device ([ParseMdmSignature], [MdmSignature],
//     and [CertificateCache], which spares parsing known certificates again),
//   - the name of a certificate in storage and logs ([CertificateHash]),
//   - certificates in PEM ([ParseCertificates]),
//   - an APNs push certificate with its key ([ParsePushPair], [PushPair],
//     [PushTopic]),
//   - values sealed at rest ([SealKeys]).
//
// What a certificate is worth (chain, validity, revocation) is not decided
// here but in package certverify.
package cryptoutil

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
)

// CertificateHash returns the lower-case hexadecimal SHA-256 of the
// certificate's DER encoding, the form in which a certificate is pinned to an
// enrollment.
func CertificateHash(cert *x509.Certificate) string {
	sum := sha256.Sum256(cert.Raw)
	return hex.EncodeToString(sum[:])
}

// ErrNoCertificate says that PEM input holds no CERTIFICATE block.
var ErrNoCertificate = errors.New("no certificate in the PEM data (expected -----BEGIN CERTIFICATE-----)")

// ParseCertificates reads every CERTIFICATE block of PEM data, in order. Other
// blocks and text between blocks are ignored, as in the bundles operators keep.
// Without any certificate the error is [ErrNoCertificate].
func ParseCertificates(pemData []byte) ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	for block, rest := pem.Decode(separatePEM(pemData)); block != nil; block, rest = pem.Decode(rest) {
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

// separatePEM puts an armour line that was glued to the end of the previous
// one (files concatenated without a final newline) on a line of its own, where
// encoding/pem looks for it. Base64 has no dash, so nothing else can match.
func separatePEM(data []byte) []byte {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	return bytes.ReplaceAll(data, []byte("----------BEGIN "), []byte("-----\n-----BEGIN "))
}
