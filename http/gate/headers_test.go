package gate_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/gate"
)

// counted is a server with a budget for headers, and how many it turned away.
func counted(t *testing.T, bytes int64, secure bool, handler http.HandlerFunc) (*httptest.Server, *atomic.Int64) {
	t.Helper()
	turned := &atomic.Int64{}
	server := httptest.NewUnstartedServer(handler)
	server.Config.MaxHeaderBytes = 1 << 20
	server.Listener = gate.NewHeaders(bytes).Serve(server.Config, server.Listener, func() { turned.Add(1) })
	if secure {
		server.EnableHTTP2 = true
		server.StartTLS()
	} else {
		server.Start()
	}
	t.Cleanup(server.Close)
	return server, turned
}

// TestHeadersShareABudget: of connections that send long headers and do not end
// them, those beyond the budget of all are cut. Others are served, and what was
// held is free again when the requests end.
func TestHeadersShareABudget(t *testing.T) {
	const room = 4
	server, turned := counted(t, room*(100<<10)*gate.HeaderCopies, false, func(http.ResponseWriter, *http.Request) {})
	for range 3 {
		before := turned.Load()
		var conns []net.Conn
		for range room + 1 {
			conn, err := net.Dial("tcp", strings.TrimPrefix(server.URL, "http://"))
			require.NoError(t, err)
			defer conn.Close() // kept until the end: an idle connection holds nothing
			_, err = io.WriteString(conn, "GET /"+strings.Repeat("x", 110<<10))
			require.NoError(t, err)
			conns = append(conns, conn)
		}
		require.Eventually(t, func() bool { return turned.Load() > before }, 20*time.Second, time.Millisecond, "no connection is cut")
		resp, err := http.Get(server.URL + "/short")
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, 200, resp.StatusCode)
		served := 0
		for _, conn := range conns {
			if _, err := io.WriteString(conn, " HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
				continue
			}
			if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
				require.Equal(t, 200, resp.StatusCode)
				served++
			}
		}
		// Two that read at the same moment may both be cut.
		require.EqualValues(t, room+1, int64(served)+turned.Load()-before)
		require.Positive(t, served)
	}
}

// TestHeadersOfHTTP2ShareABudget: a connection has many requests at once there.
func TestHeadersOfHTTP2ShareABudget(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	server, turned := counted(t, (100<<10)*gate.HeaderCopies, true, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/held" {
			entered <- struct{}{}
			<-leave
		}
		fmt.Fprint(w, r.Proto)
	})
	ask := func(path string) (int, string) {
		req, err := http.NewRequest("GET", server.URL+path, nil)
		require.NoError(t, err)
		req.Header.Set("Long", strings.Repeat("x", 100<<10))
		resp, err := server.Client().Do(req)
		require.NoError(t, err)
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		require.NoError(t, err)
		return resp.StatusCode, string(text)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		status, proto := ask("/held")
		if status != 200 || proto != "HTTP/2.0" {
			t.Errorf("held: %d %s", status, proto)
		}
	}()
	<-entered
	status, _ := ask("/")
	require.Equal(t, 503, status)
	require.EqualValues(t, 1, turned.Load())
	close(leave)
	<-done
	status, _ = ask("/")
	require.Equal(t, 200, status)
}

// TestBodiesAreNoHeaders: a body is not counted, however large.
func TestBodiesAreNoHeaders(t *testing.T) {
	server, turned := counted(t, 1<<10, false, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	for range 3 {
		resp, err := http.Post(server.URL, "", strings.NewReader(strings.Repeat("x", 1<<20)))
		require.NoError(t, err)
		require.NoError(t, resp.Body.Close())
		require.Equal(t, 200, resp.StatusCode)
	}
	require.Zero(t, turned.Load())
}

// TestMemoryOfHeaders counts what is allocated for a long URL.
func TestMemoryOfHeaders(t *testing.T) {
	server, _ := counted(t, 64<<20, false, func(http.ResponseWriter, *http.Request) {})
	target, err := url.Parse(server.URL)
	require.NoError(t, err)
	conn, err := net.Dial("tcp", target.Host)
	require.NoError(t, err)
	defer conn.Close()
	text := []byte("GET /v1/push/" + strings.Repeat("a%2C", 200<<10) + " HTTP/1.1\r\nHost: x\r\n\r\n")
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = conn.Write(text)
	require.NoError(t, err)
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	require.NoError(t, err)
	runtime.ReadMemStats(&after)
	require.Equal(t, 200, resp.StatusCode)
	times := float64(after.TotalAlloc-before.TotalAlloc) / float64(len(text))
	t.Logf("%.2f bytes for each byte of the header", times)
	require.Greater(t, times, 1.0)
	require.LessOrEqual(t, times, float64(gate.HeaderCopies))
}
