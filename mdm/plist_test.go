package mdm_test

import (
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
)

func TestDecodePlist(t *testing.T) {
	v, err := mdm.DecodePlist([]byte(`<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict>
<key>Text</key><string>a &amp; b</string><key>Yes</key><true/><key>Int</key><integer>-5</integer><key>Big</key><integer>18446744073709551615</integer>
<key>Real</key><real>1.5</real><key>Data</key><data>AQI=</data><key>At</key><date>2026-03-01T12:00:00Z</date>
<key>List</key><array><string>x</string><dict><key>In</key><string>y</string></dict></array></dict></plist>`))
	require.NoError(t, err)
	require.Equal(t, map[string]any{
		"Text": "a & b", "Yes": true, "Int": int64(-5), "Big": uint64(18446744073709551615), "Real": 1.5, "Data": []byte{1, 2},
		"At": time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC), "List": []any{"x", map[string]any{"In": "y"}},
	}, v)
	v, err = mdm.DecodePlist([]byte(`<dict><key>Date</key><date>yesterday</date><key>Int</key><integer>many</integer><key>Data</key><data>?</data>` +
		"<key>Na\x01me</key><string>Notes\x01&</string><key>Empty</key><array/><key>Real</key><real/></dict>\x00"))
	require.NoError(t, err)
	require.Equal(t, map[string]any{"Date": "yesterday", "Int": "many", "Data": "?", "Na\ufffdme": "Notes\ufffd&", "Empty": []any{}, "Real": 0.0}, v)
	for _, bad := range []string{"", "bplist00", "<plist><array/></plist>", "<plist><dict><key>a</key></dict></plist>",
		"<plist><dict><key>a</key>" + strings.Repeat("<array>", 100_000)} {
		_, err := mdm.DecodePlist([]byte(bad))
		require.ErrorIs(t, err, mdm.ErrMalformed, "%.40s", bad)
	}
}
