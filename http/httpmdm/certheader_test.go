package httpmdm

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// headerCert returns a certificate whose Base64 contains "+" and "/", which is
// what the encodings differ about.
func headerCert(t testing.TB) *x509.Certificate {
	leaf, _ := headerCerts(t)
	return leaf
}

// headerCerts returns such a certificate and its issuer's.
func headerCerts(t testing.TB) (leaf, issuer *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	create := func(template, parent *x509.Certificate) *x509.Certificate {
		der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), key)
		require.NoError(t, err)
		cert, err := x509.ParseCertificate(der)
		require.NoError(t, err)
		return cert
	}
	end := time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC)
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Device CA"}, NotAfter: end, IsCA: true, BasicConstraintsValid: true,
	}
	issuer = create(ca, ca)
	for serial := int64(2); ; serial++ {
		leaf = create(&x509.Certificate{SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: "MDM Identity"}, NotAfter: end}, issuer)
		if text := bare(leaf); strings.Contains(text, "+") && strings.Contains(text, "/") {
			return leaf, issuer
		}
	}
}

// selfSigned returns a certificate that is nobody's issuer and has no other.
func selfSigned(t testing.TB) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "MDM Identity"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}

func bare(cert *x509.Certificate) string { return base64.StdEncoding.EncodeToString(cert.Raw) }

func armoured(certs ...*x509.Certificate) string {
	var b bytes.Buffer
	for _, cert := range certs {
		b.Write(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw}))
	}
	return b.String()
}

// escape percent-encodes everything but letters, digits, "-._~" and safe.
func escape(s, safe string) string {
	s = strings.ReplaceAll(url.QueryEscape(s), "+", "%20")
	for _, c := range safe {
		s = strings.ReplaceAll(s, url.QueryEscape(string(c)), string(c))
	}
	return s
}

func TestParseCertHeader(t *testing.T) {
	leaf, issuer := headerCerts(t)
	xfccCert := func(cert *x509.Certificate) string { return `Cert="` + escape(armoured(cert), "") + `"` }
	for name, test := range map[string]struct {
		value string
		chain bool
	}{
		"RFC 9440":                        {":" + bare(leaf) + ":", false},
		"RFC 9440 with white space":       {" :" + bare(leaf) + ":\t", false},
		"nginx ssl_client_escaped_cert":   {escape(armoured(leaf), ""), false},
		"HAProxy ssl_c_der,base64":        {bare(leaf), false},
		"HAProxy in colons":               {":" + bare(leaf) + ":", false},
		"AWS ALB passthrough, chain":      {escape(armoured(leaf, issuer), "+=/"), true},
		"AWS ALB verify, leaf":            {escape(armoured(leaf), "+=/"), false},
		"Traefik 3":                       {bare(leaf), false},
		"Traefik 3, chain":                {bare(leaf) + "," + bare(issuer), true},
		"Traefik 2.8, escaped":            {url.QueryEscape(bare(leaf)), false},
		"Traefik 2.8, escaped chain":      {url.QueryEscape(bare(leaf) + "," + bare(issuer)), true},
		"Caddy certificate_der_base64":    {bare(leaf), false},
		"Google Cloud client_cert_leaf":   {":" + bare(leaf) + ":", false},
		"Cloudflare":                      {bare(leaf), false},
		"Azure App Service":               {bare(leaf), false},
		"line breaks are blanks":          {strings.ReplaceAll(armoured(leaf), "\n", " "), false},
		"line breaks are tabs":            {strings.ReplaceAll(armoured(leaf), "\n", "\t"), false},
		"line breaks and tabs as blanks":  {strings.ReplaceAll(armoured(leaf, issuer), "\n", "  "), true},
		"line breaks are gone":            {strings.ReplaceAll(armoured(leaf), "\n", ""), false},
		"line breaks are gone, chain":     {strings.ReplaceAll(armoured(leaf, issuer), "\n", ""), true},
		"line breaks are backslashes":     {strings.ReplaceAll(armoured(leaf), "\n", `\n`), false},
		"line breaks are two backslashes": {strings.ReplaceAll(armoured(leaf, issuer), "\n", `\r\n`), true},
		"HAProxy, PEM in one line":        {"-----BEGIN CERTIFICATE----- " + bare(leaf) + " -----END CERTIFICATE-----", false},
		"Base64 of PEM":                   {base64.StdEncoding.EncodeToString([]byte(armoured(leaf))), false},
		"Base64 of PEM, chain":            {base64.StdEncoding.EncodeToString([]byte(armoured(leaf, issuer))), true},
		"Base64 in lines":                 {bare(leaf)[:64] + " " + bare(leaf)[64:], false},
		"Base64 in lines, escaped":        {escape(bare(leaf)[:64]+"\n"+bare(leaf)[64:], ""), false},
		"PEM, glued":                      {escape(strings.TrimSpace(armoured(leaf))+armoured(issuer), ""), true},
		"Apache escape":                   {escape(armoured(leaf), "+/"), false},
		"form encoding":                   {url.QueryEscape(armoured(leaf)), false},
		"form encoding, chain":            {url.QueryEscape(armoured(leaf, issuer)), true},
		"Envoy":                           {"Hash=ab12;" + xfccCert(leaf), false},
		"Envoy, all keys":                 {`By=spiffe://a/b;Hash=ab12;` + xfccCert(leaf) + `;Subject="CN=a\"b,c;Cert=x\\";URI=;DNS=a.example;DNS=b.example`, false},
		"Envoy, lower case, spaces":       {`hash=ab12; cert=` + escape(armoured(leaf), ""), false},
		"Envoy, Chain":                    {xfccCert(leaf) + `;Chain="` + escape(armoured(leaf, issuer), "") + `"`, true},
		"Envoy, Chain alone":              {`Chain="` + escape(armoured(leaf, issuer), "") + `"`, true},
		"Envoy, same certificate twice":   {xfccCert(leaf) + ", By=x;" + xfccCert(leaf), false},
		"Envoy, a comma inside the quote": {`Subject="O=a,b";` + xfccCert(leaf), false},
		"Envoy, needless escapes":         {`Cert="\-----BEGIN` + strings.TrimPrefix(escape(armoured(leaf), ""), "-----BEGIN") + `"`, false},
	} {
		t.Run(name, func(t *testing.T) {
			got, chain, err := parseCertHeader([]string{test.value})
			require.NoError(t, err)
			require.Equal(t, leaf.Raw, got.Raw)
			if test.chain {
				require.Len(t, chain, 1)
				require.Equal(t, issuer.Raw, chain[0].Raw)
			} else {
				require.Empty(t, chain)
			}
		})
	}
}

