package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"encoding/base64"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

func sqliteExec(t *testing.T, file, statement string) {
	t.Helper()
	db, err := sql.Open("sqlite", "file:"+(&url.URL{Path: file}).EscapedPath())
	require.NoError(t, err)
	defer db.Close()
	_, err = db.ExecContext(t.Context(), statement)
	require.NoError(t, err)
}

func overSocket(t *testing.T, path string) *http.Client {
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// A peer on the Unix socket is a trusted proxy, even where others are named.
func TestUnixSocket(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "mdm.sock")
	old, err := net.Listen("unix", socket)
	require.NoError(t, err)
	old.(*net.UnixListener).SetUnlinkOnClose(false)
	require.NoError(t, old.Close()) // left behind by a daemon that was killed

	d := start(t, "http", "-listen", "unix:"+socket, "-cert-header", "Client-Cert", "-trusted-proxies", "192.0.2.0/24")
	info, err := os.Stat(socket)
	require.NoError(t, err)
	require.Equal(t, fs.FileMode(0o660), info.Mode().Perm())
	require.NotContains(t, d.log.String(), "every peer that can reach the listener")

	id, err := d.ca.Issue("D1")
	require.NoError(t, err)
	dev, err := mdmtest.NewDevice("http://mdm/mdm", id, mdmtest.Config{UDID: "D1", Auth: mdmtest.AuthHeader, Client: overSocket(t, socket)})
	require.NoError(t, err)
	require.NoError(t, dev.Enroll(t.Context()))

	// The real client's address is in the log.
	req, err := http.NewRequest("PUT", "http://mdm/mdm", nil)
	require.NoError(t, err)
	req.Header.Set("X-Forwarded-For", "198.51.100.7")
	req.Header.Set("Client-Cert", ":"+base64.StdEncoding.EncodeToString(make([]byte, sha256.Size))+":")
	resp, err := overSocket(t, socket).Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 400, resp.StatusCode)
	require.Regexp(t, regexp.MustCompile(`msg=request .*status=400 .*client=198\.51\.100\.7`), d.log.String())

	_, err = listenUnix(socket)
	require.Error(t, err, "a socket that somebody answers on is not taken")
	d.stop()
	_, err = os.Stat(socket)
	require.ErrorIs(t, err, fs.ErrNotExist)
}

func TestListenUnixTakesNoFileAway(t *testing.T) {
	file := filepath.Join(t.TempDir(), "precious")
	require.NoError(t, os.WriteFile(file, []byte("x"), 0o600))
	_, err := listenUnix(file)
	require.Error(t, err)
	_, err = os.Stat(file)
	require.NoError(t, err)
}

// With -api-listen nothing of the API is on the devices' listener.
func TestAPIListen(t *testing.T) {
	d := start(t, "http", "-api-listen", "127.0.0.1:0", "-migration")
	api := "http://" + regexp.MustCompile(`api_listen=(\S+)`).FindStringSubmatch(d.log.String())[1]
	require.NoError(t, d.device("D1", mdmtest.Config{}).Enroll(t.Context()))
	get := func(url string) int {
		req, err := http.NewRequest("GET", url, nil)
		require.NoError(t, err)
		req.SetBasicAuth("nanomdm", testKey)
		resp, err := http.DefaultClient.Do(req)
		require.NoError(t, err)
		resp.Body.Close()
		return resp.StatusCode
	}
	for path, want := range map[string][2]int{ // on the devices' listener, on the API's
		"/metrics":        {404, 200},
		"/version":        {200, 200},
		"/healthz":        {200, 200},
		"/readyz":         {200, 200},
		"/mdm":            {405, 404},
		"/v1/sinks/none":  {404, 404},
		"/v1/events":      {404, 200},
		"/migration":      {404, 400},
		"/authproxy/file": {404, 404},
	} {
		require.Equal(t, want[0], get(d.url+path), "device side: %s", path)
		require.Equal(t, want[1], get(api+path), "API: %s", path)
	}
	resp, err := http.Get(api + "/metrics")
	require.NoError(t, err)
	resp.Body.Close()
	require.Equal(t, 401, resp.StatusCode)
}
