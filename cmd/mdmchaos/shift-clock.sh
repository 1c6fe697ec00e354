#!/usr/bin/env bash
#
# shift-clock.sh PROGRAM: builds the daemon with a wrong clock, which is
# MDMCHAOS_CLOCK_OFFSET seconds ahead. The daemon's source has nothing of it:
# the build replaces a line of the standard library's package time.
set -euo pipefail

program=$1
source=$(go env GOROOT)/src/time
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

sed 's/^\tsec, nsec, mono := runtimeNow()$/\tsec, nsec, mono := shiftedNow()/' "$source/time.go" >"$work/time.go"
if (($(grep -c 'shiftedNow()' "$work/time.go") != 1)); then
	echo "shift-clock.sh: time.Now of $(go version) is not as expected" >&2
	exit 1
fi
cat >"$work/shifted.go" <<'END'
package time

import "syscall"

func shiftedNow() (sec int64, nsec int32, mono int64) {
	sec, nsec, mono = runtimeNow()
	return sec + clockOffset, nsec, mono
}

var clockOffset = func() int64 {
	text, _ := syscall.Getenv("MDMCHAOS_CLOCK_OFFSET")
	digits, behind := text, false
	if len(text) > 0 && text[0] == '-' {
		digits, behind = text[1:], true
	}
	n, rest, err := leadingInt(digits)
	if err != nil || len(rest) > 0 {
		panic("MDMCHAOS_CLOCK_OFFSET is not a number of seconds")
	}
	if behind {
		return -int64(n)
	}
	return int64(n)
}()
END
printf '{"Replace": {"%s": "%s", "%s": "%s"}}' "$source/time.go" "$work/time.go" "$source/shifted.go" "$work/shifted.go" >"$work/overlay.json"
CGO_ENABLED=0 go build -overlay "$work/overlay.json" -o "$program" ./cmd/nanomdm
