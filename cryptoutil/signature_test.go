package cryptoutil

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"
	"github.com/stretchr/testify/require"
	"golang.org/x/crypto/cryptobyte"
	"golang.org/x/crypto/cryptobyte/asn1"
)

// identity is a device's certificate and key.
type identity struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func newIdentity(t testing.TB, key crypto.Signer, notBefore, notAfter time.Time) identity {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: "MDM Identity"},
		NotBefore:    notBefore,
		NotAfter:     notAfter,
		SubjectKeyId: []byte{1, 2, 3},
		ExtKeyUsage:  []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return identity{cert, key}
}

func rsaKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	return key
}

func ecKey(t testing.TB) crypto.Signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	return key
}

func currentIdentity(t testing.TB, key crypto.Signer) identity {
	return newIdentity(t, key, time.Now().Add(-time.Hour), time.Now().Add(time.Hour))
}

// sign makes a detached signature with the library.
func sign(t testing.TB, id identity, body []byte, attributes bool, config pkcs7.SignerInfoConfig) []byte {
	t.Helper()
	data, err := pkcs7.NewSignedData(body)
	require.NoError(t, err)
	data.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	if attributes {
		require.NoError(t, data.AddSigner(id.cert, id.key, config))
	} else {
		data.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA1)
		require.NoError(t, data.SignWithoutAttr(id.cert, id.key, config))
	}
	data.Detach()
	der, err := data.Finish()
	require.NoError(t, err)
	return der
}

// indefinite re-encodes the outer levels of a DER element, down to the given
// depth, with BER's indefinite length, as Apple's encoder does.
func indefinite(t testing.TB, der []byte, depth int) []byte {
	return toBER(t, der, depth, false)
}

// toBER is indefinite and can also spend a byte more than needed on the lengths
// of primitive elements, which is legal BER as well.
func toBER(t testing.TB, der []byte, depth int, longLengths bool) []byte {
	t.Helper()
	input := cryptobyte.String(der)
	var contents cryptobyte.String
	var tag asn1.Tag
	require.True(t, input.ReadAnyASN1(&contents, &tag))
	require.True(t, input.Empty())
	switch {
	case depth > 0 && tag&0x20 == 0 && longLengths && len(contents) > 0 && len(contents) < 0x80:
		return append([]byte{byte(tag), 0x81, byte(len(contents))}, contents...)
	case depth == 0 || tag&0x20 == 0 || contents.Empty():
		return der
	}
	out := []byte{byte(tag), 0x80}
	for !contents.Empty() {
		var child cryptobyte.String
		require.True(t, contents.ReadAnyASN1Element(&child, &tag))
		out = append(out, toBER(t, child, depth-1, longLengths)...)
	}
	return append(out, 0, 0)
}

func header(der []byte) string { return base64.StdEncoding.EncodeToString(der) }

const vectors = "testdata/mdm-signature"

func vectorBody(t testing.TB) []byte {
	t.Helper()
	body, err := os.ReadFile(filepath.Join(vectors, "body.plist"))
	require.NoError(t, err)
	return body
}

// eachVector calls f for the OpenSSL vectors.
func eachVector(t testing.TB, f func(name string, der []byte)) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(vectors, "*.der"))
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, file := range files {
		der, err := os.ReadFile(file)
		require.NoError(t, err)
		f(strings.TrimSuffix(filepath.Base(file), ".der"), der)
	}
}

func TestMdmSignatureVectors(t *testing.T) {
	body := vectorBody(t)
	eachVector(t, func(name string, der []byte) {
		t.Run(name, func(t *testing.T) {
			sig, err := ParseMdmSignature(header(der))
			if strings.HasPrefix(name, "refused-") {
				if err == nil {
					require.ErrorIs(t, sig.Verify(body), ErrSignatureInvalid)
				} else {
					require.ErrorIs(t, err, ErrSignatureMalformed)
				}
				return
			}
			require.NoError(t, err)
			require.Nil(t, sig.library, "a shape of OpenSSL's should take the fast path")
			require.Equal(t, "MDM Identity", sig.Certificate().Subject.CommonName)
			require.Len(t, sig.Chain(), strings.Count(name, "chain"))
			require.NoError(t, sig.Verify(body))
			tampered := append([]byte{}, body...)
			tampered[len(tampered)/2] ^= 1
			require.ErrorIs(t, sig.Verify(tampered), ErrSignatureInvalid)
			require.ErrorIs(t, sig.Verify(nil), ErrSignatureInvalid)
		})
	})
}

