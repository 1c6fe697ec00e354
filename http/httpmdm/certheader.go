package httpmdm

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"strings"
)

var (
	// errNoCertificate says that the request has no identity certificate at all.
	errNoCertificate = errors.New("no client certificate")
	// errCertHeader says that the certificate header is there but cannot be
	// relied on. It must never be taken for errNoCertificate.
	errCertHeader = errors.New("malformed client certificate header")
)

const (
	// maxCertHeader bounds the header in bytes; proxies stop at 16 KB or so.
	maxCertHeader = 64 << 10

	// maxCertHeaderCerts bounds the certificates parsed from one header.
	maxCertHeaderCerts = 16
)

// parseCertHeader reads the client certificate, and its chain if it comes along,
// from all the values of the one header that the deployment names for it. The
// encoding is told from the value:
//
//	:MIIB...=:                 RFC 9440 (Google Cloud, Cloudflare rules, HAProxy)
//	-----BEGIN%20CERTIFI...    percent-encoded PEM, one or a chain, where "+" may be
//	                           literal (nginx, AWS ALB, Apache) or stand for the
//	                           spaces of the armour (form encoding)
//	Hash=...;Cert="..."        Envoy's x-forwarded-client-cert
//	MIIB...=,MIIB...=          Base64 of DER, one or a chain, also percent-encoded
//	                           (HAProxy, Caddy, Cloudflare, Azure, Traefik)
//
// A header that is absent or empty is errNoCertificate, anything else that does
// not hold a certificate errCertHeader.
func parseCertHeader(values []string) (leaf *x509.Certificate, chain []*x509.Certificate, err error) {
	if len(values) == 0 {
		return nil, nil, errNoCertificate
	}
	if len(values) > 1 {
		// Which of them the proxy wrote, and which the client, nobody knows.
		return nil, nil, fmt.Errorf("%w: repeated %d times", errCertHeader, len(values))
	}
	value := strings.Trim(values[0], " \t")
	if value == "" {
		return nil, nil, errNoCertificate
	}
	if len(value) > maxCertHeader {
		return nil, nil, fmt.Errorf("%w: longer than %d bytes", errCertHeader, maxCertHeader)
	}
	certs, err := decodeCertHeader(value)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errCertHeader, err)
	}
	return certs[0], certs[1:], nil
}

// decodeCertHeader returns at least one certificate, the client's own first.
func decodeCertHeader(value string) ([]*x509.Certificate, error) {
	if inner, ok := strings.CutPrefix(value, ":"); ok {
		inner, ok = strings.CutSuffix(inner, ":")
		if !ok {
			return nil, errors.New("RFC 9440 byte sequence does not end in a colon")
		}
		cert, err := parseBase64Cert(inner)
		return []*x509.Certificate{cert}, err
	}
	if isXFCC(value) {
		return parseXFCC(value)
	}
	plain, err := url.PathUnescape(value)
	if err != nil {
		return nil, err
	}
	if strings.HasPrefix(plain, "-----") {
		return parsePEMCerts(plain)
	}
	return parseBase64Certs(plain)
}

