package httpmdm_test

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
)

// logBuffer is a log that requests write to at once.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// recorded stores the refusals that wait and returns those of an enrollment by
// cause.
func (s *site) recorded(id string) map[string]storage.EnrollmentRefusal {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	cancel()
	require.ErrorIs(s.t, s.handler.RecordRefusals(ctx), context.Canceled)
	list, err := s.store.EnrollmentRefusals(s.t.Context(), id)
	require.NoError(s.t, err)
	by := make(map[string]storage.EnrollmentRefusal)
	for _, r := range list {
		by[r.Cause] = r
	}
	return by
}

func TestRefusalsAreAttributed(t *testing.T) {
	log := &logBuffer{}
	s := newSite(t, siteConfig{http: httpmdm.Config{MaxBody: 1 << 20, Logger: slog.New(slog.NewTextHandler(log, nil))}})
	d, e := s.enrolled("D1", mdmtest.Config{}), s.enrolled("D2", mdmtest.Config{})
	send := func(d *mdmtest.Device, contentType string, body []byte, want int) {
		t.Helper()
		resp, err := d.Do(t.Context(), "/mdm", contentType, body)
		require.NoError(t, err)
		require.Equal(t, want, resp.Status)
	}
	send(d, checkinType, message("Levitate", "D1", ""), 400)
	require.Regexp(t, `msg="device request refused" .*status=400 cause=malformed enrollment_id=D1 peer=127\.0\.0\.1:\d+ client=127\.0\.0\.1 `+
		`certificate_subject="?CN=D1.* certificate_issuer="[^"]*CN=.* error=.*unknown MessageType`, log.String())
	send(d, reportType, []byte("<plist>"), 200)
	send(d, checkinType, bytes.Repeat([]byte("x"), 2<<20), 413)
	// The certificate of D1 for D2: told at both.
	send(d, reportType, report("D2", "Idle", "", ""), 400)
	send(d, reportType, report("D2", "Idle", "", ""), 400)

	one, two := s.recorded("D1"), s.recorded("D2")
	require.Equal(t, "D2", one["certificate_not_pinned"].Other)
	require.Equal(t, "D1", two["certificate_not_pinned"].Other)
	require.EqualValues(t, 2, two["certificate_not_pinned"].Count)
	require.Len(t, two, 1)
	require.Len(t, one, 4)
	require.Contains(t, one["malformed"].Detail, "unknown MessageType")
	require.EqualValues(t, 1, one["too_large"].Count)
	require.EqualValues(t, 1, one["unreadable_report"].Count)
	require.False(t, one["malformed"].Last.IsZero())

	// A certificate of another CA says nothing of anybody, but the log has it.
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	id, err := ca.Issue("FORGED")
	require.NoError(t, err)
	forger, err := mdmtest.NewDevice(s.url+"/mdm", id, mdmtest.Config{UDID: "D2"})
	require.NoError(t, err)
	send(forger, reportType, report("D2", "Idle", "", ""), 400)
	require.Contains(t, log.String(), "cause=identity enrollment_id=\"\" ")
	require.Contains(t, log.String(), "CN=FORGED")
	require.Len(t, s.recorded("D2"), 1)
	_, err = e.Poll(t.Context())
	require.NoError(t, err)
}

func TestRefusalsAreThrottledInTheLog(t *testing.T) {
	log := &logBuffer{}
	s := newSite(t, siteConfig{http: httpmdm.Config{Logger: slog.New(slog.NewTextHandler(log, nil))}})
	d := s.enrolled("D1", mdmtest.Config{})
	for i := range 50 {
		_, err := d.Do(t.Context(), "/mdm", checkinType, message(fmt.Sprintf("Odd%d", i), "D1", ""))
		require.NoError(t, err)
	}
	require.LessOrEqual(t, strings.Count(log.String(), "cause=malformed"), 20, "at most two intervals")
	resp, err := d.Do(t.Context(), "/mdm", checkinType, message("CheckOut", "D2", ""))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status)
	require.Contains(t, log.String(), "cause=certificate_not_pinned", "another cause has lines of its own")
	require.EqualValues(t, 50, s.recorded("D1")["malformed"].Count)
}
