package httpmdm_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/certverify"
	"github.com/nanomdm/nanomdm/http/gate"
	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// forge makes an identity whose issuer is claimed to be named like another
// certificate, and eight CAs above it that certify each other.
func forge(t *testing.T, issuer pkix.Name) *mdmtest.Identity {
	t.Helper()
	certificate := func(subject pkix.Name, public *ecdsa.PublicKey, signer *ecdsa.PrivateKey, isCA bool) *x509.Certificate {
		serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
		require.NoError(t, err)
		template := &x509.Certificate{
			SerialNumber: serial, Subject: subject, BasicConstraintsValid: true, IsCA: isCA,
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		}
		der, err := x509.CreateCertificate(rand.Reader, template, &x509.Certificate{Subject: issuer}, public, signer)
		require.NoError(t, err)
		cert, err := x509.ParseCertificate(der)
		require.NoError(t, err)
		return cert
	}
	var keys [8]*ecdsa.PrivateKey
	for i := range keys {
		key, err := ecdsa.GenerateKey(elliptic.P521(), rand.Reader)
		require.NoError(t, err)
		keys[i] = key
	}
	id := &mdmtest.Identity{Key: keys[0], Cert: certificate(pkix.Name{CommonName: "d"}, &keys[0].PublicKey, keys[1], false)}
	for i, key := range keys {
		id.Chain = append(id.Chain, certificate(issuer, &key.PublicKey, keys[(i+1)%len(keys)], true))
	}
	return id
}

// A stranger's certificates cost one signature check at most, and none when they
// come again, in the header or over TLS.
func TestStrangersCostNoSignatureChecks(t *testing.T) {
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	for name, forged := range map[string]*mdmtest.Identity{
		"of a CA of their own": forge(t, pkix.Name{CommonName: "self-made"}),
		"of our CA, they say":  forge(t, ca.Cert().Subject),
	} {
		for mode, identity := range map[string]func(httpmdm.Verifier) *httpmdm.Identity{"signature": httpmdm.SignatureIdentity, "TLS": httpmdm.TLSIdentity} {
			t.Run(mode+", "+name, func(t *testing.T) {
				var checks atomic.Int64
				verifier, err := certverify.New(ca.PEM(), nil, certverify.Config{Checked: func() { checks.Add(1) }})
				require.NoError(t, err)
				srv := httptest.NewUnstartedServer(httpmdm.New(nil, identity(verifier), httpmdm.Config{}).MDM(httpmdm.Any))
				srv.TLS = &tls.Config{ClientAuth: tls.RequestClientCert}
				srv.StartTLS()
				defer srv.Close()
				client := srv.Client()
				client.Transport.(*http.Transport).TLSClientConfig.Certificates = []tls.Certificate{forged.TLS()}
				ask := func() {
					body := "never parsed"
					signature, err := mdmtest.Sign(forged, []byte(body), mdmtest.SignOptions{WithChain: true})
					require.NoError(t, err)
					req, err := http.NewRequest("PUT", srv.URL, strings.NewReader(body))
					require.NoError(t, err)
					if mode == "signature" {
						req.Header.Set("Mdm-Signature", signature)
					}
					resp, err := client.Do(req)
					require.NoError(t, err)
					defer resp.Body.Close()
					_, err = io.Copy(io.Discard, resp.Body)
					require.NoError(t, err)
					require.Equal(t, 400, resp.StatusCode)
				}
				ask()
				first := checks.Load()
				if name == "of our CA, they say" {
					require.LessOrEqual(t, first, int64(6))
				} else {
					require.Zero(t, first)
				}
				for range 10 {
					ask()
				}
				require.LessOrEqual(t, checks.Load(), max(first, 9), "each certificate once, with the CA's key")
				again := checks.Load()
				ask()
				require.Equal(t, again, checks.Load())
			})
		}
	}
}

// Forged requests with the public certificate of a device wait for bodies that
// never come: the device itself and others are served meanwhile.
func TestForgedRequestsDoNotCrowdDevicesOut(t *testing.T) {
	const forged, places = 300, 64
	var crowded, turned atomic.Int64
	s := newSite(t, siteConfig{
		http: httpmdm.Config{MaxRequests: places, Refused: func(reason string) {
			if reason == httpmdm.ReasonCrowded {
				crowded.Add(1)
			}
		}},
		start: func(srv *httptest.Server) {
			srv.Config.Handler = gate.Limit(places, func() { turned.Add(1) }, srv.Config.Handler)
			srv.Start()
		},
	})
	victim, other := s.enrolled("VICTIM", mdmtest.Config{}), s.enrolled("OTHER", mdmtest.Config{})
	signature, err := mdmtest.Sign(victim.Identity(), []byte("recorded"), mdmtest.SignOptions{})
	require.NoError(t, err)
	target, err := url.Parse(s.url)
	require.NoError(t, err)
	for range forged {
		conn := dial(t, target.Host)
		_, err := fmt.Fprintf(conn, "PUT /mdm HTTP/1.1\r\nHost: x\r\nMdm-Signature: %s\r\nContent-Length: 1000\r\n\r\n", signature)
		require.NoError(t, err)
	}
	require.Eventually(t, func() bool { return crowded.Load()+turned.Load() >= forged-16 }, 30*time.Second, time.Millisecond)
	turnedBefore := turned.Load()
	for range 20 {
		for _, d := range []*mdmtest.Device{victim, other} {
			status, _ := s.polls(d)
			require.Equal(t, 200, status)
		}
	}
	require.Equal(t, turnedBefore, turned.Load())
}
