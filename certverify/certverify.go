// Package certverify decides whether a device's identity certificate was issued
// by the certificate authority that the operator configured.
package certverify

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/textinput"
)

// The reasons to refuse a certificate. Every error of [Verifier.Verify] matches
// exactly one of these.
var (
	// ErrExpired: the certificate itself has expired. Its chain was right at the
	// end of its validity, so it is one of the configured CA's.
	ErrExpired = errors.New("certificate has expired")
	// ErrCAExpired: a configured CA certificate of the chain has expired, which
	// locks out every device below it.
	ErrCAExpired = errors.New("configured CA certificate has expired")
	// ErrNotYetValid: the validity of the certificate, or of a configured CA
	// certificate of its chain, has not begun.
	ErrNotYetValid = errors.New("certificate is not valid yet")
	// ErrUntrusted: no chain leads to a configured CA, or the certificate is not
	// for client authentication.
	ErrUntrusted = errors.New("certificate is not trusted")
)

const (
	defaultCacheSize = 1 << 16

	// maxRefusals bounds the refusals and the single signatures that are
	// remembered, and refusalLife how long.
	maxRefusals = 1 << 12
	refusalLife = time.Minute
)

// Config holds what is optional; the zero value works.
type Config struct {
	// ClockSkew is how long before its NotBefore a device's certificate is
	// already accepted, for a CA whose clock runs ahead of ours and a device
	// that enrolls at once. Default 0. Expiry gets no such grace.
	ClockSkew time.Duration
	// AllowExpired accepts a device's certificate that has expired and was right
	// at the end of its validity, for callers that know certificates again. It
	// does so of devices alone: chains through an expired CA stay refused.
	AllowExpired bool
	// CacheSize is how many verified certificates are remembered, about 100
	// bytes each. 0 means 65,536, a negative number none.
	CacheSize int
	// Checked is called for each signature on a certificate that Verify checks
	// while it looks for a chain; may be nil. A chain that was found is checked
	// once more as a whole, which is not counted.
	Checked func()
	// Now is the clock, time.Now by default.
	Now func() time.Time
}

// Verifier verifies certificates against one set of CAs. It remembers outcomes,
// so a change of CA needs a new Verifier. Safe for concurrent use.
type Verifier struct {
	roots         *x509.CertPool
	intermediates *x509.CertPool
	configured    []*x509.Certificate // both pools' certificates
	issuers       issuerIndex         // of configured, those that lead to a root
	detached      []*x509.Certificate // of configured, the others
	isRoot        map[digest]bool
	skew          time.Duration
	allowExpired  bool
	checked       func()
	now           func() time.Time

	known   *memory[validity] // verified certificates
	refused *memory[refusal]  // certificates with their chains
	edges   *memory[edge]     // signatures of one certificate on another
}

// validity is the time in which a whole chain is valid, the leaf's clock skew
// not counted.
type validity struct{ from, until time.Time }

func (v validity) holds(now time.Time) bool {
	return !now.Before(v.from) && !now.After(v.until)
}

// refusal is an error that Verify returned, and how long it is to return it
// again without looking.
type refusal struct {
	err error
	validity
}

// New returns a Verifier that trusts the certificates in rootsPEM and may build
// chains through those in intermediatesPEM, which may be empty. Anything in
// either that is not a certificate, is broken, or a rootsPEM without a
// certificate is an error.
func New(rootsPEM, intermediatesPEM []byte, cfg Config) (*Verifier, error) {
	if cfg.ClockSkew < 0 {
		return nil, fmt.Errorf("certverify: ClockSkew %s is negative", cfg.ClockSkew)
	}
	roots, err := certificates(rootsPEM)
	if err != nil {
		return nil, fmt.Errorf("certverify: roots: %w", err)
	}
	if len(roots) == 0 {
		return nil, errors.New("certverify: roots: no certificate in the PEM data")
	}
	intermediates, err := certificates(intermediatesPEM)
	if err != nil {
		return nil, fmt.Errorf("certverify: intermediates: %w", err)
	}
	v := &Verifier{
		roots:         pool(roots),
		intermediates: pool(intermediates),
		configured:    slices.Concat(roots, intermediates),
		isRoot:        make(map[digest]bool),
		skew:          cfg.ClockSkew,
		allowExpired:  cfg.AllowExpired,
		checked:       cfg.Checked,
		now:           cfg.Now,
		known:         newMemory[validity](cmp.Or(cfg.CacheSize, defaultCacheSize)),
		refused:       newMemory[refusal](maxRefusals),
		edges:         newMemory[edge](maxRefusals),
	}
	v.issuers, v.detached = indexIssuers(roots, intermediates)
	for _, root := range roots {
		v.isRoot[sha256.Sum256(root.Raw)] = true
	}
	if v.now == nil {
		v.now = time.Now
	}
	if v.checked == nil {
		v.checked = func() {}
	}
	return v, nil
}

// certificates is strict where CertPool.AppendCertsFromPEM is silent: a CA that
// was left out would show only as devices locked out.
func certificates(data []byte) (certs []*x509.Certificate, err error) {
	data = textinput.PEM(data)
	begun := bytes.Count(data, []byte("-----BEGIN "))
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("unexpected PEM block %q", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("parsing certificate %d: %w", len(certs)+1, err)
		}
		certs = append(certs, cert)
	}
	if len(certs) != begun {
		return nil, fmt.Errorf("only %d of %d PEM blocks could be read", len(certs), begun)
	}
	return certs, nil
}

