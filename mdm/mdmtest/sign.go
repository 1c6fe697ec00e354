package mdmtest

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	_ "crypto/sha1" // old devices sign with it
	_ "crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"time"
)

// SignOptions chooses the form of a signature. The zero value is what costs
// least to make: SHA-256, no signed attributes, DER.
type SignOptions struct {
	// Hash is crypto.SHA1 or crypto.SHA256; zero is SHA-256.
	Hash crypto.Hash
	// SignedAttributes signs content type, digest and signing time instead
	// of the body itself.
	SignedAttributes bool
	// SigningTime is the time in the signed attributes; zero is now.
	SigningTime time.Time
	// Indefinite writes the outer structures with indefinite length (BER),
	// as Apple's own library does.
	Indefinite bool
	// WithChain embeds the identity's intermediates beside its certificate.
	WithChain bool
	// CoSigner signs as well. No device has a second signer: it is there to
	// be refused.
	CoSigner *Identity
}

// AppleSign is the form that was seen from real devices: BER with SHA-1 and
// without signed attributes.
func AppleSign() SignOptions {
	return SignOptions{Hash: crypto.SHA1, Indefinite: true}
}

// Sign makes the value of an Mdm-Signature header: the Base64 of a detached
// CMS SignedData (RFC 5652) over body, with the signer's certificate in it.
func Sign(id *Identity, body []byte, options SignOptions) (string, error) {
	signature, err := signCMS(id, body, options)
	if err != nil {
		return "", fmt.Errorf("signing a request: %w", err)
	}
	return base64.StdEncoding.EncodeToString(signature), nil
}

const (
	tagInteger     = 0x02
	tagOctetString = 0x04
	tagSequence    = 0x30
	tagSet         = 0x31
	tagContext0    = 0xa0
)

func derNull() []byte { return []byte{0x05, 0x00} }

func oid(arcs ...int) []byte {
	der, err := asn1.Marshal(asn1.ObjectIdentifier(arcs))
	if err != nil {
		panic(err) // the arcs are constants of this file
	}
	return der
}

// der writes one element with its definite length.
func der(tag byte, parts ...[]byte) []byte {
	length := 0
	for _, part := range parts {
		length += len(part)
	}
	out := make([]byte, 0, length+6)
	out = append(out, tag)
	switch {
	case length < 0x80:
		out = append(out, byte(length))
	case length < 0x100:
		out = append(out, 0x81, byte(length))
	case length < 0x10000:
		out = append(out, 0x82, byte(length>>8), byte(length))
	default:
		out = append(out, 0x84, byte(length>>24), byte(length>>16), byte(length>>8), byte(length))
	}
	for _, part := range parts {
		out = append(out, part...)
	}
	return out
}

// ber writes one constructed element of indefinite length.
func ber(tag byte, parts ...[]byte) []byte {
	out := append([]byte{tag, 0x80}, slices.Concat(parts...)...)
	return append(out, 0x00, 0x00)
}

func signCMS(id *Identity, body []byte, options SignOptions) ([]byte, error) {
	if options.Hash == 0 {
		options.Hash = crypto.SHA256
	}
	digestAlgorithm, err := digestAlgorithm(options.Hash)
	if err != nil {
		return nil, err
	}
	signers := []*Identity{id}
	if options.CoSigner != nil {
		signers = append(signers, options.CoSigner)
	}
	var certs, infos [][]byte
	for _, signer := range signers {
		info, err := signerInfo(signer, body, digestAlgorithm, options)
		if err != nil {
			return nil, err
		}
		infos = append(infos, info)
		certs = append(certs, signer.Cert.Raw)
		if options.WithChain {
			for _, cert := range signer.Chain {
				certs = append(certs, cert.Raw)
			}
		}
	}
	// A SET OF is in the order of its encodings in DER (X.690, 11.6).
	slices.SortFunc(infos, bytes.Compare)

	outer := der
	if options.Indefinite {
		outer = ber
	}
	signedData := outer(tagSequence,
		der(tagInteger, []byte{1}),
		der(tagSet, digestAlgorithm),
		outer(tagSequence, oid(1, 2, 840, 113549, 1, 7, 1)), // data, detached
		outer(tagContext0, certs...),
		der(tagSet, infos...),
	)
	return outer(tagSequence,
		oid(1, 2, 840, 113549, 1, 7, 2), // signedData
		outer(tagContext0, signedData),
	), nil
}

