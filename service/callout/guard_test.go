package callout_test

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/service/callout"
)

func TestGuardAddresses(t *testing.T) {
	var none callout.Guard
	some := callout.Guard{Allowed: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("::1/128")}}
	for _, address := range []string{
		"127.0.0.1", "127.8.9.1", "10.2.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "0.1.2.3",
		"224.0.0.1", "255.255.255.255", "240.0.0.1", "198.18.0.1", "192.0.0.1",
		"::", "fe80::1", "fe80::1%eth0", "fd00::1", "fc00::1", "ff02::1", "fec0::1", "fd00:ec2::254",
		"::ffff:10.2.0.1", "::ffff:169.254.169.254", "::10.2.0.1", "64:ff9b::a02:1", "64:ff9b::7f00:1", "2002:a02:1::1", "2002:7f00:1::", "2001::1", "100::1",
	} {
		addr := netip.MustParseAddr(address)
		require.ErrorIs(t, none.Check(addr), callout.ErrInternal, address)
		require.ErrorIs(t, some.Check(addr), callout.ErrInternal, address)
	}
	for _, address := range []string{"8.8.8.8", "172.32.0.1", "192.169.0.1", "100.128.0.1", "2606:4700::1111", "64:ff9b::808:808", "2002:808:808::1", "::ffff:8.8.8.8"} {
		require.NoError(t, none.Check(netip.MustParseAddr(address)), address)
	}
	for _, address := range []string{"10.1.2.3", "::ffff:10.1.2.3", "::1"} {
		require.ErrorIs(t, none.Check(netip.MustParseAddr(address)), callout.ErrInternal, address)
		require.NoError(t, some.Check(netip.MustParseAddr(address)), address)
	}
	require.Error(t, none.Check(netip.Addr{}))
}

func TestGuardURLs(t *testing.T) {
	var g callout.Guard
	for _, text := range []string{"http://127.0.0.1/", "https://[::1]:8443/x", "http://localhost", "http://LOCALHOST.:80/", "http://a.localhost/", "http://[fe80::1%25eth0]/"} {
		require.ErrorIs(t, g.CheckURL(text), callout.ErrInternal, text)
	}
	for _, text := range []string{"https://hook.example.org/", "http://8.8.8.8/"} {
		require.NoError(t, g.CheckURL(text), text)
	}
	require.Error(t, g.CheckURL("http://[")) // no URL at all
}

// A name is checked by the address that the connection is made to, whatever
// it resolved to before; and a proxy does not lead around the check.
func TestGuardTransport(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer srv.Close()
	_, port, err := net.SplitHostPort(srv.Listener.Addr().String())
	require.NoError(t, err)
	client := func(g callout.Guard, proxy *url.URL) *http.Client {
		dialer := net.Dialer{ControlContext: g.Control}
		guarded := &http.Transport{DialContext: dialer.DialContext}
		proxied := &http.Transport{Proxy: func(*http.Request) (*url.URL, error) { return proxy, nil }}
		c := callout.Client(g.Transport(guarded, proxied))
		t.Cleanup(c.CloseIdleConnections)
		return c
	}
	get := func(c *http.Client, to string) error {
		req, err := http.NewRequestWithContext(context.Background(), http.MethodGet, to, nil)
		require.NoError(t, err)
		resp, err := c.Do(req)
		if err == nil {
			err = resp.Body.Close()
		}
		return err
	}
	proxy, err := url.Parse(srv.URL)
	require.NoError(t, err)
	allowed := callout.Guard{Allowed: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8"), netip.MustParsePrefix("::1/128")}}
	for _, to := range []string{srv.URL, "http://localhost:" + port} { // the name comes from a resolver
		require.ErrorIs(t, get(client(callout.Guard{}, nil), to), callout.ErrInternal, to)
		require.NoError(t, get(client(allowed, nil), to), to)
		require.ErrorIs(t, get(client(callout.Guard{}, proxy), to), callout.ErrInternal, to)
		require.NoError(t, get(client(allowed, proxy), to), to)
	}
	require.NoError(t, get(client(callout.Guard{}, proxy), "http://8.8.8.8/"), "the proxy itself may be internal")
}
