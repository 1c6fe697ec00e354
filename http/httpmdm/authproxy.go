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

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/storage"
)

var errNotPinned = errors.New("certificate is not pinned to an enrollment")

type deviceKey struct{}

// AuthProxy returns a reverse proxy to target for requests of enrolled
// devices: the certificate must be pinned to an enrollment, whose id the
// target gets in X-Enrollment-ID, with the request's id in X-Trace-ID.
// prefix is cut from the path. A target that fails is a 502.
func (h *Handler) AuthProxy(prefix string, target *url.URL, pins storage.PinnedEnrollments) http.Handler {
	proxy := &httputil.ReverseProxy{
		Transport: h.cfg.AuthProxyTransport,
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(target)
			p.SetXForwarded()
			id, _ := p.In.Context().Value(deviceKey{}).(string)
			p.Out.Header.Set("X-Enrollment-ID", id)
			p.Out.Header.Set("X-Trace-ID", requestlog.ID(p.In.Context()))
			p.Out.Header.Del("Mdm-Signature")
			p.Out.Header.Del("Traceparent") // of a peer that is not trusted
			if trace := requestlog.TraceParent(p.In.Context()); trace != "" {
				p.Out.Header.Set("Traceparent", trace)
			}
		},
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			h.cfg.Logger.Warn("authproxy target failed", "request_id", requestlog.ID(r.Context()), "error", err)
			w.WriteHeader(http.StatusBadGateway)
		},
		ErrorLog: slog.NewLogLogger(h.cfg.Logger.Handler(), slog.LevelWarn),
	}
	return http.StripPrefix(prefix, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := h.identity.fromHeaders(r)
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		body, release, err := h.readBody(w, r, id.certificate)
		defer release()
		if err == nil {
			err = id.verifyBody(body)
		}
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		device, err := pins.EnrollmentByCertificate(r.Context(), cryptoutil.CertificateHash(id.certificate))
		if errors.Is(err, storage.ErrNotFound) {
			err = fmt.Errorf("%w: %w", errIdentity, errNotPinned)
		}
		if err != nil {
			h.fail(w, r, "", err)
			return
		}
		out := r.WithContext(context.WithValue(r.Context(), deviceKey{}, device))
		out.Body = io.NopCloser(bytes.NewReader(body))
		out.ContentLength = int64(len(body))
		proxy.ServeHTTP(w, out)
	}))
}
