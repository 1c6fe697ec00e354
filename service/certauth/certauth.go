// Package certauth binds device identities to enrollments. It annotates each
// request with the certificate that has to be pinned; the store checks and
// pins in the transaction of the change itself, so that no check goes stale
// before its change.
package certauth

import (
	"context"
	"crypto/x509"
	"errors"
	"net/http"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// Config holds the policies. The zero value pins at Authenticate alone, lets
// any certificate take an enrollment over there, and asks no Confirmer.
type Config struct {
	// Retro lets an enrollment without any pinned certificate take the one
	// that it shows, as is needed after a migration that lost the pins.
	Retro bool
	// Reenroll and Renewal say which certificates may take over an enrollment
	// that has another one.
	Reenroll storage.Reenroll
	Renewal  storage.Renewal
	// Expired is called for each message that was taken from a device whose
	// certificate has expired, which needs a verifier that lets it pass; may be
	// nil.
	Expired func()
	// Confirm is asked before a certificate is pinned; nil asks nobody.
	Confirm Confirmer
	// TopicCAs are the CAs that enroll devices to some APNs topics. Certificates
	// of any CA enroll devices to the others.
	TopicCAs map[string]Verifier
}

// Verifier checks that a certificate chains to some CAs.
type Verifier interface {
	Verify(cert *x509.Certificate, chain []*x509.Certificate) error
}

// Confirmer has the last word on who enrolls.
type Confirmer interface {
	// Confirm is called for a message whose certificate the policies allow to
	// be pinned to its enrollment. nil agrees; a *service.StatusError is the
	// answer to the device. It is called again for each message until one is
	// pinned, and by any number of goroutines.
	Confirm(ctx context.Context, r *service.Request) error
}

var errNoCertificate = errors.New("request without a device certificate")

// enrollsTo says to which APNs topics a certificate's CA enrolls devices. The
// topics' CAs are those that issue the certificates, so that no chain of the device
// is needed.
func (c *Config) enrollsTo(cert *x509.Certificate) func(topic string) bool {
	if len(c.TopicCAs) == 0 {
		return nil
	}
	return func(topic string) bool {
		cas, bound := c.TopicCAs[topic]
		return !bound || cas.Verify(cert, nil) == nil
	}
}

// New returns the middleware. It belongs innermost, right before core, since
// it may call what follows twice. A request without a certificate is refused
// with 400.
func New(cfg Config) service.Middleware {
	return func(next service.Handler) service.Handler {
		return service.HandlerFunc(func(ctx context.Context, r *service.Request) (*service.Response, error) {
			if r.Certificate == nil {
				return nil, &service.StatusError{Status: http.StatusBadRequest, Err: errNoCertificate}
			}
			r.Pin = &storage.Pin{
				Hash:        cryptoutil.CertificateHash(r.Certificate),
				Certificate: r.Certificate.Raw,
				NotAfter:    r.Certificate.NotAfter,
				Retro:       cfg.Retro,
				Reenroll:    cfg.Reenroll,
				Renewal:     cfg.Renewal,
				Unconfirmed: cfg.Confirm != nil,
				EnrollsTo:   cfg.enrollsTo(r.Certificate),
			}
			resp, err := next.Handle(ctx, r)
			if err == nil && cfg.Expired != nil && time.Now().After(r.Certificate.NotAfter) {
				cfg.Expired()
			}
			if cfg.Confirm == nil || !errors.Is(err, storage.ErrUnconfirmed) {
				return resp, err
			}
			// The question is asked outside of a transaction, which must not
			// wait for another server. The second call checks everything anew.
			if err := cfg.Confirm.Confirm(ctx, r); err != nil {
				return nil, err
			}
			r.Pin.Unconfirmed = false
			return next.Handle(ctx, r)
		})
	}
}
