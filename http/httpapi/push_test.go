package httpapi_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/storage"
)

// answer is NanoMDM's result object, as its callers read it.
type answer struct {
	Status map[string]struct {
		PushError    string `json:"push_error"`
		PushResult   string `json:"push_result"`
		PushOwed     bool   `json:"push_owed"`
		CommandError string `json:"command_error"`
	}
	NoPush      bool   `json:"no_push"`
	CommandUUID string `json:"command_uuid"`
	RequestType string `json:"request_type"`
	Count       int
	Repeated    bool
	Error       string
}

func (o *operators) ask(c call, method, path, body string) (int, answer) {
	o.t.Helper()
	status, text, _ := o.do(c, method, path, body)
	var a answer
	require.NoError(o.t, json.Unmarshal([]byte(text), &a), text)
	return status, a
}

func tokenOf(id string) []byte { return []byte("token of " + id) }

func TestPush(t *testing.T) {
	o := newOperators(t)
	const topic = "com.apple.mgmt.a"
	o.enroll("A", topic)
	o.enroll("B", topic)
	for _, c := range []struct {
		method, path, body string
		want               int
	}{
		{"GET", "/v1/push/A", "", 200},
		{"PUT", "/v1/push/A,B", "", 200},
		{"POST", "/v1/push/A,A", "", 200},
		{"GET", "/v1/push/A,nobody", "", 207},
		{"GET", "/v1/push/nobody?unknown=1", "", 500},
		{"GET", "/v1/push/,", "", 500},
		{"POST", "/v1/push", `{"ids":["A","B"]}`, 200},
		{"POST", "/v1/push", `{"ids":["A","nobody"]}`, 207},
		{"POST", "/v1/push", `{"ids":[]}`, 400},
		{"POST", "/v1/push", `{"udids":["A"]}`, 400},
		{"POST", "/v1/push", `{"ids":["A"]} {}`, 400},
		{"POST", "/v1/push", `ids`, 415},
		{"POST", "/v1/push?push=later", `{"ids":["A"]}`, 400},
	} {
		o.advance(time.Millisecond) // so that records have an order
		status, a := o.ask(o.admin(), c.method, c.path, c.body)
		require.Equal(t, c.want, status, "%s %s %s: %+v", c.method, c.path, c.body, a)
		if status < 300 {
			require.Regexp(t, `^[0-9a-f-]{36}$`, a.Status["A"].PushResult)
			require.Empty(t, a.Status["A"].PushError)
		}
		if status == 207 {
			require.Equal(t, "not enrolled", a.Status["nobody"].PushError)
		}
	}
	require.Equal(t, 6, o.apns.Accepted(tokenOf("A")))

	o.advance(time.Millisecond)
	status, a := o.ask(o.admin(), "POST", "/v1/push?push=async", `{"ids":["A","nobody"]}`)
	require.Equal(t, 207, status)
	require.True(t, a.Status["A"].PushOwed)
	require.Empty(t, a.Status["A"].PushResult)
	require.NotEmpty(t, a.Status["nobody"].PushError)
	require.Eventually(t, func() bool { return o.apns.Accepted(tokenOf("A")) == 7 }, 10*time.Second, time.Millisecond)

	// APNs' word comes through.
	o.apns.SetAnswer(func(apnstest.Push) apnstest.Answer { return apnstest.Answer{Status: 400, Reason: "BadDeviceToken"} })
	o.advance(time.Millisecond)
	status, a = o.ask(o.admin(), "GET", "/v1/push/A", "")
	require.Equal(t, 500, status)
	require.Contains(t, a.Status["A"].PushError, "BadDeviceToken")

	records, err := o.store.AuditRecords(t.Context(), storage.AuditFilter{Action: "push"}, storage.AuditKey{}, 100)
	require.NoError(t, err)
	require.Len(t, records, 9, "one for each call that was understood")
	require.Equal(t, "A", records[0].Target)
	require.Equal(t, "2 enrollments: A, nobody; not waited for", records[1].Detail)
}

