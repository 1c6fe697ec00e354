package certverify

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	mathrand "math/rand/v2"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// certify makes a certificate of key, with a name and key ids of choice.
func certify(t testing.TB, key crypto.Signer, subject, issuer string, issuerKey crypto.Signer, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: subject}, BasicConstraintsValid: true,
		NotBefore: now.AddDate(0, 0, -15), NotAfter: now.AddDate(0, 0, 15),
	}
	if change != nil {
		change(template)
	}
	parent := &x509.Certificate{Subject: pkix.Name{CommonName: issuer}, SubjectKeyId: template.AuthorityKeyId}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), issuerKey)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}

func ecKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	require.NoError(t, err)
	return key
}

// counted is a verifier whose signature checks are counted.
func counted(t testing.TB, roots, intermediates []byte) (*Verifier, *atomic.Int64) {
	t.Helper()
	var checks atomic.Int64
	return newVerifier(t, roots, intermediates, Config{Checked: func() { checks.Add(1) }}), &checks
}

// Eight P-521 CAs that certify each other, and a leaf below them: a search upwards
// would compute with every pair of keys.
func TestSelfMadeChainCostsNothing(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	keys := make([]*ecdsa.PrivateKey, 8)
	for i := range keys {
		keys[i] = ecKey(t, elliptic.P521())
	}
	for name, issuerName := range map[string]string{"names of their own": "self-made", "the configured CA's name": "root"} {
		t.Run(name, func(t *testing.T) {
			var chain []*x509.Certificate
			for i, key := range keys {
				chain = append(chain, certify(t, key, issuerName, issuerName, keys[(i+1)%len(keys)], isCA))
			}
			leafKey := ecKey(t, elliptic.P256())
			v, checks := counted(t, root.pem(), nil)
			for range 20 {
				leaf := certify(t, leafKey, "d", issuerName, keys[0], nil)
				require.ErrorIs(t, v.Verify(leaf, chain), ErrUntrusted)
			}
			if issuerName == "root" {
				// Each new leaf, and each CA once, with the configured CA's key alone.
				require.LessOrEqual(t, checks.Load(), int64(20+len(keys)))
			} else {
				require.Zero(t, checks.Load())
			}
			require.Zero(t, v.refused.len(), "crypto/x509 has seen none of them")
		})
	}
}

func TestForgedLeafCostsOneCheck(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	middle := issue(t, "middle", root, isCA)
	stranger := ecKey(t, elliptic.P256())
	v, checks := counted(t, root.pem(), nil)
	leaf := certify(t, stranger, "d", "root", stranger, nil)
	for range 10 {
		require.ErrorIs(t, v.Verify(leaf, nil), ErrUntrusted)
	}
	require.Equal(t, int64(1), checks.Load(), "then it is remembered")

	checks.Store(0)
	for range 10 { // a public intermediate of ours, and leaves that it did not sign
		leaf := certify(t, stranger, "d", "middle", stranger, nil)
		require.ErrorIs(t, v.Verify(leaf, []*x509.Certificate{middle.cert}), ErrUntrusted)
	}
	require.Equal(t, int64(1+10), checks.Load())
}

// Whatever is sent, one request is bounded.
func TestChecksOfOneRequestAreBounded(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	keys := [maxSent]*ecdsa.PrivateKey{}
	var chain []*x509.Certificate
	for i := range keys {
		keys[i] = ecKey(t, elliptic.P256())
		chain = append(chain, certify(t, keys[i], "root", "root", keys[i], isCA))
	}
	v, checks := counted(t, root.pem(), nil)
	require.ErrorIs(t, v.Verify(certify(t, keys[0], "d", "root", keys[0], nil), append(chain, chain...)), ErrUntrusted)
	require.LessOrEqual(t, checks.Load(), int64(maxChecks))
}

