package main

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// TestExpiredCertificates: a device whose certificate expired after it was
// pinned is served if that is asked for, and no other one with such a
// certificate is.
func TestExpiredCertificates(t *testing.T) {
	for _, tc := range []struct {
		args   []string
		served bool
	}{
		{nil, false},
		{[]string{"-expired-certificates", "refuse"}, false},
		{[]string{"-expired-certificates", "pinned", "-retro"}, true},
	} {
		t.Run(strings.Join(tc.args, " "), func(t *testing.T) {
			d := start(t, "http", tc.args...)
			end := time.Now().Add(2 * time.Second).Truncate(time.Second).Add(time.Second)
			identity := func(udid string, notAfter time.Time) *mdmtest.Device {
				id, err := d.ca.Issue(udid, mdmtest.WithValidity(time.Now().Add(-time.Hour), notAfter))
				require.NoError(t, err)
				dev, err := mdmtest.NewDevice(d.url+"/mdm", id, mdmtest.Config{UDID: udid})
				require.NoError(t, err)
				return dev
			}
			dev := identity("PINNED", end)
			require.NoError(t, dev.Enroll(t.Context()))
			require.Eventually(t, func() bool { return time.Now().After(end) }, 10*time.Second, 20*time.Millisecond)

			status, body, _ := d.api("PUT", "/v1/enqueue/PINNED?nopush=1", "nanomdm", testKey, mdmtest.NewCommand("C1", "ProfileList", nil))
			require.Equal(t, 200, status, body)
			visit, err := dev.Poll(t.Context())
			_, answer, _ := d.api("GET", "/v1/enrollments/PINNED", "nanomdm", testKey, nil)
			if tc.served {
				require.NoError(t, err)
				require.Len(t, visit.Exchanges, 1)
				require.NoError(t, dev.Enroll(t.Context()), "with its own it may begin anew")
				require.True(t, strings.Contains(d.metrics(), "nanomdm_identity_expired_messages_total 4\n"))
				require.Contains(t, answer, "it is served all the same")
			} else {
				require.Error(t, err)
				require.True(t, strings.Contains(d.metrics(), "nanomdm_identity_expired_messages_total 0\n"))
				require.Contains(t, answer, "what it sends is refused")
			}

			long := time.Now().Add(-time.Minute)
			for udid, dev := range map[string]*mdmtest.Device{"PINNED": identity("PINNED", long), "NEW": identity("NEW", long)} {
				require.Error(t, dev.Authenticate(t.Context()), udid)
				status, _, _ := poll(t, dev)
				require.Equal(t, 400, status, udid)
			}
			status, _, _ = d.api("GET", "/v1/enrollments/NEW", "nanomdm", testKey, nil)
			require.Equal(t, 404, status)
		})
	}
}