// TestMdmSignatureBER signs as the one real sample we know of: indefinite
// lengths, SHA-1, no signed attributes.
func TestMdmSignatureBER(t *testing.T) {
	body := []byte("<plist/>")
	id := currentIdentity(t, rsaKey(t))
	for _, attributes := range []bool{false, true} {
		der := sign(t, id, body, attributes, pkcs7.SignerInfoConfig{})
		for depth := 1; depth < 6; depth++ {
			for _, long := range []bool{false, true} {
				ber := toBER(t, der, depth, long)
				require.NotEqual(t, der, ber)
				normal, err := normalizeBER(ber)
				require.NoError(t, err)
				require.Equal(t, der, normal)
				for _, surplus := range [][]byte{nil, {0, 0}, {0, 0, 0, 0}} {
					sig, err := ParseMdmSignature(header(append(ber, surplus...)))
					require.NoError(t, err)
					require.Equal(t, id.cert.Raw, sig.Certificate().Raw)
					require.NoError(t, sig.Verify(body))
					require.ErrorIs(t, sig.Verify([]byte("<plist />")), ErrSignatureInvalid)
				}
			}
		}
	}
}

func TestMdmSignatureSigningTimeIsNotJudged(t *testing.T) {
	body := []byte("<plist/>")
	long := time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
	expired := newIdentity(t, ecKey(t), long, long.AddDate(1, 0, 0))
	configs := map[string]pkcs7.SignerInfoConfig{
		"fast path": {},
		"library": {ExtraUnsignedAttributes: []pkcs7.Attribute{{
			Type: pkcs7.OIDAttributeSigningTime, Value: long,
		}}},
	}
	for name, config := range configs {
		t.Run(name, func(t *testing.T) {
			der := sign(t, expired, body, true, config)
			p7, err := pkcs7.Parse(der)
			require.NoError(t, err)
			p7.Content = body
			var timeError *pkcs7.SigningTimeNotValidError
			require.ErrorAs(t, p7.Verify(), &timeError, "the case is about what the library refuses")

			sig, err := ParseMdmSignature(header(der))
			require.NoError(t, err)
			require.Equal(t, name == "library", sig.library != nil)
			require.NoError(t, sig.Verify(body))
			require.ErrorIs(t, sig.Verify([]byte("other")), ErrSignatureInvalid)
		})
	}
}

func TestMdmSignatureAttributes(t *testing.T) {
	body := []byte("<plist/>")
	id := currentIdentity(t, ecKey(t))
	extra := func(attrs ...pkcs7.Attribute) []byte {
		return sign(t, id, body, true, pkcs7.SignerInfoConfig{ExtraSignedAttributes: attrs})
	}
	wrongType := func() []byte {
		data, err := pkcs7.NewSignedData(body)
		require.NoError(t, err)
		data.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
		data.GetSignedData().ContentInfo.ContentType = pkcs7.OIDEnvelopedData
		require.NoError(t, data.AddSigner(id.cert, id.key, pkcs7.SignerInfoConfig{}))
		data.Detach()
		der, err := data.Finish()
		require.NoError(t, err)
		return der
	}
	for name, der := range map[string][]byte{
		"two message digests": extra(pkcs7.Attribute{Type: pkcs7.OIDAttributeMessageDigest, Value: []byte("x")}),
		"two content types":   extra(pkcs7.Attribute{Type: pkcs7.OIDAttributeContentType, Value: pkcs7.OIDSignedData}),
		"wrong content type":  wrongType(),
	} {
		t.Run(name, func(t *testing.T) {
			sig, err := ParseMdmSignature(header(der))
			require.NoError(t, err)
			require.ErrorIs(t, sig.Verify(body), ErrSignatureInvalid)
		})
	}
	t.Run("unknown attribute", func(t *testing.T) {
		sig, err := ParseMdmSignature(header(extra(pkcs7.Attribute{Type: []int{1, 2, 840, 113635, 100, 9, 1}, Value: []byte("x")})))
		require.NoError(t, err)
		require.Nil(t, sig.library)
		require.NoError(t, sig.Verify(body))
	})
	t.Run("attributes passed off as a body", func(t *testing.T) {
		sig, err := ParseMdmSignature(header(extra()))
		require.NoError(t, err)
		require.NoError(t, sig.Verify(body))
		stripped := *sig
		stripped.attributes, stripped.digest = nil, nil
		require.NoError(t, id.cert.CheckSignature(stripped.algorithm, sig.attributes, stripped.signature))
		require.ErrorIs(t, stripped.Verify(sig.attributes), ErrSignatureInvalid)
	})
}

