package main

import (
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// The event log holds many hours of a device that sends as much as it may, in the
// small reports of unknown commands whose events have their payloads.
func TestEventsOfOneDeviceAreBounded(t *testing.T) {
	const hourly = 256 << 10
	sink := newConsumer(t, func(int) bool { return true })
	d := start(t, "http", "-webhook-url", sink.URL, "-max-hourly-bytes", fmt.Sprint(hourly))
	dev := d.device("ROGUE", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	noise := make([]byte, 2<<10)
	sent := 2 // of enrolling
	for status := 200; status == 200; {
		_, err := rand.Read(noise)
		require.NoError(t, err)
		resp, err := dev.Do(t.Context(), "/mdm", "application/x-apple-aspen-mdm; charset=UTF-8", []byte(`<plist version="1.0"><dict><key>UDID</key><string>ROGUE</string>`+
			`<key>Status</key><string>Acknowledged</string><key>CommandUUID</key><string>unknown</string>`+
			`<key>Noise</key><data>`+base64.StdEncoding.EncodeToString(noise)+`</data></dict></plist>`))
		require.NoError(t, err)
		if status = resp.Status; status == 200 {
			sent++
		}
	}
	require.Greater(t, sent, 50)
	var stats struct {
		Events struct {
			Logged   int64 `json:"logged"`
			LogBytes int64 `json:"log_bytes"`
		} `json:"events"`
	}
	require.Eventually(t, func() bool {
		_, text, _ := d.api("GET", "/v1/stats", "nanomdm", testKey, nil)
		require.NoError(t, json.Unmarshal([]byte(text), &stats))
		return stats.Events.Logged >= int64(sent)
	}, 10*time.Second, 20*time.Millisecond)
	require.Greater(t, stats.Events.LogBytes, int64(hourly/4))
	require.Less(t, stats.Events.LogBytes, int64(hourly))
}
