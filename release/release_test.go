package release

import (
	"os"
	"regexp"
	"runtime/debug"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestVersion(t *testing.T) {
	require.Regexp(t, regexp.MustCompile(`^\d+\.\d+\.\d+(-[0-9A-Za-z.]+)?$`), Version())
}

func TestDescribe(t *testing.T) {
	revision := debug.BuildSetting{Key: "vcs.revision", Value: "0123456789abcdef0123456789abcdef01234567"}
	require.Equal(t, Version(), describe(nil))
	require.Equal(t, Version()+"+0123456789ab", describe([]debug.BuildSetting{revision, {Key: "vcs.modified", Value: "false"}}))
	require.Equal(t, Version()+"+0123456789ab.modified", describe([]debug.BuildSetting{revision, {Key: "vcs.modified", Value: "true"}}))
	require.Equal(t, Version(), describe([]debug.BuildSetting{{Key: "vcs.modified", Value: "true"}}))
}

// TestChangelog: the changelog has a section for the version that is built.
func TestChangelog(t *testing.T) {
	changelog, err := os.ReadFile("../docs/changelog.md")
	require.NoError(t, err)
	require.Regexp(t, `(?m)^## `+regexp.QuoteMeta(Version())+`( |$)`, string(changelog))
}
