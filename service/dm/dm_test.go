package dm_test

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/dm"
)

func mac(key, body string) string {
	h := hmac.New(sha256.New, []byte(key))
	h.Write([]byte(body))
	return base64.StdEncoding.EncodeToString(h.Sum(nil))
}

func request(endpoint, data string) *service.Request {
	return &service.Request{
		Message: &mdm.DeclarativeManagement{Endpoint: endpoint, Data: []byte(data)},
		Enroll:  mdm.EnrollID{Type: mdm.User, ID: "D1:U1", ParentID: "D1"},
	}
}

func TestCallout(t *testing.T) {
	var got *http.Request
	var gotBody string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		got = r
		b, _ := io.ReadAll(r.Body)
		gotBody = string(b)
		w.Header().Set("X-Hmac-Signature", mac("recv", `{"ok":1}`))
		_, _ = io.WriteString(w, `{"ok":1}`)
	}))
	defer srv.Close()
	backend, err := dm.New(srv.URL+"/ddm", dm.Config{SendKey: []byte("send"), RecvKey: []byte("recv")})
	require.NoError(t, err)

	resp, err := backend.Handle(t.Context(), request("declaration/configuration/a b/../c", ""))
	require.NoError(t, err)
	require.Equal(t, &service.Response{ContentType: "application/json", Body: []byte(`{"ok":1}`)}, resp)
	require.Equal(t, "GET", got.Method)
	require.Equal(t, "/ddm/declaration/configuration/a%20b%2F..%2Fc", got.URL.EscapedPath(), "the identifier stays one segment")
	require.Equal(t, "D1:U1", got.Header.Get("X-Enrollment-ID"))
	require.Equal(t, "User", got.Header.Get("X-Enrollment-Type"))
	require.Equal(t, "D1", got.Header.Get("X-Enrollment-ParentID"))
	require.Equal(t, mac("send", ""), got.Header.Get("X-Hmac-Signature"))

	_, err = backend.Handle(t.Context(), request("status", `{"StatusItems":{}}`))
	require.NoError(t, err)
	require.Equal(t, "PUT", got.Method)
	require.Equal(t, "application/json", got.Header.Get("Content-Type"))
	require.Equal(t, `{"StatusItems":{}}`, gotBody)
	require.Equal(t, mac("send", gotBody), got.Header.Get("X-Hmac-Signature"))
}

func TestBackendStatuses(t *testing.T) {
	for _, c := range []struct {
		backend  int
		location string
		want     int // of the reply or, if over 404, of the error
	}{
		{200, "", 0}, {204, "", 0}, {404, "", 404},
		{401, "", 502}, {403, "", 502}, {410, "", 502}, {500, "", 502}, {302, "http://192.0.2.1/", 502},
	} {
		srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if c.location != "" {
				w.Header().Set("Location", c.location)
			}
			w.WriteHeader(c.backend)
		}))
		backend, err := dm.New(srv.URL+"/", dm.Config{})
		require.NoError(t, err)
		resp, err := backend.Handle(t.Context(), request("tokens", ""))
		if c.want == 502 {
			var se *service.StatusError
			require.ErrorAs(t, err, &se, "backend %d", c.backend)
			require.Equal(t, 502, se.Status)
		} else {
			require.NoError(t, err)
			require.Equal(t, c.want, resp.Status)
			require.Empty(t, resp.Body)
		}
		srv.Close()
	}
}

func TestCalloutFails(t *testing.T) {
	release := make(chan struct{})
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		cfg     dm.Config
	}{
		"missing signature": {func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "x") }, dm.Config{RecvKey: []byte("k")}},
		"wrong signature": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X-Hmac-Signature", mac("other", "x"))
			_, _ = io.WriteString(w, "x")
		}, dm.Config{RecvKey: []byte("k")}},
		"too slow": {func(http.ResponseWriter, *http.Request) { <-release }, dm.Config{Timeout: 20 * time.Millisecond}},
		"too long": {func(w http.ResponseWriter, _ *http.Request) {
			_, _ = io.WriteString(w, strings.Repeat("x", 17<<20))
		}, dm.Config{}},
	} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(c.handler)
			backend, err := dm.New(srv.URL, c.cfg)
			require.NoError(t, err)
			_, err = backend.Handle(t.Context(), request("tokens", ""))
			var se *service.StatusError
			require.True(t, errors.As(err, &se))
			require.Equal(t, 502, se.Status)
			if name == "too slow" {
				close(release)
			}
			srv.Close()
		})
	}
}

// The endpoint is the device's to choose: it must not lead anywhere else.
func TestEndpointsOutsideAppleForms(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		t.Errorf("backend was asked for %s", r.URL)
	}))
	defer srv.Close()
	backend, err := dm.New(srv.URL, dm.Config{})
	require.NoError(t, err)
	for _, endpoint := range []string{"", "//192.0.2.1/x", "http://192.0.2.1/", "../admin", "declaration/configuration/..", "declaration/other/x", "tokens?x=1", "tokens/"} {
		_, err := backend.Handle(t.Context(), request(endpoint, ""))
		var se *service.StatusError
		require.ErrorAs(t, err, &se, "%q", endpoint)
		require.Equal(t, 400, se.Status, "%q", endpoint)
	}
}

func TestNewRefusesBadURLs(t *testing.T) {
	for _, base := range []string{"", "ftp://x/", "http://", "/path", "http://x/?q=1", "http://x/#f", "http://[::1"} {
		_, err := dm.New(base, dm.Config{})
		require.Error(t, err, base)
	}
}
