package requestlog

import (
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
)

// TrustedPeer says whether the request's peer, the last hop, is one of the
// operator's proxies: its address is in one of the networks, or it came
// through a Unix socket, which only those can open whom the file's
// permissions allow.
func TrustedPeer(r *http.Request, trusted []netip.Prefix) bool {
	if local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr); ok && local.Network() == "unix" {
		return true
	}
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	return err == nil && contains(trusted, peer.Addr())
}

func contains(networks []netip.Prefix, addr netip.Addr) bool {
	addr = addr.Unmap().WithZone("")
	return slices.ContainsFunc(networks, func(p netip.Prefix) bool { return p.Contains(addr) })
}

// peerAddress is the peer's address without the port, "" for a Unix socket's.
func peerAddress(r *http.Request) string {
	peer, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return ""
	}
	return peer.Addr().Unmap().String()
}

// maxHops bounds how many addresses of X-Forwarded-For are looked at.
const maxHops = 32

// forwardedFor returns the client in X-Forwarded-For, to whose end each proxy
// appends its peer: the last address that is not a trusted proxy's. The client
// may have made up the addresses before it. Without such an address, or if its
// place holds no address, the peer is the client.
func forwardedFor(values []string, peer string, trusted []netip.Prefix) string {
	client := peer
	hops := 0
	for _, value := range slices.Backward(values) {
		for value != "" {
			var hop string
			if i := strings.LastIndexByte(value, ','); i >= 0 {
				value, hop = value[:i], value[i+1:]
			} else {
				value, hop = "", value
			}
			addr, ok := parseHop(strings.Trim(hop, " \t"))
			if hops++; !ok || hops > maxHops {
				return client
			}
			client = addr.String()
			if !contains(trusted, addr) {
				return client
			}
		}
	}
	return client
}

// parseHop reads an address, which some proxies write with a port or in
// brackets.
func parseHop(s string) (netip.Addr, bool) {
	if with, err := netip.ParseAddrPort(s); err == nil {
		return with.Addr().Unmap().WithZone(""), true
	}
	if inner, ok := strings.CutPrefix(s, "["); ok {
		s, ok = strings.CutSuffix(inner, "]")
		if !ok {
			return netip.Addr{}, false
		}
	}
	addr, err := netip.ParseAddr(s)
	return addr.Unmap().WithZone(""), err == nil
}

// parseTraceParent returns the header's value if it is there once and valid:
// version, trace id, parent id and flags in lower-case hex, neither id zero. A
// version above 00 may have more after a dash, which is not passed on.
//
// Source: W3C Trace Context, section 3.2.
func parseTraceParent(values []string) string {
	if len(values) != 1 {
		return ""
	}
	const size = len("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	v := strings.Trim(values[0], " \t")
	switch {
	case len(v) < size, v[2] != '-', v[35] != '-', v[52] != '-':
		return ""
	case len(v) > size && (v[:2] == "00" || v[size] != '-'):
		return ""
	}
	version, trace, parent, flags := v[:2], v[3:35], v[36:52], v[53:size]
	for _, field := range []string{version, trace, parent, flags} {
		if strings.Trim(field, "0123456789abcdef") != "" {
			return ""
		}
	}
	if version == "ff" || strings.Trim(trace, "0") == "" || strings.Trim(parent, "0") == "" {
		return ""
	}
	return v[:size]
}
