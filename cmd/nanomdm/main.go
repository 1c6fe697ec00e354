// Command nanomdm is an Apple MDM server. Devices check in and fetch their
// commands over HTTP; operators queue commands and upload push certificates
// through an HTTP API on the same listener.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
)

// version is set by the linker: -ldflags "-X main.version=...".
var version = "dev"

func main() { os.Exit(run(context.Background(), os.Args[1:], os.Environ(), os.Stdout, os.Stderr)) }

func run(_ context.Context, args, environ []string, stdout, stderr io.Writer) int {
	o, _, err := parseOptions(args, environ, os.Stat)
	switch {
	case errors.Is(err, flag.ErrHelp):
		writeHelp(stdout)
		return 0
	case err != nil:
		fmt.Fprintln(stderr, err)
		return 2
	case o.version:
		fmt.Fprintln(stdout, version)
		return 0
	}
	fmt.Fprintln(stderr, "not wired")
	return 2
}
