// Package callout holds what requests to configured services have in common:
// webhook receivers, the authenticate hook, the declarative management
// backend. A callout follows no redirect, is signed with HMAC-SHA256 as
// NanoMDM signs, and its errors do not show the URL, which may hold a
// password.
package callout

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
)

// Headers of callouts.
const (
	// HeaderSignature is the Base64 of the body's MAC.
	HeaderSignature = "X-Hmac-Signature"
	// HeaderTraceID is the ID of the device's HTTP request.
	HeaderTraceID = "X-Trace-ID"
	// HeaderTraceParent is that of the device's request (W3C Trace Context).
	HeaderTraceParent = "Traceparent"
)

// Client returns a client that hands out redirects as answers: following one
// could lead the body and its signature to a server that nobody configured. A
// nil transport is http.DefaultTransport.
func Client(transport http.RoundTripper) *http.Client {
	return &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// Transport returns http.DefaultTransport, or a copy of it that verifies servers
// by roots. Nil roots are the system's.
func Transport(roots *x509.CertPool) http.RoundTripper {
	standard, ok := http.DefaultTransport.(*http.Transport)
	if roots == nil || !ok {
		return http.DefaultTransport
	}
	transport := standard.Clone()
	transport.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	return transport
}

// MAC is the HMAC-SHA256 of the parts, one after the other.
func MAC(key []byte, parts ...[]byte) []byte {
	m := hmac.New(sha256.New, key)
	for _, p := range parts {
		m.Write(p)
	}
	return m.Sum(nil)
}

// Sign sets HeaderSignature. An empty key signs nothing.
func Sign(h http.Header, key, body []byte) {
	if len(key) > 0 {
		h.Set(HeaderSignature, base64.StdEncoding.EncodeToString(MAC(key, body)))
	}
}

// Signed reports whether HeaderSignature is that of the body. An empty key
// checks nothing.
func Signed(h http.Header, key, body []byte) bool {
	if len(key) == 0 {
		return true
	}
	got, err := base64.StdEncoding.DecodeString(h.Get(HeaderSignature))
	return err == nil && hmac.Equal(got, MAC(key, body))
}

// WithoutURL drops the URL from an error of package http.
func WithoutURL(err error) error {
	if u := (*url.Error)(nil); errors.As(err, &u) {
		return u.Err
	}
	return err
}
