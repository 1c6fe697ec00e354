package httpapi_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/groob/plist"
	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// enqueueBody is a body of POST /v1/enqueue for a command of that UUID, with
// more properties.
func enqueueBody(uuid, more string) string {
	return fmt.Sprintf(`{"plist":%q,%s}`, base64.StdEncoding.EncodeToString([]byte(command(uuid))), more)
}

func TestEnqueueForms(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	o.enroll("B", "com.apple.mgmt.a")
	at := o.clock().Add(time.Hour).Format(time.RFC3339)
	for i, c := range []struct {
		method, path, body string
		want               int
		contains           string
	}{
		{"PUT", "/v1/enqueue/A?priority=5&expires_after=1h&supersede_key=s&unknown=1", command("C0"), 200, ""},
		{"POST", "/v1/enqueue/A,nobody?not_before=" + at, command("C1"), 207, "not enrolled"},
		{"POST", "/v1/enqueue", enqueueBody("C2", `"ids":["A","B","A"]`), 200, `"count": 2`},
		{"POST", "/v1/enqueue", enqueueBody("C3", `"udid":"A","options":{"priority":1,"no_push":true}`), 200, `"no_push": true`},
		{"POST", "/v1/enqueue?push=async", enqueueBody("C4", `"selector":{"topic":"com.apple.mgmt.a"}`), 200, `"push_owed": true`},
		{"POST", "/v1/enqueue", enqueueBody("C5", `"ids":["nobody"]`), 500, "not enrolled"},
		{"POST", "/v1/enqueue", enqueueBody("C6", `"selector":{"topic":"none"}`), 200, `"command_uuid": "C6"`},
		{"POST", "/v1/commands", `{"ids":["A"],"request_type":"ProfileList"}`, 200, `"command_uuid"`},
		{"POST", "/v1/commands", `{"udid":"A","request_type":"RemoveProfile","Identifier":"x","command_uuid":"C8"}`, 200, `"C8"`},

		{"PUT", "/v1/enqueue/A?priority=x", command("E"), 500, "priority: a number"},
		{"PUT", "/v1/enqueue/A?not_before=soon", command("E"), 500, `not_before: \"soon\" is not a time`},
		{"PUT", "/v1/enqueue/A?expires_after=-1h", command("E"), 500, `expires_after: \"-1h\" is not a duration`},
		{"PUT", "/v1/enqueue/A?idempotency_key=%00", command("E"), 500, "idempotency_key: it is not text"},
		{"PUT", "/v1/enqueue/A?supersede_key=" + strings.Repeat("x", 256), command("E"), 500, "supersede_key: it has more than 255 bytes"},
		{"PUT", "/v1/enqueue/A?push=never", command("E"), 500, "push: use async"},
		{"PUT", "/v1/enqueue/A", "no plist", 500, "command: "},
		{"POST", "/v1/enqueue?nopush=1", enqueueBody("E", `"ids":["A"]`), 400, "nopush: there is no such query parameter"},
		{"POST", "/v1/enqueue", `{"ids":["A"]}`, 400, "plist: the command's property list is missing"},
		{"POST", "/v1/enqueue", `{"ids":["A"],"plist":"?"}`, 400, "base64"},
		{"POST", "/v1/enqueue", `{"ids":["A"],"plist":"AAAA"}`, 400, "command: "},
		{"POST", "/v1/enqueue", enqueueBody("E", `"options":{}`), 400, "ids: no enrollment is named"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"ids":["A",""]`), 400, "ids: one of them is empty"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"ids":["A"],"selector":{"enabled":true}`), 400, "ids: give ids or a selector"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"ids":["A"],"confirm":1`), 400, "confirm: that is for a selector"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"selector":{}`), 400, "selector: it is empty"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"selector":{"color":"red"}`), 400, "color"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"selector":{"type":"Phone"}`), 400, "type: use Device"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"ids":["A"],"options":{"priority":1000001}`), 400, "priority: a number"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"ids":["A"],"options":{"expires":"1h"}`), 400, "expires"},
		{"POST", "/v1/enqueue", enqueueBody("E", `"ids":["A"],"options":{"no_push":true,"not_before":"`+at+`"}`), 400, "no_push: a command with not_before"},
		{"POST", "/v1/commands", `{"ids":["A"]}`, 400, "request_type: it is missing"},
		{"POST", "/v1/commands", `{"request_type":"X"}`, 400, "ids: no enrollment is named"},
		{"POST", "/v1/commands", `{"ids":"A","request_type":"X"}`, 400, "ids: "},
		{"POST", "/v1/commands", `{"udid":1,"request_type":"X"}`, 400, "udid: an id or a list of ids is wanted"},
		{"POST", "/v1/commands", `{"ids":["A"],"request_type":"InstallProfile","profile":"x"}`, 400, "profile: there is no such key"},
		{"POST", "/v1/commands", `{"ids":["A"],"request_type":"InstallProfile","Payload":"<x>"}`, 400, "Payload: base64 is wanted"},
		{"POST", "/v1/commands", `{"ids":["A"],"request_type":"X","options":{"bad":1}}`, 400, "options: "},
		{"POST", "/v1/commands", `[]`, 400, "body: "},
		{"POST", "/v1/commands", `{"ids":["A"],"request_type":"X","command_uuid":"C2"}`, 409, "C2 exists with other contents"},
	} {
		o.advance(time.Millisecond) // so that records have an order
		status, text, _ := o.do(o.admin(), c.method, c.path, c.body)
		require.Equal(t, c.want, status, "%d: %s %s: %s", i, c.path, c.body, text)
		require.Contains(t, text, c.contains, "%d: %s", i, c.path)
	}
	require.Equal(t, "C0", o.next("A"), "the most urgent")
	require.Equal(t, "C2", o.next("B"))
	// Each call that was understood left a record, and no other did.
	records, err := o.store.AuditRecords(t.Context(), storage.AuditFilter{Action: "command.enqueue"}, storage.AuditKey{}, 100)
	require.NoError(t, err)
	require.Len(t, records, 9)
	require.Contains(t, records[0].Outcome, "exists with other contents")
	require.Equal(t, "RemoveProfile for 1 enrollments: A", records[1].Detail)
	require.Equal(t, `ProfileList for 2 enrollments: A, B; selected by {"topic":"com.apple.mgmt.a"}`, records[4].Detail)
	require.Equal(t, `ProfileList for 1 enrollments: A; options {"priority":5,"expires_after":"1h","supersede_key":"s"}`, records[8].Detail)
}

