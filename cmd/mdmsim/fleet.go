package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// identitiesFile keeps the devices of a CA directory, so that a second run
// polls with those that the first one enrolled.
const identitiesFile = "devices.pem"

// openIdentities returns the first count devices of dir and makes what is
// missing.
func openIdentities(ca *mdmtest.CA, dir string, count int) ([]*mdmtest.Identity, error) {
	path := filepath.Join(dir, identitiesFile)
	kept, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	identities, err := mdmtest.ParseIdentities(kept)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if len(identities) >= count {
		return identities[:count], nil
	}
	for len(identities) < count {
		id, err := ca.Issue(fmt.Sprintf("mdmsim %06d", len(identities)+1))
		if err != nil {
			return nil, err
		}
		identities = append(identities, id)
		both, err := id.PEM()
		if err != nil {
			return nil, err
		}
		kept = append(kept, both...)
	}
	// Written beside and renamed: a torn file would lose the whole fleet.
	temporary := path + ".new"
	if err := os.WriteFile(temporary, kept, 0o600); err != nil {
		return nil, err
	}
	return identities, os.Rename(temporary, path)
}

// newClient makes a client for one server that keeps as many connections as
// are in use. roots are those of the server's certificate; nil is the system's.
func newClient(connections int, timeout time.Duration, roots *x509.CertPool) *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns = connections
	transport.MaxIdleConnsPerHost = connections
	transport.MaxConnsPerHost = connections
	if roots != nil {
		transport.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots}
	}
	// The server's own replies are small; asking for gzip measures gzip.
	transport.DisableCompression = true
	return &http.Client{Transport: transport, Timeout: timeout}
}
