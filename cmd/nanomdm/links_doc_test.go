package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestPagesLinkToExistingPages: relative links of the documentation lead to
// files and headings that exist.
func TestPagesLinkToExistingPages(t *testing.T) {
	const root = "../../"
	pages, err := filepath.Glob(root + "docs/*.md")
	require.NoError(t, err)
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	checked := 0
	for _, page := range append(pages, root+"README.md") {
		text, err := os.ReadFile(page)
		require.NoError(t, err)
		for _, found := range link.FindAllStringSubmatch(string(text), -1) {
			if strings.Contains(found[1], "://") {
				continue
			}
			checked++
			file, heading, _ := strings.Cut(found[1], "#")
			target := filepath.Join(filepath.Dir(page), file)
			if file == "" {
				target = page
			}
			content, err := os.ReadFile(target)
			if info, statErr := os.Stat(target); statErr == nil && info.IsDir() {
				continue
			}
			if err != nil {
				t.Errorf("%s links to %s, which does not exist", page, found[1])
				continue
			}
			if heading != "" && !headings(string(content))[heading] {
				t.Errorf("%s links to %s, a heading that does not exist", page, found[1])
			}
		}
	}
	require.Greater(t, checked, 50, "the search looked at the wrong place")
}

// TestWalksAreShort: each walk of the architecture page names at most six
// files, and all of them exist.
func TestWalksAreShort(t *testing.T) {
	page, err := os.ReadFile("../../docs/architecture.md")
	require.NoError(t, err)
	_, rest, _ := strings.Cut(string(page), "## Three walks\n")
	section, _, _ := strings.Cut(rest, "\n## ")
	walks := strings.Split(strings.TrimSpace(section), "\n\n")
	require.Len(t, walks, 3)
	for _, walk := range walks {
		files := regexp.MustCompile("`([^`]+\\.go)`").FindAllStringSubmatch(walk, -1)
		assert.LessOrEqual(t, len(files), 6, walk)
		assert.NotEmpty(t, files, walk)
		for _, file := range files {
			assert.FileExists(t, "../../"+file[1])
		}
	}
}

// headings are the anchors of a page's headings, as GitHub makes them.
func headings(page string) map[string]bool {
	anchors := make(map[string]bool)
	dropped := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for _, heading := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(page, -1) {
		anchor := dropped.ReplaceAllString(strings.ToLower(heading[1]), "")
		anchors[strings.ReplaceAll(anchor, " ", "-")] = true
	}
	return anchors
}