func TestParseMdmSignatureRefuses(t *testing.T) {
	der := sign(t, currentIdentity(t, ecKey(t)), []byte("x"), true, pkcs7.SignerInfoConfig{})
	for name, value := range map[string]string{
		"empty":              "",
		"not Base64":         "%%%",
		"URL alphabet":       strings.NewReplacer("+", "-", "/", "_").Replace(header(der)) + "-_-_",
		"trailing data":      header(append(append([]byte{}, der...), 1)),
		"truncated":          header(withoutLast(der)),
		"truncated BER":      header(withoutLast(indefinite(t, der, 3))),
		"too long":           strings.Repeat("A", maxSignatureHeader+1),
		"plist":              header([]byte("<plist/>")),
		"not SignedData":     header([]byte{0x30, 0x00}),
		"empty indefinite":   header([]byte{0x30, 0x80, 0, 0}),
		"primitive infinite": header([]byte{0x04, 0x80, 0, 0}),
		"leading zero":       header([]byte{0x30, 0x82, 0, 1, 0}),
		"nested definite":    header(nested(maxNesting + 2)),
		"nested indefinite":  header([]byte(strings.Repeat("\x30\x80", 2000))),
		// Each child outgrows its parent; a reader that lets it is exponential.
		"outgrown": header([]byte("\x30\x7d" + strings.Repeat("\x30\x02\x30\x50", 31))),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := ParseMdmSignature(value)
			require.ErrorIs(t, err, ErrSignatureMalformed)
		})
	}
}

func TestSigningTime(t *testing.T) {
	id := currentIdentity(t, ecKey(t))
	begun := time.Now().Truncate(time.Second)
	with := sign(t, id, []byte("x"), true, pkcs7.SignerInfoConfig{})
	for name, parse := range map[string]func() (*MdmSignature, error){
		"fast":    func() (*MdmSignature, error) { return ParseMdmSignature(header(with)) },
		"library": func() (*MdmSignature, error) { return parseWithLibrary(with) },
	} {
		sig, err := parse()
		require.NoError(t, err)
		require.NoError(t, sig.Verify([]byte("x")))
		at, ok := sig.SigningTime()
		require.True(t, ok, name)
		require.WithinRange(t, at, begun, time.Now())
	}
	sig, err := ParseMdmSignature(header(sign(t, id, []byte("x"), false, pkcs7.SignerInfoConfig{})))
	require.NoError(t, err)
	_, ok := sig.SigningTime()
	require.False(t, ok)
	for name, value := range map[string]string{
		"nothing": "", "no time": "\x02\x01\x01", "two": "\x17\x0d260101000000Z\x17\x0d260101000000Z", "no date": "\x17\x0d261301000000Z",
	} {
		_, ok := readTime([]byte(value))
		require.False(t, ok, name)
	}
	at, ok := readTime([]byte("\x18\x0f20600101000000Z"))
	require.True(t, ok)
	require.Equal(t, 2060, at.Year())
}

// A header full of certificates is refused before any of them is parsed.
func TestManyCertificatesAreNotParsed(t *testing.T) {
	id := currentIdentity(t, ecKey(t))
	with := func(more int) string {
		data, err := pkcs7.NewSignedData([]byte("x"))
		require.NoError(t, err)
		require.NoError(t, data.AddSigner(id.cert, id.key, pkcs7.SignerInfoConfig{}))
		for range more {
			data.AddCertificate(id.cert)
		}
		data.Detach()
		der, err := data.Finish()
		require.NoError(t, err)
		return header(der)
	}
	parsed := 0
	parse := func(der []byte) (*x509.Certificate, error) { parsed++; return x509.ParseCertificate(der) }
	_, err := parseMdmSignature(with(maxEmbedded), parse)
	require.ErrorIs(t, err, ErrSignatureMalformed)
	require.Zero(t, parsed)
	sig, err := parseMdmSignature(with(maxEmbedded-1), parse)
	require.NoError(t, err)
	require.Len(t, sig.Chain(), maxEmbedded-1)
	require.Equal(t, maxEmbedded, parsed)
}

func withoutLast(b []byte) []byte { return b[:len(b)-1] }

func nested(depth int) []byte {
	out := []byte{0x05, 0x00}
	for range depth {
		out = append(appendLength([]byte{0x30}, len(out)), out...)
	}
	return out
}

