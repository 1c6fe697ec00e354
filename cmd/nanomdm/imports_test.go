package main

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/nanomdm/nanomdm/"

// The allowed imports, by the first element of the path; docs/architecture.md
// draws the same arrows.
var arrows = map[string][]string{
	"docs":       nil, // examples, of what others write
	"mdm":        nil,
	"cryptoutil": {"textinput"},
	"certverify": {"textinput"},
	"backoff":    nil,
	"textinput":  nil,
	"release":    nil,
	"supervise":  {"backoff"},
	"storage":    {"mdm", "backoff", "supervise"},
	"service":    {"storage", "mdm", "cryptoutil", "backoff", "textinput", "supervise"},
	"push":       {"storage", "mdm", "backoff", "supervise"},
	"http":       {"service", "storage", "mdm", "cryptoutil", "certverify", "push", "backoff", "textinput"},
	"cmd":        {"http", "service", "storage", "push", "mdm", "cryptoutil", "certverify", "backoff", "textinput", "release", "supervise"},
}

// isolated packages import nothing of ours beside the listed ones, and why.
var isolated = map[string]struct {
	allowed []string
	why     string
}{
	"storage/sqldb": {[]string{"backoff"}, "it knows databases and no device or command, so that a new engine is one dialect file there"},
}

func TestImportsPointOneWay(t *testing.T) {
	seen := 0
	err := filepath.WalkDir("../..", func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(file, ".go") || strings.HasSuffix(file, "_test.go") {
			return err
		}
		rel, err := filepath.Rel("../..", file)
		require.NoError(t, err)
		from, _, _ := strings.Cut(filepath.ToSlash(rel), "/")
		allowed, known := arrows[from]
		require.True(t, known, "%s is in a top-level directory that the architecture does not have", rel)
		f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		require.NoError(t, err)
		for _, spec := range f.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			require.NoError(t, err)
			inner, ours := strings.CutPrefix(imported, module)
			if !ours {
				continue
			}
			seen++
			to, _, _ := strings.Cut(inner, "/")
			require.True(t, to == from || slices.Contains(allowed, to), "%s imports %s", rel, imported)
			if apart, is := isolated[filepath.ToSlash(filepath.Dir(rel))]; is {
				require.Contains(t, apart.allowed, inner, "%s imports %s: %s", rel, imported, apart.why)
			}
			if spec.Name != nil && spec.Name.Name != "_" {
				require.Equal(t, path.Base(imported), spec.Name.Name, "%s renames %s", rel, imported)
			}
		}
		return nil
	})
	require.NoError(t, err)
	require.Greater(t, seen, 20, "the walk looked at the wrong place")
}
