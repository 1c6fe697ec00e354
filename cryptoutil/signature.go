package cryptoutil

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/smallstep/pkcs7"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Errors of an Mdm-Signature.
var (
	// ErrSignatureMalformed says that the header is not one detached CMS
	// signature with its signer's certificate.
	ErrSignatureMalformed = errors.New("malformed Mdm-Signature")
	// ErrSignatureInvalid says that the signature is not the signer's over this
	// body.
	ErrSignatureInvalid = errors.New("Mdm-Signature does not match the body")
)

// maxSignatureHeader bounds the header in bytes. Devices send about 2 KB for
// each certificate they include.
const maxSignatureHeader = 16 << 10

// maxEmbedded bounds the certificates in a signature: each is parsed before
// anything about its sender is known.
const maxEmbedded = 9

// MdmSignature is a parsed Mdm-Signature header: a detached CMS SignedData
// (RFC 5652) of one signer over the bytes of the request body. It is immutable
// and may be used concurrently.
type MdmSignature struct {
	signer *x509.Certificate
	chain  []*x509.Certificate

	// Either the parts of a signature whose every byte the fast parser knows,
	algorithm  x509.SignatureAlgorithm
	digestHash crypto.Hash
	signature  []byte
	attributes []byte // the DER SET that was signed; nil: the body itself was
	digest     []byte // the messageDigest attribute
	// or the library's reading of it.
	library *pkcs7.PKCS7
}

// Certificate returns the certificate whose key is claimed to have signed. It
// is worth nothing until its chain is verified and Verify has succeeded.
func (m *MdmSignature) Certificate() *x509.Certificate { return m.signer }

// Chain returns the other certificates that came with the signature.
func (m *MdmSignature) Chain() []*x509.Certificate { return m.chain }

// ParseMdmSignature reads the value of an Mdm-Signature header: standard Base64,
// white space ignored, of a CMS SignedData in BER or DER, detached, with exactly
// one signer whose certificate is included. Size and nesting are bounded before
// any recursive parser runs. The error matches [ErrSignatureMalformed].
//
// The parsing is apart from [MdmSignature.Verify] so that the signer's chain can
// be checked before the body is read.
//
// Common shapes are read by a small parser of our own; any other shape gets the
// verdict of github.com/smallstep/pkcs7. The own parser accepts nothing that the
// library refuses, except where said at Verify, and signers that are named by
// subject key identifier instead of issuer and serial number, which the library
// does not know.
//
// Source: Apple, "Managing certificates for MDM servers and devices", on the
// SignMessage key.
func ParseMdmSignature(header string) (*MdmSignature, error) {
	return parseMdmSignature(header, x509.ParseCertificate)
}

type certificateParser func(der []byte) (*x509.Certificate, error)

func parseMdmSignature(header string, parse certificateParser) (*MdmSignature, error) {
	if len(header) > maxSignatureHeader {
		return nil, fmt.Errorf("%w: longer than %d bytes", ErrSignatureMalformed, maxSignatureHeader)
	}
	raw, err := base64.StdEncoding.DecodeString(stripSpace(header))
	if err != nil {
		return nil, fmt.Errorf("%w: not Base64", ErrSignatureMalformed)
	}
	der, err := normalizeBER(raw)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSignatureMalformed, err)
	}
	if countEmbedded(der) > maxEmbedded {
		return nil, fmt.Errorf("%w: more than %d certificates", ErrSignatureMalformed, maxEmbedded)
	}
	m, known, err := parseKnownShape(der, parse)
	if err == nil && !known {
		m, err = parseWithLibrary(der)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSignatureMalformed, err)
	}
	return m, nil
}

func stripSpace(s string) string {
	if !strings.ContainsAny(s, " \t\r\n") {
		return s
	}
	return strings.NewReplacer(" ", "", "\t", "", "\r", "", "\n", "").Replace(s)
}

// Verify checks that the signer's key signed body, which must be the raw bytes
// of the request. The error matches [ErrSignatureInvalid].
//
// When the signature has signed attributes, messageDigest and contentType must
// each occur once and fit. The signingTime attribute is not looked at here, only by
// [MdmSignature.SigningTime]: it is the device's own clock, which may be wrong, and
// package certverify compares the certificate's validity with ours. (The library
// refuses a signingTime outside the certificate's validity; here alone it is not
// followed.)
func (m *MdmSignature) Verify(body []byte) error {
	if !m.hasAttributes() && isAttributeSet(body) {
		// The signature of attributes over some message is also a signature
		// without attributes over the attributes' encoding (RFC 5652, section
		// 11, RFC 8933). No device sends a body that is an ASN.1 SET.
		return fmt.Errorf("%w: the body is an encoding of CMS attributes", ErrSignatureInvalid)
	}
	if m.library != nil {
		return m.verifyWithLibrary(body)
	}
	signed := body
	if m.attributes != nil {
		h := m.digestHash.New()
		h.Write(body)
		if !bytes.Equal(h.Sum(nil), m.digest) {
			return fmt.Errorf("%w: message digest differs", ErrSignatureInvalid)
		}
		signed = m.attributes
	}
	if err := m.signer.CheckSignature(m.algorithm, signed, m.signature); err != nil {
		return fmt.Errorf("%w: %w", ErrSignatureInvalid, err)
	}
	return nil
}