func TestParseMdmSignatureIgnoresSpace(t *testing.T) {
	body := []byte("x")
	value := header(sign(t, currentIdentity(t, ecKey(t)), body, true, pkcs7.SignerInfoConfig{}))
	sig, err := ParseMdmSignature(" " + value[:64] + "\r\n\t" + value[64:] + " ")
	require.NoError(t, err)
	require.NoError(t, sig.Verify(body))
}

// TestMdmSignatureWrongKey signs with a key other than the certificate's.
func TestMdmSignatureWrongKey(t *testing.T) {
	body := []byte("x")
	for name, keys := range map[string][2]crypto.Signer{
		"RSA":   {rsaKey(t), rsaKey(t)},
		"ECDSA": {ecKey(t), ecKey(t)},
		"mixed": {rsaKey(t), ecKey(t)},
	} {
		t.Run(name, func(t *testing.T) {
			id := currentIdentity(t, keys[0])
			id.key = keys[1]
			for _, attributes := range []bool{false, true} {
				sig, err := ParseMdmSignature(header(sign(t, id, body, attributes, pkcs7.SignerInfoConfig{})))
				require.NoError(t, err)
				require.ErrorIs(t, sig.Verify(body), ErrSignatureInvalid)
			}
		})
	}
}

func TestCertificateCache(t *testing.T) {
	body := []byte("x")
	values := make([]string, 5)
	for i := range values {
		values[i] = header(sign(t, currentIdentity(t, ecKey(t)), body, true, pkcs7.SignerInfoConfig{}))
	}
	cache := NewCertificateCache(3)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for _, value := range values {
				sig, err := cache.ParseMdmSignature(value)
				if err == nil {
					err = sig.Verify(body)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.Len(t, cache.certs, 3)

	first, err := cache.ParseMdmSignature(values[0])
	require.NoError(t, err)
	second, err := cache.ParseMdmSignature(values[0])
	require.NoError(t, err)
	require.Same(t, first.Certificate(), second.Certificate())

	none := NewCertificateCache(0)
	_, err = none.ParseMdmSignature(values[0])
	require.NoError(t, err)
	require.Empty(t, none.certs)
}

// libraryVerify is the reference: the library's verdict on the bytes as they
// came, save for the two differences that ParseMdmSignature documents.
func libraryVerify(raw, body []byte, signer *x509.Certificate) error {
	p7, err := pkcs7.Parse(raw)
	if err != nil {
		return err
	}
	if len(p7.Signers) == 0 { // it does not know subject key identifiers
		if p7, err = pkcs7.Parse(withIssuerAndSerial(raw, signer)); err != nil {
			return err
		}
	}
	if len(p7.Signers) != 1 || len(p7.Content) != 0 {
		return errors.New("not a detached signature of one signer")
	}
	if got := p7.GetOnlySigner(); got == nil || !got.Equal(signer) {
		return errors.New("another signer")
	}
	for _, cert := range p7.Certificates { // signingTime
		cert.NotBefore, cert.NotAfter = time.Date(-1, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(10001, 1, 1, 0, 0, 0, 0, time.UTC)
	}
	p7.Content = body
	return p7.Verify()
}

// withIssuerAndSerial names the signer by issuer and serial number instead of
// subject key identifier. No signature covers the name.
func withIssuerAndSerial(raw []byte, signer *x509.Certificate) []byte {
	der, err := normalizeBER(raw)
	if err != nil {
		return nil
	}
	input := cryptobyte.String(der)
	var content, oid, signedData, signers, info, keyID, element cryptobyte.String
	var tag asn1.Tag
	if !input.ReadASN1(&content, asn1.SEQUENCE) || !content.ReadASN1Element(&oid, asn1.OBJECT_IDENTIFIER) ||
		!content.ReadASN1(&content, tagExplicit0) || !content.ReadASN1(&signedData, asn1.SEQUENCE) {
		return nil
	}
	var head []byte
	for range 4 { // version, digest algorithms, content info, certificates
		if !signedData.ReadAnyASN1Element(&element, &tag) {
			return nil
		}
		head = append(head, element...)
	}
	var version cryptobyte.String
	if !signedData.ReadASN1(&signers, asn1.SET) || !signers.ReadASN1(&info, asn1.SEQUENCE) ||
		!info.ReadASN1Element(&version, asn1.INTEGER) || !info.ReadASN1(&keyID, tagKeyID) {
		return nil
	}
	var b cryptobyte.Builder
	b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
		b.AddBytes(oid)
		b.AddASN1(tagExplicit0, func(b *cryptobyte.Builder) {
			b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
				b.AddBytes(head)
				b.AddASN1(asn1.SET, func(b *cryptobyte.Builder) {
					b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
						b.AddBytes(version)
						b.AddASN1(asn1.SEQUENCE, func(b *cryptobyte.Builder) {
							b.AddBytes(signer.RawIssuer)
							b.AddASN1BigInt(signer.SerialNumber)
						})
						b.AddBytes(info)
					})
				})
			})
		})
	})
	return b.BytesOrPanic()
}

