package callout

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"syscall"
)

// ErrInternal is the error of a connection that a Guard refuses.
var ErrInternal = errors.New("the address is not a public one, and its network is not allowed")

// Guard keeps callouts to URLs that somebody chose through the API out of
// networks that only the server reaches: loopback, private, link-local and
// other special addresses. The zero value allows none of them.
type Guard struct {
	Allowed []netip.Prefix
}

// special are networks that are not public, beside those that package netip
// knows. Source: IANA's special-purpose address registries.
var special = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("100.64.0.0/10"),
	netip.MustParsePrefix("192.0.0.0/24"),
	netip.MustParsePrefix("198.18.0.0/15"),
	netip.MustParsePrefix("240.0.0.0/4"),
	netip.MustParsePrefix("64:ff9b:1::/48"),
	netip.MustParsePrefix("100::/64"),
	netip.MustParsePrefix("2001::/23"),
	netip.MustParsePrefix("fec0::/10"),
}

// Networks of IPv6 addresses that hold the IPv4 address of the receiver, at a
// byte.
var translated = map[netip.Prefix]int{
	netip.MustParsePrefix("64:ff9b::/96"): 12, // NAT64
	netip.MustParsePrefix("2002::/16"):    2,  // 6to4
	netip.MustParsePrefix("::/96"):        12, // IPv4-compatible
}

func internal(addr netip.Addr) bool {
	for prefix, at := range translated {
		if prefix.Contains(addr) {
			b := addr.As16()
			return internal(netip.AddrFrom4([4]byte(b[at : at+4])))
		}
	}
	return !addr.IsGlobalUnicast() || addr.IsPrivate() ||
		slices.ContainsFunc(special, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// Check refuses an address that is neither public nor in an allowed network.
func (g Guard) Check(addr netip.Addr) error {
	addr = addr.Unmap().WithZone("")
	allowed := slices.ContainsFunc(g.Allowed, func(p netip.Prefix) bool { return p.Contains(addr) })
	if addr.IsValid() && (allowed || !internal(addr)) {
		return nil
	}
	return fmt.Errorf("%s: %w", addr, ErrInternal)
}

// CheckURL refuses a URL whose host is an address that Check refuses, or
// localhost. Other names are checked when a connection is made.
func (g Guard) CheckURL(text string) error {
	u, err := url.Parse(text)
	if err != nil {
		return errors.New("not a URL")
	}
	host := strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		host = "127.0.0.1"
	}
	if addr, err := netip.ParseAddr(host); err == nil {
		return g.Check(addr)
	}
	return nil
}

// Control is a net.Dialer's ControlContext. It sees the address that a name
// was resolved to, so that a name cannot change its address after a check.
func (g Guard) Control(_ context.Context, _, address string, _ syscall.RawConn) error {
	to, err := netip.ParseAddrPort(address)
	if err != nil {
		return fmt.Errorf("%s: %w", address, ErrInternal)
	}
	return g.Check(to.Addr())
}

// Transport is a RoundTripper that refuses internal addresses: guarded has a
// dialer with the Control of g. A request that goes through a proxy of the
// environment uses proxied, whose dialer reaches the proxy. The address of the
// receiver is then checked before, as far as it can be resolved here; the
// proxy has the last word.
func (g Guard) Transport(guarded, proxied *http.Transport) http.RoundTripper {
	return &guardTransport{g, guarded, proxied}
}

type guardTransport struct {
	guard            Guard
	guarded, proxied *http.Transport
}

// RoundTrip implements http.RoundTripper.
func (t *guardTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.proxied.Proxy == nil {
		return t.guarded.RoundTrip(r)
	}
	if proxy, err := t.proxied.Proxy(r); err != nil || proxy == nil {
		return t.guarded.RoundTrip(r)
	}
	if err := t.guard.CheckURL(r.URL.String()); err != nil {
		return nil, err
	}
	addrs, err := net.DefaultResolver.LookupNetIP(r.Context(), "ip", r.URL.Hostname())
	if err == nil {
		for _, addr := range addrs {
			if err := t.guard.Check(addr); err != nil {
				return nil, err
			}
		}
	}
	return t.proxied.RoundTrip(r)
}

// CloseIdleConnections is called by http.Client.CloseIdleConnections.
func (t *guardTransport) CloseIdleConnections() {
	t.guarded.CloseIdleConnections()
	t.proxied.CloseIdleConnections()
}
