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
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	for serial := int64(1); ; serial++ {
		template := &x509.Certificate{
			SerialNumber: big.NewInt(serial),
			Subject:      pkix.Name{CommonName: "MDM Identity"},
			NotAfter:     time.Date(2040, 1, 1, 0, 0, 0, 0, time.UTC),
		}
		der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
		require.NoError(t, err)
		if text := base64.StdEncoding.EncodeToString(der); strings.Contains(text, "+") && strings.Contains(text, "/") {
			cert, err := x509.ParseCertificate(der)
			require.NoError(t, err)
			return cert
		}
	}
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
	leaf, issuer := headerCert(t), headerCert(t)
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
	for _, values := range [][]string{nil, {}, {""}, {" \t"}} {
		_, _, err := parseCertHeader(values)
		require.ErrorIs(t, err, errNoCertificate)
		require.NotErrorIs(t, err, errCertHeader)
	}
}

func TestParseCertHeaderRefuses(t *testing.T) {
	leaf, other := headerCert(t), headerCert(t)
	whole, text := bare(leaf), armoured(leaf)
	cert := `Cert="` + escape(text, "") + `"`
	otherCert := `Cert="` + escape(armoured(other), "") + `"`
	trailing := base64.StdEncoding.EncodeToString(append(bytes.Clone(leaf.Raw), 0))
	for name, values := range map[string][]string{
		"repeated":                     {whole, whole},
		"repeated, empty":              {"", ""},
		"oversize":                     {strings.Repeat("A", maxCertHeader+1)},
		"words":                        {"hello"},
		"none":                         {"(null)"},
		"broken escape":                {"%zz"},
		"DER in URL alphabet":          {strings.NewReplacer("+", "-", "/", "_").Replace(whole)},
		"DER and more":                 {trailing},
		"Base64 and more":              {whole + "!"},
		"Base64 cut":                   {whole[:len(whole)-8]},
		"line break in Base64":         {whole[:8] + "%0A" + whole[8:]},
		"empty second certificate":     {whole + ","},
		"second certificate broken":    {whole + ",MIIB"},
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
		"PEM, glued":                   {escape(strings.TrimSpace(text)+text, "")},
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
}

// FuzzParseCertHeader: no panic, a certificate or an error but never both or
// neither, and what was accepted is one of the certificates that went in.
func FuzzParseCertHeader(f *testing.F) {
	leaf, issuer := headerCert(f), headerCert(f)
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
// as a chain. What is accepted names one device: if both stand there as the
// client's own, in whatever element, neither is taken.
func FuzzXFCC(f *testing.F) {
	one, two := headerCert(f), headerCert(f)
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
