package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

const defaultCADir = "mdmsim-ca"

func runCA(_ context.Context, s streams, args []string) error {
	flags := newFlags(s, "ca", "[-dir DIR]", `
Makes a certificate authority for simulated devices, and one for the fake APNs
(apns-ca.pem), or keeps those that are there, and prints the flag that makes a
server believe in the devices. Never give that flag to a server of real devices:
whoever has the directory can be any of them.`)
	dir := flags.String("dir", defaultCADir, "`directory` for ca.pem, apns-ca.pem and their keys")
	if err := parse(s, flags, args); err != nil {
		return err
	}
	_, made, err := openCA(*dir)
	if err != nil {
		return err
	}
	if _, err := openAPNsCA(apnsCAFiles(*dir)); err != nil {
		return err
	}
	if made {
		fmt.Fprintf(s.err, "made a new CA in %s\n", *dir)
	} else {
		fmt.Fprintf(s.err, "kept the CA in %s\n", *dir)
	}
	fmt.Fprintf(s.out, "-ca %s\n", filepath.Join(*dir, "ca.pem"))
	return nil
}

// openCA loads the CA in dir, or makes one.
func openCA(dir string) (ca *mdmtest.CA, made bool, err error) {
	ca, err = mdmtest.LoadCA(dir)
	if err == nil {
		return ca, false, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, false, err
	}
	if ca, err = mdmtest.NewCA(); err != nil {
		return nil, false, err
	}
	return ca, true, ca.Save(dir)
}

// apnsCAFiles are the certificate and the key of the fake APNs' authority in
// dir.
func apnsCAFiles(dir string) (certFile, keyFile string) {
	return filepath.Join(dir, "apns-ca.pem"), filepath.Join(dir, "apns-ca.key")
}

// openAPNsCA loads the authority of the fake APNs, or makes one if there is
// neither of its files.
func openAPNsCA(certFile, keyFile string) (tls.Certificate, error) {
	ca, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return ca, err
	}
	for _, file := range []string{certFile, keyFile} {
		if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
			return ca, fmt.Errorf("the authority of the fake APNs: %s is there, but not both of %s and %s", file, certFile, keyFile)
		}
	}
	if ca, err = apnstest.NewCA(); err != nil {
		return ca, err
	}
	key, err := x509.MarshalPKCS8PrivateKey(ca.PrivateKey)
	if err != nil {
		return ca, err
	}
	if err := os.MkdirAll(filepath.Dir(keyFile), 0o700); err != nil {
		return ca, err
	}
	if err := os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}), 0o600); err != nil {
		return ca, err
	}
	return ca, os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate[0]}), 0o644)
}
