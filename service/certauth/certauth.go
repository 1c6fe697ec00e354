// Package certauth binds device identities to enrollments. It annotates each
// request with the certificate that has to be pinned; the store checks and
// pins in the transaction of the change itself, so that no check goes stale
// before its change.
package certauth

import (
	"context"
	"errors"
	"net/http"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// Config holds the policies; the zero value pins at Authenticate only.
type Config struct {
	// Retro lets an enrollment without any pinned certificate take the one
	// that it shows, as is needed after a migration that lost the pins.
	Retro bool
}

var errNoCertificate = errors.New("request without a device certificate")

// New returns the middleware. A request without a certificate is refused
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
			}
			return next.Handle(ctx, r)
		})
	}
}