// Ours as it is: one check for each certificate of the chain, none the second
// time, one for the next device.
func TestHonestChecks(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	var chain []*x509.Certificate
	last := root
	for i := range maxAccepted {
		last = issue(t, fmt.Sprint("middle", i), last, isCA)
		chain = append(chain, last.cert)
	}
	v, checks := counted(t, root.pem(), nil)
	one, two := issue(t, "one", last, nil), issue(t, "two", last, nil)
	require.NoError(t, v.Verify(one.cert, chain))
	require.Equal(t, int64(maxAccepted+1), checks.Load())
	require.NoError(t, v.Verify(one.cert, chain))
	require.NoError(t, v.Verify(two.cert, chain))
	require.Equal(t, int64(maxAccepted+2), checks.Load())

	deeper := issue(t, "deeper", last, isCA)
	three := issue(t, "three", deeper, nil)
	require.ErrorIs(t, v.Verify(three.cert, append(chain, deeper.cert)), ErrUntrusted, "at most three")
	configured, _ := counted(t, root.pem(), append(issuePEM(chain[1]), issuePEM(chain[0])...))
	require.NoError(t, configured.Verify(three.cert, append(chain, deeper.cert)), "besides those of the configuration, in any order")
}

func issuePEM(c *x509.Certificate) []byte { return authority{cert: c}.pem() }

// Somebody sends a device's public certificate with a chain that does not hold:
// that does not have the device refused.
func TestRefusalsDoNotLockOthersOut(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	middle := issue(t, "middle", root, isCA)
	device := issue(t, "d", middle, nil)
	forged := certify(t, ecKey(t, elliptic.P256()), "middle", "root", ecKey(t, elliptic.P256()), isCA)
	v, _ := counted(t, root.pem(), nil)
	for _, chain := range [][]*x509.Certificate{nil, {forged}, {root.cert}, {device.cert}} {
		require.ErrorIs(t, v.Verify(device.cert, chain), ErrUntrusted)
	}
	require.NoError(t, v.Verify(device.cert, []*x509.Certificate{forged, middle.cert}))
}

// A refusal by crypto/x509 is remembered for a minute, or until the time at which
// it may end.
func TestRefusalsAreRemembered(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	clock := now
	v := newVerifier(t, root.pem(), nil, Config{Now: func() time.Time { return clock }, ClockSkew: time.Second})
	server := issue(t, "s", root, usage(x509.ExtKeyUsageServerAuth))
	require.ErrorIs(t, v.Verify(server.cert, nil), ErrUntrusted)
	require.Equal(t, 1, v.refused.len())
	young := issue(t, "y", root, period(10*time.Second, time.Hour))
	require.ErrorIs(t, v.Verify(young.cert, nil), ErrNotYetValid)
	clock = now.Add(8 * time.Second)
	require.ErrorIs(t, v.Verify(young.cert, nil), ErrNotYetValid)
	clock = now.Add(9 * time.Second)
	require.NoError(t, v.Verify(young.cert, nil))
	old := issue(t, "o", root, period(-time.Hour, 20*time.Second))
	clock = now.Add(30 * time.Second)
	require.ErrorIs(t, v.Verify(old.cert, nil), ErrExpired)
	clock = now.Add(15 * time.Second)
	require.NoError(t, v.Verify(old.cert, nil), "the clock was set back")
}

func TestMemoriesAreBounded(t *testing.T) {
	m := newMemory[int](4)
	for i := range byte(100) {
		m.put(digest{i}, int(i))
	}
	require.Equal(t, 4, m.len())
	root := issue(t, "root", authority{}, isCA)
	v, _ := counted(t, root.pem(), nil)
	require.Equal(t, maxRefusals, v.refused.size)
	require.Equal(t, maxRefusals, v.edges.size)
}

func TestKeysThatCostMuchAreRefused(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	n := new(big.Int).Lsh(big.NewInt(1), 4103) // nobody factors it: it says nothing
	large := otherPublic{ecKey(t, elliptic.P256()), &rsa.PublicKey{N: n.Add(n, big.NewInt(1)), E: 65537}}
	for name, key := range map[string]crypto.Signer{"RSA 4104": large, "P-224": ecKey(t, elliptic.P224())} {
		t.Run(name, func(t *testing.T) {
			v, checks := counted(t, root.pem(), nil)
			leaf := certify(t, key, "d", "root", root.key, nil)
			require.ErrorIs(t, v.Verify(leaf, nil), errKey)
			require.Zero(t, checks.Load())
			middle := certify(t, key, "middle", "root", root.key, isCA)
			below := certify(t, ecKey(t, elliptic.P256()), "d", "middle", root.key, nil)
			require.ErrorIs(t, v.Verify(below, []*x509.Certificate{middle}), ErrUntrusted)
			require.Zero(t, checks.Load())
		})
	}
}