// SigningTime returns the signing time in the signed attributes, if there is one
// (RFC 5652, 11.3). Like all of a signature it is worth nothing before Verify has
// succeeded, and then it is the word of the device's clock.
func (m *MdmSignature) SigningTime() (at time.Time, ok bool) {
	if m.library != nil {
		for _, attr := range m.library.Signers[0].AuthenticatedAttributes {
			if attr.Type.Equal(pkcs7.OIDAttributeSigningTime) {
				if ok { // twice: which one counts?
					return time.Time{}, false
				}
				at, ok = readTime(attr.Value.Bytes)
			}
		}
		return at, ok
	}
	var set cryptobyte.String
	if attributes := cryptobyte.String(m.attributes); !attributes.ReadASN1(&set, asn1.SET) {
		return time.Time{}, false
	}
	for !set.Empty() {
		var attribute, oid, value cryptobyte.String
		if !set.ReadASN1(&attribute, asn1.SEQUENCE) || !attribute.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) ||
			!attribute.ReadASN1(&value, asn1.SET) {
			return time.Time{}, false
		}
		if string(oid) == oidSigningTime {
			if ok {
				return time.Time{}, false
			}
			at, ok = readTime(value)
		}
	}
	return at, ok
}

// readTime reads one UTCTime or GeneralizedTime.
func readTime(s cryptobyte.String) (t time.Time, ok bool) {
	if s.PeekASN1Tag(asn1.UTCTime) {
		ok = s.ReadASN1UTCTime(&t)
	} else {
		ok = s.ReadASN1GeneralizedTime(&t)
	}
	return t, ok && s.Empty()
}

func (m *MdmSignature) hasAttributes() bool {
	if m.library != nil {
		return len(m.library.Signers[0].AuthenticatedAttributes) > 0
	}
	return m.attributes != nil
}

func isAttributeSet(body []byte) bool {
	s := cryptobyte.String(body)
	return s.SkipASN1(asn1.SET) && s.Empty()
}

// parseWithLibrary takes der, whose nesting is bounded, to the library.
func parseWithLibrary(der []byte) (*MdmSignature, error) {
	p7, err := pkcs7.Parse(der)
	if err != nil {
		return nil, err
	}
	if len(p7.Signers) != 1 {
		return nil, fmt.Errorf("%d signers, want 1", len(p7.Signers))
	}
	if len(p7.Content) > 0 {
		return nil, errors.New("the signature is not detached")
	}
	m := &MdmSignature{library: p7, signer: p7.GetOnlySigner()}
	if m.signer == nil {
		return nil, errNoSignerCertificate
	}
	for _, cert := range p7.Certificates {
		if cert != m.signer {
			m.chain = append(m.chain, cert)
		}
	}
	return m, nil
}

var errNoSignerCertificate = errors.New("the signer's certificate is not included")

func (m *MdmSignature) verifyWithLibrary(body []byte) error {
	if err := m.checkLibraryAttributes(); err != nil {
		return fmt.Errorf("%w: %w", ErrSignatureInvalid, err)
	}
	// The library compares signingTime with the validity of the signer's
	// certificate: give it one that was always valid.
	ageless := *m.signer
	ageless.NotBefore = time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC)
	ageless.NotAfter = time.Date(10001, 1, 1, 0, 0, 0, 0, time.UTC)
	p7 := *m.library
	p7.Content = body
	p7.Certificates = []*x509.Certificate{&ageless}
	if err := p7.Verify(); err != nil {
		return fmt.Errorf("%w: %w", ErrSignatureInvalid, err)
	}
	return nil
}

// checkLibraryAttributes adds what RFC 5652 asks of signed attributes and the
// library does not check.
func (m *MdmSignature) checkLibraryAttributes() error {
	if !m.hasAttributes() {
		return nil
	}
	contentTypes, digests := 0, 0
	for _, attr := range m.library.Signers[0].AuthenticatedAttributes {
		switch value := cryptobyte.String(attr.Value.Bytes); {
		case attr.Type.Equal(pkcs7.OIDAttributeContentType):
			contentTypes++
			if !readOID(&value, oidData) || !value.Empty() {
				return errors.New("contentType attribute is not data")
			}
		case attr.Type.Equal(pkcs7.OIDAttributeMessageDigest):
			digests++
			if !value.SkipASN1(asn1.OCTET_STRING) || !value.Empty() {
				return errors.New("messageDigest attribute does not have one value")
			}
		}
	}
	if contentTypes != 1 || digests != 1 {
		return errors.New("signed attributes need one contentType and one messageDigest")
	}
	return nil
}