func signerInfo(id *Identity, body, digestAlgorithm []byte, options SignOptions) ([]byte, error) {
	signatureAlgorithm, err := signatureAlgorithm(id.Key.Public(), options.Hash)
	if err != nil {
		return nil, err
	}
	digest := sum(options.Hash, body)
	var attributes []byte
	if options.SignedAttributes {
		set, err := signedAttributes(digest, options.SigningTime)
		if err != nil {
			return nil, err
		}
		// The signature covers the SET; the message has the same under an
		// implicit tag (RFC 5652, 5.4).
		digest = sum(options.Hash, set)
		attributes = bytes.Clone(set)
		attributes[0] = tagContext0
	}
	signature, err := id.Key.Sign(rand.Reader, digest, options.Hash)
	if err != nil {
		return nil, err
	}
	serial, err := asn1.Marshal(id.Cert.SerialNumber)
	if err != nil {
		return nil, err
	}
	return der(tagSequence,
		der(tagInteger, []byte{1}),
		der(tagSequence, id.Cert.RawIssuer, serial),
		digestAlgorithm,
		attributes,
		signatureAlgorithm,
		der(tagOctetString, signature),
	), nil
}

func signedAttributes(digest []byte, at time.Time) ([]byte, error) {
	if at.IsZero() {
		at = time.Now()
	}
	signingTime, err := asn1.Marshal(at.UTC())
	if err != nil {
		return nil, fmt.Errorf("encoding the signing time: %w", err)
	}
	attributes := [][]byte{
		der(tagSequence, oid(1, 2, 840, 113549, 1, 9, 3), der(tagSet, oid(1, 2, 840, 113549, 1, 7, 1))),
		der(tagSequence, oid(1, 2, 840, 113549, 1, 9, 4), der(tagSet, der(tagOctetString, digest))),
		der(tagSequence, oid(1, 2, 840, 113549, 1, 9, 5), der(tagSet, signingTime)),
	}
	slices.SortFunc(attributes, bytes.Compare)
	return der(tagSet, attributes...), nil
}

func sum(hash crypto.Hash, data []byte) []byte {
	h := hash.New()
	h.Write(data)
	return h.Sum(nil)
}

func digestAlgorithm(hash crypto.Hash) ([]byte, error) {
	switch hash {
	case crypto.SHA1:
		return der(tagSequence, oid(1, 3, 14, 3, 2, 26), derNull()), nil
	case crypto.SHA256:
		return der(tagSequence, oid(2, 16, 840, 1, 101, 3, 4, 2, 1), derNull()), nil
	}
	return nil, fmt.Errorf("unsupported hash %v", hash)
}

func signatureAlgorithm(public crypto.PublicKey, hash crypto.Hash) ([]byte, error) {
	switch public.(type) {
	case *rsa.PublicKey:
		return der(tagSequence, oid(1, 2, 840, 113549, 1, 1, 1), derNull()), nil
	case *ecdsa.PublicKey:
		if hash == crypto.SHA1 {
			return der(tagSequence, oid(1, 2, 840, 10045, 4, 1)), nil
		}
		return der(tagSequence, oid(1, 2, 840, 10045, 4, 3, 2)), nil
	}
	return nil, errors.New("unsupported key type")
}

// clientCertHeader is a certificate in RFC 9440's form.
func clientCertHeader(cert *x509.Certificate) string {
	return ":" + base64.StdEncoding.EncodeToString(cert.Raw) + ":"
}
