package main

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
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
		assert.True(t, strings.Contains(sources.String(), "func "+name[1]+"(t *testing.T)"), "%s does not exist", name[1])
		if name[2] != "" && name[2] != "..." {
			assert.True(t, strings.Contains(sources.String(), `{"`+name[2]+`", `), "the subtest %q does not exist", name[2])
		}
	}
}
