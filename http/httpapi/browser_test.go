package httpapi_test

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// No route that changes something, now or later, takes a request of another
// origin's page with an operator's credentials, nor a body as a form sends it, and
// every answer is closed to pages.
func TestEveryRouteRefusesForeignPages(t *testing.T) {
	o := newOperators(t)
	send := func(method, path string, header map[string]string, body string) *httptest.ResponseRecorder {
		r := httptest.NewRequestWithContext(t.Context(), method, path, strings.NewReader(body))
		r.SetBasicAuth(o.admin().user, o.admin().key)
		for name, value := range header {
			r.Header.Set(name, value)
		}
		w := httptest.NewRecorder()
		o.mux.ServeHTTP(w, r)
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin",
		} {
			require.Equal(t, want, w.Header().Get(name), "%s %s", method, path)
		}
		require.Contains(t, w.Header().Get("Content-Security-Policy"), "sandbox")
		require.Empty(t, w.Header().Get("Access-Control-Allow-Origin"))
		return w
	}
	changing := 0
	for _, route := range o.api.RoutesForTest() {
		path := inPath.ReplaceAllString(route.Path, "x")
		require.NotEqual(t, "{}", send("OPTIONS", path, map[string]string{"Origin": "https://evil.example", "Access-Control-Request-Method": route.Method}, "").Body.String())
		if route.Method == http.MethodGet && route.Role == "read" {
			continue
		}
		changing++
		for _, header := range []map[string]string{
			{"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}, {"Origin": "https://evil.example"}, {"Origin": "null"},
		} {
			w := send(route.Method, path, header, "")
			require.Equal(t, http.StatusForbidden, w.Code, "%s %s from %v: %s", route.Method, path, header, w.Body)
		}
		for _, form := range []string{"text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"} {
			w := send(route.Method, path, map[string]string{"Content-Type": form}, `{"add": ["x"]}`)
			require.GreaterOrEqual(t, w.Code, 400, "%s %s with %s", route.Method, path, form)
		}
	}
	require.Greater(t, changing, 30)
}
