package cryptoutil

import (
	"bytes"
	"crypto"
	_ "crypto/sha1" // devices sign with it; linked for crypto.SHA1
	_ "crypto/sha256"
	_ "crypto/sha512"
	"crypto/x509"
	"math/big"

	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// Contents of the object identifiers the fast parser knows.
const (
	oidData          = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x01"
	oidSignedData    = "\x2a\x86\x48\x86\xf7\x0d\x01\x07\x02"
	oidContentType   = "\x2a\x86\x48\x86\xf7\x0d\x01\x09\x03"
	oidMessageDigest = "\x2a\x86\x48\x86\xf7\x0d\x01\x09\x04"
	oidSigningTime   = "\x2a\x86\x48\x86\xf7\x0d\x01\x09\x05"

	oidSHA1   = "\x2b\x0e\x03\x02\x1a"
	oidSHA256 = "\x60\x86\x48\x01\x65\x03\x04\x02\x01"
	oidSHA384 = "\x60\x86\x48\x01\x65\x03\x04\x02\x02"
	oidSHA512 = "\x60\x86\x48\x01\x65\x03\x04\x02\x03"

	oidRSA             = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01"
	oidSHA1WithRSA     = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x05"
	oidSHA256WithRSA   = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b"
	oidSHA384WithRSA   = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0c"
	oidSHA512WithRSA   = "\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0d"
	oidECDSAWithSHA1   = "\x2a\x86\x48\xce\x3d\x04\x01"
	oidECDSAWithSHA256 = "\x2a\x86\x48\xce\x3d\x04\x03\x02"
	oidECDSAWithSHA384 = "\x2a\x86\x48\xce\x3d\x04\x03\x03"
	oidECDSAWithSHA512 = "\x2a\x86\x48\xce\x3d\x04\x03\x04"
)

const (
	tagExplicit0 = asn1.Tag(0xa0)
	tagKeyID     = asn1.Tag(0x80)
)

// parseKnownShape reads a DER SignedData of exactly the shape that devices
// send. known is false when any byte is not understood, which is no error: the
// library decides then. Every rule here is at least as strict as the library's,
// which the differential fuzz test holds.
func parseKnownShape(der []byte, parse certificateParser) (m *MdmSignature, known bool, err error) {
	var content, signedData, digests, encapsulated, embedded, signers, signer cryptobyte.String
	var version int
	input := cryptobyte.String(der)
	if !readOnly(&input, &content, asn1.SEQUENCE) || !readOID(&content, oidSignedData) ||
		!readOnly(&content, &content, tagExplicit0) || !readOnly(&content, &signedData, asn1.SEQUENCE) ||
		!signedData.ReadASN1Integer(&version) ||
		!signedData.ReadASN1(&digests, asn1.SET) || !knownDigests(digests) ||
		!signedData.ReadASN1(&encapsulated, asn1.SEQUENCE) || !readOID(&encapsulated, oidData) || !encapsulated.Empty() ||
		!signedData.ReadASN1(&embedded, tagExplicit0) ||
		!readOnly(&signedData, &signers, asn1.SET) || !readOnly(&signers, &signer, asn1.SEQUENCE) {
		return nil, false, nil
	}
	m = &MdmSignature{}
	var id signerID
	if !signer.ReadASN1Integer(&version) || !id.read(&signer) || !m.readSignature(&signer) {
		return nil, false, nil
	}
	for !embedded.Empty() {
		var element cryptobyte.String
		if !embedded.ReadASN1Element(&element, asn1.SEQUENCE) {
			return nil, false, nil
		}
		cert, err := parse(element)
		if err != nil {
			return nil, true, err
		}
		if m.signer == nil && id.names(cert) {
			m.signer = cert
		} else {
			m.chain = append(m.chain, cert)
		}
	}
	if m.signer == nil {
		return nil, true, errNoSignerCertificate
	}
	return m, true, nil
}

// countEmbedded counts the certificates of a DER SignedData without parsing them,
// as far as its shape is known.
func countEmbedded(der []byte) int {
	var content, signedData, embedded cryptobyte.String
	input := cryptobyte.String(der)
	if !readOnly(&input, &content, asn1.SEQUENCE) || !readOID(&content, oidSignedData) ||
		!readOnly(&content, &content, tagExplicit0) || !readOnly(&content, &signedData, asn1.SEQUENCE) ||
		!signedData.SkipASN1(asn1.INTEGER) || !signedData.SkipASN1(asn1.SET) || !signedData.SkipASN1(asn1.SEQUENCE) ||
		!signedData.ReadASN1(&embedded, tagExplicit0) {
		return 0
	}
	n := 0
	for ; !embedded.Empty(); n++ {
		var tag asn1.Tag
		var element cryptobyte.String
		if !embedded.ReadAnyASN1(&element, &tag) {
			return n
		}
	}
	return n
}

// readOnly reads an element of the given tag that is all of s. s and out may be
// the same.
func readOnly(s, out *cryptobyte.String, tag asn1.Tag) bool {
	var contents cryptobyte.String
	if !s.ReadASN1(&contents, tag) || !s.Empty() {
		return false
	}
	*out = contents
	return true
}

func readOID(s *cryptobyte.String, want string) bool {
	var oid cryptobyte.String
	return s.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) && string(oid) == want
}

