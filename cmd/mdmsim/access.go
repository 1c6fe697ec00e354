package main

import (
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// access is how devices reach a server and prove who they are.
type access struct {
	certHeader string
	clientTLS  bool
	serverCA   string
	timeout    time.Duration

	roots *x509.CertPool // nil is the system's
	// clients are those of devices that show a certificate.
	clients []*http.Client
}

func (a *access) flags(flags *flag.FlagSet) {
	flags.StringVar(&a.certHeader, "cert-header", "", "send the certificate in this `header` (RFC 9440) instead of signing")
	flags.BoolVar(&a.clientTLS, "tls-client-auth", false, "show the certificate in the TLS handshake instead of signing")
	flags.StringVar(&a.serverCA, "server-ca", "", "PEM `file` of the CA of the server's certificate; the system's unless given")
	flags.DurationVar(&a.timeout, "timeout", 30*time.Second, "how long a request may take")
}

// check reads what the flags name. The server is at url.
func (a *access) check(url string) error {
	switch {
	case a.certHeader != "" && a.clientTLS:
		return errors.New("-cert-header and -tls-client-auth exclude each other")
	case a.clientTLS && !strings.HasPrefix(url, "https://"):
		return errors.New("-tls-client-auth needs a -url that begins with https://")
	case a.serverCA == "":
		return nil
	}
	pem, err := os.ReadFile(a.serverCA)
	if err != nil {
		return fmt.Errorf("-server-ca: %w", err)
	}
	a.roots = x509.NewCertPool()
	if !a.roots.AppendCertsFromPEM(pem) {
		return fmt.Errorf("-server-ca %s: there is no PEM certificate in it", a.serverCA)
	}
	return nil
}

// client is for the API and for devices that share connections.
func (a *access) client(connections int) *http.Client {
	return newClient(connections, a.timeout, a.roots)
}

// configure says in cfg how the device of an identity proves who it is.
func (a *access) configure(cfg *mdmtest.Config, id *mdmtest.Identity) {
	switch {
	case a.certHeader != "":
		cfg.Auth, cfg.CertHeader = mdmtest.AuthHeader, a.certHeader
	case a.clientTLS: // a connection has one certificate
		cfg.Auth, cfg.Client = mdmtest.AuthTLS, mdmtest.TLSClient(id, a.roots)
		cfg.Client.Timeout = a.timeout
		cfg.Client.Transport.(*http.Transport).IdleConnTimeout = deviceIdle
		a.clients = append(a.clients, cfg.Client)
	}
}

// deviceIdle is how long a device that shows a certificate keeps a connection
// that it does not use: a fleet has many.
const deviceIdle = 5 * time.Second

// close closes the connections of devices.
func (a *access) close() {
	for _, c := range a.clients {
		c.CloseIdleConnections()
	}
}
