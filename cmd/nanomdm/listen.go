package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strings"
	"syscall"
)

// socketMode lets the proxy in through the socket's group.
const socketMode = 0o660

// listen opens the address of a listening option.
func listen(flag, address string) (net.Listener, error) {
	path, unix := strings.CutPrefix(address, unixPrefix)
	var listener net.Listener
	var err error
	if unix {
		listener, err = listenUnix(path)
	} else {
		listener, err = net.Listen("tcp", address)
	}
	if err != nil {
		return nil, fmt.Errorf("listening on -%s %s: %w", flag, address, err)
	}
	return listener, nil
}

// listenUnix makes a socket. It replaces a socket without a listener, which a
// killed daemon leaves, and no other one.
func listenUnix(path string) (net.Listener, error) {
	listener, err := net.Listen("unix", path)
	if errors.Is(err, syscall.EADDRINUSE) && abandoned(path) {
		if err := os.Remove(path); err != nil {
			return nil, err
		}
		listener, err = net.Listen("unix", path)
	}
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, socketMode); err != nil {
		return nil, errors.Join(err, listener.Close())
	}
	return listener, nil
}

func abandoned(path string) bool {
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Type() != fs.ModeSocket {
		return false
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, syscall.ECONNREFUSED)
}
