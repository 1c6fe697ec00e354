package httpmdm_test

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/service/certauth"
	"github.com/nanomdm/nanomdm/storage"
)

const longUDID = "00008020-000915083C80012E"

// as is the device with another certificate of the same CA.
func (s *site) as(d *mdmtest.Device, subject string) *mdmtest.Device {
	s.t.Helper()
	other, err := mdmtest.NewDevice(s.url+"/mdm", s.identity(subject), mdmtest.Config{UDID: d.UDID()})
	require.NoError(s.t, err)
	return other
}

func (s *site) authenticates(d *mdmtest.Device) int {
	s.t.Helper()
	resp, err := d.Do(s.t.Context(), "/mdm", checkinType, message("Authenticate", d.UDID(), "<key>Topic</key><string>"+mdmtest.DefaultTopic+"</string><key>SerialNumber</key><string>C02XL0GYJGH5</string>"))
	require.NoError(s.t, err)
	return resp.Status
}

// polls returns the status of the answer and the UUID of the command in it.
func (s *site) polls(d *mdmtest.Device) (int, string) {
	s.t.Helper()
	resp, err := d.Do(s.t.Context(), "/mdm", reportType, report(d.UDID(), "Idle", "", ""))
	require.NoError(s.t, err)
	if resp.Status != 200 || len(resp.Body) == 0 {
		return resp.Status, ""
	}
	cmd, err := mdmtest.ParseCommand(resp.Body)
	require.NoError(s.t, err)
	return resp.Status, cmd.UUID
}

func TestReenrollment(t *testing.T) {
	for _, c := range []struct {
		name            string
		policy          storage.Reenroll
		stranger, named int
	}{
		{"allow", storage.ReenrollAllow, 200, 200},
		{"same-subject", storage.ReenrollSameSubject, 400, 200},
		{"deny", storage.ReenrollDeny, 400, 400},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSite(t, siteConfig{auth: certauth.Config{Reenroll: c.policy}})
			d := s.enrolled(longUDID, mdmtest.Config{})
			s.enqueue("C1", "ProfileList", longUDID)
			require.Equal(t, 200, s.authenticates(d), "its own certificate")
			require.NoError(t, d.TokenUpdate(t.Context()))
			s.enqueue("C2", "ProfileList", longUDID)

			stranger := s.as(d, "MDM Identity")
			require.Equal(t, c.stranger, s.authenticates(stranger))
			if c.stranger == 400 {
				status, uuid := s.polls(d)
				require.Equal(t, 200, status)
				require.Equal(t, "C2", uuid, "the queue was not touched")
				status, _ = s.polls(stranger)
				require.Equal(t, 400, status)
			}
			if c.policy == storage.ReenrollAllow {
				return
			}
			again := s.as(d, longUDID)
			require.Equal(t, c.named, s.authenticates(again))
			if c.named == 200 {
				require.NoError(t, again.TokenUpdate(t.Context()))
				status, _ := s.polls(d)
				require.Equal(t, 400, status, "the former certificate is dead")
			}
		})
	}
}

// A device that renews its certificate says nothing: it is just another one
// from some message on.
func TestRenewalWithoutAuthenticate(t *testing.T) {
	for policy, want := range map[storage.Renewal]int{storage.RenewalDeny: 400, storage.RenewalWindow: 400, storage.RenewalSameSubject: 200} {
		s := newSite(t, siteConfig{auth: certauth.Config{Renewal: policy}})
		d := s.enrolled(longUDID, mdmtest.Config{})
		require.NoError(t, d.SetBootstrapToken(t.Context(), []byte("bootstrap")))
		s.enqueue("C", "ProfileList", longUDID)
		status, _ := s.polls(s.as(d, "MDM Identity"))
		require.Equal(t, 400, status)
		status, uuid := s.polls(s.as(d, longUDID))
		require.Equal(t, want, status)
		if want == 200 {
			require.Equal(t, "C", uuid)
			status, _ = s.polls(d)
			require.Equal(t, 400, status)
			continue
		}
		status, uuid = s.polls(d)
		require.Equal(t, 200, status)
		require.Equal(t, "C", uuid)
	}
}

func TestAuthenticateHook(t *testing.T) {
	var answer, asked atomic.Int64
	var question struct {
		MessageType string            `json:"message_type"`
		UDID        string            `json:"udid"`
		Params      map[string]string `json:"url_params"`
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		_ = json.Unmarshal(body, &question)
		asked.Add(1)
		w.WriteHeader(int(answer.Load()))
		_, _ = io.WriteString(w, `{"message": "Ask IT."}`)
	}))
	defer srv.Close()
	hook, err := certauth.NewHook(srv.URL, certauth.HookConfig{})
	require.NoError(t, err)
	reasons := map[string]int{}
	s := newSite(t, siteConfig{
		auth: certauth.Config{Renewal: storage.RenewalSameSubject, Retro: true, Confirm: hook},
		http: httpmdm.Config{Refused: func(reason string) { reasons[reason]++ }},
	})
	d := s.device(longUDID, mdmtest.Config{})

	// Down, or without an opinion: come again. Never 401.
	for _, status := range []int64{500, 401, 404, 302} {
		answer.Store(status)
		resp, err := d.Do(t.Context(), "/mdm?ticket=t1", checkinType, message("Authenticate", longUDID, "<key>Topic</key><string>t</string>"))
		require.NoError(t, err)
		require.Equal(t, 503, resp.Status)
		require.Equal(t, "5", resp.Header.Get("Retry-After"))
		require.Empty(t, resp.Body)
	}
	require.Equal(t, "Authenticate", question.MessageType)
	require.Equal(t, longUDID, question.UDID)
	require.Equal(t, map[string]string{"ticket": "t1"}, question.Params)

	// Refused: Apple's document.
	answer.Store(403)
	resp, err := d.Do(t.Context(), "/mdm", checkinType, message("Authenticate", longUDID, "<key>Topic</key><string>t</string>"))
	require.NoError(t, err)
	require.Equal(t, 403, resp.Status)
	require.Equal(t, "application/json", resp.Header.Get("Content-Type"))
	require.JSONEq(t, `{"code": "com.apple.unrecognized.device", "message": "Ask IT."}`, string(resp.Body))
	status, _ := s.polls(d)
	require.Equal(t, 400, status, "it did not enroll")

	// Agreed, and not asked again about a certificate that is pinned.
	answer.Store(200)
	require.NoError(t, d.Enroll(t.Context()))
	answer.Store(403)
	n := asked.Load()
	require.NoError(t, d.Enroll(t.Context()))
	require.NoError(t, d.SetBootstrapToken(t.Context(), []byte("b")))
	_, err = d.Poll(t.Context())
	require.NoError(t, err)
	require.Equal(t, n, asked.Load())

	// Another certificate: asked at a re-enrollment and at a renewal alike.
	renewed := s.as(d, longUDID)
	status, _ = s.polls(renewed)
	require.Equal(t, 403, status)
	require.Equal(t, 403, s.authenticates(s.as(d, "MDM Identity")))
	require.Equal(t, n+2, asked.Load())
	status, _ = s.polls(s.as(d, "MDM Identity"))
	require.Equal(t, 400, status, "which the policy refuses, so that nobody has to be asked")
	require.Equal(t, n+2, asked.Load())
	answer.Store(204)
	status, _ = s.polls(renewed)
	require.Equal(t, 200, status)
	status, _ = s.polls(d)
	require.Equal(t, 400, status)
	require.Equal(t, map[string]int{"unavailable": 4, "unrecognized_device": 3, "certificate_not_pinned": 3}, reasons)
}
