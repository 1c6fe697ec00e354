package httpapi

import (
	"mime"
	"net/http"
	"strings"
)

// closed keeps browsers from interpreting, framing, caching and sharing the
// answers of a handler: some of them hold bytes that a device chose.
func closed(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		header := w.Header()
		header.Set("X-Content-Type-Options", "nosniff")
		header.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'; sandbox")
		header.Set("Cache-Control", "no-store")
		header.Set("Cross-Origin-Resource-Policy", "same-origin")
		next.ServeHTTP(w, r)
	})
}

// sameOrigin refuses requests that a page of another origin makes in a browser,
// whatever their method.
func (a *API) sameOrigin(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		checked := r.WithContext(r.Context())
		checked.Method = http.MethodPost // CrossOriginProtection passes GET
		if err := a.origins.Check(checked); err != nil {
			a.cfg.Refused(refusedCrossOrigin)
			writeError(w, r, http.StatusForbidden, "the request comes from a page of another origin")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// jsonOnly refuses bodies of other types than JSON, which forms of a web page
// can send.
func jsonOnly(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		contentType := r.Header.Get("Content-Type")
		media, _, _ := mime.ParseMediaType(contentType)
		if media != contentTypeJSON && (contentType != "" || r.ContentLength != 0) {
			writeError(w, r, http.StatusUnsupportedMediaType, "Content-Type: "+contentTypeJSON+" is wanted for the body")
			return
		}
		next.ServeHTTP(w, r)
	})
}

// fromBrowser reports whether a browser sent a request. It is not asked for
// Basic credentials: it would keep them and add them to requests of other pages.
func fromBrowser(r *http.Request) bool {
	for name := range r.Header {
		if strings.HasPrefix(name, "Sec-Fetch-") {
			return true
		}
	}
	return false
}