func pool(certs []*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, cert := range certs {
		p.AddCert(cert)
	}
	return p
}

// Verify checks that cert chains to a configured root and may be used for client
// authentication (an extended key usage that names it or any, or none at all),
// directly or through the configured intermediates and chain, the certificates
// that came with the request.
//
// The chain is built downwards from the configured CAs, so that the keys of
// strangers are never computed with; at most three of the certificates that
// came along count, and at most six signatures are checked. A certificate that was accepted is remembered by its hash, and its
// time checked again at each call, until the first certificate of its chain
// expires. A refusal is remembered for a minute, by the hash of the certificate
// and of the chain that counted, so that nobody can have a certificate refused by
// sending it with a wrong chain.
//
// Revocation is not checked. The error matches one of the sentinels; expiry is
// only reported of certificates that are otherwise trusted.
func (v *Verifier) Verify(cert *x509.Certificate, chain []*x509.Certificate) error {
	leaf := digest(sha256.Sum256(cert.Raw))
	now := v.now()
	if period, ok := v.known.get(leaf); ok && period.holds(now) {
		return nil
	}
	issuers, err := v.findIssuers(cert, leaf, chain, now)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrUntrusted, err)
	}
	whole := leaf
	for _, c := range issuers {
		whole = combine(whole, sha256.Sum256(c.Raw))
	}
	if r, ok := v.refused.get(whole); ok && r.holds(now) {
		return v.unlessAllowed(r.err)
	}
	period, err := v.verify(cert, issuers, now)
	if err != nil {
		v.refused.put(whole, refusal{err, validity{now, v.refusedUntil(cert, now)}})
		return v.unlessAllowed(err)
	}
	v.known.put(leaf, period)
	return nil
}

// unlessAllowed is err, or nil if it is the expiry that Config.AllowExpired is
// about.
func (v *Verifier) unlessAllowed(err error) error {
	if v.allowExpired && errors.Is(err, ErrExpired) {
		return nil
	}
	return err
}

// refusedUntil returns when a refusal is looked at again: after refusalLife, or
// when a certificate that is too young today becomes valid.
func (v *Verifier) refusedUntil(cert *x509.Certificate, now time.Time) time.Time {
	until := now.Add(refusalLife)
	begins := []time.Time{cert.NotBefore.Add(-v.skew)}
	for _, c := range v.configured {
		begins = append(begins, c.NotBefore)
	}
	for _, begin := range begins {
		if begin.After(now) && begin.Before(until) {
			until = begin.Add(-time.Nanosecond)
		}
	}
	return until
}

// verify has crypto/x509 check a chain whose signatures are valid: key usages,
// constraints, validity. It checks at the moment of the leaf's validity that is
// nearest to now, so that an expired leaf differs from a stranger's.
func (v *Verifier) verify(cert *x509.Certificate, issuers []*x509.Certificate, now time.Time) (validity, error) {
	at := now
	switch {
	case now.Before(cert.NotBefore):
		at = cert.NotBefore
	case now.After(cert.NotAfter):
		at = cert.NotAfter
	}
	intermediates := v.intermediates
	if len(issuers) > 0 {
		intermediates = intermediates.Clone()
		for _, c := range issuers {
			intermediates.AddCert(c)
		}
	}
	chains, err := cert.Verify(x509.VerifyOptions{
		Roots:         v.roots,
		Intermediates: intermediates,
		CurrentTime:   at,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	switch {
	case err != nil:
		return validity{}, fmt.Errorf("%w: %w", v.reason(err, at), err)
	case now.After(cert.NotAfter):
		return validity{}, fmt.Errorf("%w on %s", ErrExpired, cert.NotAfter.UTC().Format(time.RFC3339))
	case now.Before(cert.NotBefore.Add(-v.skew)):
		return validity{}, fmt.Errorf("%w: it begins on %s", ErrNotYetValid, cert.NotBefore.UTC().Format(time.RFC3339))
	}
	return v.lasting(chains), nil
}

// reason distinguishes an expired certificate of a configured CA, which locks a
// whole fleet out, from a stranger's certificate. It ignores the validity of
// certificates that came with the request: anybody can make an expired one.
func (v *Verifier) reason(err error, at time.Time) error {
	var invalid x509.CertificateInvalidError
	if !errors.As(err, &invalid) || invalid.Reason != x509.Expired || !slices.ContainsFunc(v.configured, invalid.Cert.Equal) {
		return ErrUntrusted
	}
	if at.Before(invalid.Cert.NotBefore) {
		return ErrNotYetValid
	}
	return ErrCAExpired
}

// lasting returns the validity of the chain that lasts longest.
func (v *Verifier) lasting(chains [][]*x509.Certificate) (best validity) {
	for _, chain := range chains {
		period := validity{from: chain[0].NotBefore.Add(-v.skew), until: chain[0].NotAfter}
		for _, issuer := range chain[1:] {
			if issuer.NotBefore.After(period.from) && issuer.NotBefore.After(chain[0].NotBefore) {
				period.from = issuer.NotBefore
			}
			if issuer.NotAfter.Before(period.until) {
				period.until = issuer.NotAfter
			}
		}
		if period.until.After(best.until) {
			best = period
		}
	}
	return best
}
