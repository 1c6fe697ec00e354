package storage_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// certificateWith makes a certificate of a template.
func certificateWith(t *testing.T, template x509.Certificate) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template.SerialNumber, template.NotAfter = big.NewInt(1), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert
}

// otherName is a subject alternative name of a kind that package x509 does not
// know, such as a user principal name.
func otherName(t *testing.T, text string) pkix.Extension {
	t.Helper()
	value, err := asn1.MarshalWithParams(text, "utf8,explicit,tag:0")
	require.NoError(t, err)
	name, err := asn1.Marshal([]asn1.RawValue{{
		Class: asn1.ClassContextSpecific, Tag: 0, IsCompound: true,
		Bytes: append([]byte{0x06, 0x0a, 0x2b, 0x06, 0x01, 0x04, 0x01, 0x82, 0x37, 0x14, 0x02, 0x03}, value...),
	}})
	require.NoError(t, err)
	return pkix.Extension{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: name}
}

func TestNamesDevice(t *testing.T) {
	const udid, serial = "00008020-000915083C80012E", "C02XL0GYJGH5"
	cn := func(text string) x509.Certificate { return x509.Certificate{Subject: pkix.Name{CommonName: text}} }
	link, err := url.Parse("urn:device:" + udid)
	require.NoError(t, err)
	for name, c := range map[string]struct {
		cert       x509.Certificate
		id, serial string
		want       bool
	}{
		"id alone":                   {cn(udid), udid, serial, true},
		"id in a sentence":           {cn("MDM identity (" + strings.ToLower(udid) + ")"), udid, "", true},
		"serial in the subject":      {x509.Certificate{Subject: pkix.Name{SerialNumber: serial}}, udid, serial, true},
		"serial in a unit":           {x509.Certificate{Subject: pkix.Name{OrganizationalUnit: []string{"x", "sn-" + serial}}}, udid, serial, true},
		"DNS name":                   {x509.Certificate{DNSNames: []string{serial + ".mdm.example.org"}}, udid, serial, true},
		"email":                      {x509.Certificate{EmailAddresses: []string{serial + "@example.org"}}, udid, serial, true},
		"URI":                        {x509.Certificate{URIs: []*url.URL{link}}, udid, serial, true},
		"other name":                 {x509.Certificate{ExtraExtensions: []pkix.Extension{otherName(t, serial)}}, udid, serial, true},
		"one subject for all":        {cn("MDM Identity"), udid, serial, false},
		"another device":             {cn("00008020-000915083C80012F"), udid, serial, false},
		"longer serial":              {cn(serial + "9"), udid, serial, false},
		"serial inside of a word":    {cn("X" + serial), udid, serial, false},
		"second occurrence":          {cn("X" + serial + " " + serial), udid, serial, true},
		"empty serial":               {cn("MDM Identity"), udid, "", false},
		"short serial":               {cn("device 0"), udid, "0", false},
		"nothing":                    {cn(""), udid, serial, false},
		"other name of another kind": {x509.Certificate{ExtraExtensions: []pkix.Extension{otherName(t, "nobody")}}, udid, serial, false},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, c.want, storage.NamesDevice(certificateWith(t, c.cert), c.id, c.serial))
		})
	}
}

func FuzzNamesDevice(f *testing.F) {
	f.Add([]byte{0x30, 0x02, 0x82, 0x00}, "C02XL0GYJGH5")
	f.Add([]byte(strings.Repeat("\x30\x80", 100)), "C02XL0GYJGH5")
	f.Add([]byte("\x30\x0e\x82\x0cC02XL0GYJGH5"), "C02XL0GYJGH5")
	f.Fuzz(func(t *testing.T, san []byte, serial string) {
		cert := &x509.Certificate{Extensions: []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 17}, Value: san}}}
		if storage.NamesDevice(cert, "no such id", serial) && !strings.Contains(strings.ToUpper(string(san)), strings.ToUpper(serial)) {
			t.Fatal("found what is not there")
		}
	})
}