// otherPublic signs with one key and shows another.
type otherPublic struct {
	crypto.Signer
	shown crypto.PublicKey
}

func (o otherPublic) Public() crypto.PublicKey { return o.shown }

// A CA that was renewed under its name: the former one is still configured, or
// sent, and neither is in the way.
func TestRenewedCA(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	expired := issue(t, "middle", root, period(-time.Hour, -time.Minute, isCA))
	renewed := authority{certify(t, expired.key, "middle", "root", root.key, isCA), expired.key}
	device := issue(t, "d", renewed, nil)
	v, _ := counted(t, root.pem(), expired.pem())
	require.ErrorIs(t, v.Verify(device.cert, nil), ErrCAExpired)
	require.NoError(t, v.Verify(device.cert, []*x509.Certificate{renewed.cert}))
	none, _ := counted(t, root.pem(), nil)
	require.NoError(t, none.Verify(device.cert, []*x509.Certificate{expired.cert, renewed.cert}))

	newRoot := issue(t, "root", authority{}, isCA) // other key, same name
	both, _ := counted(t, append(newRoot.pem(), root.pem()...), nil)
	require.NoError(t, both.Verify(issue(t, "d", root, nil).cert, nil))
	require.NoError(t, both.Verify(issue(t, "d", newRoot, nil).cert, nil))
}

// Hierarchies at random: the verdict is crypto/x509's, as long as the bounds are
// not reached.
func TestAgreesWithX509(t *testing.T) {
	for seed := range uint64(150) {
		r := mathrand.New(mathrand.NewPCG(seed, 1))
		ca := func(c *x509.Certificate) {
			isCA(c)
			alter(r, c)
			if r.IntN(4) == 0 {
				c.MaxPathLen, c.MaxPathLenZero = 0, true
			}
		}
		root := issue(t, "root", authority{}, isCA)
		other := issue(t, []string{"root", "other"}[r.IntN(2)], authority{}, isCA)
		top := root
		if r.IntN(8) == 0 {
			top = other
		}
		var intermediates []byte
		var chain []*x509.Certificate
		for i := range r.IntN(maxAccepted + 1) {
			top = issue(t, fmt.Sprint("middle", i), top, ca)
			switch r.IntN(8) {
			case 0: // nobody has it
			case 1, 2:
				intermediates = append(intermediates, top.pem()...)
			default:
				chain = append(chain, top.cert)
			}
		}
		for range r.IntN(3) {
			chain = append(chain, issue(t, "middle0", other, isCA).cert)
		}
		r.Shuffle(len(chain), func(i, j int) { chain[i], chain[j] = chain[j], chain[i] })
		leaf := issue(t, "d", top, func(c *x509.Certificate) {
			c.DNSNames = []string{"d.example.org"}
			alter(r, c)
		})
		pool := newPool(t, intermediates)
		for _, c := range chain {
			pool.AddCert(c)
		}
		_, want := leaf.cert.Verify(x509.VerifyOptions{
			Roots: newPool(t, root.pem()), Intermediates: pool, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		v, checks := counted(t, root.pem(), intermediates)
		got := v.Verify(leaf.cert, chain)
		require.Equal(t, want == nil, got == nil, "seed %d: x509 says %v, we say %v", seed, want, got)
		require.LessOrEqual(t, checks.Load(), int64(maxChecks))
	}
}

// alter changes now and then what decides about a certificate.
func alter(r *mathrand.Rand, c *x509.Certificate) {
	switch r.IntN(16) {
	case 0:
		c.NotAfter = now.Add(-time.Minute)
	case 1:
		c.NotBefore = now.Add(time.Minute)
	case 2:
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	case 3:
		c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	case 4:
		c.KeyUsage = x509.KeyUsageDigitalSignature // no signing of certificates
	case 5:
		if c.IsCA {
			c.PermittedDNSDomains, c.PermittedDNSDomainsCritical = []string{"example.org"}, true
		}
	case 6:
		if c.IsCA {
			c.ExcludedDNSDomains = []string{"example.org"}
		}
	}
}

func newPool(t testing.TB, pemData []byte) *x509.CertPool {
	t.Helper()
	certs, err := certificates(pemData)
	require.NoError(t, err)
	return pool(certs)
}
