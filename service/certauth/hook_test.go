package certauth_test

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/certauth"
	"github.com/nanomdm/nanomdm/storage"
)

func identity(t *testing.T, name string) *mdmtest.Identity {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	id, err := ca.Issue(name)
	require.NoError(t, err)
	return id
}

// request is one that went through the middleware.
func request(t *testing.T, msg mdm.Message) *service.Request {
	t.Helper()
	id := identity(t, "UDID-1234")
	return &service.Request{
		ID: "request-1", TraceParent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", Message: msg,
		Enroll: mdm.EnrollID{Type: mdm.Device, ID: "UDID-1234"}, Params: map[string]string{"ticket": "t1"}, Certificate: id.Cert,
		Pin: &storage.Pin{Hash: cryptoutil.CertificateHash(id.Cert), Certificate: id.Cert.Raw, NotAfter: id.Cert.NotAfter},
	}
}

func authenticate() *mdm.Authenticate {
	return &mdm.Authenticate{Enrollment: mdm.Enrollment{UDID: "UDID-1234"}, SerialNumber: "C02XL0GYJGH5", Raw: []byte("<plist/>")}
}

func TestHookQuestion(t *testing.T) {
	var got *http.Request
	var body []byte
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		body, _ = io.ReadAll(r.Body)
	}))
	defer srv.Close()
	hook, err := certauth.NewHook(srv.URL+"/ask?x=1", certauth.HookConfig{Key: []byte("key")})
	require.NoError(t, err)
	r := request(t, authenticate())
	require.NoError(t, hook.Confirm(t.Context(), r))

	require.Equal(t, "POST", got.Method)
	require.Equal(t, "/ask?x=1", got.URL.String())
	require.Equal(t, "application/json; charset=utf-8", got.Header.Get("Content-Type"))
	require.Equal(t, r.ID, got.Header.Get("X-Trace-ID"))
	require.Equal(t, r.TraceParent, got.Header.Get("Traceparent"))
	mac := hmac.New(sha256.New, []byte("key"))
	mac.Write(body)
	require.Equal(t, base64.StdEncoding.EncodeToString(mac.Sum(nil)), got.Header.Get("X-Hmac-Signature"))
	var question map[string]any
	require.NoError(t, json.Unmarshal(body, &question))
	cert := question["certificate"].(map[string]any)
	require.Equal(t, r.Pin.Hash, cert["sha256"])
	require.Equal(t, "CN=UDID-1234", cert["subject"])
	require.Equal(t, r.Certificate.SerialNumber.Text(16), cert["serial_number"])
	require.Equal(t, r.Certificate.NotAfter.UTC().Format(time.RFC3339), cert["not_after"])
	require.Contains(t, cert["pem"], "-----BEGIN CERTIFICATE-----")
	delete(question, "certificate")
	require.Equal(t, map[string]any{
		"message_type": "Authenticate", "ids": map[string]any{"id": "UDID-1234", "type": "Device"}, "udid": "UDID-1234",
		"url_params": map[string]any{"ticket": "t1"}, "raw_payload": base64.StdEncoding.EncodeToString([]byte("<plist/>")),
	}, question)

	// A message that may hold a token or a result is not sent along.
	r.Message = &mdm.TokenUpdate{Enrollment: mdm.Enrollment{UDID: "UDID-1234"}, UnlockToken: []byte("secret"), Raw: []byte("secret")}
	require.NoError(t, hook.Confirm(t.Context(), r))
	require.Contains(t, string(body), `"message_type":"TokenUpdate"`)
	require.NotContains(t, string(body), base64.StdEncoding.EncodeToString([]byte("secret")))
	require.NotContains(t, string(body), "raw_payload")
}

func TestHookAnswers(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer http.HandlerFunc
		want   int // 0: agreed
		doc    *mdm.ErrorDocument
	}{
		{"200", func(http.ResponseWriter, *http.Request) {}, 0, nil},
		{"200 with something", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "whatever") }, 0, nil},
		{"204", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(204) }, 0, nil},
		{"403", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(403) }, 403, &mdm.ErrorDocument{Code: "com.apple.unrecognized.device"}},
		{"403 with words", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(403)
			_, _ = io.WriteString(w, `{"message": "Ask IT.", "description": "not in the inventory", "code": "com.example.other"}`)
		}, 403, &mdm.ErrorDocument{Code: "com.apple.unrecognized.device", Message: "Ask IT.", Description: "not in the inventory"}},
		{"403 with nonsense", func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(403)
			_, _ = io.WriteString(w, `<html>`)
		}, 403, &mdm.ErrorDocument{Code: "com.apple.unrecognized.device"}},
		// What does not say no is not taken for one: a device that is told
		// so unenrolls.
		{"401", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) }, 503, nil},
		{"404", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404) }, 503, nil},
		{"500", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(500) }, 503, nil},
		{"201", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(201) }, 503, nil},
		{"a redirect", func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
		}, 503, nil},
		{"a broken connection", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, 503, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			var asked atomic.Int64
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked.Add(1)
				c.answer(w, r)
			}))
			defer srv.Close()
			hook, err := certauth.NewHook(srv.URL, certauth.HookConfig{Client: &http.Client{
				Transport:     &http.Transport{DisableKeepAlives: true},
				CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
			}})
			require.NoError(t, err)
			err = hook.Confirm(t.Context(), request(t, authenticate()))
			require.EqualValues(t, 1, asked.Load())
			if c.want == 0 {
				require.NoError(t, err)
				return
			}
			var se *service.StatusError
			require.ErrorAs(t, err, &se)
			require.Equal(t, c.want, se.Status)
			require.Equal(t, c.doc, se.Document)
			require.NotContains(t, err.Error(), srv.URL)
		})
	}
}

