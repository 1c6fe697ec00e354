package webhook

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// A ticket in the enrollment URL proves the right to enroll: neither the log
// nor a receiver learns it, and the handlers behind the middleware do.
func TestSecretParams(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		params := map[string]string{"site": "berlin", "Ticket": "test"}
		r := &service.Request{
			Message: &mdm.Authenticate{Enrollment: mdm.Enrollment{UDID: "A"}, Topic: "com.apple.mgmt.x", Raw: []byte("authenticate")},
			Enroll:  mdm.EnrollID{Type: mdm.Device, ID: "A"}, Params: params,
		}
		_, err := w.devices.Handle(t.Context(), r)
		require.NoError(t, err)
		require.Equal(t, map[string]string{"site": "berlin", "Ticket": "test"}, r.Params)
		w.deliver("a", Config{})
		w.drained(time.Minute)
		want := map[string]string{"site": "berlin", "Ticket": "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}
		require.Equal(t, want, w.receiver.requests()[0].event.Checkin.Params)
		events, _, err := w.store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{Limit: 10})
		require.NoError(t, err)
		require.Equal(t, want, events[0].Params)
	})
}