func parseBase64Certs(list string) (certs []*x509.Certificate, err error) {
	parts := strings.Split(list, ",")
	if len(parts) > maxCertHeaderCerts {
		return nil, errTooManyCerts
	}
	for _, part := range parts {
		cert, err := parseBase64Cert(strings.Trim(part, " \t"))
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	return certs, nil
}

var errTooManyCerts = fmt.Errorf("more than %d certificates", maxCertHeaderCerts)

func parseBase64Cert(s string) (*x509.Certificate, error) {
	// The decoder skips line breaks, which have no place here.
	if strings.ContainsAny(s, "\r\n") {
		return nil, errors.New("line break in Base64")
	}
	der, err := base64.StdEncoding.DecodeString(s)
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// parsePEMCerts reads PEM that holds certificates and white space only.
func parsePEMCerts(text string) (certs []*x509.Certificate, err error) {
	// Form encoding leaves "+" where the armour has a space; in the Base64
	// between, a "+" is a "+" in every encoding by now.
	text = strings.ReplaceAll(text, "-----BEGIN+CERTIFICATE-----", "-----BEGIN CERTIFICATE-----")
	text = strings.ReplaceAll(text, "-----END+CERTIFICATE-----", "-----END CERTIFICATE-----")
	begun := strings.Count(text, "-----BEGIN ")
	for rest := strings.TrimSpace(text); rest != ""; {
		// The decoder skips whatever comes before a block that it can read.
		if !strings.HasPrefix(rest, "-----BEGIN ") {
			return nil, errors.New("something other than certificates in PEM")
		}
		block, after := pem.Decode([]byte(rest))
		switch {
		case block == nil:
			return nil, errors.New("broken PEM")
		case block.Type != "CERTIFICATE" || len(block.Headers) > 0:
			return nil, errors.New("a PEM block that is not a certificate")
		case len(certs) == maxCertHeaderCerts:
			return nil, errTooManyCerts
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
		rest = strings.TrimSpace(string(after))
	}
	if len(certs) == 0 || len(certs) != begun {
		return nil, errors.New("broken PEM")
	}
	return certs, nil
}

// isXFCC says whether value begins with a key of Envoy's header. Base64 of a
// certificate always begins with "M", PEM with a dash.
func isXFCC(value string) bool {
	key, _, ok := strings.Cut(value, "=")
	if !ok {
		return false
	}
	switch strings.ToLower(strings.Trim(key, " \t")) {
	case "by", "hash", "cert", "chain", "subject", "uri", "dns":
		return true
	}
	return false
}

// parseXFCC reads Envoy's x-forwarded-client-cert. Proxies in a row append an
// element each, for the peer that each of them saw. Only one of these is the
// device, and which one depends on the deployment, so several elements are
// accepted only if all carry the same certificate; otherwise the edge proxy
// must be set to SANITIZE_SET and the ones behind it to FORWARD_ONLY.
//
// Source: Envoy, "HTTP header manipulation", x-forwarded-client-cert.
func parseXFCC(value string) (certs []*x509.Certificate, err error) {
	elements, err := splitQuoted(value, ',')
	if err != nil {
		return nil, err
	}
	if len(elements) > maxCertHeaderCerts {
		return nil, errTooManyCerts
	}
	for _, element := range elements {
		found, err := parseXFCCElement(element)
		if err != nil {
			return nil, err
		}
		if certs != nil && !found[0].Equal(certs[0]) {
			return nil, errors.New("elements for different certificates")
		}
		certs = found
	}
	return certs, nil
}

// parseXFCCElement reads Cert and Chain; Chain begins with the client's own
// certificate as well.
func parseXFCCElement(element string) ([]*x509.Certificate, error) {
	pairs, err := splitQuoted(element, ';')
	if err != nil {
		return nil, err
	}
	found := map[string][]*x509.Certificate{}
	for _, pair := range pairs {
		key, value, ok := strings.Cut(pair, "=")
		if !ok {
			return nil, errors.New("element without key and value")
		}
		key = strings.ToLower(strings.Trim(key, " \t"))
		if key != "cert" && key != "chain" {
			continue
		}
		if found[key] != nil {
			return nil, fmt.Errorf("%s twice in one element", key)
		}
		if value, err = unquote(strings.Trim(value, " \t")); err != nil {
			return nil, err
		}
		if value, err = url.PathUnescape(value); err != nil {
			return nil, err
		}
		if found[key], err = parsePEMCerts(value); err != nil {
			return nil, err
		}
	}
	cert, chain := found["cert"], found["chain"]
	switch {
	case cert == nil && chain == nil:
		return nil, errors.New("element without Cert or Chain (is the proxy set to forward them?)")
	case chain == nil && len(cert) == 1:
		return cert, nil
	case cert == nil, len(cert) == 1 && cert[0].Equal(chain[0]):
		return chain, nil
	}
	return nil, errors.New("the Cert is not one certificate that the Chain begins with")
}

// splitQuoted splits at separators outside double quotes, within which a
// backslash escapes the next character. The quoting stays.
func splitQuoted(s string, separator byte) (parts []string, err error) {
	quoted, start := false, 0
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			quoted = !quoted
		case quoted && s[i] == '\\':
			i++
		case !quoted && s[i] == separator:
			parts = append(parts, s[start:i])
			start = i + 1
		}
	}
	if quoted {
		return nil, errors.New("quotes do not end")
	}
	return append(parts, s[start:]), nil
}

// unquote removes the quotes that enclose the whole of s, if there are any, and
// the backslashes within.
func unquote(s string) (string, error) {
	if !strings.Contains(s, `"`) {
		return s, nil
	}
	var b strings.Builder
	inner := s[1:]
	for i := 0; i < len(inner); i++ {
		switch {
		case inner[i] == '"' && i == len(inner)-1 && s[0] == '"':
			return b.String(), nil
		case inner[i] == '"':
			return "", errors.New("quotes inside a value")
		case inner[i] == '\\' && i+1 < len(inner):
			i++
		}
		b.WriteByte(inner[i])
	}
	return "", errors.New("quotes do not enclose the value")
}