// requireNoLaxer fails if the fast path accepts what the library refuses. It
// says whether the fast path accepted.
func requireNoLaxer(t *testing.T, raw, body []byte) bool {
	t.Helper()
	sig, err := ParseMdmSignature(header(raw))
	if err != nil {
		return false
	}
	_, _ = sig.SigningTime() // it does not panic
	if sig.library != nil || sig.Verify(body) != nil {
		return false
	}
	require.NoError(t, libraryVerify(raw, body, sig.Certificate()), "accepted %x", raw)
	return true
}

// TestFastPathIsNoLaxer flips a bit in every byte of every vector. (Many flips
// inside the certificates are accepted by both: their own signature is the
// chain's business.)
func TestFastPathIsNoLaxer(t *testing.T) {
	body := vectorBody(t)
	eachVector(t, func(name string, der []byte) {
		if strings.HasPrefix(name, "refused-") {
			return
		}
		t.Run(name, func(t *testing.T) {
			require.True(t, requireNoLaxer(t, der, body))
			accepted := 0
			for i := range der {
				mutated := append([]byte{}, der...)
				mutated[i] ^= 1 << (i % 8)
				if requireNoLaxer(t, mutated, body) {
					accepted++
				}
			}
			t.Logf("%d of %d flips accepted, all by the library too", accepted, len(der))
		})
	})
}

// FuzzMdmSignature: whatever the bytes, no panic, and the fast path accepts
// nothing that the library refuses.
func FuzzMdmSignature(f *testing.F) {
	body := vectorBody(f)
	eachVector(f, func(_ string, der []byte) {
		f.Add(der)
		if normal, err := normalizeBER(der); err == nil {
			f.Add(toBER(f, normal, 5, true))
		}
	})
	f.Fuzz(func(t *testing.T, raw []byte) { requireNoLaxer(t, raw, body) })
}

// FuzzMdmSignatureHeader: white space is ignored and nothing else is: a value
// that is accepted is Base64 of what is accepted without it.
func FuzzMdmSignatureHeader(f *testing.F) {
	eachVector(f, func(_ string, der []byte) {
		value := header(der)
		f.Add(value)
		f.Add(strings.ReplaceAll(value, "A", "A \t\r\n"))
		f.Add(strings.TrimRight(value, "="))
		f.Add(base64.URLEncoding.EncodeToString(der))
		f.Add("=" + value)
	})
	f.Fuzz(func(t *testing.T, value string) {
		sig, err := ParseMdmSignature(value)
		cache := NewCertificateCache(1)
		cached, cacheErr := cache.ParseMdmSignature(value)
		require.Equal(t, err == nil, cacheErr == nil, "the cache decides nothing")
		if err != nil {
			require.ErrorIs(t, err, ErrSignatureMalformed)
			return
		}
		require.True(t, sig.Certificate().Equal(cached.Certificate()))
		bare := strings.Join(strings.Fields(value), "")
		_, err = base64.StdEncoding.DecodeString(bare)
		require.NoError(t, err)
		again, err := ParseMdmSignature(bare)
		require.NoError(t, err)
		require.True(t, again.Certificate().Equal(sig.Certificate()))
	})
}

// node is one ASN.1 element; a primitive one has bytes, another one children.
type node struct {
	tag      byte
	bytes    []byte
	children []*node
}

func parseNode(t testing.TB, s *cryptobyte.String) *node {
	t.Helper()
	var contents cryptobyte.String
	var tag asn1.Tag
	require.True(t, s.ReadAnyASN1(&contents, &tag))
	n := &node{tag: byte(tag), bytes: contents}
	for tag&0x20 != 0 && !contents.Empty() {
		n.children = append(n.children, parseNode(t, &contents))
	}
	return n
}