func TestParseCertHeaderAbsent(t *testing.T) {
	for _, values := range [][]string{nil, {}, {""}, {" \t"}, {"(null)"}} {
		_, _, err := parseCertHeader(values)
		require.ErrorIs(t, err, errNoCertificate)
		require.NotErrorIs(t, err, errCertHeader)
	}
}

func TestParseCertHeaderRefuses(t *testing.T) {
	leaf, issuer := headerCerts(t)
	sibling, other := headerCert(t), selfSigned(t)
	whole, text := bare(leaf), armoured(leaf)
	cert := `Cert="` + escape(text, "") + `"`
	otherCert := `Cert="` + escape(armoured(other), "") + `"`
	trailing := base64.StdEncoding.EncodeToString(append(bytes.Clone(leaf.Raw), 0))
	for name, values := range map[string][]string{
		"repeated":                     {whole, whole},
		"repeated, empty":              {"", ""},
		"oversize":                     {strings.Repeat("A", maxCertHeader+1)},
		"words":                        {"hello"},
		"broken escape":                {"%zz"},
		"DER in URL alphabet":          {strings.NewReplacer("+", "-", "/", "_").Replace(whole)},
		"DER and more":                 {trailing},
		"Base64 and more":              {whole + "!"},
		"Base64 cut":                   {whole[:len(whole)-8]},
		"empty second certificate":     {whole + ","},
		"second certificate broken":    {whole + ",MIIB"},
		"two devices":                  {whole + "," + bare(other)},
		"two devices, PEM":             {escape(text+armoured(other), "")},
		"two devices of one CA":        {whole + "," + bare(sibling)},
		"device, CA, device":           {whole + "," + bare(issuer) + "," + bare(sibling)},
		"CA that did not issue it":     {bare(other) + "," + whole},
		"issuer first":                 {bare(issuer) + "," + whole},
		"backslash in Base64":          {whole[:8] + `\x` + whole[8:]},
		"too many certificates":        {strings.Repeat(whole+",", maxCertHeaderCerts) + whole},
		"RFC 9440, open":               {":" + whole},
		"RFC 9440, only a colon":       {":"},
		"RFC 9440, empty":              {"::"},
		"RFC 9440, parameter":          {":" + whole + ":;a=1"},
		"RFC 9440, list":               {":" + whole + ":, :" + whole + ":"},
		"RFC 9440, DER and more":       {":" + trailing + ":"},
		"PEM, text before":             {escape("x\n"+text, "")},
		"PEM, text after":              {escape(text+"x", "")},
		"PEM, cut":                     {escape(text[:len(text)-9], "")},
		"PEM, broken before a good":    {escape("-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"+text, "")},
		"PEM, other block":             {escape(strings.ReplaceAll(text, "CERTIFICATE", "PUBLIC KEY"), "")},
		"PEM, headers":                 {escape(strings.Replace(text, "-----\n", "-----\nA: b\n\n", 1), "")},
		"PEM, too many":                {escape(strings.Repeat(text, maxCertHeaderCerts+1), "")},
		"PEM, not DER":                 {escape("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "")},
		"Envoy, no certificate":        {"By=spiffe://a;Hash=ab12"},
		"Envoy, empty":                 {`Cert=""`},
		"Envoy, different":             {cert + "," + otherCert},
		"Envoy, one without":           {cert + ",By=x;Hash=ab12"},
		"Envoy, empty element":         {cert + ","},
		"Envoy, Cert twice":            {cert + ";" + otherCert},
		"Envoy, other Chain":           {cert + `;Chain="` + escape(armoured(other, leaf), "") + `"`},
		"Envoy, two in Cert":           {`Cert="` + escape(armoured(leaf, other), "") + `"`},
		"Envoy, quote open":            {`Subject="a;` + cert},
		"Envoy, quote does not open":   {`Cert=` + escape(text, "") + `""`},
		"Envoy, quote closes early":    {cert + `x`},
		"Envoy, hidden in the subject": {`Subject="a;` + strings.ReplaceAll(cert, `"`, `\"`) + `"`},
		"Envoy, too many":              {strings.Repeat(cert+",", maxCertHeaderCerts) + cert},
	} {
		t.Run(name, func(t *testing.T) {
			got, chain, err := parseCertHeader(values)
			require.ErrorIs(t, err, errCertHeader)
			require.NotErrorIs(t, err, errNoCertificate)
			require.Nil(t, got)
			require.Nil(t, chain)
		})
	}
	_, _, err := parseCertHeader([]string{"CN=D1,O=Example Corporation of Somewhere"})
	require.ErrorContains(t, err, `40 bytes that begin with "CN=D1,O=Example Corporat"`)
	require.ErrorContains(t, err, "should be one of: percent-encoded PEM")
}

// FuzzParseCertHeader: no panic, a certificate or an error but never both or
// neither, and what was accepted is one of the certificates that went in.
func FuzzParseCertHeader(f *testing.F) {
	leaf, issuer := headerCerts(f)
	f.Add(":" + bare(leaf) + ":")
	f.Add(bare(leaf) + "," + bare(issuer))
	f.Add(escape(armoured(leaf, issuer), "+=/"))
	f.Add(url.QueryEscape(armoured(leaf)))
	f.Add(`By=a;Hash=b;Cert="` + escape(armoured(leaf), "") + `";Chain="` + escape(armoured(leaf, issuer), "") + `";Subject="a\"b"`)
	f.Fuzz(func(t *testing.T, value string) {
		got, chain, err := parseCertHeader([]string{value})
		if err != nil {
			require.Nil(t, got)
			require.Nil(t, chain)
			return
		}
		require.NotNil(t, got)
		require.Less(t, len(chain), maxCertHeaderCerts)
		again, rest, err := parseCertHeader([]string{escape(armoured(append([]*x509.Certificate{got}, chain...)...), "")})
		require.NoError(t, err)
		require.True(t, again.Equal(got))
		require.Len(t, rest, len(chain))
	})
}

// FuzzXFCC puts two certificates into whatever a proxy, or who talks to it,
// might write, in places that the text names: C and D are certificates, K both
// as a chain. An accepted header names one device: if both stand there as the
// client's own, in whatever element, neither is taken.
func FuzzXFCC(f *testing.F) {
	one, two := headerCerts(f)
	for _, seed := range []string{
		`Cert="{C}"`, `Hash=1;Cert="{C}";Chain="{K}"`, `Cert="{C}",Cert="{D}"`, `By=a;Cert={C};Subject="x\";Cert={D}"`, `Chain="{K}"`,
		`Cert="{C}";Cert="{D}"`, `Cert="{C}";Chain="{D}"`, `URI=a;DNS=b;cert="{C}" , CERT="{C}"`, `Cert="{C}{D}"`, `Cert="\{C}"`, `Subject="Cert={C}";Hash=a`,
		`Subject="a,Cert={D},b";Cert="{C}"`, `Cert="{C}`, `,Cert="{C}"`, `Cert="{C}";`, `Hash=a,Cert="{C}"`,
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		value := strings.NewReplacer("{C}", escape(armoured(one), ""), "{D}", escape(armoured(two), ""), "{K}", escape(armoured(one, two), "")).Replace(text)
		got, _, err := parseCertHeader([]string{value})
		if err != nil {
			require.Nil(t, got)
			return
		}
		require.True(t, got.Equal(one) || got.Equal(two))
		elements, err := splitQuoted(value, ',')
		if err != nil || !isXFCC(value) {
			return // another form
		}
		for _, element := range elements {
			certs, err := parseXFCCElement(element)
			require.NoError(t, err)
			require.True(t, certs[0].Equal(got), "each element is of the same device")
		}
	})
}