// The answer has a deadline; what is not done then is owed.
func TestPushDeadline(t *testing.T) {
	o := newOperators(t)
	o.enroll("slow", "com.apple.mgmt.a")
	o.enroll("A", "com.apple.mgmt.a")
	stalled := make(chan struct{}, 10)
	o.apns.SetAnswer(func(p apnstest.Push) apnstest.Answer {
		if string(p.Token) == string(tokenOf("slow")) {
			stalled <- struct{}{}
			return apnstest.Answer{Stall: true}
		}
		return apnstest.Answer{}
	})
	status, a := o.ask(o.admin(), "PUT", "/v1/enqueue/slow,A", command("one"))
	require.Equal(t, 200, status)
	require.NotEmpty(t, a.Status["A"].PushResult)
	require.True(t, a.Status["slow"].PushOwed)
	states, err := o.store.PushStates(t.Context(), storage.Scope{}, []string{"slow"})
	require.NoError(t, err)
	require.True(t, states["slow"].Owed)
	ctx, cancel := context.WithCancel(t.Context())
	cancel() // the stalled push is not waited for
	_ = o.pusher.Close(ctx)
	<-stalled
}

func TestEnqueuePushes(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	status, a := o.ask(o.admin(), "PUT", "/v1/enqueue/A", command("one"))
	require.Equal(t, 200, status)
	require.NotEmpty(t, a.Status["A"].PushResult)
	require.Equal(t, 1, o.apns.Accepted(tokenOf("A")))
	status, a = o.ask(o.admin(), "PUT", "/v1/enqueue/A?nopush=1", command("two"))
	require.Equal(t, 200, status)
	require.True(t, a.NoPush)
	require.Empty(t, a.Status["A"].PushResult)
	require.Equal(t, 1, o.apns.Accepted(tokenOf("A")))
	status, a = o.ask(o.admin(), "PUT", "/v1/enqueue/A?push=async", command("three"))
	require.Equal(t, 200, status)
	require.True(t, a.Status["A"].PushOwed)
	require.Eventually(t, func() bool { return o.apns.Accepted(tokenOf("A")) == 2 }, 10*time.Second, time.Millisecond)
}

// identity is a push certificate, or what is none, with its key.
type identity struct {
	cert, key []byte
	der       *ecdsa.PrivateKey
}

func (o *operators) issue(topic string, from, until time.Time) identity {
	o.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(o.t, err)
	subject := pkix.Name{CommonName: "APSP"}
	if topic != "" {
		subject.ExtraNames = []pkix.AttributeTypeAndValue{{Type: asn1.ObjectIdentifier{0, 9, 2342, 19200300, 100, 1, 1}, Value: topic}}
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: subject, NotBefore: from, NotAfter: until}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	require.NoError(o.t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(o.t, err)
	return identity{
		cert: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}),
		key:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), der: key,
	}
}