// readAlgorithm reads an AlgorithmIdentifier whose parameters are absent or NULL.
func readAlgorithm(s *cryptobyte.String) (oid []byte, ok bool) {
	var sequence, id, null cryptobyte.String
	ok = s.ReadASN1(&sequence, asn1.SEQUENCE) && sequence.ReadASN1(&id, asn1.OBJECT_IDENTIFIER) &&
		(sequence.Empty() || readOnly(&sequence, &null, asn1.NULL) && null.Empty())
	return id, ok
}

func knownDigests(set cryptobyte.String) bool {
	for !set.Empty() {
		oid, ok := readAlgorithm(&set)
		if !ok || digestHash(oid) == 0 {
			return false
		}
	}
	return true
}

func digestHash(oid []byte) crypto.Hash {
	switch string(oid) {
	case oidSHA1:
		return crypto.SHA1
	case oidSHA256:
		return crypto.SHA256
	case oidSHA384:
		return crypto.SHA384
	case oidSHA512:
		return crypto.SHA512
	}
	return 0
}

// signatureAlgorithm knows the pairs in which both identifiers agree on the hash.
func signatureAlgorithm(oid []byte, hash crypto.Hash) x509.SignatureAlgorithm {
	var rsa, ecdsa x509.SignatureAlgorithm
	var rsaOID, ecdsaOID string
	switch hash {
	case crypto.SHA1:
		rsa, rsaOID, ecdsa, ecdsaOID = x509.SHA1WithRSA, oidSHA1WithRSA, x509.ECDSAWithSHA1, oidECDSAWithSHA1
	case crypto.SHA256:
		rsa, rsaOID, ecdsa, ecdsaOID = x509.SHA256WithRSA, oidSHA256WithRSA, x509.ECDSAWithSHA256, oidECDSAWithSHA256
	case crypto.SHA384:
		rsa, rsaOID, ecdsa, ecdsaOID = x509.SHA384WithRSA, oidSHA384WithRSA, x509.ECDSAWithSHA384, oidECDSAWithSHA384
	case crypto.SHA512:
		rsa, rsaOID, ecdsa, ecdsaOID = x509.SHA512WithRSA, oidSHA512WithRSA, x509.ECDSAWithSHA512, oidECDSAWithSHA512
	}
	switch string(oid) {
	case oidRSA, rsaOID:
		return rsa
	case ecdsaOID:
		return ecdsa
	}
	return x509.UnknownSignatureAlgorithm
}

// signerID is a SignerIdentifier: issuer and serial, or a subject key id.
type signerID struct {
	issuer []byte
	serial big.Int
	keyID  []byte
}

