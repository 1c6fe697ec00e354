package httpmdm

import (
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/http/requestlog"
)

// Verifier checks that a certificate chains to the configured CA.
type Verifier interface {
	// Verify may use chain, which the peer sent, to find a way to a root.
	Verify(cert *x509.Certificate, chain []*x509.Certificate) error
}

// Identity finds the certificate of a request. It has one mode, so that a
// request cannot choose how it proves its identity. Methods may be called
// concurrently.
type Identity struct {
	verifier Verifier
	mode     mode
	header   string
	trusted  []netip.Prefix
	// certs remembers parsed signers; parsing costs more than a lookup.
	certs *cryptoutil.CertificateCache
}

// cachedCertificates is how many signers' certificates are remembered, about
// 5 KB each, and twice that until garbage is collected. A poll of a device that
// is not among them costs some microseconds more.
const cachedCertificates = 2_000

type mode int

const (
	modeSignature mode = iota
	modeHeader
	modeTLS
)

// errIdentity marks every failure to say who sends; it is answered 400.
var errIdentity = errors.New("no acceptable device identity")

var (
	errPeer         = errors.New("certificate header from a peer that is not in -trusted-proxies")
	errUnusedHeader = errors.New("certificate header in a mode that does not use it; name it with -cert-header, or let the proxy remove it")
	errNoSignature  = errors.New("no Mdm-Signature header; is SignMessage set in the enrollment profile?")
	errSignatures   = errors.New("repeated Mdm-Signature header")
	errNoClientCert = errors.New("no TLS client certificate")
)

// SignatureIdentity believes Mdm-Signature: the device signs each body.
func SignatureIdentity(v Verifier) *Identity {
	return &Identity{verifier: v, mode: modeSignature, certs: cryptoutil.NewCertificateCache(cachedCertificates)}
}

// HeaderIdentity believes the named header if the peer is in one of the
// trusted networks or came through a Unix socket; with no networks, every peer
// is believed.
func HeaderIdentity(v Verifier, header string, trusted []netip.Prefix) *Identity {
	return &Identity{verifier: v, mode: modeHeader, header: header, trusted: trusted}
}

// TLSIdentity believes the client certificate of the connection itself.
func TLSIdentity(v Verifier) *Identity {
	return &Identity{verifier: v, mode: modeTLS}
}

// sender is a certificate that chains to the CA. In signature mode it is
// proven only once verifyBody has passed.
type sender struct {
	speaker
	signature *cryptoutil.MdmSignature
}

// fromHeaders finds the sender's certificate and checks its chain, before
// anything of the body is read. With an error the sender is what is known.
func (i *Identity) fromHeaders(r *http.Request) (*sender, error) {
	s, chain, err := i.extract(r)
	if err != nil {
		return &sender{}, fmt.Errorf("%w: %w", errIdentity, err)
	}
	if err := i.verifier.Verify(s.certificate, chain); err != nil {
		return s, fmt.Errorf("%w: %w", errIdentity, err)
	}
	s.chained = true
	return s, nil
}

// carriesCertificate returns the name of a header that holds a certificate, empty
// if there is none. The name does not matter: proxies are free to choose it.
func carriesCertificate(h http.Header) string {
	for name, values := range h {
		if name == signatureHeader {
			continue
		}
		for _, value := range values {
			if len(value) < shortestCertificate || len(value) > maxCertHeader || !isXFCC(value) && !strings.ContainsAny(value[:1], "-:ML%") {
				continue
			}
			if _, err := decodeCertHeader(value); err == nil {
				return name
			}
		}
	}
	return ""
}

// shortestCertificate is fewer characters than any certificate takes in a header.
const shortestCertificate = 200

const signatureHeader = "Mdm-Signature"

// extract refuses a certificate header that the mode does not use: it is either
// an attack, or a proxy sets the header and the daemon's option is missing,
// which must not go unnoticed.
func (i *Identity) extract(r *http.Request) (*sender, []*x509.Certificate, error) {
	if i.mode != modeHeader {
		if name := carriesCertificate(r.Header); name != "" {
			return nil, nil, fmt.Errorf("%s: %w", name, errUnusedHeader)
		}
	}
	switch i.mode {
	case modeHeader:
		if len(i.trusted) > 0 && !requestlog.TrustedPeer(r, i.trusted) {
			return nil, nil, fmt.Errorf("%w: %s", errPeer, r.RemoteAddr)
		}
		cert, chain, err := parseCertHeader(r.Header.Values(i.header))
		if err != nil {
			return nil, nil, fmt.Errorf("header %s: %w", i.header, err)
		}
		return &sender{speaker: speaker{certificate: cert}}, chain, nil
	case modeTLS:
		if r.TLS == nil || len(r.TLS.PeerCertificates) == 0 {
			return nil, nil, errNoClientCert
		}
		certs := r.TLS.PeerCertificates
		return &sender{speaker: speaker{certificate: certs[0]}}, certs[1:], nil
	}
	values := r.Header.Values(signatureHeader)
	switch {
	case len(values) == 0 || values[0] == "":
		return nil, nil, errNoSignature
	case len(values) > 1:
		return nil, nil, errSignatures
	}
	sig, err := i.certs.ParseMdmSignature(values[0])
	if err != nil {
		return nil, nil, err
	}
	return &sender{speaker: speaker{certificate: sig.Certificate()}, signature: sig}, sig.Chain(), nil
}

// isFresh says whether the sender spoke about now: a certificate from TLS or a
// proxy did, and a signature says when it was made, if at all.
func (s *sender) isFresh(now time.Time) bool {
	if s.signature == nil {
		return true
	}
	at, ok := s.signature.SigningTime()
	return ok && now.Sub(at).Abs() <= signatureAge
}

// verifyBody proves that the sender signed these bytes, where the mode needs
// it.
func (s *sender) verifyBody(body []byte) error {
	if s.signature == nil {
		return nil
	}
	if err := s.signature.Verify(body); err != nil {
		return fmt.Errorf("%w: %w", errIdentity, err)
	}
	return nil
}
