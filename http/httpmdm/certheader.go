package httpmdm

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
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
// value shows the encoding:
//
//	:MIIB...=:                 RFC 9440 (Google Cloud, Cloudflare rules, HAProxy)
//	-----BEGIN%20CERTIFI...    percent-encoded PEM, one or a chain, where "+" may be
//	                           literal (nginx, AWS ALB, Apache) or stand for the
//	                           spaces of the armour (form encoding)
//	-----BEGIN CERTIFICATE...  PEM as it is, whose line breaks became blanks, tabs
//	                           or the two characters \n, or are gone (nginx
//	                           $ssl_client_cert, Apache %{SSL_CLIENT_CERT}s, HAProxy)
//	Hash=...;Cert="..."        Envoy's x-forwarded-client-cert
//	MIIB...=,MIIB...=          Base64 of DER or of PEM, one or a chain, also
//	                           percent-encoded (HAProxy, Caddy, Cloudflare, Azure,
//	                           Traefik)
//
// In a chain each certificate must be the issuer of the one before: a proxy that
// appends its certificate to what the client sent makes a list that is none. A
// header that is absent or empty, or that holds Apache's word for nothing, is
// errNoCertificate, anything else that does not hold a certificate errCertHeader.
func parseCertHeader(values []string) (leaf *x509.Certificate, chain []*x509.Certificate, err error) {
	if len(values) == 0 {
		return nil, nil, errNoCertificate
	}
	if len(values) > 1 {
		// The client may have sent one of them.
		return nil, nil, fmt.Errorf("%w: repeated %d times", errCertHeader, len(values))
	}
	value := strings.Trim(values[0], " \t")
	if value == "" || value == "(null)" {
		return nil, nil, errNoCertificate
	}
	if len(value) > maxCertHeader {
		return nil, nil, fmt.Errorf("%w: longer than %d bytes", errCertHeader, maxCertHeader)
	}
	certs, err := decodeCertHeader(value)
	if err == nil {
		err = checkOrder(certs)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w; it is %d bytes that begin with %.24q, but should be one of: %s",
			errCertHeader, err, len(value), value, certHeaderForms)
	}
	return certs[0], certs[1:], nil
}

// certHeaderForms lists the encodings of a header for operators.
const certHeaderForms = `percent-encoded PEM, PEM with its line breaks as blanks or left out, Base64 of DER or of PEM, ` +
	`:Base64: (RFC 9440), or Hash=...;Cert="..." (Envoy)`

// checkOrder checks that each certificate could be the issuer of the one before.
// Signatures are the verifier's business.
func checkOrder(certs []*x509.Certificate) error {
	for i, issuer := range certs[1:] {
		if !issuer.IsCA || !bytes.Equal(certs[i].RawIssuer, issuer.RawSubject) {
			return errors.New("a further certificate that did not issue the one before")
		}
	}
	return nil
}

// decodeCertHeader returns at least one certificate, the client's own first.
func decodeCertHeader(value string) ([]*x509.Certificate, error) {
	if inner, ok := strings.CutPrefix(value, ":"); ok {
		inner, ok = strings.CutSuffix(inner, ":")
		if !ok {
			return nil, errors.New("RFC 9440 byte sequence does not end in a colon")
		}
		der, err := base64.StdEncoding.DecodeString(inner)
		if err != nil {
			return nil, err
		}
		cert, err := x509.ParseCertificate(der)
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
		found, err := parseBase64Part(part)
		if err != nil {
			return nil, err
		}
		if certs = append(certs, found...); len(certs) > maxCertHeaderCerts {
			return nil, errTooManyCerts
		}
	}
	return certs, nil
}

var errTooManyCerts = fmt.Errorf("more than %d certificates", maxCertHeaderCerts)

// parseBase64Part reads Base64 of one certificate, or of PEM with one or more.
func parseBase64Part(s string) ([]*x509.Certificate, error) {
	data, err := base64.StdEncoding.DecodeString(withoutBreaks(s))
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(data, []byte("-----")) {
		return parsePEMCerts(string(data))
	}
	cert, err := x509.ParseCertificate(data)
	if err != nil {
		return nil, err
	}
	return []*x509.Certificate{cert}, nil
}

// withoutBreaks removes white space, and line breaks that became a backslash and
// a letter.
func withoutBreaks(s string) string {
	return lineBreaks.Replace(s)
}

var lineBreaks = strings.NewReplacer(" ", "", "\t", "", "\r", "", "\n", "", `\r`, "", `\n`, "")

const (
	pemBegin = "-----BEGINCERTIFICATE-----"
	pemEnd   = "-----ENDCERTIFICATE-----"
)

// parsePEMCerts reads PEM that holds certificates and white space only. The line
// breaks may be gone, or have become something else: armour and Base64 do not
// need them.
func parsePEMCerts(text string) (certs []*x509.Certificate, err error) {
	// Form encoding leaves "+" where the armour has a space; in the Base64
	// between, a "+" is a "+" in every encoding by now.
	text = strings.ReplaceAll(text, "-----BEGIN+CERTIFICATE-----", pemBegin)
	text = strings.ReplaceAll(text, "-----END+CERTIFICATE-----", pemEnd)
	for rest := withoutBreaks(text); rest != ""; {
		if len(certs) == maxCertHeaderCerts {
			return nil, errTooManyCerts
		}
		block, ok := strings.CutPrefix(rest, pemBegin)
		if !ok {
			return nil, errors.New("something other than certificates in PEM")
		}
		if block, rest, ok = strings.Cut(block, pemEnd); !ok {
			return nil, errors.New("PEM without its end")
		}
		der, err := base64.StdEncoding.DecodeString(block)
		if err != nil {
			return nil, fmt.Errorf("broken PEM: %w", err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		certs = append(certs, cert)
	}
	if len(certs) == 0 {
		return nil, errors.New("PEM without a certificate")
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
