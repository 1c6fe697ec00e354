package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
)

// A context is a server with its key: a private file of the lines of the
// configuration file, in the folder contexts beside it. The file current has
// the name of the one in use.

var contextName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// folder is where nanoctl keeps its files.
func (e *env) folder() (string, error) {
	dir, err := e.home()
	if err != nil {
		return "", err
	}
	return filepath.Join(dir, "nanoctl"), nil
}

func (e *env) contextPath(name string) (string, error) {
	if !contextName.MatchString(name) {
		return "", usage("context %q: a name has letters, digits, dots, dashes and underscores", name)
	}
	dir, err := e.folder()
	return filepath.Join(dir, "contexts", name), err
}

// currentContext is the name of the one in use, empty if there is none.
func (e *env) currentContext() string {
	dir, err := e.folder()
	if err != nil {
		return ""
	}
	name, err := os.ReadFile(filepath.Join(dir, "current"))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(name))
}

// contextInfo is a context for a list; the key stays in its file.
type contextInfo struct {
	Name    string `json:"name"`
	Current bool   `json:"current"`
	URL     string `json:"url"`
	CAFile  string `json:"ca_file,omitempty"`
}

var contextColumns = []column[contextInfo]{
	{heading: "NAME", cell: func(c *contextInfo) string { return c.Name }},
	{heading: "IN USE", cell: func(c *contextInfo) string { return wordIf(c.Current, "yes") }},
	{heading: "URL", cell: func(c *contextInfo) string { return c.URL }, clip: true},
	{heading: "CA FILE", cell: func(c *contextInfo) string { return c.CAFile }, wide: true},
}

func (e *env) contexts() ([]contextInfo, error) {
	dir, err := e.folder()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(filepath.Join(dir, "contexts"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	current := e.currentContext()
	var list []contextInfo
	for _, entry := range entries {
		if !contextName.MatchString(entry.Name()) {
			continue
		}
		s, err := readSettings(filepath.Join(dir, "contexts", entry.Name()))
		if err != nil {
			return nil, &exitError{exitUsage, err}
		}
		list = append(list, contextInfo{entry.Name(), entry.Name() == current, s["url"], s["ca-file"]})
	}
	return list, nil
}

func contextLsCommand() command {
	return command{
		name: "context ls", offline: true, short: "List the servers that nanoctl knows", example: "nanoctl context ls",
		prepare: func(*flag.FlagSet) runner {
			return func(_ context.Context, e *env, _ []string) error {
				list, err := e.contexts()
				if err != nil {
					return err
				}
				var items []json.RawMessage
				for _, c := range list {
					item, err := json.Marshal(c)
					if err != nil {
						return err
					}
					items = append(items, item)
				}
				t := &table[contextInfo]{e: e, field: "contexts", columns: contextColumns}
				if err := t.add(items); err != nil {
					return err
				}
				return t.end()
			}
		},
	}
}

func contextAddCommand() command {
	return command{
		name: "context add", args: "NAME", offline: true,
		short:   "Keep a server's address, key and CA under a name",
		long:    "-url, -key-file (- is standard input) and -ca-file say what is kept. The first context is in use at once.",
		example: "nanoctl context add prod -url https://mdm.example.org -key-file prod.key -ca-file ca.pem",
		prepare: func(*flag.FlagSet) runner {
			return func(_ context.Context, e *env, args []string) error {
				path, err := e.contextPath(args[0])
				if err != nil {
					return err
				}
				if _, err := parseServer(e.url); err != nil {
					return usage("context add: -url: %w", err)
				}
				if e.keyFile == "" {
					return usage("context add: -key-file is missing")
				}
				key, err := e.readKey(e.keyFile)
				if err != nil {
					return err
				}
				text := "url = " + e.url + "\nkey = " + key + "\n"
				if e.caFile != "" {
					absolute, err := filepath.Abs(e.caFile)
					if err != nil {
						return err
					}
					if _, err := readCAs(absolute); err != nil {
						return err
					}
					text += "ca-file = " + absolute + "\n"
				}
				if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
					return err
				}
				if err := writePrivate(path, text); err != nil {
					return err
				}
				if e.currentContext() == "" {
					return e.useContext(args[0])
				}
				_, err = fmt.Fprintf(e.out, "context %s is kept; nanoctl context use %s\n", args[0], args[0])
				return err
			}
		},
	}
}

func contextUseCommand() command {
	return command{
		name: "context use", args: "NAME", offline: true,
		short: "Speak to this server from now on", example: "nanoctl context use prod",
		prepare: func(*flag.FlagSet) runner {
			return func(_ context.Context, e *env, args []string) error {
				if _, err := e.contextSettings(args[0]); err != nil {
					return err
				}
				return e.useContext(args[0])
			}
		},
	}
}

func (e *env) useContext(name string) error {
	dir, err := e.folder()
	if err != nil {
		return err
	}
	if err := writePrivate(filepath.Join(dir, "current"), name+"\n"); err != nil {
		return err
	}
	_, err = fmt.Fprintf(e.out, "context %s is in use\n", name)
	return err
}

func contextRmCommand() command {
	return command{
		name: "context rm", args: "NAME", offline: true, short: "Forget a server", example: "nanoctl context rm prod",
		prepare: func(*flag.FlagSet) runner {
			return func(_ context.Context, e *env, args []string) error {
				path, err := e.contextPath(args[0])
				if err != nil {
					return err
				}
				if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
					return e.noContext(args[0])
				} else if err != nil {
					return err
				}
				if e.currentContext() == args[0] {
					dir, err := e.folder()
					if err != nil {
						return err
					}
					if err := os.Remove(filepath.Join(dir, "current")); err != nil {
						return err
					}
				}
				_, err = fmt.Fprintf(e.out, "context %s is forgotten\n", args[0])
				return err
			}
		},
	}
}

// contextSettings reads a context.
func (e *env) contextSettings(name string) (map[string]string, error) {
	path, err := e.contextPath(name)
	if err != nil {
		return nil, err
	}
	s, err := readSettings(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, e.noContext(name)
	case err != nil:
		return nil, &exitError{exitUsage, err}
	}
	return s, nil
}

func (e *env) noContext(name string) error {
	list, err := e.contexts()
	if err != nil {
		return err
	}
	var names []string
	for _, c := range list {
		names = append(names, c.Name)
	}
	return &exitError{exitNotFound, fmt.Errorf("there is no context %q%s", name, suggestion(name, names))}
}

// writePrivate writes a file that nobody else may read, all of it or nothing.
func writePrivate(path, text string) error {
	temporary, err := os.CreateTemp(filepath.Dir(path), ".nanoctl-*") // with mode 0600
	if err != nil {
		return err
	}
	_, err = temporary.WriteString(text)
	if err := errors.Join(err, temporary.Close()); err != nil {
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return os.Rename(temporary.Name(), path)
}
