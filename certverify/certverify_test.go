package certverify

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

type authority struct {
	cert *x509.Certificate
	key  crypto.Signer
}

func (a authority) pem() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw})
}

// issue makes a certificate that is valid for a month around now; change may
// alter the template. A zero issuer means self-signed.
func issue(t testing.TB, name string, issuer authority, change func(*x509.Certificate)) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.AddDate(0, 0, -15),
		NotAfter:              now.AddDate(0, 0, 15),
		BasicConstraintsValid: true,
	}
	if change != nil {
		change(template)
	}
	if issuer.cert == nil {
		issuer = authority{template, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, issuer.cert, key.Public(), issuer.key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return authority{cert, key}
}

func isCA(c *x509.Certificate) { c.IsCA = true }

func usage(usages ...x509.ExtKeyUsage) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.ExtKeyUsage = usages }
}

func period(from, until time.Duration, more ...func(*x509.Certificate)) func(*x509.Certificate) {
	return func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = now.Add(from), now.Add(until)
		for _, change := range more {
			change(c)
		}
	}
}

func newVerifier(t testing.TB, roots, intermediates []byte, cfg Config) *Verifier {
	t.Helper()
	if cfg.Now == nil {
		cfg.Now = func() time.Time { return now }
	}
	v, err := New(roots, intermediates, cfg)
	require.NoError(t, err)
	return v
}

func TestVerify(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	middle := issue(t, "middle", root, isCA)
	stranger := issue(t, "root", authority{}, isCA)
	strangerMiddle := issue(t, "middle", stranger, period(-time.Hour, -time.Minute, isCA))
	expiredRoot := issue(t, "expired root", authority{}, period(-time.Hour, -time.Minute, isCA))
	futureRoot := issue(t, "future root", authority{}, period(time.Hour, 2*time.Hour, isCA))
	roots := append(append(root.pem(), expiredRoot.pem()...), futureRoot.pem()...)

	for name, test := range map[string]struct {
		cert          authority
		chain         []*x509.Certificate
		intermediates []byte
		skew          time.Duration
		want          error
	}{
		"client authentication":        {cert: issue(t, "d", root, usage(x509.ExtKeyUsageClientAuth))},
		"no extended key usage":        {cert: issue(t, "d", root, nil)},
		"any extended key usage":       {cert: issue(t, "d", root, usage(x509.ExtKeyUsageAny))},
		"server authentication only":   {cert: issue(t, "d", root, usage(x509.ExtKeyUsageServerAuth)), want: ErrUntrusted},
		"stranger of the same name":    {cert: issue(t, "d", stranger, nil), want: ErrUntrusted},
		"self-signed":                  {cert: issue(t, "d", authority{}, nil), want: ErrUntrusted},
		"stranger's root in the chain": {cert: issue(t, "d", stranger, nil), chain: []*x509.Certificate{stranger.cert}, want: ErrUntrusted},
		"intermediate configured":      {cert: issue(t, "d", middle, nil), intermediates: middle.pem()},
		"intermediate in the chain":    {cert: issue(t, "d", middle, nil), chain: []*x509.Certificate{middle.cert}},
		"intermediate missing":         {cert: issue(t, "d", middle, nil), want: ErrUntrusted},
		"issued by a device":           {cert: issue(t, "d", issue(t, "x", root, nil), nil), want: ErrUntrusted},

		"expired":                       {cert: issue(t, "d", root, period(-time.Hour, -time.Second)), want: ErrExpired},
		"expired, skew allowed":         {cert: issue(t, "d", root, period(-time.Hour, -time.Second)), skew: time.Minute, want: ErrExpired},
		"expired stranger":              {cert: issue(t, "d", stranger, period(-time.Hour, -time.Second)), want: ErrUntrusted},
		"expired stranger in the chain": {cert: issue(t, "d", strangerMiddle, nil), chain: []*x509.Certificate{strangerMiddle.cert}, want: ErrUntrusted},
		"expired root":                  {cert: issue(t, "d", expiredRoot, nil), want: ErrCAExpired},
		"future root":                   {cert: issue(t, "d", futureRoot, nil), want: ErrNotYetValid},
		"too young":                     {cert: issue(t, "d", root, period(2*time.Second, time.Hour)), want: ErrNotYetValid},
		"too young within the skew":     {cert: issue(t, "d", root, period(2*time.Second, time.Hour)), skew: 2 * time.Second},
		"too young beyond the skew":     {cert: issue(t, "d", root, period(2*time.Second, time.Hour)), skew: time.Second, want: ErrNotYetValid},
		"too young stranger":            {cert: issue(t, "d", stranger, period(2*time.Second, time.Hour)), skew: time.Minute, want: ErrUntrusted},
		"validity ends before it begins": {
			cert: issue(t, "d", root, period(-time.Second, -time.Hour)), want: ErrUntrusted},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVerifier(t, roots, test.intermediates, Config{ClockSkew: test.skew})
			for range 2 { // the second answer may come from memory
				err := v.Verify(test.cert.cert, test.chain)
				if test.want == nil {
					require.NoError(t, err)
				} else {
					require.ErrorIs(t, err, test.want)
				}
			}
			require.Equal(t, test.want == nil, v.known.len() == 1, "only positive outcomes are remembered")
		})
	}
}

