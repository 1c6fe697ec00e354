package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/textinput"
)

// expiryWarning is how long before its end a configured certificate is warned
// about at start.
const expiryWarning = 30 * 24 * time.Hour

// pemFile is the PEM file of an option.
type pemFile struct {
	option string // without the hyphen
	path   string
	data   []byte
}

// readPEMFile reads the file of an option. Errors name both, and say how to
// convert a file that is not PEM.
func readPEMFile(option, path string) (pemFile, error) {
	f := pemFile{option: option, path: path}
	raw, err := os.ReadFile(path)
	if err != nil {
		return f, fmt.Errorf("-%s: %w", option, err)
	}
	if err := cryptoutil.NotPEM(raw); err != nil {
		return f, f.wrong(err)
	}
	f.data = textinput.PEM(raw)
	return f, nil
}

func (f pemFile) wrong(err error) error { return fmt.Errorf("-%s: %s: %w", f.option, f.path, err) }

// certificates returns the certificates of a file that holds nothing else.
func (f pemFile) certificates() ([]*x509.Certificate, error) {
	var certs []*x509.Certificate
	begun := bytes.Count(f.data, []byte("-----BEGIN "))
	for block, rest := pem.Decode(f.data); block != nil; block, rest = pem.Decode(rest) {
		if strings.HasSuffix(block.Type, "PRIVATE KEY") {
			return nil, f.wrong(errors.New("the file holds a private key: name the file with the certificate, and keep the key of a CA off this machine"))
		}
		if block.Type != "CERTIFICATE" {
			return nil, f.wrong(fmt.Errorf("the file holds a PEM block %q, and certificates alone are wanted", block.Type))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, f.wrong(fmt.Errorf("certificate number %d cannot be read: %w", len(certs)+1, err))
		}
		certs = append(certs, cert)
	}
	if len(certs) != begun {
		return nil, f.wrong(fmt.Errorf("only %d of %d PEM blocks can be read", len(certs), begun))
	}
	return certs, nil
}

// checkCAs logs the certificates that cannot issue device identities, and those
// near their end. The error is that of a file in which none can.
func (f pemFile) checkCAs(certs []*x509.Certificate, now time.Time, log *slog.Logger) error {
	var unusable []error
	for _, cert := range certs {
		if err := checkCA(cert, now); err != nil {
			unusable = append(unusable, fmt.Errorf("%s %w", cert.Subject, err))
			continue
		}
		f.warnOfEnd(cert, now, log)
	}
	if len(unusable) == len(certs) {
		return f.wrong(fmt.Errorf("no certificate in the file can issue device identities: %w", errors.Join(unusable...)))
	}
	for _, err := range unusable {
		log.Error("a certificate cannot issue device identities: remove it from the file", "option", "-"+f.option, "file", f.path, "error", err)
	}
	return nil
}

// checkCA reports why a certificate cannot have issued others that are valid
// now.
func checkCA(cert *x509.Certificate, now time.Time) error {
	switch {
	case cert.Version == 3 && !cert.BasicConstraintsValid, cert.BasicConstraintsValid && !cert.IsCA:
		return errors.New("is not a CA (no basic constraint CA:TRUE): name the certificate that issued it")
	case cert.KeyUsage != 0 && cert.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("is a CA whose key usage does not allow to sign certificates")
	case now.After(cert.NotAfter):
		return fmt.Errorf("expired on %s", cert.NotAfter.UTC().Format(time.DateOnly))
	case now.Before(cert.NotBefore):
		return fmt.Errorf("is not valid before %s", cert.NotBefore.UTC().Format(time.RFC3339))
	}
	return nil
}

// warnOfEnd warns of a certificate that ends soon, or has ended.
func (f pemFile) warnOfEnd(cert *x509.Certificate, now time.Time, log *slog.Logger) {
	left := cert.NotAfter.Sub(now)
	attrs := []any{"option", "-" + f.option, "file", f.path, "subject", cert.Subject.String(), "not_after", cert.NotAfter.UTC()}
	switch {
	case left <= 0:
		log.Error("a certificate has expired", attrs...)
	case left <= expiryWarning:
		log.Warn("a certificate expires soon", append(attrs, "days_left", int(left.Hours()/24))...)
	}
}

// loadRoots returns the system's CAs and those of an option's file. Without a
// file it returns nil, which stands for the system's.
func loadRoots(option, path string, log *slog.Logger) (*x509.CertPool, error) {
	if path == "" {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		log.Warn("the system's CAs cannot be read, those of the file alone are trusted", "option", "-"+option, "error", err)
		pool = x509.NewCertPool()
	}
	return pool, addRoots(pool, option, path, log)
}

// addRoots adds the certificates of an option's file to a pool.
func addRoots(pool *x509.CertPool, option, path string, log *slog.Logger) error {
	f, err := readPEMFile(option, path)
	if err != nil {
		return err
	}
	certs, err := f.certificates()
	if err != nil {
		return err
	}
	for _, cert := range certs {
		f.warnOfEnd(cert, time.Now(), log)
		pool.AddCert(cert)
	}
	return nil
}

// loadServerCertificate returns the pair of -tls-cert and -tls-key.
func loadServerCertificate(o options, log *slog.Logger) (tls.Certificate, error) {
	cert, err := readPEMFile("tls-cert", o.tlsCert)
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := readPEMFile("tls-key", o.tlsKey)
	if err != nil {
		return tls.Certificate{}, err
	}
	if bytes.Contains(key.data, []byte("ENCRYPTED")) {
		return tls.Certificate{}, key.wrong(cryptoutil.ErrEncryptedKey)
	}
	pair, err := tls.X509KeyPair(cert.data, key.data)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("-tls-cert, -tls-key: %s and %s: %w", o.tlsCert, o.tlsKey, err)
	}
	cert.warnOfEnd(pair.Leaf, time.Now(), log)
	return pair, nil
}
