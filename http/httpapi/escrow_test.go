package httpapi_test

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/storage"
)

func TestEscrowKeyUnlock(t *testing.T) {
	o := newOperators(t)
	const topic = "com.apple.mgmt.External.1"
	o.certify(topic)
	type asked struct {
		query, form url.Values
		subject     string
	}
	got := make(chan asked, 1)
	apple := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_ = r.ParseForm()
		got <- asked{r.URL.Query(), r.PostForm, r.TLS.PeerCertificates[0].Subject.CommonName}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("X-Apple", "yes")
		w.WriteHeader(http.StatusPaymentRequired)
		_, _ = io.WriteString(w, `{"code":"x"}`)
	}))
	clients := x509.NewCertPool()
	clients.AppendCertsFromPEM(o.apns.CAPEM())
	apple.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients}
	apple.StartTLS()
	defer apple.Close()
	pool := x509.NewCertPool()
	pool.AddCert(apple.Certificate())
	api, err := httpapi.New(mainKey, o.store, o.pusher, httpapi.Config{
		Logger: slog.New(slog.NewTextHandler(o.log, nil)), Now: o.clock, EscrowURL: apple.URL + "/unlock", EscrowCAs: pool,
	})
	require.NoError(t, err)
	mux := http.NewServeMux()
	api.Register(mux)
	full := url.Values{
		"topic": {topic}, "serial": {"S1"}, "productType": {"iPad1,1"}, "escrowKey": {"very-secret"}, "orgName": {"Org & Co"}, "guid": {"G"},
		"imei": {"1"}, "imei2": {"2"}, "meid": {"3"}, "other": {"x"},
	}
	post := func(c call, form url.Values) (int, string, http.Header) {
		r := httptest.NewRequestWithContext(t.Context(), "POST", "/v1/escrowkeyunlock", strings.NewReader(form.Encode()))
		r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		r.Header.Set("Authorization", "Bearer "+c.key)
		w := httptest.NewRecorder()
		mux.ServeHTTP(w, r)
		documented(t, "POST", "/v1/escrowkeyunlock", "", w.Code, w.Header(), w.Body.String())
		return w.Code, w.Body.String(), w.Header()
	}
	main := call{key: mainKey}
	status, body, header := post(main, full)
	require.Equal(t, http.StatusPaymentRequired, status, body)
	require.Equal(t, `{"code":"x"}`, body)
	require.Equal(t, []string{"yes", "application/json"}, []string{header.Get("X-Apple"), header.Get("Content-Type")})
	require.Equal(t, asked{
		query: url.Values{"serial": {"S1"}, "productType": {"iPad1,1"}, "imei": {"1"}, "imei2": {"2"}, "meid": {"3"}},
		form:  url.Values{"orgName": {"Org & Co"}, "guid": {"G"}, "escrowKey": {"very-secret"}}, subject: "APSP:" + topic,
	}, <-got)
	for _, name := range []string{"imei", "imei2", "meid"} {
		full.Del(name)
	}
	status, _, _ = post(main, full)
	require.Equal(t, http.StatusPaymentRequired, status)
	require.Len(t, (<-got).query, 2)

	fails := func(c call, want int, text string, change func(url.Values)) {
		t.Helper()
		form := url.Values{}
		for name, values := range full {
			form[name] = values
		}
		change(form)
		status, body, _ := post(c, form)
		require.Equal(t, want, status, body)
		var e struct{ Error string }
		require.NoError(t, json.Unmarshal([]byte(body), &e))
		require.Contains(t, e.Error, text)
	}
	for _, name := range []string{"topic", "serial", "productType", "escrowKey", "orgName", "guid"} {
		fails(main, 400, name+": it is missing", func(v url.Values) { v.Del(name) })
	}
	fails(main, 500, "no push certificate", func(v url.Values) { v.Set("topic", "x") })
	fails(call{key: o.makeKey("bound", "admin", "x")}, 500, "no push certificate", func(url.Values) {})
	fails(call{key: o.makeKey("enqueue", "enqueue")}, 403, "role", func(url.Values) {})
	apple.Close()
	fails(main, 500, "Apple's service did not answer", func(url.Values) {})

	records, err := o.store.AuditRecords(t.Context(), storage.AuditFilter{Action: "escrowkey.unlock"}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 3)
	for _, r := range records {
		require.Equal(t, "S1", r.Target)
		require.NotContains(t, r.Detail+r.Outcome, "very-secret")
	}
	require.NotContains(t, o.log.String(), "very-secret")
}