func TestPushCert(t *testing.T) {
	o := newOperators(t)
	const topic = "com.apple.mgmt.External.1"
	now := o.clock()
	good := o.issue(topic, now.Add(-time.Hour), now.Add(time.Hour))
	other := o.issue(topic, now.Add(-time.Hour), now.Add(time.Hour))
	none := o.issue("", now.Add(-time.Hour), now.Add(time.Hour))
	foreign := o.issue("com.example.app", now.Add(-time.Hour), now.Add(time.Hour))
	old := o.issue(topic, now.Add(-2*time.Hour), now.Add(-time.Hour))
	//lint:ignore SA1019 that is what openssl still writes
	encrypted, err := x509.EncryptPEMBlock(rand.Reader, "EC PRIVATE KEY", []byte("secret"), []byte("password"), x509.PEMCipherAES128)
	require.NoError(t, err)
	for name, c := range map[string]struct{ body, want string }{
		"no PEM":        {"hello", "no PEM block"},
		"no key":        {string(good.cert), "no private key"},
		"no cert":       {string(good.key), "no certificate"},
		"another key":   {string(good.cert) + string(other.key), "does not belong"},
		"encrypted":     {string(good.cert) + string(pem.EncodeToMemory(encrypted)), "encrypted"},
		"no topic":      {string(none.cert) + string(none.key), "no APNs topic"},
		"foreign topic": {string(foreign.cert) + string(foreign.key), "not for MDM"},
		"expired":       {string(old.cert) + string(old.key), "has expired"},
	} {
		status, a := o.ask(o.admin(), "PUT", "/v1/pushcert", c.body)
		require.Equal(t, 400, status, name)
		require.Contains(t, a.Error, c.want, name)
		require.NotContains(t, a.Error, "secret", name)
	}
	want := fmt.Sprintf(`{"topic":%q,"not_after":%q}`, topic, now.Add(time.Hour).Format(time.RFC3339))
	for name, body := range map[string]string{
		"as it comes": string(good.cert) + string(good.key),
		"key first":   string(good.key) + string(good.cert),
		"glued":       strings.TrimSuffix(string(good.cert), "\n") + strings.TrimSuffix(string(good.key), "\n"),
	} {
		o.advance(time.Millisecond)
		status, text, _ := o.do(o.admin(), "PUT", "/v1/pushcert", body)
		require.Equal(t, 200, status, name)
		require.JSONEq(t, want, text, name)
	}
	status, text, _ := o.do(o.admin(), "GET", "/v1/pushcert?topic="+topic, "")
	require.Equal(t, 200, status)
	require.JSONEq(t, want, text)
	status, _, _ = o.do(o.admin(), "GET", "/v1/pushcert", "")
	require.Equal(t, 400, status)
	status, _, _ = o.do(o.admin(), "GET", "/v1/pushcert?topic=x", "")
	require.Equal(t, 500, status)

	// A key that is bound to a topic handles that one.
	o.advance(time.Millisecond)
	bound := call{key: o.makeKey("bound", "admin", "com.apple.mgmt.External.2")}
	status, _, _ = o.do(bound, "PUT", "/v1/pushcert", string(good.cert)+string(good.key))
	require.Equal(t, 403, status)
	status, _, _ = o.do(bound, "GET", "/v1/pushcert?topic="+topic, "")
	require.Equal(t, 500, status)
	status, text, _ = o.do(bound, "GET", "/v1/pushcerts", "")
	require.Equal(t, 200, status)
	require.JSONEq(t, `{"pushcerts":[],"stranded":[]}`, text)
	mine := o.issue("com.apple.mgmt.External.2", now.Add(-time.Hour), now.Add(time.Hour))
	status, _, _ = o.do(bound, "PUT", "/v1/pushcert", string(mine.cert)+string(mine.key))
	require.Equal(t, 200, status)

	records, err := o.store.AuditRecords(t.Context(), storage.AuditFilter{Target: topic, Action: "pushcert.store"}, storage.AuditKey{}, 100)
	require.NoError(t, err)
	require.Len(t, records, 4)
	require.Equal(t, []string{"bound", "nanomdm"}, []string{records[0].Who, records[1].Who})
	require.Contains(t, records[0].Outcome, "not bound")
	require.Equal(t, "expires 2026-03-01T13:00:00Z", records[1].Detail)
	require.NotContains(t, o.log.String(), "PRIVATE")
}

// A certificate is deleted once; while devices use it, only by force.
func TestDeletePushCert(t *testing.T) {
	o := newOperators(t)
	now := o.clock()
	topic := "com.apple.mgmt.External.1"
	pair := o.issue(topic, now.Add(-time.Hour), now.Add(time.Hour))
	put := func() {
		o.advance(time.Millisecond)
		status, text, _ := o.do(o.admin(), "PUT", "/v1/pushcert", string(pair.cert)+string(pair.key))
		require.Equal(t, 200, status, text)
	}
	put()
	status, text, _ := o.do(call{key: o.makeKey("bound", "admin", "com.apple.mgmt.External.2")}, "DELETE", "/v1/pushcerts/"+topic, "")
	require.Equal(t, 404, status)
	require.JSONEq(t, `{"error":"there is no push certificate for that topic"}`, text)
	status, _, _ = o.do(call{key: o.makeKey("pusher", "push")}, "DELETE", "/v1/pushcerts/"+topic, "")
	require.Equal(t, 403, status)
	status, _, _ = o.do(o.admin(), "DELETE", "/v1/pushcerts/"+topic+"?force=perhaps", "")
	require.Equal(t, 400, status)

	status, text, _ = o.do(o.admin(), "DELETE", "/v1/pushcerts/"+topic, "")
	require.Equal(t, 200, status, text)
	require.JSONEq(t, `{"topic":"com.apple.mgmt.External.1","enrollments":0}`, text)
	status, _, _ = o.do(o.admin(), "DELETE", "/v1/pushcerts/"+topic, "")
	require.Equal(t, 204, status, "repeated after a lost answer")
	status, _, _ = o.do(o.admin(), "DELETE", "/v1/pushcerts/other", "")
	require.Equal(t, 404, status)

	o.enrollOnly("A", topic)
	put()
	status, text, _ = o.do(o.admin(), "DELETE", "/v1/pushcerts/"+topic, "")
	require.Equal(t, 409, status, text)
	require.Contains(t, text, "1 enrollments use that topic")
	status, text, _ = o.do(o.admin(), "DELETE", "/v1/pushcerts/"+topic+"?force=true", "")
	require.Equal(t, 200, status, text)
	status, text, _ = o.do(o.admin(), "GET", "/v1/pushcerts", "")
	require.Equal(t, 200, status)
	require.JSONEq(t, `{"pushcerts":[],"stranded":[{"topic":"com.apple.mgmt.External.1","enrollments":1}]}`, text)
}

