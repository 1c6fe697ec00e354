package httpapi_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/storage"
)

// TestDiagnosis spoils one thing at a time of a device that is well.
func TestDiagnosis(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	const day = 24 * time.Hour
	for name, tc := range map[string]struct {
		spoil func(d *httpapi.DiagnosisForTest)
		want  []string
	}{
		"nothing": {func(d *httpapi.DiagnosisForTest) {}, []string{}},
		"refused requests": {func(d *httpapi.DiagnosisForTest) {
			d.Refusals = []storage.EnrollmentRefusal{
				{Cause: "too_large", Count: 1, Detail: "body is larger than -max-body", First: ago(time.Hour), Last: ago(time.Hour)},
				{Cause: "unreadable_report", Count: 2, First: ago(day), Last: ago(2 * time.Hour)},
				{Cause: "certificate_not_pinned", Count: 3, First: ago(day), Last: ago(3 * time.Hour)},
				{Cause: "malformed", Count: 9, First: ago(30 * day), Last: ago(8 * day)},
			}
		}, []string{
			"Its requests were refused (too_large), once, at 2026-03-01T11:00:00Z: body is larger than -max-body.",
			"It sent reports that cannot be read, 2 times since 2026-02-28T12:00:00Z, the last at 2026-03-01T10:00:00Z: the commands ended as error with the status Unreadable, and the bytes are their results.",
			"Its requests were refused, 3 times since 2026-02-28T12:00:00Z, the last at 2026-03-01T09:00:00Z: the certificate is not the one that is pinned to it. It has to enroll again, unless a renewal window is opened.",
		}},
		"one identity on two devices": {func(d *httpapi.DiagnosisForTest) {
			d.Refusals = []storage.EnrollmentRefusal{{Cause: "certificate_not_pinned", Other: "E", Count: 1, First: ago(time.Hour), Last: ago(time.Hour)}}
		}, []string{"One identity was shown for it and for E, once, at 2026-03-01T11:00:00Z: it was copied from one device to the other, as Migration Assistant does. The one that it was not issued to has to enroll again."}},
		"a command that just came": {func(d *httpapi.DiagnosisForTest) {
			d.Head = &storage.QueueItem{CommandUUID: "C", State: storage.Queued, CreatedAt: ago(time.Minute)}
			d.E.Push = storage.PushState{Owed: true, LastAt: ago(time.Second), LastClass: "accepted", Attempts: 1}
		}, []string{}},
		"no TokenUpdate yet": {func(d *httpapi.DiagnosisForTest) {
			d.E.Enabled, d.E.EnrolledAt = false, time.Time{}
		}, []string{"It is not enrolled yet: it sent Authenticate at 2026-02-01T12:00:00Z and no TokenUpdate."}},
		"enrolling anew": {func(d *httpapi.DiagnosisForTest) {
			d.E.Enabled, d.E.BegunAt = false, ago(time.Hour)
		}, []string{"It began to enroll anew at 2026-03-01T11:00:00Z, and has not finished with a TokenUpdate."}},
		"checked out": {func(d *httpapi.DiagnosisForTest) { d.E.Enabled = false },
			[]string{"It has checked out: the profile was removed, or the device was erased. It has to enroll again."}},
		"disabled by an operator": {func(d *httpapi.DiagnosisForTest) { d.E.OperatorDisabled = true },
			[]string{"An operator has disabled it: it gets no commands and is not pushed until it is enabled again."}},
		"in Setup Assistant": {func(d *httpapi.DiagnosisForTest) { d.E.AwaitingConfiguration = true },
			[]string{"It waits in Setup Assistant for a DeviceConfigured command."}},
		"a user of a device that is gone": {func(d *httpapi.DiagnosisForTest) {
			d.E.ID, d.E.Enabled = "D:u", false
			d.Device = &storage.Enrollment{ID: "D", DeviceID: "D"}
		}, []string{"Its device, D, is not enrolled."}},
		"a user who has not logged in": {func(d *httpapi.DiagnosisForTest) {
			d.E.ID, d.E.Enabled = "D:u", false
			d.Device = &storage.Enrollment{ID: "D", DeviceID: "D", Enabled: true}
		}, []string{"The user has not sent a TokenUpdate since the device enrolled: that comes when the user logs in."}},
		"dead token": {func(d *httpapi.DiagnosisForTest) { d.E.Push.TokenDeadAt = ago(time.Hour) },
			[]string{"APNs says that its push token is dead since 2026-03-01T11:00:00Z: it is not pushed until it sends a new one."}},
		"no push certificate": {func(d *httpapi.DiagnosisForTest) { d.Cert = nil },
			[]string{"There is no push certificate for its topic, topic: it cannot be woken."}},
		"expired push certificate": {func(d *httpapi.DiagnosisForTest) { d.Cert.NotAfter = now },
			[]string{"The push certificate for its topic expired at 2026-03-01T12:00:00Z: it cannot be woken."}},
		"refused push certificate": {func(d *httpapi.DiagnosisForTest) {
			d.Cert.LastClass, d.Cert.LastAt = "certificate_fault", ago(time.Hour)
			d.E.Push = storage.PushState{LastAt: ago(time.Minute), LastClass: "certificate_fault", LastStatus: 403, LastReason: "BadCertificate"}
		}, []string{"APNs refused the push certificate for its topic at 2026-03-01T11:00:00Z: it cannot be woken."}},
		"refused push": {func(d *httpapi.DiagnosisForTest) {
			d.E.Push = storage.PushState{LastAt: ago(time.Minute), LastClass: "retry_later", LastStatus: 503, LastReason: "ServiceUnavailable", NextAt: now.Add(time.Minute)}
		}, []string{"The last push, at 2026-03-01T11:59:00Z, was not accepted: ServiceUnavailable (503, retry_later); the next one is planned for 2026-03-01T12:01:00Z."}},
		"refused push before it came": {func(d *httpapi.DiagnosisForTest) {
			d.E.Push = storage.PushState{LastAt: ago(2 * time.Hour), LastClass: "retry_later", LastStatus: 503}
		}, []string{}},
		"APNs did not answer": {func(d *httpapi.DiagnosisForTest) {
			d.E.Push = storage.PushState{LastAt: ago(time.Minute), LastClass: "retry_later", LastReason: "timed out"}
		}, []string{"The last push, at 2026-03-01T11:59:00Z, was not accepted: timed out (retry_later)."}},
		"one push without an answer": {func(d *httpapi.DiagnosisForTest) {
			d.E.Push = storage.PushState{LastAt: ago(10 * time.Minute), LastClass: "accepted", Attempts: 1}
		}, []string{"It was pushed once without an answer: it is off, asleep or offline, or is not managed any more."}},
		"pushes without an answer": {func(d *httpapi.DiagnosisForTest) {
			d.E.Push = storage.PushState{LastAt: ago(10 * time.Minute), LastClass: "accepted", Attempts: 5}
		}, []string{"It was pushed 5 times, the last at 2026-03-01T11:50:00Z, without an answer: it is off, asleep or offline, or is not managed any more."}},
		"NotNow": {func(d *httpapi.DiagnosisForTest) {
			d.Head = &storage.QueueItem{CommandUUID: "C", RequestType: "InstallProfile", State: storage.NotNow, NotNowCount: 3, NotNowAt: ago(time.Hour)}
		}, []string{"It has put off the command at the head of its queue, InstallProfile C, 3 times, the last time at 2026-03-01T11:00:00Z: it is locked or busy."}},
		"scheduled": {func(d *httpapi.DiagnosisForTest) {
			d.Head = &storage.QueueItem{CommandUUID: "C", RequestType: "InstallProfile", State: storage.Scheduled, NotBefore: now.Add(time.Hour)}
		}, []string{"Its next command, InstallProfile C, is scheduled for 2026-03-01T13:00:00Z."}},
		"about to expire": {func(d *httpapi.DiagnosisForTest) {
			d.Head = &storage.QueueItem{CommandUUID: "C", State: storage.Queued, CreatedAt: ago(time.Minute), ExpiresAt: now.Add(time.Hour)}
		}, []string{"The command at the head of its queue, C, expires at 2026-03-01T13:00:00Z."}},
		"came and did not answer": {func(d *httpapi.DiagnosisForTest) {
			d.Head = &storage.QueueItem{CommandUUID: "C", RequestType: "X", State: storage.Queued, CreatedAt: ago(3 * time.Hour)}
		}, []string{"It came at 2026-03-01T11:00:00Z and has not answered the command at the head of its queue, X C, which waits since 2026-03-01T09:00:00Z: the device may choke on it; cancelling it lets the next one through."}},
		"came many times and did not answer": {func(d *httpapi.DiagnosisForTest) {
			d.Head = &storage.QueueItem{CommandUUID: "C", RequestType: "X", State: storage.Queued, CreatedAt: ago(3 * time.Hour), Attempts: 7}
		}, []string{"It came at 2026-03-01T11:00:00Z and has not answered the command at the head of its queue, X C, which waits since 2026-03-01T09:00:00Z and was offered 7 times: the device may choke on it; cancelling it lets the next one through."}},
		"no certificate": {func(d *httpapi.DiagnosisForTest) { d.E.Certificate = nil },
			[]string{"No identity certificate is pinned to it: what it sends is refused unless the server runs with -retro."}},
		"expired certificate": {func(d *httpapi.DiagnosisForTest) { d.E.Certificate.NotAfter = ago(day) },
			[]string{"Its identity certificate expired at 2026-02-28T12:00:00Z: what it sends is refused."}},
		"certificate near its end": {func(d *httpapi.DiagnosisForTest) { d.E.Certificate.NotAfter = now.Add(day) },
			[]string{"Its identity certificate expires at 2026-03-02T12:00:00Z."}},
		"not seen for long": {func(d *httpapi.DiagnosisForTest) { d.E.LastSeenAt = ago(8 * day) },
			[]string{"It was last seen at 2026-02-21T12:00:00Z, 8 days ago."}},
		"never seen": {func(d *httpapi.DiagnosisForTest) { d.E.LastSeenAt = time.Time{} }, []string{"It was never seen by this server."}},
		"two things": {func(d *httpapi.DiagnosisForTest) { d.Cert, d.E.OperatorDisabled = nil, true }, []string{
			"An operator has disabled it: it gets no commands and is not pushed until it is enabled again.",
			"There is no push certificate for its topic, topic: it cannot be woken.",
		}},
	} {
		t.Run(name, func(t *testing.T) {
			d := httpapi.DiagnosisForTest{
				Now: now,
				E: &storage.Enrollment{ID: "D", DeviceID: "D", Topic: "topic", Enabled: true, BegunAt: ago(28 * day), EnrolledAt: ago(28 * day), LastSeenAt: ago(time.Hour),
					Certificate: &storage.PinnedCertificate{NotAfter: now.Add(300 * day)}},
				Cert: &storage.PushCertInfo{Topic: "topic", NotAfter: now.Add(300 * day), LastClass: "accepted"},
			}
			tc.spoil(&d)
			require.Equal(t, tc.want, d.Sentences())
		})
	}
}
