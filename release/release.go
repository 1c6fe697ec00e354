// Package release tells which release a program is: the version in the file
// VERSION and the commit that it was built from.
package release

import (
	_ "embed"
	"runtime/debug"
	"strings"
)

//go:embed VERSION
var version string

// Version returns the version of this release, such as 0.1.0.
func Version() string { return strings.TrimSpace(version) }

// String returns the version with the commit, such as "0.1.0+0123456789ab", with
// ".modified" behind it if the work tree had changes. Without the records of
// version control, as in tests, it is the version alone.
func String() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return Version()
	}
	return describe(info.Settings)
}

// commitLength is how many digits of the commit are shown.
const commitLength = 12

func describe(settings []debug.BuildSetting) string {
	text := Version()
	modified := ""
	for _, s := range settings {
		switch {
		case s.Key == "vcs.revision" && len(s.Value) >= commitLength:
			text += "+" + s.Value[:commitLength]
		case s.Key == "vcs.modified" && s.Value == "true":
			modified = ".modified"
		}
	}
	if text == Version() {
		return text
	}
	return text + modified
}
