package apns

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"golang.org/x/net/http2"
)

// maxProxyAnswer bounds the header of a proxy's answer to CONNECT.
const maxProxyAnswer = 16 << 10

// dialer makes TLS connections to the service, through a proxy if one is
// configured. Names are resolved anew for each connection.
type dialer struct {
	cfg  Config
	root *url.URL
}

// dial connects and completes the TLS handshake. ctx bounds all of it.
func (d dialer) dial(ctx context.Context, cert *tls.Certificate) (*tls.Conn, error) {
	nc, err := d.dialTCP(ctx)
	if err != nil {
		return nil, err
	}
	tc := tls.Client(nc, &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{http2.NextProtoTLS},
		RootCAs:    d.cfg.RootCAs,
		ServerName: d.root.Hostname(),
		// Sent even if the server's list of authorities lacks its issuer:
		// without a certificate the handshake fails anyway.
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return cert, nil
		},
	})
	if err := tc.HandshakeContext(ctx); err != nil {
		nc.Close()
		return nil, fmt.Errorf("TLS handshake with %s: %w", d.root.Host, err)
	}
	if p := tc.ConnectionState().NegotiatedProtocol; p != http2.NextProtoTLS {
		tc.Close()
		return nil, fmt.Errorf("%s negotiated protocol %q, not HTTP/2", d.root.Host, p)
	}
	return tc, nil
}

// dialTCP connects to the service, through the proxy if there is one.
func (d dialer) dialTCP(ctx context.Context) (net.Conn, error) {
	target := hostPort(d.root, "443")
	proxy, err := d.cfg.Proxy(d.root)
	if err != nil {
		// The error may repeat a proxy URL with its password.
		return nil, errors.New("finding the proxy: its setting is not a valid URL")
	}
	var nd net.Dialer
	if proxy == nil {
		return nd.DialContext(ctx, "tcp", target)
	}
	var addr string
	switch proxy.Scheme {
	case "http":
		addr = hostPort(proxy, "80")
	case "https":
		addr = hostPort(proxy, "443")
	default:
		return nil, fmt.Errorf("proxy scheme %q is not supported, only http and https are", proxy.Scheme)
	}
	nc, err := nd.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("connecting to proxy: %w", err)
	}
	if proxy.Scheme == "https" {
		tc := tls.Client(nc, &tls.Config{
			MinVersion: tls.VersionTLS12,
			RootCAs:    d.cfg.RootCAs,
			ServerName: proxy.Hostname(),
		})
		if err := tc.HandshakeContext(ctx); err != nil {
			nc.Close()
			return nil, fmt.Errorf("TLS handshake with proxy %s: %w", addr, err)
		}
		nc = tc
	}
	if err := connect(ctx, nc, target, proxy.User); err != nil {
		nc.Close()
		return nil, fmt.Errorf("proxy %s: %w", addr, err)
	}
	return nc, nil
}

// connect asks the proxy at the other end of nc for a tunnel to target.
func connect(ctx context.Context, nc net.Conn, target string, user *url.Userinfo) error {
	// Ends reads and writes when ctx ends; undone before connect returns nc.
	stop := context.AfterFunc(ctx, func() { nc.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	req := &http.Request{
		Method: http.MethodConnect,
		URL:    &url.URL{Opaque: target},
		Host:   target,
		Header: http.Header{"User-Agent": {userAgent}},
	}
	if user != nil {
		password, _ := user.Password()
		req.Header.Set("Proxy-Authorization",
			"Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	if err := req.Write(nc); err != nil {
		return ctxError(ctx, err)
	}
	br := bufio.NewReader(io.LimitReader(nc, maxProxyAnswer))
	res, err := http.ReadResponse(br, req)
	if err != nil {
		return ctxError(ctx, err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("answered CONNECT with status %d", res.StatusCode)
	}
	if br.Buffered() > 0 {
		return errors.New("sent data ahead of the TLS handshake")
	}
	if !stop() {
		return ctx.Err()
	}
	return nil
}

// ctxError returns the error of ctx if ctx has ended, else err.
func ctxError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// readAtMost reads r to its end, or n bytes of it.
func readAtMost(r io.Reader, n int64) ([]byte, error) {
	return io.ReadAll(io.LimitReader(r, n))
}

// certificateAlerts are the TLS alerts by which a server refuses a client
// certificate (RFC 8446, section 6.2).
var certificateAlerts = [...]tls.AlertError{
	42,  // bad_certificate
	43,  // unsupported_certificate
	44,  // certificate_revoked
	45,  // certificate_expired
	46,  // certificate_unknown
	48,  // unknown_ca
	49,  // access_denied
	116, // certificate_required
}

// isCertificateAlert reports whether the server ended the TLS connection because
// of the client certificate.
func isCertificateAlert(err error) bool {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		return false
	}
	// The alert's own type is not exported; AlertError has the same text.
	for _, a := range certificateAlerts {
		if op.Err.Error() == a.Error() {
			return true
		}
	}
	return false
}
