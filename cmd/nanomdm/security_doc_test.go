package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// The security page names tests that exist.
func TestDocumentedTestsExist(t *testing.T) {
	var sources strings.Builder
	require.NoError(t, filepath.WalkDir("../..", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		if strings.HasSuffix(path, "_test.go") || strings.Contains(path, "storagetest") {
			data, err := os.ReadFile(path)
			sources.Write(data)
			return err
		}
		return nil
	}))
	page, err := os.ReadFile("../../docs/security.md")
	require.NoError(t, err)
	found := regexp.MustCompile("`(Test\\w+)(?:: ([^`]+))?`").FindAllStringSubmatch(string(page), -1)
	require.Greater(t, len(found), 20)
	for _, name := range found {
		require.Contains(t, sources.String(), "func "+name[1]+"(t *testing.T)")
		if name[2] != "" && name[2] != "..." {
			require.Contains(t, sources.String(), `{"`+name[2]+`", `)
		}
	}
}
