package requestlog

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

var trusted = []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::1/128")}

const parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

func TestClient(t *testing.T) {
	for _, c := range []struct {
		name, peer string
		forwarded  []string
		want       string
	}{
		{"no proxy", "192.0.2.1:99", nil, "192.0.2.1"},
		{"a stranger's header", "192.0.2.1:99", []string{"198.51.100.7"}, "192.0.2.1"},
		{"one proxy", "10.1.1.1:99", []string{"198.51.100.7"}, "198.51.100.7"},
		{"what the client claimed", "10.1.1.1:99", []string{"1.1.1.1, 198.51.100.7"}, "198.51.100.7"},
		{"two proxies", "10.1.1.1:99", []string{"1.1.1.1, 198.51.100.7, 10.2.2.2"}, "198.51.100.7"},
		{"two headers", "10.1.1.1:99", []string{"1.1.1.1", "198.51.100.7,10.2.2.2"}, "198.51.100.7"},
		{"proxies only", "10.1.1.1:99", []string{"10.3.3.3"}, "10.3.3.3"},
		{"no header", "10.1.1.1:99", nil, "10.1.1.1"},
		{"not an address", "10.1.1.1:99", []string{"198.51.100.7, unknown"}, "10.1.1.1"},
		{"behind a proxy not an address", "10.1.1.1:99", []string{"unknown, 10.2.2.2"}, "10.2.2.2"},
		{"port", "10.1.1.1:99", []string{"198.51.100.7:1234"}, "198.51.100.7"},
		{"IPv6", "[::1]:99", []string{"2001:db8::1"}, "2001:db8::1"},
		{"IPv6 in brackets", "[::1]:99", []string{"[2001:db8::1]"}, "2001:db8::1"},
		{"IPv6 with port", "[::1]:99", []string{"[2001:db8::1]:80"}, "2001:db8::1"},
		{"IPv4 in IPv6", "[::ffff:10.1.1.1]:99", []string{"::ffff:198.51.100.7"}, "198.51.100.7"},
		{"endless", "10.1.1.1:99", []string{strings.Repeat("10.9.9.9,", 100) + "10.8.8.8"}, "10.9.9.9"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var got string
			var log bytes.Buffer
			h := Middleware(slog.New(slog.NewTextHandler(&log, nil)), Config{Trusted: trusted}, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				got = Client(r.Context())
				w.WriteHeader(http.StatusNotFound)
			}))
			r := httptest.NewRequest("PUT", "/mdm?secret=1", nil)
			r.RemoteAddr = c.peer
			r.Header["X-Forwarded-For"] = c.forwarded
			h.ServeHTTP(httptest.NewRecorder(), r)
			require.Equal(t, c.want, got)
			require.Contains(t, log.String(), "client="+c.want)
			require.NotContains(t, log.String(), "secret")
		})
	}
}

func TestTraceParent(t *testing.T) {
	ask := func(peer string, networks []netip.Prefix, values ...string) string {
		var got string
		h := Middleware(slog.New(slog.DiscardHandler), Config{Trusted: networks}, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			got = TraceParent(r.Context())
		}))
		r := httptest.NewRequest("PUT", "/mdm", nil)
		r.RemoteAddr = peer
		r.Header["Traceparent"] = values
		h.ServeHTTP(httptest.NewRecorder(), r)
		return got
	}
	require.Equal(t, parent, ask("10.0.0.1:1", trusted, parent))
	require.Empty(t, ask("192.0.2.1:1", trusted, parent), "a stranger's")
	require.Equal(t, parent, ask("192.0.2.1:1", nil, parent))
	require.Empty(t, ask("10.0.0.1:1", trusted, parent, parent))
	require.Equal(t, "01"+parent[2:], ask("10.0.0.1:1", trusted, "01"+parent[2:]+"-more"))
	for _, bad := range []string{
		"", "x", parent + "-more", "ff" + parent[2:], strings.ToUpper(parent), parent[:54],
		strings.Replace(parent, "00f067aa0ba902b7", "0000000000000000", 1),
		strings.Replace(parent, "4bf92f3577b34da6a3ce929d0e0e4736", strings.Repeat("0", 32), 1),
		strings.Replace(parent, "-", "_", 1), "01" + parent[2:] + "more",
	} {
		require.Empty(t, ask("10.0.0.1:1", trusted, bad), bad)
	}
}

func TestUnixSocketIsATrustedHop(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	listener, err := net.Listen("unix", path)
	require.NoError(t, err)
	got := make(chan [2]string, 1)
	srv := httptest.NewUnstartedServer(Middleware(slog.New(slog.DiscardHandler), Config{}, http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		got <- [2]string{Client(r.Context()), TraceParent(r.Context())}
	})))
	require.NoError(t, srv.Listener.Close())
	srv.Listener = listener
	srv.Start()
	defer srv.Close()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequest("GET", "http://x/", nil)
	require.NoError(t, err)
	req.Header.Set("X-Forwarded-For", "1.1.1.1, 198.51.100.7")
	req.Header.Set("Traceparent", parent)
	resp, err := client.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, [2]string{"198.51.100.7", parent}, <-got)
}

func TestPanicsAreCounted(t *testing.T) {
	n := 0
	var log bytes.Buffer
	h := Middleware(slog.New(slog.NewTextHandler(&log, nil)), Config{Panicked: func() { n++ }}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("boom") }))
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("PUT", "/mdm", nil))
	require.Equal(t, 500, w.Code)
	require.Equal(t, 1, n)
	require.Contains(t, log.String(), "boom")
}

// An answer that a panic ended must not look complete.
func TestPanicCutsAnAnswerThatHasBegun(t *testing.T) {
	var log bytes.Buffer
	srv := httptest.NewServer(Middleware(slog.New(slog.NewTextHandler(&log, nil)), Config{}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, strings.Repeat("half", 4<<10))
		panic("boom")
	})))
	resp, err := http.Get(srv.URL)
	if err == nil {
		_, err = io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
	}
	require.Error(t, err)
	srv.Close()
	require.Contains(t, log.String(), "boom")
}

func TestLevels(t *testing.T) {
	for status, level := range map[int]string{200: "DEBUG", 503: "DEBUG", 400: "INFO", 404: "INFO", 500: "ERROR", 502: "ERROR"} {
		var log bytes.Buffer
		logger := slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
		h := Middleware(logger, Config{}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(status) }))
		h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("PUT", "/mdm", nil))
		require.Contains(t, log.String(), "level="+level+" ", status)
	}
}

func FuzzOrigin(f *testing.F) {
	f.Add("1.1.1.1, [::1]:3", parent)
	f.Add("10.0.0.1,,", "01-"+parent[3:]+"-x")
	f.Fuzz(func(t *testing.T, forwarded, trace string) {
		client := forwardedFor([]string{forwarded}, "192.0.2.1", trusted)
		_, err := netip.ParseAddr(client)
		require.NoError(t, err, "the log gets an address and nothing else")
		if got := parseTraceParent([]string{trace}); got != "" {
			require.Len(t, got, len(parent))
			require.Equal(t, got, parseTraceParent([]string{got}))
		}
	})
}
