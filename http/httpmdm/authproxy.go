package httpmdm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httputil"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

var (
	errNotPinned = errors.New("certificate is not pinned to an enrollment")
	errProxyPath = badRequest(errors.New("path that leaves the target's base, or that servers read differently"))
	errUpgraded  = errors.New("the target switched protocols, which nobody asked for")
	errStale     = fmt.Errorf("%w: a signature of an empty body needs a signing time of the last %s; use -cert-header or -tls-client-auth",
		errIdentity, signatureAge)
	errProxyMethod = &service.StatusError{Status: http.StatusMethodNotAllowed, Err: errors.New("method that is not passed on")}
)

// signatureAge is how far the signing time of an empty body's signature may be
// from the daemon's clock.
const signatureAge = 5 * time.Minute

// maxUnescapes is how often a target may decode a path once more.
const maxUnescapes = 3

type deviceKey struct{}

// proxyMethods are passed on to the target.
func proxyMethods() []string {
	return []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete}
}

// proxyHeaders are the only headers of a device that the target sees. Many
// targets take an underscore for a hyphen, so that leaving out the headers which
// AuthProxy sets by itself is not enough.
func proxyHeaders() []string {
	return []string{
		"Accept", "Accept-Encoding", "Accept-Language", "Cache-Control", "Content-Disposition", "Content-Language",
		"Content-Type", "If-Match", "If-Modified-Since", "If-None-Match", "If-Range", "If-Unmodified-Since", "Pragma",
		"Range", "User-Agent",
	}
}

// AuthProxy returns a reverse proxy to target for requests of enrolled devices:
// the certificate must be pinned to an enrollment that is neither checked out nor
// disabled, whose id the target gets in X-Enrollment-ID, with the request's id in
// X-Trace-ID. prefix is cut from the path. A target that fails is a 502.
//
// In signature mode the signature proves the body and not the path, and that of
// an empty body is the same for ever: it needs a signing time.
func (h *Handler) AuthProxy(prefix string, target *url.URL, active storage.ActiveEnrollments) http.Handler {
	proxy := &httputil.ReverseProxy{
		Transport: h.cfg.AuthProxyTransport,
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(target)
			p.SetXForwarded()
			id, _ := p.In.Context().Value(deviceKey{}).(string)
			p.Out.Header.Set("X-Enrollment-ID", id)
			p.Out.Header.Set("X-Trace-ID", requestlog.ID(p.In.Context()))
			if trace := requestlog.TraceParent(p.In.Context()); trace != "" {
				p.Out.Header.Set("Traceparent", trace)
			}
		},
		ModifyResponse: func(resp *http.Response) error {
			if resp.StatusCode == http.StatusSwitchingProtocols {
				return errUpgraded
			}
			return nil
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			h.cfg.Logger.Warn("authproxy target failed", "request_id", requestlog.ID(r.Context()), "error", err)
			w.WriteHeader(http.StatusBadGateway)
		},
		ErrorLog: slog.NewLogLogger(h.cfg.Logger.Handler(), slog.LevelWarn),
	}
	return http.StripPrefix(prefix, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		who, body, release, err := h.proxied(w, r, active)
		defer release()
		if err != nil {
			h.fail(w, r, who, err)
			return
		}
		proxy.ServeHTTP(w, forwarded(r, who.enrollment, body))
	}))
}

// proxied checks a request to AuthProxy and returns the device that it is of, or
// what is known of it.
func (h *Handler) proxied(w http.ResponseWriter, r *http.Request, active storage.ActiveEnrollments) (who speaker, body []byte, release func(), err error) {
	release = func() {}
	if !slices.Contains(proxyMethods(), r.Method) {
		return speaker{}, nil, release, errProxyMethod
	}
	if !plainPath(r.URL.Path) {
		return speaker{}, nil, release, errProxyPath
	}
	id, err := h.identity.fromHeaders(r)
	if err != nil {
		return id.speaker, nil, release, err
	}
	if body, release, err = h.readBody(w, r, id.certificate, nil); err != nil {
		return id.speaker, nil, release, err
	}
	if err := id.verifyBody(body); err != nil {
		return id.speaker, nil, release, err
	}
	if len(body) == 0 && !id.isFresh(time.Now()) {
		return id.speaker, nil, release, errStale
	}
	id.enrollment, err = active.ActiveEnrollmentByCertificate(r.Context(), cryptoutil.CertificateHash(id.certificate))
	if errors.Is(err, storage.ErrNotFound) {
		err = fmt.Errorf("%w: %w", errIdentity, errNotPinned)
	}
	return id.speaker, body, release, err
}

// forwarded is a request as the target gets it, but for its address.
func forwarded(r *http.Request, device string, body []byte) *http.Request {
	out := r.WithContext(context.WithValue(r.Context(), deviceKey{}, device))
	out.Header = make(http.Header)
	for _, name := range proxyHeaders() {
		if values := r.Header[name]; len(values) > 0 {
			out.Header[name] = values
		}
	}
	out.Trailer, out.TransferEncoding = nil, nil
	out.Body = io.NopCloser(bytes.NewReader(body))
	out.ContentLength = int64(len(body))
	return out
}

// plainPath says whether a decoded path means the same to all: it has no segment
// "..", with parameters or without, no backslash and no control character, and
// none appears if it is decoded again.
func plainPath(path string) bool {
	for range maxUnescapes {
		for _, c := range []byte(path) {
			if c == '\\' || c < ' ' || c == 0x7f {
				return false
			}
		}
		for segment := range strings.SplitSeq(path, "/") {
			if name, _, _ := strings.Cut(segment, ";"); name == ".." {
				return false
			}
		}
		again, err := url.PathUnescape(path)
		if err != nil || again == path {
			return true // a percent sign that is only that
		}
		path = again
	}
	return false
}
