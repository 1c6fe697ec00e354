//go:build linux

package main

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// A signal reaches a child that has a session of its own, as PostgreSQL's have.
func TestSignalReachesDescendants(t *testing.T) {
	dir := t.TempDir()
	p, err := start(dir, "parent", "", nil, "/bin/sh", "-c", `setsid sleep 60 & echo $! > `+filepath.Join(dir, "child")+`; wait`)
	require.NoError(t, err)
	t.Cleanup(p.kill)
	var child string
	require.Eventually(t, func() bool {
		content, err := os.ReadFile(filepath.Join(dir, "child"))
		child = strings.TrimSpace(string(content))
		return err == nil && child != "" && state(child) == "S"
	}, 10*time.Second, 10*time.Millisecond)

	p.signal(syscall.SIGSTOP)
	require.Eventually(t, func() bool { return state(child) == "T" }, 10*time.Second, 10*time.Millisecond)
	p.kill()
	require.Eventually(t, func() bool { return state(child) == "" || state(child) == "Z" }, 10*time.Second, 10*time.Millisecond)
}

// state is the letter of a process's state, empty when it is gone.
func state(pid string) string {
	content, err := os.ReadFile("/proc/" + pid + "/stat")
	if err != nil {
		return ""
	}
	return strings.Fields(string(content[strings.LastIndexByte(string(content), ')')+1:]))[0]
}

func TestParentOf(t *testing.T) {
	for _, c := range []struct {
		stat        string
		pid, parent int
		ok          bool
	}{
		{"12 (sh) S 7 12 12 0", 12, 7, true},
		{"13 (a) b) R 12 13 13 0", 13, 12, true},
		{stat: "13 (a) R"},
		{stat: "x (a) R 1"},
		{"", 0, 0, false},
	} {
		t.Run(strconv.Quote(c.stat), func(t *testing.T) {
			pid, parent, ok := parentOf(c.stat)
			require.Equal(t, c.ok, ok)
			if !ok {
				return
			}
			require.Equal(t, c.pid, pid)
			require.Equal(t, c.parent, parent)
		})
	}
}
