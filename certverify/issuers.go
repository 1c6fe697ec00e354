package certverify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"slices"
	"time"
)

// The bounds of one search for a chain.
const (
	// maxSent is how many certificates of a request are looked at.
	maxSent = 8
	// maxAccepted is how many of them may be issuers of the leaf's chain.
	maxAccepted = 3
	// maxChecks is how many signatures are checked: of maxAccepted and the leaf,
	// and two wrong guesses among issuers of the same name.
	maxChecks = 6
	// maxRSABits bounds keys that strangers or devices choose.
	maxRSABits = 4096
)

var (
	errKey       = errors.New("its key is neither RSA of at most 4096 bits nor on P-256, P-384, P-521 or Ed25519")
	errNoIssuer  = errors.New("its issuer is no configured CA, and no certificate that came with it leads to one")
	errSignature = errors.New("it names a configured CA as its issuer, or one below, which did not sign it")
)

// issuerIndex finds CA certificates by the raw subject.
type issuerIndex map[string][]issuer

type issuer struct {
	cert   *x509.Certificate
	digest digest
}

// edge remembers whether one certificate's key signed another certificate. A
// signature that does not hold is forgotten after a while, to make room.
type edge struct {
	signed bool
	until  time.Time
}

// indexIssuers indexes the roots, and the intermediates that lead to one. detached
// are the other intermediates: what is missing above them may come with a request.
func indexIssuers(roots, intermediates []*x509.Certificate) (index issuerIndex, detached []*x509.Certificate) {
	index = make(issuerIndex)
	add := func(c *x509.Certificate) {
		index[string(c.RawSubject)] = append(index[string(c.RawSubject)], issuer{c, sha256.Sum256(c.Raw)})
	}
	for _, root := range roots {
		add(root)
	}
	issued := func(c *x509.Certificate) bool {
		return slices.ContainsFunc(index[string(c.RawIssuer)], func(i issuer) bool { return c.CheckSignatureFrom(i.cert) == nil })
	}
	detached = slices.Clone(intermediates)
	for at := slices.IndexFunc(detached, issued); at >= 0; at = slices.IndexFunc(detached, issued) {
		add(detached[at])
		detached = slices.Delete(detached, at, at+1)
	}
	return index, detached
}

// of returns the configured CAs that may have issued cert: the ones whose key id
// fits come first, as in crypto/x509, which also tries those whose key id differs.
func (x issuerIndex) of(cert *x509.Certificate) []issuer {
	named := x[string(cert.RawIssuer)]
	if len(named) < 2 {
		return named
	}
	named = slices.Clone(named)
	slices.SortStableFunc(named, func(a, b issuer) int {
		return int(keyIDFit(cert, a.cert)) - int(keyIDFit(cert, b.cert))
	})
	return named
}

type fit int

const (
	fits fit = iota
	unsaid
	differs
)

func keyIDFit(child, parent *x509.Certificate) fit {
	switch {
	case len(child.AuthorityKeyId) == 0 || len(parent.SubjectKeyId) == 0:
		return unsaid
	case bytes.Equal(child.AuthorityKeyId, parent.SubjectKeyId):
		return fits
	}
	return differs
}

// keyAllowed says whether computing with cert's key costs little.
func keyAllowed(cert *x509.Certificate) bool {
	switch key := cert.PublicKey.(type) {
	case *rsa.PublicKey:
		return key.N.BitLen() <= maxRSABits
	case *ecdsa.PublicKey:
		return key.Curve == elliptic.P256() || key.Curve == elliptic.P384() || key.Curve == elliptic.P521()
	case ed25519.PublicKey:
		return true
	}
	return false
}

// search looks for issuers of one certificate among those that came with it.
// Names and key ids are compared upwards, signatures are checked downwards: a key
// is computed with only if it is a configured CA's, or certified by one already.
type search struct {
	v          *Verifier
	now        time.Time
	candidates []candidate
	accepted   []*x509.Certificate // a configured CA issued these, or one before them did
	sent       int                 // of accepted
	named      bool                // some configured CA was named as an issuer
	checks     int
}

// candidate is a certificate that may be an issuer in the chain.
type candidate struct {
	cert       *x509.Certificate
	configured bool // a detached intermediate
	seen       bool
}

// findIssuers returns the candidates that lead from a configured
// CA to cert, and an error if neither they nor a configured CA issued it.
func (v *Verifier) findIssuers(cert *x509.Certificate, leaf digest, sent []*x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	if v.isRoot[leaf] {
		return nil, nil
	}
	if !keyAllowed(cert) {
		return nil, errKey
	}
	s := &search{v: v, now: now}
	for _, c := range v.detached {
		s.candidates = append(s.candidates, candidate{cert: c, configured: true})
	}
	for _, c := range sent[:min(len(sent), maxSent)] {
		if !slices.ContainsFunc(v.configured, c.Equal) {
			s.candidates = append(s.candidates, candidate{cert: c})
		}
	}
	s.accept(cert)
	switch {
	case s.issued(cert):
		return s.accepted, nil
	case s.named:
		return nil, errSignature
	}
	return nil, errNoIssuer
}

// accept accepts the candidates that may be issuers of child, those above them
// first.
func (s *search) accept(child *x509.Certificate) {
	for i := range s.candidates {
		c := &s.candidates[i]
		if c.seen || !mayIssue(c.cert, child) {
			continue
		}
		c.seen = true
		s.accept(c.cert)
		if !c.configured && s.sent == maxAccepted || !s.issued(c.cert) {
			continue
		}
		s.accepted = append(s.accepted, c.cert)
		if !c.configured {
			s.sent++
		}
	}
}

// issued says whether a configured CA or an accepted certificate issued cert.
func (s *search) issued(cert *x509.Certificate) bool {
	for _, ca := range s.v.issuers.of(cert) {
		s.named = true
		if s.signed(cert, ca.cert, ca.digest) {
			return true
		}
	}
	return slices.ContainsFunc(s.accepted, func(parent *x509.Certificate) bool {
		return mayIssue(parent, cert) && s.signed(cert, parent, sha256.Sum256(parent.Raw))
	})
}

// mayIssue says whether a certificate that was sent looks like the issuer of
// another one.
func mayIssue(parent, child *x509.Certificate) bool {
	return bytes.Equal(parent.RawSubject, child.RawIssuer) && keyIDFit(child, parent) != differs &&
		parent.IsCA && parent.BasicConstraintsValid && keyAllowed(parent)
}

// signed checks, or remembers, that parent issued child. Past maxChecks it says
// no.
func (s *search) signed(child, parent *x509.Certificate, parentID digest) bool {
	key := combine(sha256.Sum256(child.Raw), parentID)
	if e, ok := s.v.edges.get(key); ok && (e.signed || s.now.Before(e.until)) {
		return e.signed
	}
	if s.checks == maxChecks {
		return false
	}
	s.checks++
	s.v.checked()
	err := child.CheckSignatureFrom(parent)
	s.v.edges.put(key, edge{signed: err == nil, until: s.now.Add(refusalLife)})
	return err == nil
}