// A certificate that was made anew, not renewed, strands the devices.
func TestStrandedEnrollments(t *testing.T) {
	o := newOperators(t)
	now := o.clock()
	first := o.issue("com.apple.mgmt.External.new", now, now.Add(time.Hour))
	put := func(c call, id identity) string {
		status, text, _ := o.do(c, "PUT", "/v1/pushcert", string(id.cert)+string(id.key))
		require.Equal(t, 200, status, text)
		var a struct{ Warning string }
		require.NoError(t, json.Unmarshal([]byte(text), &a))
		return a.Warning
	}
	require.Empty(t, put(o.admin(), first), "nobody is enrolled")
	o.enroll("A", "com.apple.mgmt.External.used")
	_, err := o.store.Apply(t.Context(), &storage.CheckOut{Src: storage.Source{Enroll: enrollID("A")}})
	require.NoError(t, err)
	require.Empty(t, put(o.admin(), first), "nor is now")
	for _, id := range []string{"B", "C"} {
		o.enrollOnly(id, "com.apple.mgmt.External.old")
	}
	o.enroll("D", "com.apple.mgmt.External.used")
	warning := put(o.admin(), first)
	require.Contains(t, warning, "while 3 use others, of which 2 are stranded: there is no push certificate for com.apple.mgmt.External.old.")
	require.Contains(t, o.log.String(), "topic no enrollment uses")
	bound := call{key: o.makeKey("bound", "admin", "com.apple.mgmt.External.new")}
	require.Empty(t, put(bound, first), "others' topics are not the caller's to know")

	var list struct {
		PushCerts []struct {
			Topic       string
			Version     int
			Enrollments int
			NotAfter    time.Time `json:"not_after"`
			LastClass   string    `json:"last_class"`
		}
		Stranded []struct {
			Topic       string
			Enrollments int
		}
	}
	status, _ := o.ask(o.admin(), "PUT", "/v1/enqueue/D", command("C1"))
	require.Equal(t, 200, status)
	require.Eventually(t, func() bool {
		_, text, _ := o.do(o.admin(), "GET", "/v1/pushcerts", "")
		require.NoError(t, json.Unmarshal([]byte(text), &list))
		return list.PushCerts[1].LastClass == "accepted"
	}, 10*time.Second, time.Millisecond)
	require.Equal(t, "com.apple.mgmt.External.new", list.PushCerts[0].Topic)
	require.Positive(t, list.PushCerts[0].Version)
	require.Zero(t, list.PushCerts[0].Enrollments)
	require.Equal(t, now.Add(time.Hour), list.PushCerts[0].NotAfter)
	require.Equal(t, 1, list.PushCerts[1].Enrollments)
	require.Len(t, list.Stranded, 1)
	require.Equal(t, 2, list.Stranded[0].Enrollments)

	second := o.issue("com.apple.mgmt.External.old", now, now.Add(time.Hour))
	require.Empty(t, put(o.admin(), second))
}

// TestDeletedCertificateIsUnused: the replica that deletes a push certificate
// does not push with it any more.
func TestDeletedCertificateIsUnused(t *testing.T) {
	o := newOperators(t)
	const topic = "com.apple.mgmt.a"
	o.enroll("A", topic)
	status, _ := o.ask(o.admin(), "POST", "/v1/push", `{"ids":["A"]}`)
	require.Equal(t, 200, status)
	status, text, _ := o.do(o.admin(), "DELETE", "/v1/pushcerts/"+topic+"?force=true", "")
	require.Equal(t, 200, status, text)
	status, a := o.ask(o.admin(), "POST", "/v1/push", `{"ids":["A"]}`)
	require.Equal(t, 500, status)
	require.NotEmpty(t, a.Status["A"].PushError)
}