// TestVerifyRechecksTime moves the clock past the end of a chain that is
// remembered: the intermediate's, which comes before the leaf's.
func TestVerifyRechecksTime(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	middle := issue(t, "middle", root, period(-time.Hour, time.Hour, isCA))
	device := issue(t, "d", middle, nil)
	clock := now
	v := newVerifier(t, root.pem(), middle.pem(), Config{Now: func() time.Time { return clock }})
	require.NoError(t, v.Verify(device.cert, nil))
	clock = now.Add(time.Hour)
	require.NoError(t, v.Verify(device.cert, nil))
	clock = now.Add(time.Hour + time.Second)
	require.ErrorIs(t, v.Verify(device.cert, nil), ErrCAExpired)
	clock = now.Add(-time.Hour - time.Second)
	require.ErrorIs(t, v.Verify(device.cert, nil), ErrNotYetValid)
	clock = device.cert.NotAfter.Add(time.Second)
	require.ErrorIs(t, v.Verify(device.cert, nil), ErrCAExpired, "at the end of the device's certificate, too")
	clock = device.cert.NotBefore.Add(-time.Second)
	require.ErrorIs(t, v.Verify(device.cert, nil), ErrNotYetValid)
}

func TestVerifyMemory(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	middle := issue(t, "middle", root, isCA)
	device := issue(t, "d", middle, nil)
	v := newVerifier(t, root.pem(), nil, Config{})
	require.ErrorIs(t, v.Verify(device.cert, nil), ErrUntrusted)
	require.NoError(t, v.Verify(device.cert, []*x509.Certificate{middle.cert}))
	require.NoError(t, v.Verify(device.cert, nil), "known by now")

	none := newVerifier(t, root.pem(), nil, Config{CacheSize: -1})
	require.NoError(t, none.Verify(device.cert, []*x509.Certificate{middle.cert}))
	require.ErrorIs(t, none.Verify(device.cert, nil), ErrUntrusted)
}

func TestVerifyConcurrentlyInBounds(t *testing.T) {
	root := issue(t, "root", authority{}, isCA)
	devices := make([]authority, 6)
	for i := range devices {
		devices[i] = issue(t, "d", root, nil)
	}
	v := newVerifier(t, root.pem(), nil, Config{CacheSize: 4})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for _, device := range devices {
				if err := v.Verify(device.cert, nil); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	require.Equal(t, 4, v.known.len())
}

func TestNewRefuses(t *testing.T) {
	root := issue(t, "root", authority{}, isCA).pem()
	broken := append([]byte{}, root...)
	broken[60] = '!'
	for name, test := range map[string]struct {
		roots, intermediates []byte
		cfg                  Config
		want                 string
	}{
		"no roots":             {nil, nil, Config{}, "roots: no certificate"},
		"text":                 {[]byte("hello"), nil, Config{}, "roots: no certificate"},
		"broken Base64":        {append(broken, root...), nil, Config{}, "roots: only 1 of 2"},
		"broken certificate":   {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte("x")}), nil, Config{}, "roots: parsing certificate 1"},
		"a key":                {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}), nil, Config{}, `roots: unexpected PEM block "PRIVATE KEY"`},
		"broken intermediates": {root, broken, Config{}, "intermediates: only 0 of 1"},
		"negative skew":        {root, nil, Config{ClockSkew: -1}, "ClockSkew"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(test.roots, test.intermediates, test.cfg)
			require.ErrorContains(t, err, test.want)
		})
	}
}

func BenchmarkVerify(b *testing.B) {
	root := issue(b, "root", authority{}, isCA)
	device := issue(b, "d", root, usage(x509.ExtKeyUsageClientAuth))
	for name, size := range map[string]int{"cached": 1, "uncached": -1} {
		v := newVerifier(b, root.pem(), nil, Config{CacheSize: size})
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if err := v.Verify(device.cert, nil); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