// report has a device report.
func (o *operators) report(id, status, uuid string) (next, raw string) {
	o.t.Helper()
	out, err := o.store.Apply(o.t.Context(), &storage.Report{
		Src: storage.Source{Enroll: enrollID(id)}, Status: mdm.Status(status), CommandUUID: uuid, Raw: []byte("r")})
	require.NoError(o.t, err)
	if out.Command == nil {
		return "", ""
	}
	return out.Command.CommandUUID, string(out.Command.Raw)
}

func TestEnqueueOptions(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	send := func(uuid, options string) {
		t.Helper()
		status, text, _ := o.do(o.admin(), "POST", "/v1/enqueue", enqueueBody(uuid, `"ids":["A"],"options":{`+options+`}`))
		require.Equal(t, 200, status, text)
	}
	send("old", `"supersede_key":"lock"`)
	send("new", `"supersede_key":"lock"`)
	send("later", `"not_before":"`+o.clock().Add(100*365*24*time.Hour).Format(time.RFC3339)+`","priority":9`)
	send("expired", `"expires_after":"1ns","priority":9`)
	pushed := o.apns.Accepted(tokenOf("A"))
	require.Equal(t, 3, pushed, "what is scheduled is not pushed for")
	next, _ := o.report("A", "Idle", "")
	require.Equal(t, "new", next)
	next, _ = o.report("A", "Acknowledged", "new")
	require.Empty(t, next)
}

