package main

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"

	"github.com/smallstep/pkcs7"
)

const referenceCommand = "reference"

// serveReference is the server that all others are compared with: it reads the
// body, verifies the signature with the library, chains the certificate to
// the CA each time, and replies with nothing. It prints its address.
func serveReference(ctx context.Context, caFile string) error {
	caPEM, err := os.ReadFile(caFile)
	if err != nil {
		return err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(caPEM) {
		return fmt.Errorf("%s holds no certificate", caFile)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := verify(r, roots); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
		}
	})}
	context.AfterFunc(ctx, func() { server.Close() })
	fmt.Println(listener.Addr())
	if err := server.Serve(listener); ctx.Err() == nil {
		return err
	}
	return nil
}

func verify(r *http.Request, roots *x509.CertPool) error {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	der, err := base64.StdEncoding.DecodeString(r.Header.Get("Mdm-Signature"))
	if err != nil {
		return err
	}
	p7, err := pkcs7.Parse(der)
	if err != nil {
		return err
	}
	p7.Content = body
	if err := p7.Verify(); err != nil {
		return err
	}
	_, err = p7.GetOnlySigner().Verify(x509.VerifyOptions{
		Roots: roots, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	return err
}
