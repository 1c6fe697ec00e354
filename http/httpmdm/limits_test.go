package httpmdm_test

import (
	"bytes"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// Messages are limited by their type, whether or not they tell their size, and in
// whatever order their keys are.
func TestLimitsByType(t *testing.T) {
	const checkin, status = 100 << 10, 300 << 10
	s := newSite(t, siteConfig{http: httpmdm.Config{MaxBody: 1 << 20, MaxCheckin: checkin, MaxStatus: status}})
	d := s.enrolled("D1", mdmtest.Config{})
	fill := func(n int) string { return "<key>Filler</key><string>" + strings.Repeat("x", n) + "</string>" }
	data := func(n int) string { return "<key>Data</key><data>" + strings.Repeat("AAAA", n/4) + "</data>" }
	last := func(kind, more string) []byte { // as devices send keys
		return []byte(`<plist version="1.0"><dict>` + more + `<key>Endpoint</key><string>status</string><key>MessageType</key><string>` + kind +
			`</string><key>UDID</key><string>D1</string></dict></plist>`)
	}
	const ddm = "<key>Endpoint</key><string>status</string>"
	for name, c := range map[string]struct {
		contentType string
		body        []byte
		want        int
	}{
		"check-in":                              {checkinType, message("GetBootstrapToken", "D1", fill(checkin/2)), 200},
		"check-in, too large":                   {checkinType, message("GetBootstrapToken", "D1", fill(checkin)), 413},
		"check-in, type last":                   {checkinType, last("GetBootstrapToken", fill(checkin)), 413},
		"check-in without content type":         {"", message("GetBootstrapToken", "D1", fill(checkin)), 413},
		"check-in that pretends to be data":     {checkinType, last("GetBootstrapToken", data(checkin)), 413},
		"check-in that pretends to be a report": {"", last("GetBootstrapToken", fill(checkin)), 413},
		"status":                                {checkinType, message("DeclarativeManagement", "D1", ddm+data(status/2)), 404},
		"status, type last":                     {checkinType, last("DeclarativeManagement", data(status/2)), 404},
		"status, too large":                     {checkinType, message("DeclarativeManagement", "D1", ddm+data(status)), 413},
		"status, too large, type last":          {checkinType, last("DeclarativeManagement", data(status)), 413},
		"report":                                {reportType, report("D1", "Acknowledged", "x", fill(900<<10)), 200},
		"report without content type":           {"", report("D1", "Acknowledged", "x", fill(900<<10)), 200},
		"report, too large":                     {reportType, report("D1", "Acknowledged", "x", fill(1<<20)), 413},
	} {
		t.Run(name, func(t *testing.T) {
			signature, err := mdmtest.Sign(d.Identity(), c.body, mdmtest.SignOptions{})
			require.NoError(t, err)
			for _, body := range []io.Reader{bytes.NewReader(c.body), io.MultiReader(bytes.NewReader(c.body))} { // the second without its size
				req, err := http.NewRequest("PUT", s.url+"/mdm", body)
				require.NoError(t, err)
				req.Header.Set("Mdm-Signature", signature)
				req.Header.Set("Content-Type", c.contentType)
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					require.Equal(t, 413, c.want, err) // it was cut while it was sent
					continue
				}
				require.NoError(t, resp.Body.Close())
				require.Equal(t, c.want, resp.StatusCode)
			}
		})
	}
}

func TestBytesByTheHour(t *testing.T) {
	reasons := map[string]int{}
	s := newSite(t, siteConfig{http: httpmdm.Config{MaxHourly: 250 << 10, Refused: func(reason string) { reasons[reason]++ }}})
	d, e := s.enrolled("D1", mdmtest.Config{}), s.enrolled("D2", mdmtest.Config{})
	large := func(d *mdmtest.Device) int {
		resp, err := d.Do(t.Context(), "/mdm", reportType, report(d.UDID(), "Acknowledged", "x", "<key>a</key><string>"+strings.Repeat("x", 100<<10)+"</string>"))
		require.NoError(t, err)
		if resp.Status == 503 {
			require.Equal(t, "600", resp.Header.Get("Retry-After"))
		}
		return resp.Status
	}
	for range 3 {
		require.Equal(t, 200, large(d))
	}
	require.Equal(t, 503, large(d))
	require.Equal(t, 200, large(e), "another device has a budget of its own")
	_, err := d.Poll(t.Context())
	require.NoError(t, err, "polls are always let in")
	require.Equal(t, map[string]int{"byte_budget": 1}, reasons)
	require.EqualValues(t, 1, s.recorded("D1")["byte_budget"].Count)

	// Small ones have a budget, too, which queries use as well.
	small := func(query string) int {
		resp, err := e.Do(t.Context(), "/mdm"+query, reportType, report("D2", "Idle", "", ""))
		require.NoError(t, err)
		return resp.Status
	}
	sent := 0
	for small("?q="+strings.Repeat("q", 10<<10)) == 200 {
		sent++
	}
	require.InDelta(t, 23, sent, 2)
	require.Equal(t, 503, small(""))
	_, err = d.Poll(t.Context())
	require.NoError(t, err)
}