func (id *signerID) read(s *cryptobyte.String) bool {
	var sequence, issuer, keyID cryptobyte.String
	if s.PeekASN1Tag(tagKeyID) {
		ok := s.ReadASN1(&keyID, tagKeyID) && len(keyID) > 0
		id.keyID = keyID
		return ok
	}
	ok := s.ReadASN1(&sequence, asn1.SEQUENCE) && sequence.ReadASN1Element(&issuer, asn1.SEQUENCE) &&
		sequence.ReadASN1Integer(&id.serial) && sequence.Empty()
	id.issuer = issuer
	return ok
}

func (id *signerID) names(cert *x509.Certificate) bool {
	if id.keyID != nil {
		return bytes.Equal(id.keyID, cert.SubjectKeyId)
	}
	return id.serial.Cmp(cert.SerialNumber) == 0 && bytes.Equal(id.issuer, cert.RawIssuer)
}

// readSignature reads the rest of a SignerInfo, from its digest algorithm on,
// without unsigned attributes.
func (m *MdmSignature) readSignature(s *cryptobyte.String) bool {
	var attributes, signature cryptobyte.String
	digestOID, ok := readAlgorithm(s)
	if !ok {
		return false
	}
	if m.digestHash = digestHash(digestOID); m.digestHash == 0 {
		return false
	}
	if s.PeekASN1Tag(tagExplicit0) {
		if !s.ReadASN1Element(&attributes, tagExplicit0) || !m.readAttributes(attributes) {
			return false
		}
	}
	signatureOID, ok := readAlgorithm(s)
	if !ok {
		return false
	}
	m.algorithm = signatureAlgorithm(signatureOID, m.digestHash)
	if m.algorithm == x509.UnknownSignatureAlgorithm || !readOnly(s, &signature, asn1.OCTET_STRING) {
		return false
	}
	m.signature = signature
	return true
}

// readAttributes reads signed attributes that are in DER's order, so that the
// bytes as sent are the bytes that were signed.
func (m *MdmSignature) readAttributes(element cryptobyte.String) bool {
	var set, previous, attribute, value cryptobyte.String
	tagged := element
	if !readOnly(&tagged, &set, tagExplicit0) {
		return false
	}
	contentTypes, digests := 0, 0
	for !set.Empty() {
		var oid cryptobyte.String
		if !set.ReadASN1Element(&attribute, asn1.SEQUENCE) || bytes.Compare(previous, attribute) >= 0 {
			return false
		}
		previous = attribute
		if !readOnly(&attribute, &attribute, asn1.SEQUENCE) || !wellFormedOID(attribute) ||
			!attribute.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) || !readOnly(&attribute, &value, asn1.SET) {
			return false
		}
		switch string(oid) {
		case oidContentType:
			contentTypes++
			if !readOID(&value, oidData) || !value.Empty() {
				return false
			}
		case oidMessageDigest:
			digests++
			var digest cryptobyte.String
			if !readOnly(&value, &digest, asn1.OCTET_STRING) {
				return false
			}
			m.digest = digest
		}
	}
	if contentTypes != 1 || digests != 1 {
		return false
	}
	m.attributes = bytes.Clone(element)
	m.attributes[0] = byte(asn1.SET) // RFC 5652, 5.4: signed with the explicit SET OF tag
	return true
}

// wellFormedOID says whether an object identifier comes next whose numbers are
// minimally encoded and of at most four bytes, as any parser accepts.
func wellFormedOID(s cryptobyte.String) bool {
	var oid cryptobyte.String
	if !s.ReadASN1(&oid, asn1.OBJECT_IDENTIFIER) || len(oid) == 0 || oid[len(oid)-1] >= 0x80 {
		return false
	}
	length := 0
	for _, b := range oid {
		if length == 0 && b == 0x80 || length == 4 {
			return false
		}
		if length++; b < 0x80 {
			length = 0
		}
	}
	return true
}
