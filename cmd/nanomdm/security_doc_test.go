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

// The security page names tests that exist, one at least for each promise.
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
	promises := 0
	for table := range strings.SplitSeq(string(page), "| promise | test |\n|---|---|\n") {
		if promises++; promises == 1 {
			continue // before the first table
		}
		rows, _, _ := strings.Cut(table, "\n\n")
		for row := range strings.SplitSeq(rows, "\n") {
			assert.Regexp(t, "^\\|.*\\| `Test\\w+[^|]*` \\|$", row, "a promise without a test")
		}
	}
	require.Greater(t, promises, 7)
	_, attackers, _ := strings.Cut(string(page), "\n## Attackers")
	attackers, _, _ = strings.Cut(attackers, "\n## ")
	require.NotContains(t, attackers, "\n* ", "promises are rows of tables")
	found := regexp.MustCompile("`(Test\\w+)(?:: ([^`]+))?`").FindAllStringSubmatch(string(page), -1)
	require.Greater(t, len(found), 20)
	for _, name := range found {
		assert.True(t, strings.Contains(sources.String(), "func "+name[1]+"(t *testing.T)"), "%s does not exist", name[1])
		if name[2] != "" && name[2] != "..." {
			assert.True(t, strings.Contains(sources.String(), `{"`+name[2]+`", `), "the subtest %q does not exist", name[2])
		}
	}
}