func TestHookIsAway(t *testing.T) {
	srv := httptest.NewServer(http.NotFoundHandler())
	srv.Close()
	hook, err := certauth.NewHook(strings.Replace(srv.URL, "://", "://user:hunter2@", 1), certauth.HookConfig{})
	require.NoError(t, err)
	var se *service.StatusError
	err = hook.Confirm(t.Context(), request(t, authenticate()))
	require.ErrorAs(t, err, &se)
	require.Equal(t, 503, se.Status)
	require.NotContains(t, err.Error(), "hunter2")

	for _, bad := range []string{"", "ftp://x", "http://", "http://user:hunter2@[", "/ask"} {
		_, err := certauth.NewHook(bad, certauth.HookConfig{})
		require.Error(t, err, bad)
		require.NotContains(t, err.Error(), "hunter2")
	}
}

// A hook that hangs takes few places, and its time is bounded.
func TestHookHangs(t *testing.T) {
	asked, release := make(chan struct{}), make(chan struct{})
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	defer srv.Close()
	defer close(release)
	hook, err := certauth.NewHook(srv.URL, certauth.HookConfig{MaxPerAddress: 2, Timeout: time.Minute})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	again := request(t, authenticate())
	again.Client = "192.0.2.1"
	go func() { first <- hook.Confirm(ctx, again) }()
	<-asked
	var se *service.StatusError
	for range 300 { // one device asks again and again
		err = hook.Confirm(t.Context(), again)
		require.ErrorAs(t, err, &se)
		require.Equal(t, 503, se.Status)
		require.ErrorContains(t, err, "too many")
	}
	another := request(t, authenticate())
	another.Enroll.ID, another.Client = "UDID-5678", again.Client
	second := make(chan error, 1)
	go func() { second <- hook.Confirm(ctx, another) }()
	<-asked // there is room for it
	third := request(t, authenticate())
	third.Enroll.ID, third.Client = "UDID-9012", again.Client
	require.ErrorContains(t, hook.Confirm(t.Context(), third), "too many", "its address has two")
	cancel() // the devices leave
	require.ErrorIs(t, <-second, context.Canceled)
	err = <-first
	require.ErrorIs(t, err, context.Canceled)
	require.ErrorAs(t, err, &se)
	require.Equal(t, 503, se.Status)

	short, err := certauth.NewHook(srv.URL, certauth.HookConfig{Timeout: time.Millisecond})
	require.NoError(t, err)
	go func() {
		select {
		case <-asked: // it may get so far
		case <-release:
		}
	}()
	err = short.Confirm(t.Context(), request(t, authenticate()))
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.ErrorAs(t, err, &se)
	require.Equal(t, 503, se.Status)
}

// confirmer is a Confirmer of a function.
type confirmer func(r *service.Request) error

func (c confirmer) Confirm(_ context.Context, r *service.Request) error { return c(r) }

func TestMiddleware(t *testing.T) {
	errHook := errors.New("no")
	for _, c := range []struct {
		name    string
		confirm certauth.Confirmer
		inner   []error // what the store says, call by call
		want    error
		calls   int
	}{
		{"nobody to ask", nil, []error{nil}, nil, 1},
		{"not to be pinned", confirmer(func(*service.Request) error { panic("asked") }), []error{nil}, nil, 1},
		{"refused by the store", confirmer(func(*service.Request) error { panic("asked") }), []error{storage.ErrIdentity}, storage.ErrIdentity, 1},
		{"agreed", confirmer(func(*service.Request) error { return nil }), []error{storage.ErrUnconfirmed, nil}, nil, 2},
		{"agreed, and somebody was faster", confirmer(func(*service.Request) error { return nil }), []error{storage.ErrUnconfirmed, storage.ErrIdentity}, storage.ErrIdentity, 2},
		{"not agreed", confirmer(func(*service.Request) error { return errHook }), []error{storage.ErrUnconfirmed}, errHook, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			var pins []storage.Pin
			h := certauth.New(certauth.Config{Retro: true, Reenroll: storage.ReenrollDeny, Renewal: storage.RenewalWindow, Confirm: c.confirm})(
				service.HandlerFunc(func(_ context.Context, r *service.Request) (*service.Response, error) {
					pins = append(pins, *r.Pin)
					return &service.Response{}, c.inner[len(pins)-1]
				}))
			r := request(t, authenticate())
			_, err := h.Handle(t.Context(), r)
			require.ErrorIs(t, err, c.want)
			require.Len(t, pins, c.calls)
			for i, pin := range pins {
				require.Equal(t, storage.Pin{
					Hash: cryptoutil.CertificateHash(r.Certificate), Certificate: r.Certificate.Raw, NotAfter: r.Certificate.NotAfter,
					Retro: true, Reenroll: storage.ReenrollDeny, Renewal: storage.RenewalWindow, Unconfirmed: c.confirm != nil && i == 0,
				}, pin)
			}
		})
	}
	h := certauth.New(certauth.Config{})(service.HandlerFunc(func(context.Context, *service.Request) (*service.Response, error) { panic("reached") }))
	_, err := h.Handle(t.Context(), &service.Request{Message: authenticate()})
	var se *service.StatusError
	require.ErrorAs(t, err, &se)
	require.Equal(t, 400, se.Status)
}
