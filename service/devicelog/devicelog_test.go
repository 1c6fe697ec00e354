package devicelog_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/devicelog"
)

func TestLines(t *testing.T) {
	var log bytes.Buffer
	var failure error
	h := devicelog.New(slog.New(slog.NewTextHandler(&log, nil)))(service.HandlerFunc(
		func(context.Context, *service.Request) (*service.Response, error) {
			return &service.Response{}, failure
		}))
	handle := func(m mdm.Message) string {
		log.Reset()
		_, err := h.Handle(t.Context(), &service.Request{ID: "R", Message: m, Enroll: mdm.EnrollID{Type: mdm.Device, ID: "UDID"}})
		require.ErrorIs(t, err, failure)
		return log.String()
	}
	line := handle(&mdm.Authenticate{SerialNumber: "C02", Model: "Mac14,2", OSVersion: "15.1", Topic: "com.apple.mgmt.x"})
	for _, attr := range []string{`level=INFO msg="device enrolls"`, "request_id=R", "enrollment_id=UDID", "serial_number=C02", "os_version=15.1"} {
		require.Contains(t, line, attr)
	}
	require.Equal(t, 1, strings.Count(line, "\n"))
	require.Contains(t, handle(&mdm.CheckOut{}), `level=INFO msg="device checked out" request_id=R enrollment_id=UDID`)
	require.Empty(t, handle(&mdm.TokenUpdate{}))
	require.Empty(t, handle(&mdm.Report{}))

	failure = errors.New("refused")
	require.Empty(t, handle(&mdm.Authenticate{}))
	require.Empty(t, handle(&mdm.CheckOut{}))
}
