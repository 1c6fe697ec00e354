package main

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
)

// credentials finds the server's address and the API key: flags first, then
// NANOMDM_URL and NANOMDM_API, then the configuration file with its lines
// "url = ..." and "key = ...". The key has no flag of its own, since other
// users of the machine see command lines.
func (e *env) credentials() (base *url.URL, key string, err error) {
	address := e.url
	if address == "" {
		address = e.getenv("NANOMDM_URL")
	}
	key = e.getenv("NANOMDM_API")
	if e.keyFile != "" {
		text, err := readPrivate(e.keyFile)
		if err != nil {
			return nil, "", &exitError{exitUsage, fmt.Errorf("-key-file: %w", err)}
		}
		key = strings.TrimSpace(text)
	}
	if address == "" || key == "" {
		settings, path, err := e.readConfig()
		if err != nil {
			return nil, "", &exitError{exitUsage, err}
		}
		if address == "" {
			address = settings["url"]
		}
		if key == "" {
			key = settings["key"]
		}
		if address == "" || key == "" {
			return nil, "", usage("the server's address or the API key is missing: set NANOMDM_URL and NANOMDM_API, or write the lines \"url = ...\" and \"key = ...\" into %s (mode 0600)", path)
		}
	}
	base, err = url.Parse(address)
	if err != nil || base.Host == "" || base.Scheme != "http" && base.Scheme != "https" {
		return nil, "", usage("the server's address %q is no http or https URL", address)
	}
	return base, key, nil
}

// readConfig reads the configuration file; a missing one is empty.
func (e *env) readConfig() (settings map[string]string, path string, err error) {
	dir, err := e.home()
	if err != nil {
		return nil, "a configuration file", nil
	}
	path = filepath.Join(dir, "nanoctl", "config")
	text, err := readPrivate(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, path, nil
	}
	if err != nil {
		return nil, path, err
	}
	settings = make(map[string]string)
	lines := bufio.NewScanner(strings.NewReader(text))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		name, value, ok := strings.Cut(line, "=")
		name = strings.TrimSpace(name)
		if !ok || name != "url" && name != "key" {
			return nil, path, fmt.Errorf("%s, line %d: want \"url = ...\" or \"key = ...\"", path, n)
		}
		settings[name] = strings.TrimSpace(value)
	}
	return settings, path, nil
}

// readPrivate reads a small file that holds a key, and refuses one that
// others may read.
func readPrivate(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", err
	}
	if info.Mode().Perm()&0o077 != 0 {
		return "", fmt.Errorf("%s holds a key and others may read it: chmod 600 %s", path, path)
	}
	if info.Size() > 64<<10 {
		return "", fmt.Errorf("%s is too large to be a configuration", path)
	}
	data, err := os.ReadFile(path)
	return string(data), err
}
