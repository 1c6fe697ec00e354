package main

import (
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// A device renews its certificate and says nothing of it. An operator's window
// lets it in, with what waited for it, also after it was refused.
func TestRenewalWindow(t *testing.T) {
	d := start(t, "http", "-reenroll", "deny")
	old := d.device("D1", mdmtest.Config{})
	require.NoError(t, old.Enroll(t.Context()))
	require.NoError(t, old.SetBootstrapToken(t.Context(), []byte("bootstrap")))
	enqueue := func(uuid string) {
		t.Helper()
		status, answer, _ := d.api("PUT", "/v1/enqueue/D1?nopush=1", "nanomdm", testKey, mdmtest.NewCommand(uuid, "ProfileList", nil))
		require.Equal(t, 200, status, answer)
	}
	window := func(method, body string) {
		t.Helper()
		status, answer, _ := d.api(method, "/v1/enrollments/D1/renewal", "nanomdm", testKey, []byte(body))
		require.Equal(t, 200, status, answer)
	}
	commands := func(dev *mdmtest.Device) (uuids []string) {
		t.Helper()
		visit, err := dev.Poll(t.Context())
		require.NoError(t, err)
		for _, exchange := range visit.Exchanges {
			uuids = append(uuids, exchange.Command.UUID)
		}
		return uuids
	}
	refused := func(dev *mdmtest.Device) {
		t.Helper()
		status, _, _ := poll(t, dev)
		require.Equal(t, 400, status)
	}
	enqueue("C1")
	renewed := d.device("D1", mdmtest.Config{})
	refused(renewed)
	require.Contains(t, d.log.String(), "a device that renewed its certificate needs a renewal window")
	require.Error(t, renewed.Authenticate(t.Context()), "-reenroll deny")

	window("PUT", `{"for": "1h"}`)
	require.Equal(t, []string{"C1"}, commands(renewed))
	token, err := renewed.GetBootstrapToken(t.Context())
	require.NoError(t, err)
	require.Equal(t, "bootstrap", string(token))
	// One that goes back is let in, too, and so is one that enrolls anew.
	enqueue("C2")
	require.Equal(t, []string{"C2"}, commands(old))
	enqueue("C3")
	third := d.device("D1", mdmtest.Config{})
	require.NoError(t, third.Enroll(t.Context()))
	require.Equal(t, []string{"C3"}, commands(third))
	token, err = third.GetBootstrapToken(t.Context())
	require.NoError(t, err)
	require.Equal(t, "bootstrap", string(token))

	window("DELETE", "")
	refused(old)
	refused(renewed)
	require.Empty(t, commands(third))
	_, text, _ := d.api("GET", "/v1/audit?target=D1", "nanomdm", testKey, nil)
	require.Contains(t, text, "enrollment.renewal.open")
	require.Contains(t, text, "enrollment.renewal.close")
}