// all returns the node and everything below it.
func (n *node) all() []*node {
	nodes := []*node{n}
	for _, child := range n.children {
		nodes = append(nodes, child.all()...)
	}
	return nodes
}

func (n *node) clone() *node {
	c := &node{tag: n.tag, bytes: n.bytes}
	for _, child := range n.children {
		c.children = append(c.children, child.clone())
	}
	return c
}

func (n *node) encode() []byte {
	contents := n.bytes
	if len(n.children) > 0 {
		contents = nil
		for _, child := range n.children {
			contents = append(contents, child.encode()...)
		}
	}
	return append(appendLength([]byte{n.tag}, len(contents)), contents...)
}

// mutate changes one element: lengths around it are put right, so that the
// result is well-formed and gets far into a parser.
func (n *node) mutate(at uint16, op, value byte, other *node) {
	nodes := n.all()
	target := nodes[int(at)%len(nodes)]
	count := len(target.children)
	child := 0
	if count > 0 {
		child = int(value) % count
	}
	switch op % 8 {
	case 0:
		target.tag = value
	case 1:
		target.bytes, target.children = append([]byte{value}, target.bytes...), nil
	case 2:
		target.bytes, target.children = append(append([]byte{}, target.bytes...), value), nil
	case 3: // drop a child
		if count > 0 {
			target.children = append(append([]*node{}, target.children[:child]...), target.children[child+1:]...)
			target.bytes = nil
		}
	case 4: // repeat a child
		if count > 0 {
			target.children = append(target.children, target.children[child])
		}
	case 5: // swap two children
		if count > 1 {
			next := (child + 1) % count
			target.children[child], target.children[next] = target.children[next], target.children[child]
		}
	case 6: // transplant
		*target = *other.clone() // a clone, for other may hold target by now
	case 7:
		if len(target.bytes) > 0 && count == 0 {
			target.bytes = append([]byte{}, target.bytes...)
			target.bytes[int(value)%len(target.bytes)] ^= 1 << (at % 8)
		}
	}
}

// FuzzMdmSignatureTree is FuzzMdmSignature for signatures changed element by
// element, twice each.
func FuzzMdmSignatureTree(f *testing.F) {
	body := vectorBody(f)
	var ders [][]byte
	eachVector(f, func(_ string, der []byte) {
		if normal, err := normalizeBER(der); err == nil {
			ders = append(ders, normal)
		}
	})
	for vector := range ders {
		for at := range uint16(60) {
			f.Add(byte(vector), byte(vector+1), at, byte(at), byte(1), at, byte(8), byte(0))
		}
	}
	f.Fuzz(func(t *testing.T, vector, donor byte, at uint16, op, value byte, at2 uint16, op2, value2 byte) {
		one, two := cryptobyte.String(ders[int(vector)%len(ders)]), cryptobyte.String(ders[int(donor)%len(ders)])
		tree, other := parseNode(t, &one), parseNode(t, &two).all()
		tree.mutate(at, op, value, other[int(at2)%len(other)])
		tree.mutate(at2, op2, value2, other[int(at)%len(other)])
		requireNoLaxer(t, tree.encode(), body)
	})
}

func BenchmarkVerify(b *testing.B) {
	body := []byte(strings.Repeat("<plist/>", 90))
	for name, key := range map[string]crypto.Signer{"RSA": rsaKey(b), "ECDSA": ecKey(b)} {
		id := currentIdentity(b, key)
		for shape, attributes := range map[string]bool{"attributes": true, "SHA1BER": false} {
			der := sign(b, id, body, attributes, pkcs7.SignerInfoConfig{})
			if !attributes {
				der = indefinite(b, der, 3)
			}
			value := header(der)
			run := func(path string, verify func() error) {
				b.Run(name+"/"+shape+"/"+path, func(b *testing.B) {
					b.ReportAllocs()
					for b.Loop() {
						if err := verify(); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
			cache := NewCertificateCache(1)
			run("cached", func() error {
				sig, err := cache.ParseMdmSignature(value)
				if err != nil {
					return err
				}
				return sig.Verify(body)
			})
			run("fast", func() error {
				sig, err := ParseMdmSignature(value)
				if err != nil {
					return err
				}
				return sig.Verify(body)
			})
			run("library", func() error {
				raw, err := base64.StdEncoding.DecodeString(value)
				if err != nil {
					return err
				}
				p7, err := pkcs7.Parse(raw)
				if err != nil {
					return err
				}
				p7.Content = body
				return p7.Verify()
			})
		}
	}
}
