package httpapi

import (
	"cmp"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// escrowURL is Apple's service that removes Activation Lock from a device
	// with the bypass code of its server. Source: Apple, "Creating and using
	// bypass codes".
	escrowURL     = "https://deviceservices-external.apple.com/deviceservicesworkers/escrowKeyUnlock"
	escrowTimeout = 30 * time.Second
	// maxEscrowAnswer bounds the part of the answer that is passed on.
	maxEscrowAnswer = 1 << 20
)

// The parameters of Apple's query and form; those with a star are required.
var (
	escrowQuery = []string{"serial*", "productType*", "imei", "imei2", "meid"}
	escrowForm  = []string{"orgName*", "guid*", "escrowKey*"}
)

// escrowKeyUnlock passes a call to Apple with the push certificate of its
// topic, and passes Apple's answer back.
func (a *API) escrowKeyUnlock(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, a.cfg.MaxBody)
	resp, err := a.askEscrow(r)
	if err != nil {
		a.fail(w, r, err)
		return
	}
	defer resp.Body.Close()
	header := w.Header()
	for name, values := range resp.Header {
		if _, set := header[name]; !set && !hopByHop[name] { // what closed set stays
			header[name] = values
		}
	}
	w.WriteHeader(resp.StatusCode)
	_, _ = io.Copy(w, io.LimitReader(resp.Body, maxEscrowAnswer)) // a caller that is gone gets nothing
}

// hopByHop are headers of one connection (RFC 9110, 7.6.1), and the length,
// which the server sets itself.
var hopByHop = map[string]bool{
	"Connection": true, "Keep-Alive": true, "Proxy-Authenticate": true, "Proxy-Connection": true, "Te": true, "Trailer": true,
	"Transfer-Encoding": true, "Upgrade": true, "Content-Length": true,
}

// askEscrow makes Apple's request from the caller's form.
func (a *API) askEscrow(r *http.Request) (*http.Response, error) {
	if err := r.ParseForm(); err != nil {
		if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
			return nil, err
		}
		return nil, badRequest("the form cannot be read: %v", err)
	}
	topic := r.Form.Get("topic")
	if topic == "" {
		return nil, badRequest("topic: it is missing")
	}
	query, err := pick(r.Form, escrowQuery)
	if err != nil {
		return nil, err
	}
	form, err := pick(r.Form, escrowForm)
	if err != nil {
		return nil, err
	}
	if !covers(callerOf(r.Context()).scope, topic) {
		return nil, noPushCert(topic)
	}
	cert, err := a.store.PushCert(r.Context(), topic)
	switch {
	case errors.Is(err, storage.ErrNotFound):
		return nil, noPushCert(topic)
	case err != nil:
		return nil, err
	}
	pair, err := tls.X509KeyPair(cert.CertPEM, cert.KeyPEM)
	if err != nil {
		return nil, fmt.Errorf("reading the stored push certificate of %s: %w", topic, err)
	}
	resp, err := a.postEscrow(r, pair, query, form)
	outcome := "topic " + topic
	if resp != nil {
		outcome += fmt.Sprintf(", Apple's status %d", resp.StatusCode)
	}
	a.audit(r.Context(), actEscrowUnlock, query.Get("serial"), outcome, err)
	return resp, err
}

func noPushCert(topic string) error {
	return &problem{http.StatusInternalServerError, "there is no push certificate for the topic " + topic}
}

// pick copies parameters of a form.
func pick(from url.Values, names []string) (url.Values, error) {
	picked := make(url.Values)
	for _, name := range names {
		name, required := strings.CutSuffix(name, "*")
		switch value := from.Get(name); {
		case value != "":
			picked.Set(name, value)
		case required:
			return nil, badRequest("%s: it is missing", name)
		}
	}
	return picked, nil
}

func (a *API) postEscrow(r *http.Request, pair tls.Certificate, query, form url.Values) (*http.Response, error) {
	target := cmp.Or(a.cfg.EscrowURL, escrowURL) + "?" + query.Encode()
	req, err := http.NewRequestWithContext(r.Context(), http.MethodPost, target, strings.NewReader(form.Encode()))
	if err != nil {
		return nil, fmt.Errorf("making a request to Apple: %w", err)
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("User-Agent", "nanomdm")
	// Such calls are rare and use different certificates, so no connection is
	// kept.
	client := callout.Client(&http.Transport{
		Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, ForceAttemptHTTP2: true,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{pair}, RootCAs: a.cfg.EscrowCAs},
	})
	client.Timeout = escrowTimeout
	resp, err := client.Do(req)
	if err != nil {
		return nil, &problem{http.StatusInternalServerError, fmt.Sprintf("Apple's service did not answer: %v", callout.WithoutURL(err))}
	}
	return resp, nil
}