func TestCommandsAsJSON(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	profile := base64.StdEncoding.EncodeToString([]byte("profile"))
	status, a := o.ask(o.admin(), "POST", "/v1/commands", `{"udid":["A"],"request_type":"InstallProfile","Payload":"`+profile+`"}`)
	require.Equal(t, 200, status)
	require.Regexp(t, "^[0-9A-F]{8}-[0-9A-F]{4}-4[0-9A-F]{3}-[89AB][0-9A-F]{3}-[0-9A-F]{12}$", a.CommandUUID)
	require.Equal(t, "InstallProfile", a.RequestType)
	require.NotEmpty(t, a.Status["A"].PushResult)
	next, raw := o.report("A", "Idle", "")
	require.Equal(t, a.CommandUUID, next)
	var got struct {
		Command struct {
			RequestType string
			Payload     []byte
		}
	}
	require.NoError(t, plist.Unmarshal([]byte(raw), &got))
	require.Equal(t, "profile", string(got.Command.Payload))
}

func TestSelectorsAreConfirmed(t *testing.T) {
	o := newOperators(t)
	var ids []string
	for i := range 101 {
		id := fmt.Sprintf("D%03d", i)
		ids = append(ids, id)
		o.enroll(id, "com.apple.mgmt.a")
	}
	done := 0
	for _, path := range []string{"/v1/commands", "/v1/push"} {
		body := func(confirm string) string {
			if path == "/v1/push" {
				return `{"selector":{"enabled":true}` + confirm + `}`
			}
			return `{"request_type":"ProfileList","selector":{"enabled":true}` + confirm + `}`
		}
		for _, confirm := range []string{"", `,"confirm":100`} {
			status, a := o.ask(o.admin(), "POST", path, body(confirm))
			require.Equal(t, 409, status)
			require.Equal(t, 101, a.Count)
			require.Contains(t, a.Error, `repeat the call with "confirm": 101`)
		}
		before := o.apns.Counts().Accepted
		require.Equal(t, done, before, "nothing is pushed without the confirmation")
		status, a := o.ask(o.admin(), "POST", path, body(`,"confirm":101`))
		require.Equal(t, 200, status)
		require.Len(t, a.Status, 101)
		done += 101
		require.Eventually(t, func() bool { return o.apns.Counts().Accepted == done }, time.Minute, 5*time.Millisecond)
		if path == "/v1/commands" {
			for _, id := range ids {
				require.Equal(t, a.CommandUUID, o.next(id))
			}
		}
	}
}

