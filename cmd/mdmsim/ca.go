package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

const defaultCADir = "mdmsim-ca"

func runCA(_ context.Context, s streams, args []string) error {
	flags := newFlags(s, "ca", "[-dir DIR]", `
Makes a certificate authority for simulated devices, or keeps the one that is
there, and prints the flag that makes a server believe in it. Never give that
flag to a server of real devices: whoever has the directory can be any of them.`)
	dir := flags.String("dir", defaultCADir, "`directory` for ca.pem and ca.key")
	if err := parse(s, flags, args); err != nil {
		return err
	}
	_, made, err := openCA(*dir)
	if err != nil {
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
