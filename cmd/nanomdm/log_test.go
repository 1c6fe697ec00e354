package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// linesOf returns the lines of a log that hold a text.
func linesOf(log, text string) (lines []string) {
	for line := range strings.Lines(log) {
		if strings.Contains(line, text) {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestDeviceLines: the beginning and the end of an enrollment are a line each, and
// the request's own line at level Debug names enrollment and message.
func TestDeviceLines(t *testing.T) {
	t.Parallel()
	d := start(t, "http", "-debug")
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	_, err := dev.Poll(t.Context())
	require.NoError(t, err)
	require.NoError(t, dev.CheckOut(t.Context()))
	log := d.log.String()
	lines := linesOf(log, `msg="device enrolls"`)
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], "level=INFO")
	require.Contains(t, lines[0], "enrollment_id=D1")
	lines = linesOf(log, `msg="device checked out"`)
	require.Len(t, lines, 1)
	require.Contains(t, lines[0], "enrollment_id=D1")
	for _, message := range []string{"Authenticate", "TokenUpdate", "Report", "CheckOut"} {
		lines = linesOf(log, "enrollment_id=D1 message_type="+message)
		require.NotEmpty(t, lines, message)
		require.Contains(t, lines[0], "level=DEBUG msg=request")
	}
}

// TestDebugEnrollment follows one device in a log of JSON lines.
func TestDebugEnrollment(t *testing.T) {
	t.Parallel()
	d := start(t, "http", "-log-format", "json", "-debug-enrollment", "D1")
	for _, udid := range []string{"D1", "D11", "D2"} {
		dev := d.device(udid, mdmtest.Config{})
		require.NoError(t, dev.Enroll(t.Context()))
		_, err := dev.Poll(t.Context())
		require.NoError(t, err)
	}
	seen := 0
	for line := range strings.Lines(d.log.String()) {
		var record map[string]any
		require.NoError(t, json.Unmarshal([]byte(line), &record), line)
		if record["level"] == "DEBUG" {
			require.Equal(t, "D1", record["enrollment_id"])
			seen++
		}
	}
	require.GreaterOrEqual(t, seen, 3, "Authenticate, TokenUpdate and the poll")
	require.False(t, (&follower{enrollment: "D1"}).follows("D11"))
	require.True(t, (&follower{enrollment: "D1"}).follows("D1:U1"), "the device's users")
	require.False(t, (&follower{enrollment: "D1"}).follows(""))
}