func TestIdempotencyKey(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	const body = `{"ids":["A","nobody"],"request_type":"RestartDevice","options":{"idempotency_key":"k"}}`
	status, first := o.ask(o.admin(), "POST", "/v1/commands", body)
	require.Equal(t, 207, status)
	require.False(t, first.Repeated)
	_, _ = o.report("A", "Acknowledged", first.CommandUUID)
	pushes := o.apns.Counts().Requests

	for _, again := range []string{
		body,
		`{"options":{"idempotency_key":"k"},"request_type":"RestartDevice","ids":["nobody","A","A"]}`,
		`{"udid":["A","nobody"],"request_type":"RestartDevice","options":{"idempotency_key":"k"}}`,
	} {
		status, a := o.ask(o.admin(), "POST", "/v1/commands?push=async", again)
		require.Equal(t, 207, status)
		require.True(t, a.Repeated)
		require.Equal(t, first.CommandUUID, a.CommandUUID)
		require.Equal(t, "RestartDevice", a.RequestType)
		require.Equal(t, 2, a.Count)
		require.Equal(t, "not enrolled", a.Status["nobody"].CommandError)
		require.Empty(t, a.Status["A"].CommandError)
	}
	require.Equal(t, pushes, o.apns.Counts().Requests)
	require.Empty(t, o.next("A"))
	for _, other := range []string{
		`{"ids":["A"],"request_type":"RestartDevice","options":{"idempotency_key":"k"}}`,
		`{"ids":["A","nobody"],"request_type":"ShutDownDevice","options":{"idempotency_key":"k"}}`,
		`{"ids":["A","nobody"],"request_type":"RestartDevice","NotifyUser":true,"options":{"idempotency_key":"k"}}`,
		`{"ids":["A","nobody"],"request_type":"RestartDevice","options":{"idempotency_key":"k","priority":1}}`,
		`{"ids":["A","nobody"],"request_type":"RestartDevice","command_uuid":"U","options":{"idempotency_key":"k"}}`,
	} {
		status, a := o.ask(o.admin(), "POST", "/v1/commands", other)
		require.Equal(t, 409, status, other)
		require.Contains(t, a.Error, "idempotency_key: it was used for another call")
	}
	require.Empty(t, o.next("A"))
	// It is the caller's own, and holds for the other forms.
	bob := call{key: o.makeKey("bob", "enqueue")}
	status, _ = o.ask(bob, "PUT", "/v1/enqueue/A?idempotency_key=k", command("P"))
	require.Equal(t, 200, status)
	_, _ = o.report("A", "Acknowledged", "P")
	status, a := o.ask(bob, "PUT", "/v1/enqueue/A?idempotency_key=k", command("P"))
	require.Equal(t, 200, status)
	require.True(t, a.Repeated)
	status, a = o.ask(bob, "PUT", "/v1/enqueue/A?idempotency_key=k", command("Q"))
	require.Equal(t, 500, status)
	require.Contains(t, a.Error, "idempotency_key: it was used for another call")
	// A selector may choose others by now.
	const selected = `{"selector":{"topic":"com.apple.mgmt.a"},"request_type":"ProfileList","options":{"idempotency_key":"s"}}`
	_, first = o.ask(bob, "POST", "/v1/commands", selected)
	o.enroll("B", "com.apple.mgmt.a")
	status, a = o.ask(bob, "POST", "/v1/commands", selected)
	require.Equal(t, 200, status)
	require.Equal(t, []any{true, 1, first.CommandUUID}, []any{a.Repeated, a.Count, a.CommandUUID})
	require.Empty(t, o.next("B"))
	records, err := o.store.AuditRecords(t.Context(), storage.AuditFilter{Action: "command.enqueue"}, storage.AuditKey{}, 100)
	require.NoError(t, err)
	require.Len(t, records, 3, "a call without effect leaves no record")
}

func TestIdempotencyKeyAtOnce(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	uuids := make(chan string, 20)
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			status, a := o.ask(o.admin(), "POST", "/v1/commands",
				`{"ids":["A"],"request_type":"EraseDevice","options":{"idempotency_key":"k"}}`)
			if status != 200 {
				t.Errorf("%d %+v", status, a)
			}
			uuids <- a.CommandUUID
		})
	}
	wg.Wait()
	close(uuids)
	first := o.next("A")
	for uuid := range uuids {
		require.Equal(t, first, uuid)
	}
	next, _ := o.report("A", "Acknowledged", first)
	require.Empty(t, next, "it was queued once")
}

// 100,000 enrollments in one call. They are enrolled by hand, two of them for
// real; the others have each an error of its own.
func TestEnqueueForAnyNumber(t *testing.T) {
	o := newOperators(t)
	ids := make([]string, 100_000)
	for i := range ids {
		ids[i] = fmt.Sprintf("00008030-%012X", i)
	}
	o.enroll(ids[0], "com.apple.mgmt.a")
	o.enroll(ids[99_999], "com.apple.mgmt.a")
	list, err := json.Marshal(ids)
	require.NoError(t, err)
	status, a := o.ask(o.admin(), "POST", "/v1/enqueue", enqueueBody("C", `"ids":`+string(list)))
	require.Equal(t, 207, status)
	require.Len(t, a.Status, 100_000)
	require.Equal(t, 100_000, a.Count)
	failed := 0
	for _, s := range a.Status {
		if s.CommandError != "" {
			failed++
		}
	}
	require.Equal(t, 99_998, failed)
	require.Equal(t, "C", o.next(ids[0]))
	require.Equal(t, "C", o.next(ids[99_999]))
	require.Equal(t, 2, o.apns.Counts().Accepted)
}
