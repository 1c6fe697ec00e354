package main

import (
	"bufio"
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// server is where the API is, and how to speak to it.
type server struct {
	base   *url.URL
	key    string
	caFile string
}

// server finds the address, the API key and the CA: flags first (-context among
// them), then the environment, then the context in use, then the configuration
// file. The key has no flag of its own, since other users of the machine see
// command lines.
func (e *env) server() (*server, error) {
	s := &server{caFile: e.caFile}
	address := e.url
	if e.keyFile != "" {
		var err error
		if s.key, err = e.readKey(e.keyFile); err != nil {
			return nil, err
		}
	}
	// A kept key goes to its own server alone.
	fill := func(url, key, caFile string) {
		if address == "" || address == url {
			address, s.caFile = url, cmp.Or(s.caFile, caFile)
			s.key = cmp.Or(s.key, key)
		}
	}
	if e.context != "" {
		settings, err := e.contextSettings(e.context)
		if err != nil {
			return nil, err
		}
		fill(settings["url"], settings["key"], settings["ca-file"])
	}
	// nanoctl's own variables go before those that it shares with the server.
	s.key = cmp.Or(s.key, e.getenv("NANOCTL_API"), e.getenv("NANOMDM_API"))
	if address == "" {
		address = cmp.Or(e.getenv("NANOCTL_URL"), e.getenv("NANOMDM_URL"))
	}
	s.caFile = cmp.Or(s.caFile, e.getenv("NANOCTL_CA_FILE"))
	path := "a configuration file"
	if address == "" || s.key == "" {
		settings, where, err := e.readConfig()
		if err != nil {
			return nil, &exitError{exitUsage, err}
		}
		path = where
		fill(settings["url"], settings["key"], settings["ca-file"])
	}
	if address == "" || s.key == "" {
		return s, &exitError{exitUsage, &missingServer{address, path}}
	}
	var err error
	s.base, err = parseServer(address)
	if err != nil {
		return nil, &exitError{exitUsage, err}
	}
	return s, nil
}

// missingServer is the error of an address or a key that is not configured.
type missingServer struct{ address, path string }

func (m *missingServer) Error() string {
	what := "the API key is"
	if m.address == "" {
		what = "the server's address is"
	}
	return what + " missing: set NANOCTL_URL and NANOCTL_API, keep a server with nanoctl context add, or write the lines \"url = ...\" and \"key = ...\" into " + m.path + " (mode 0600)"
}

func parseServer(address string) (*url.URL, error) {
	base, err := url.Parse(address)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, fmt.Errorf("the server's address %q is no http or https URL", address)
	}
	return base, nil
}

// readKey reads an API key from a private file, or from standard input.
func (e *env) readKey(name string) (string, error) {
	var text string
	var err error
	if name == "-" {
		var data []byte
		data, err = io.ReadAll(io.LimitReader(e.in, maxPrivate))
		text = string(data)
	} else {
		text, err = readPrivate(name)
	}
	if err != nil {
		return "", usage("-key-file: %w", err)
	}
	key := strings.TrimSpace(text)
	if strings.ContainsAny(key, " \t\r\n") {
		return "", usage("-key-file: %s holds more than an API key", name)
	}
	return key, nil
}

// readConfig reads the context in use, or the configuration file; a missing
// one is empty.
func (e *env) readConfig() (settings map[string]string, path string, err error) {
	dir, err := e.folder()
	if err != nil {
		return nil, "a configuration file", nil
	}
	path = filepath.Join(dir, "config")
	if name := e.currentContext(); name != "" {
		settings, err = e.contextSettings(name)
		return settings, path, err
	}
	settings, err = readSettings(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, path, nil
	}
	return settings, path, err
}

// readSettings reads a private file with lines "name = value".
func readSettings(path string) (map[string]string, error) {
	text, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	settings := make(map[string]string)
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		if !ok || !slices.Contains([]string{"url", "key", "ca-file"}, name) {
			return nil, fmt.Errorf("%s, line %d: want \"url = ...\", \"key = ...\" or \"ca-file = ...\"", path, n)
		}
		settings[name] = strings.TrimSpace(value)
	}
	return settings, nil
}

// maxPrivate bounds the files that hold keys.
const maxPrivate = 64 << 10

// readPrivate reads a small file that holds a key, and refuses one that
// others may read.
func readPrivate(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s holds a key and others may read it: chmod 600 %s", path, path)
	}
	if info.Size() > maxPrivate {
		return "", fmt.Errorf("%s is too large to be a configuration", path)
	}
	data, err := os.ReadFile(path)
	return string(data), err
}

// readCAs reads the certificates of a file, beside those that the system
// trusts.
func readCAs(path string) (*x509.CertPool, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, usage("-ca-file: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(text) {
		what := "it is no PEM"
		if block, _ := pem.Decode(text); block != nil {
			what = "it is a file of " + block.Type
		}
		return nil, usage("-ca-file: %s holds no certificate: %s", path, what)
	}
	return pool, nil
}

// client makes the client of a server.
func (s *server) client(transport http.RoundTripper) (*client, error) {
	if transport == nil {
		own := http.DefaultTransport.(*http.Transport).Clone()
		if s.caFile != "" {
			pool, err := readCAs(s.caFile)
			if err != nil {
				return nil, err
			}
			own.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
		}
		transport = own
	}
	return newClient(s.base, s.key, transport), nil
}

// reachHint says what may mend an error of the connection.
func reachHint(err error, address *url.URL) string {
	var (
		unknown *tls.CertificateVerificationError
		host    x509.HostnameError
		plain   tls.RecordHeaderError
	)
	switch {
	case errors.As(err, &host):
		return "; the certificate is for " + strings.Join(host.Certificate.DNSNames, ", ") + ": use that name in the URL"
	case errors.As(err, &unknown):
		return "; if the certificate is of your own CA, give -ca-file FILE, or keep it with nanoctl context add"
	case errors.As(err, &plain), strings.Contains(err.Error(), "server gave HTTP response to HTTPS client"):
		return "; the server speaks http there: is it the right port, or is the TLS proxy elsewhere?"
	case address.Scheme == "http" && strings.Contains(err.Error(), "malformed HTTP response"):
		return "; the server speaks https there"
	}
	return ""
}
