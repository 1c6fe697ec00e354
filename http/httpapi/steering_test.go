package httpapi_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/storage"
)

// asks does what a test needs done and decodes the answer.
func (o *operators) asks(c call, want int, method, path, body string) map[string]any {
	o.t.Helper()
	status, answer, _ := o.do(c, method, path, body)
	require.Equal(o.t, want, status, "%s %s: %s", method, path, answer)
	var v map[string]any
	require.NoError(o.t, json.Unmarshal([]byte(answer), &v), answer)
	return v
}

// reports is a device's result of a command.
func (o *operators) reports(id string, status mdm.Status, uuid, raw string) {
	o.t.Helper()
	_, err := o.store.Apply(o.t.Context(), &storage.Report{Src: storage.Source{Enroll: enrollID(id)}, Status: status, CommandUUID: uuid, Raw: []byte(raw)})
	require.NoError(o.t, err)
}

// deeds are the audit records of an action, sorted, as "target outcome".
func (o *operators) deeds(action string) (list []string) {
	o.t.Helper()
	records, err := o.store.AuditRecords(o.t.Context(), storage.AuditFilter{Action: action}, storage.AuditKey{}, 100)
	require.NoError(o.t, err)
	for _, r := range records {
		list = append(list, r.Target+" "+r.Outcome)
	}
	slices.Sort(list)
	return list
}

// enrollFully enrolls a device with a serial number, a certificate and tokens.
func (o *operators) enrollFully(id, serial, topic string) {
	o.t.Helper()
	src := storage.Source{Enroll: enrollID(id), Pin: &storage.Pin{Hash: "cert of " + id, Certificate: []byte("x"), NotAfter: o.clock().Add(365 * 24 * time.Hour)}}
	who := mdm.Enrollment{UDID: id}
	for _, op := range []storage.Op{
		&storage.Authenticate{Src: src, Message: &mdm.Authenticate{Enrollment: who, Topic: topic, SerialNumber: serial, OSVersion: "15.1", Raw: []byte("raw")}},
		&storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{Enrollment: who, Topic: topic, PushMagic: "m", Token: []byte("t"), UnlockToken: []byte("unlock"), Raw: []byte("raw")}},
		&storage.SetBootstrapToken{Src: src, Token: []byte("bootstrap")},
	} {
		_, err := o.store.Apply(o.t.Context(), op)
		require.NoError(o.t, err)
	}
	require.NoError(o.t, o.store.Flush(o.t.Context()))
}

func TestShowEnrollment(t *testing.T) {
	o := newOperators(t)
	o.enrollFully("mac", "S1", "topic-a")
	o.enrollFully("old", "S2", "topic-a")
	o.enrollFully("new", "S2", "topic-a")
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac?nopush=1", command("C1"))
	o.reports("mac", mdm.StatusNotNow, "C1", "")
	for _, name := range []string{"mac", "S1"} {
		e := o.asks(o.admin(), 200, "GET", "/v1/enrollments/"+name, "")
		require.Equal(t, "mac", e["id"])
		require.Equal(t, "S1", e["serial_number"])
		require.Equal(t, "2026-03-01T12:00:00Z", e["last_seen_at"])
		require.Equal(t, "C1", e["queue"].(map[string]any)["head"].(map[string]any)["command_uuid"])
		require.EqualValues(t, 1, e["queue"].(map[string]any)["notnow"])
		require.Equal(t, "cert of mac", e["certificate"].(map[string]any)["sha256"])
		require.Equal(t, []any{
			"There is no push certificate for its topic, topic-a: it cannot be woken.",
			"It has put off the command at the head of its queue, ProfileList C1, once, the last time at 2026-03-01T12:00:00Z: it is locked or busy.",
		}, e["diagnosis"])
	}
	e := o.asks(o.admin(), 409, "GET", "/v1/enrollments/S2", "")
	require.Contains(t, e["error"], "new, old")
	_, err := o.store.Apply(t.Context(), &storage.CheckOut{Src: storage.Source{Enroll: enrollID("old")}})
	require.NoError(t, err)
	require.Equal(t, "new", o.asks(o.admin(), 200, "GET", "/v1/enrollments/S2", "")["id"], "the one that is enrolled")
	require.Contains(t, o.asks(o.admin(), 404, "GET", "/v1/enrollments/nobody", "")["error"], "no enrollment has that id")
	o.asks(o.admin(), 404, "GET", "/v1/enrollments/a%00b", "")

	src := storage.Source{Enroll: mdm.EnrollID{Type: mdm.User, ID: "mac:a/b", ParentID: "mac"}}
	_, err = o.store.Apply(t.Context(), &storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{
		Enrollment: mdm.Enrollment{UDID: "mac", UserID: "a/b", UserShortName: "anna"}, Topic: "topic-a", PushMagic: "m", Token: []byte("t"), Raw: []byte("raw")}})
	require.NoError(t, err)
	u := o.asks(o.admin(), 200, "GET", "/v1/enrollments/mac:a%2Fb", "")
	require.Equal(t, "mac", u["parent_id"])
	require.Equal(t, "anna", u["user"].(map[string]any)["short_name"])
	require.Equal(t, []any{"mac:a/b"}, o.asks(o.admin(), 200, "GET", "/v1/enrollments/mac", "")["channels"])
	require.Equal(t, "mac", o.asks(o.admin(), 200, "GET", "/v1/enrollments/S1", "")["id"], "the device, not its user")
}

func TestDisableAndEnable(t *testing.T) {
	o := newOperators(t)
	o.enroll("mac", "topic-a")
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac?nopush=1", command("C1"))
	require.Equal(t, []any{"mac"}, o.asks(o.admin(), 200, "POST", "/v1/enrollments/mac/disable", "")["changed"])
	require.Empty(t, o.next("mac"))
	require.Contains(t, fmt.Sprint(o.asks(o.admin(), 200, "GET", "/v1/enrollments/mac", "")["diagnosis"]), "An operator has disabled it")
	require.Equal(t, false, o.asks(o.admin(), 200, "POST", "/v1/enrollments/mac/enable", "")["operator_disabled"])
	require.Equal(t, "C1", o.next("mac"))
	o.asks(o.admin(), 404, "POST", "/v1/enrollments/nobody/disable", "")
	require.Equal(t, []string{"mac done", "nobody no enrollment has that id or serial number"}, o.deeds("enrollment.disable"))
	require.Equal(t, []string{"mac done"}, o.deeds("enrollment.enable"))
}

func TestDeleteEnrollment(t *testing.T) {
	o := newOperators(t)
	o.enrollFully("mac", "S1", "topic-a")
	for _, query := range []string{"", "?confirm=S1", "?confirm=other"} {
		require.Contains(t, o.asks(o.admin(), 400, "DELETE", "/v1/enrollments/mac"+query, "")["error"], "confirm: repeat the enrollment's id, mac")
	}
	o.asks(o.admin(), 200, "GET", "/v1/enrollments/mac", "")
	o.asks(o.admin(), 200, "DELETE", "/v1/enrollments/mac?confirm=mac", "")
	o.asks(o.admin(), 404, "GET", "/v1/enrollments/mac", "")
	o.asks(o.admin(), 404, "DELETE", "/v1/enrollments/mac?confirm=other", "")
	unconfirmed := "mac confirm: repeat the enrollment's id, mac, to delete it"
	require.Equal(t, []string{unconfirmed, unconfirmed, unconfirmed, "mac done", "mac no enrollment has that id or serial number"}, o.deeds("enrollment.delete"))
}

func TestReadTokens(t *testing.T) {
	o := newOperators(t)
	o.enrollFully("mac", "S1", "topic-a")
	o.enroll("bare", "topic-a")
	encode := func(s string) string { return base64.StdEncoding.EncodeToString([]byte(s)) }
	require.Equal(t, encode("bootstrap"), o.asks(o.admin(), 200, "POST", "/v1/enrollments/mac/bootstrap_token", "")["bootstrap_token"])
	require.Equal(t, encode("unlock"), o.asks(o.admin(), 200, "POST", "/v1/enrollments/S1/unlock_token", "")["unlock_token"])
	require.Equal(t, "the device has not escrowed one", o.asks(o.admin(), 404, "POST", "/v1/enrollments/bare/bootstrap_token", "")["error"])
	o.asks(o.admin(), 404, "POST", "/v1/enrollments/nobody/unlock_token", "")
	require.Equal(t, []string{"bare the device has not escrowed one", "mac done"}, o.deeds("enrollment.bootstrap_token.read"))
	require.Equal(t, []string{"mac done", "nobody no enrollment has that id or serial number"}, o.deeds("enrollment.unlock_token.read"))
	status, answer, _ := o.do(o.admin(), "GET", "/v1/enrollments/mac", "")
	require.Equal(t, 200, status)
	require.NotContains(t, answer, encode("bootstrap"))
	require.NotContains(t, answer, encode("unlock"))
	require.NotContains(t, o.log.String(), "bootstrap\"")
}

func TestRenewals(t *testing.T) {
	o := newOperators(t)
	for _, id := range []string{"a", "b", "c"} {
		o.enroll(id, "topic-a")
	}
	const window = "/v1/enrollments/a/renewal"
	require.Equal(t, "2026-03-02T12:00:00Z", o.asks(o.admin(), 200, "PUT", window, `{"for": "24h"}`)["renewal_until"])
	require.Equal(t, "2026-03-02T12:00:00Z", o.asks(o.admin(), 200, "GET", "/v1/enrollments/a", "")["renewal_until"])
	require.Equal(t, "2026-03-01T15:00:00Z", o.asks(o.admin(), 200, "PUT", window, `{"until": "2026-03-01T15:00:00Z"}`)["renewal_until"])
	require.NotContains(t, o.asks(o.admin(), 200, "DELETE", window, ""), "renewal_until")
	require.NotContains(t, o.asks(o.admin(), 200, "GET", "/v1/enrollments/a", ""), "renewal_until")
	for body, want := range map[string]string{
		`{}`: "say how long", `{"for": "1d"}`: "is not a time such as 24h", `{"for": "-1h"}`: "must end within", `{"for": "2161h"}`: "must end within the next 90 days",
		`{"until": "2020-01-01T00:00:00Z"}`: "must end within", `{"for": "1h", "until": "2026-03-02T00:00:00Z"}`: "give one of them", `{"sheep": 1}`: "unknown field", ``: "body",
	} {
		require.Contains(t, o.asks(o.admin(), 400, "PUT", window, body)["error"], want, body)
	}
	all := o.asks(o.admin(), 200, "PUT", "/v1/renewals", `{"ids": ["a", "b", "nobody"], "for": "1h"}`)
	require.EqualValues(t, 2, all["opened"])
	require.Equal(t, []any{"nobody"}, all["missing"])
	require.EqualValues(t, 3, o.asks(o.admin(), 200, "PUT", "/v1/renewals", `{"selector": {"topic": "topic-a"}, "for": "1h"}`)["opened"])
	for body, want := range map[string]string{
		`{"for": "1h"}`: "ids or a selector", `{"ids": ["a"], "selector": {"topic": "x"}, "for": "1h"}`: "one of them", `{"ids": ["a"]}`: "say how long",
		`{"selector": {"type": "Sheep"}, "for": "1h"}`: "type: use", `{"selector": {}, "for": "1h"}`: "empty",
	} {
		require.Contains(t, o.asks(o.admin(), 400, "PUT", "/v1/renewals", body)["error"], want, body)
	}
	require.Len(t, o.deeds("enrollment.renewal.open"), 4)
	require.Len(t, o.deeds("enrollment.renewal.close"), 1)
}

func TestTags(t *testing.T) {
	o := newOperators(t)
	for _, id := range []string{"a", "b"} {
		o.enrollFully(id, "S-"+id, "topic-a")
	}
	key := call{key: o.makeKey("helpdesk", "enqueue")}
	require.Equal(t, []any{"lab"}, o.asks(key, 200, "PUT", "/v1/enrollments/S-a/tags/lab", "")["tags"])
	require.Equal(t, []any{"lab"}, o.asks(key, 200, "PUT", "/v1/enrollments/a/tags/lab", "")["tags"])
	require.Equal(t, []any{"lab"}, o.asks(key, 200, "GET", "/v1/enrollments/a", "")["tags"])
	require.NotContains(t, o.asks(key, 200, "GET", "/v1/enrollments/b", ""), "tags")
	for path, want := range map[string]string{
		"a/tags/" + strings.Repeat("x", 65): "longer than 64", "a/tags/a%20b": "other characters", "a/tags/-x": "begin with",
	} {
		require.Contains(t, o.asks(key, 400, "PUT", "/v1/enrollments/"+path, "")["error"], want)
	}
	o.asks(key, 404, "PUT", "/v1/enrollments/nobody/tags/lab", "")

	answer := o.asks(key, 200, "POST", "/v1/tags", `{"ids": ["a", "b", "nobody"], "add": ["berlin", "berlin"], "remove": ["lab"]}`)
	require.EqualValues(t, 2, answer["changed"])
	require.Equal(t, []any{"nobody"}, answer["missing"])
	answer = o.asks(key, 200, "POST", "/v1/tags", `{"selector": {"tag": "berlin", "serial": "S-b"}, "add": ["lab"]}`)
	require.EqualValues(t, 1, answer["changed"])
	for body, want := range map[string]string{
		`{"ids": ["a"]}`: "give a tag", `{"add": ["x"]}`: "ids or a selector", `{"ids": ["a"], "add": ["x y"]}`: `add: "x y" is no tag`,
		`{"ids": ["a"], "add": ["x"], "remove": ["x"]}`: "in both", `{"ids": ["a"], "remove": [""]}`: "remove: ",
	} {
		require.Contains(t, o.asks(key, 400, "POST", "/v1/tags", body)["error"], want, body)
	}
	page := o.asks(key, 200, "GET", "/v1/tags?limit=1", "")
	require.Equal(t, []any{map[string]any{"tag": "berlin", "devices": 2.0}}, page["tags"])
	page = o.asks(key, 200, "GET", "/v1/tags?limit=1&after="+url.QueryEscape(page["next"].(string)), "")
	require.Equal(t, []any{map[string]any{"tag": "lab", "devices": 1.0}}, page["tags"])
	require.NotContains(t, page, "next")

	for range 2 {
		require.Equal(t, []any{"berlin"}, o.asks(key, 200, "DELETE", "/v1/enrollments/b/tags/lab", "")["tags"])
	}
	full := make([]string, storage.MaxTags)
	for i := range full {
		full[i] = fmt.Sprintf("%q", fmt.Sprint("t", i))
	}
	o.asks(key, 200, "POST", "/v1/tags", `{"ids": ["b"], "add": [`+strings.Join(full, ",")+`], "remove": ["berlin"]}`)
	require.Contains(t, o.asks(key, 409, "PUT", "/v1/enrollments/b/tags/more", "")["error"], "has 50 tags already")
	require.Equal(t, []any{"b"}, o.asks(key, 200, "POST", "/v1/tags", `{"ids": ["b"], "add": ["more"]}`)["full"])

	require.Equal(t, []string{" done", "a done", "b b has 50 tags already", "b done", "b done", "b done", "nobody no enrollment has that id or serial number"},
		o.deeds("enrollment.tags"), "of what changed, and of what was refused")
}

func TestInventory(t *testing.T) {
	o := newOperators(t)
	for _, id := range []string{"a", "b"} {
		o.enrollFully(id, "S-"+id, "topic-a")
	}
	require.NotContains(t, o.asks(o.admin(), 200, "GET", "/v1/enrollments/a", ""), "inventory")
	require.Equal(t, map[string]any{"id": "a", "count": 0.0, "applications": []any{}}, o.asks(o.admin(), 200, "GET", "/v1/enrollments/a/applications", ""))
	for uuid, inv := range map[string]mdm.Inventory{
		"DeviceInformation":        {Information: &mdm.DeviceInformation{OSVersion: "15.1", DeviceName: "<script>", Supervised: new(true), Capacity: new(494.38)}},
		"SecurityInfo":             {Security: &mdm.SecurityInfo{FileVault: new(true), SecureBoot: "full"}},
		"InstalledApplicationList": {Applications: &mdm.Applications{Count: 3000, Items: []mdm.Application{{Identifier: "com.example.a", Name: "A", Version: "1"}}}},
	} {
		o.asks(o.admin(), 200, "PUT", "/v1/enqueue/a?nopush=1", `<plist version="1.0"><dict><key>CommandUUID</key><string>`+uuid+
			`</string><key>Command</key><dict><key>RequestType</key><string>`+uuid+`</string></dict></dict></plist>`)
		_, err := o.store.Apply(t.Context(), &storage.Report{
			Src:    storage.Source{Enroll: enrollID("a"), Pin: &storage.Pin{Hash: "cert of a"}},
			Status: mdm.StatusAcknowledged, CommandUUID: uuid, Raw: []byte("raw"), Inventory: &inv,
		})
		require.NoError(t, err)
	}
	now := "2026-03-01T12:00:00Z"
	shown := o.asks(call{key: o.makeKey("reader", "read", "topic-a")}, 200, "GET", "/v1/enrollments/S-a", "")
	require.Equal(t, map[string]any{
		"information": map[string]any{"os_version": "15.1", "device_name": "<script>", "supervised": true, "capacity_gb": 494.38}, "information_at": now,
		"security": map[string]any{"filevault": true, "secure_boot": "full"}, "security_at": now, "applications_count": 3000.0, "applications_at": now,
	}, shown["inventory"])
	require.Equal(t, "15.1", shown["os_version"])
	require.Equal(t, map[string]any{"id": "a", "count": 3000.0, "applications_at": now, "applications": []any{
		map[string]any{"identifier": "com.example.a", "name": "A", "version": "1"}}}, o.asks(o.admin(), 200, "GET", "/v1/enrollments/a/applications", ""))
	for query, want := range map[string]int{
		"filevault=true": 1, "filevault=false": 0, "supervised=true&os_version_from=15": 1, "serial=S-a&os_version_below=15.1": 0, "serial=S-a&os_version_below=15.2": 1,
	} {
		require.Len(t, o.asks(o.admin(), 200, "GET", "/v1/enrollments?"+query, "")["enrollments"], want, query)
	}
	require.Contains(t, o.asks(o.admin(), 400, "GET", "/v1/enrollments?os_version_below=new", "")["error"], `os_version_below: "new" is not a version such as 15.1`)
	answer := o.asks(o.admin(), 200, "POST", "/v1/tags", `{"selector": {"filevault": true, "os_version_from": "15"}, "add": ["encrypted"]}`)
	require.EqualValues(t, 1, answer["changed"])
}

func TestQueueAndCommands(t *testing.T) {
	o := newOperators(t)
	o.enroll("mac", "topic-a")
	o.enroll("pad", "topic-a")
	for _, uuid := range []string{"C1", "C2", "C3"} {
		o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac,pad?nopush=1", command(uuid))
		o.advance(time.Second)
	}
	o.reports("mac", mdm.StatusAcknowledged, "C1", "x")
	o.reports("mac", mdm.StatusError, "C2", "x")
	uuids := func(path, key string) (all []string) {
		next := ""
		for {
			page := o.asks(o.admin(), 200, "GET", path+next, "")
			for _, item := range page[key].([]any) {
				all = append(all, item.(map[string]any)["command_uuid"].(string))
			}
			if page["next"] == nil {
				return all
			}
			next = "&after=" + page["next"].(string)
		}
	}
	for _, limit := range []string{"1", "2", "10"} {
		require.Equal(t, []string{"C1", "C2", "C3"}, uuids("/v1/enrollments/pad/queue?limit="+limit, "queue"))
		require.Equal(t, []string{"C3"}, uuids("/v1/enrollments/mac/queue?limit="+limit, "queue"))
		require.Equal(t, []string{"C2"}, uuids("/v1/enrollments/mac/queue?state=error&limit="+limit, "queue"))
		require.Equal(t, []string{"C3", "C2", "C1"}, uuids("/v1/commands?limit="+limit, "commands"))
		require.Equal(t, []string{"C2"}, uuids("/v1/commands?state=error&request_type=ProfileList&limit="+limit, "commands"))
		require.Equal(t, []string{"C2", "C1"}, uuids("/v1/commands?created_before=2026-03-01T12:00:02Z&limit="+limit, "commands"))
		require.Equal(t, []string{"C1", "C1"}, uuids("/v1/commands/C1?limit="+limit, "enrollments"))
	}
	c := o.asks(o.admin(), 200, "GET", "/v1/commands/C1", "")
	require.Equal(t, map[string]any{"acknowledged": 1.0, "queued": 1.0}, c["states"])
	require.Equal(t, false, c["done"])
	require.Len(t, o.asks(o.admin(), 200, "GET", "/v1/commands/C1?state=queued", "")["enrollments"], 1)
	for path, want := range map[string]string{
		"/v1/commands?state=sheep": "state: use scheduled", "/v1/commands?after=x": "after:", "/v1/commands/C1?wait=2m": "wait: a time of at most 1m",
		"/v1/commands/C1?wait=x": "wait:", "/v1/enrollments/mac/queue?after=x": "after:", "/v1/commands/C1?after=e30": "after:",
	} {
		require.Contains(t, o.asks(o.admin(), 400, "GET", path, "")["error"], want, path)
	}
	require.Equal(t, "there is no such command", o.asks(o.admin(), 404, "GET", "/v1/commands/none", "")["error"])
	o.asks(o.admin(), 404, "GET", "/v1/enrollments/nobody/queue", "")
}

func TestCancelAndRequeue(t *testing.T) {
	o := newOperators(t)
	for _, id := range []string{"a", "b", "c"} {
		o.enroll(id, "topic-a")
	}
	for _, uuid := range []string{"C1", "C2", "C3"} {
		o.asks(o.admin(), 200, "PUT", "/v1/enqueue/a,b,c?nopush=1", command(uuid))
	}
	o.reports("a", mdm.StatusAcknowledged, "C1", "x")
	o.reports("b", mdm.StatusError, "C1", "x")
	item := o.asks(o.admin(), 200, "DELETE", "/v1/commands/C1/enrollments/c", "")
	require.Equal(t, "cancelled", item["state"])
	require.Contains(t, o.asks(o.admin(), 409, "DELETE", "/v1/commands/C1/enrollments/a", "")["error"], "has ended for a: acknowledged")
	require.Contains(t, o.asks(o.admin(), 404, "DELETE", "/v1/commands/none/enrollments/a", "")["error"], "does not have that command")
	o.asks(o.admin(), 404, "DELETE", "/v1/commands/C1/enrollments/nobody", "")
	require.Len(t, o.deeds("command.cancel"), 4)

	all := o.asks(o.admin(), 200, "DELETE", "/v1/commands/C1", "")
	require.Equal(t, map[string]any{"cancelled": 0.0, "finished": 3.0}, all)
	all = o.asks(o.admin(), 200, "DELETE", "/v1/commands/C2", "")
	require.Equal(t, map[string]any{"cancelled": 3.0, "finished": 0.0}, all)
	o.asks(o.admin(), 404, "DELETE", "/v1/commands/none", "")

	require.EqualValues(t, 1, o.asks(o.admin(), 200, "DELETE", "/v1/enrollments/c/queue", "")["cancelled"])
	require.Empty(t, o.next("c"))
	o.asks(o.admin(), 404, "DELETE", "/v1/enrollments/nobody/queue", "")
	require.Equal(t, []string{"c done", "nobody no enrollment has that id or serial number"}, o.deeds("queue.clear"))

	item = o.asks(o.admin(), 200, "POST", "/v1/commands/C1/enrollments/b/requeue", "")
	require.Equal(t, "queued", item["state"])
	require.Equal(t, "C3", o.next("b"), "behind what waits")
	require.Contains(t, o.asks(o.admin(), 409, "POST", "/v1/commands/C1/enrollments/a/requeue", "")["error"], "is acknowledged for a")
	require.Contains(t, o.asks(o.admin(), 409, "POST", "/v1/commands/C3/enrollments/b/requeue", "")["error"], "is queued for b")
	o.asks(o.admin(), 404, "POST", "/v1/commands/none/enrollments/b/requeue", "")
	_, err := o.store.Apply(t.Context(), &storage.CheckOut{Src: storage.Source{Enroll: enrollID("c")}})
	require.NoError(t, err)
	require.Contains(t, o.asks(o.admin(), 409, "POST", "/v1/commands/C1/enrollments/c/requeue", "")["error"], "c is not enrolled")
	require.Len(t, o.deeds("command.requeue"), 5)
}

func TestRequeueAndEnablePush(t *testing.T) {
	o := newOperators(t)
	o.certify("topic-a")
	o.enroll("mac", "topic-a")
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac?nopush=1", command("C1"))
	o.reports("mac", mdm.StatusError, "C1", "x")
	pushed := make(chan struct{}, 8)
	o.apns.SetOnPush(func(apnstest.Push) { pushed <- struct{}{} })
	o.asks(o.admin(), 200, "POST", "/v1/commands/C1/enrollments/mac/requeue", "")
	<-pushed
	failed, err := o.store.OwePush(t.Context(), storage.Scope{}, []string{"mac"}, o.clock())
	require.NoError(t, err)
	require.Empty(t, failed)
	o.asks(o.admin(), 200, "POST", "/v1/enrollments/mac/disable", "")
	o.asks(o.admin(), 200, "POST", "/v1/enrollments/mac/enable", "")
	<-pushed
}

func TestShowResult(t *testing.T) {
	o := newOperators(t)
	o.enroll("mac", "topic-a")
	for _, uuid := range []string{"C1", "C2", "C3"} {
		o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac?nopush=1", command(uuid))
	}
	raw := `<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict><key>Status</key><string>Acknowledged</string>
<key>Data</key><data>AQI=</data><key>At</key><date>2026-03-01T12:00:00Z</date><key>Big</key><integer>18446744073709551615</integer>
<key>Odd</key><real>nan</real><key>List</key><array><true/><dict><key>D</key><data>AA==</data></dict></array></dict></plist>`
	o.reports("mac", mdm.StatusAcknowledged, "C1", raw)
	const path = "/v1/commands/C1/results/mac"
	status, answer, _ := o.do(o.admin(), "GET", path, "")
	require.Equal(t, 200, status, answer)
	var got struct {
		Result json.RawMessage
		Raw    []byte
		State  string
		Size   int
	}
	require.NoError(t, json.Unmarshal([]byte(answer), &got))
	require.JSONEq(t, `{"Status": "Acknowledged", "Data": "AQI=", "At": "2026-03-01T12:00:00Z", "Big": 18446744073709551615, "Odd": "NaN", "List": [true, {"D": "AA=="}]}`, string(got.Result))
	require.Contains(t, string(got.Result), "18446744073709551615")
	require.Equal(t, raw, string(got.Raw))
	require.Equal(t, "acknowledged", got.State)
	require.Equal(t, len(raw), got.Size)

	status, answer, header := o.do(o.admin(), "GET", path+"?raw=1", "")
	require.Equal(t, 200, status)
	require.Equal(t, raw, answer)
	require.Equal(t, "application/octet-stream", header.Get("Content-Type"))
	require.Contains(t, header.Get("Content-Disposition"), "attachment")
	for accept, xml := range map[string]bool{"application/xml": true, "text/html, application/xml;q=0.9": true, "*/*": false, "application/json, application/xml": false, "": false} {
		r := httptest.NewRequestWithContext(t.Context(), "GET", path, nil)
		r.SetBasicAuth(httpapi.User, mainKey)
		r.Header.Set("Accept", accept)
		w := httptest.NewRecorder()
		o.mux.ServeHTTP(w, r)
		require.Equal(t, xml, w.Body.String() == raw, accept)
	}

	require.Equal(t, "there is no result; the command is queued", o.asks(o.admin(), 404, "GET", "/v1/commands/C2/results/mac", "")["error"])
	require.Contains(t, o.asks(o.admin(), 404, "GET", "/v1/commands/none/results/mac", "")["error"], "does not have that command")
	o.asks(o.admin(), 404, "GET", "/v1/commands/C1/results/nobody", "")

	o.reports("mac", mdm.StatusAcknowledged, "C2", "no plist at all")
	r := o.asks(o.admin(), 200, "GET", "/v1/commands/C2/results/mac", "")
	require.Contains(t, r["left_out"], "cannot be shown as JSON")
	require.NotEmpty(t, r["raw"])
	o.reports("mac", mdm.StatusAcknowledged, "C3", strings.Replace(raw, "AQI=", strings.Repeat("AAAA", 2<<20), 1))
	r = o.asks(o.admin(), 200, "GET", "/v1/commands/C3/results/mac", "")
	require.Contains(t, r["left_out"], "too large")
	require.NotContains(t, r, "raw")
	require.NotContains(t, r, "result")
}

// TestWaitForCommand has a bubble's clock, so that a minute is nothing.
func TestWaitForCommand(t *testing.T) {
	for name, tc := range map[string]struct {
		after time.Duration // until something happens
		what  string
		took  time.Duration
	}{
		"until it is done":        {20 * time.Second, "done", 20 * time.Second},
		"no longer than asked":    {time.Hour, "", 30 * time.Second},
		"until the server drains": {10 * time.Second, "drain", 10 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				draining := make(chan struct{})
				store := new(waitingStore)
				store.waits.Store(true)
				api, err := httpapi.New(mainKey, store, nil, httpapi.Config{Draining: draining})
				require.NoError(t, err)
				mux := http.NewServeMux()
				api.Register(mux)
				timer := time.AfterFunc(tc.after, func() {
					switch tc.what {
					case "done":
						store.waits.Store(false)
					case "drain":
						close(draining)
					}
				})
				defer timer.Stop()
				began := time.Now()
				r := httptest.NewRequestWithContext(t.Context(), "GET", "/v1/commands/C1?wait=30s", nil)
				r.SetBasicAuth(httpapi.User, mainKey)
				w := httptest.NewRecorder()
				mux.ServeHTTP(w, r)
				require.Equal(t, 200, w.Code)
				require.InDelta(t, tc.took.Seconds(), time.Since(began).Seconds(), 2.1)
				require.Equal(t, tc.what == "done", strings.Contains(w.Body.String(), `"done": true`))
				require.Less(t, store.looks, 30, "it does not look all the time")
			})
		})
	}
}

func TestStats(t *testing.T) {
	o := newOperators(t)
	o.certify("topic-a")
	o.enroll("a", "topic-a")
	o.enroll("b", "topic-b")
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/a,b?nopush=1", command("C1"))
	o.reports("a", mdm.StatusAcknowledged, "C1", "x")
	require.NoError(t, o.store.PutEventSink(t.Context(), storage.EventSink{Name: "s", URL: "http://s/", Enabled: true}))
	s := o.asks(o.admin(), 200, "GET", "/v1/stats", "")
	require.Equal(t, map[string]any{"by_type": map[string]any{"Device": 2.0}, "enabled": 2.0, "disabled": 0.0, "not_enrolled": 0.0}, s["enrollments"])
	queue := s["queue"].(map[string]any)
	require.Equal(t, map[string]any{"queued": 1.0, "acknowledged": 1.0}, queue["by_state"])
	require.Equal(t, "2026-03-01T12:00:00Z", queue["oldest_waiting_at"])
	require.Len(t, s["events"].(map[string]any)["sinks"], 1)
	bound := o.asks(call{key: o.makeKey("t", "read", "topic-a")}, 200, "GET", "/v1/stats", "")
	require.Equal(t, map[string]any{"Device": 1.0}, bound["enrollments"].(map[string]any)["by_type"])
	require.NotContains(t, bound, "events")
	topics := bound["push"].(map[string]any)["topics"].([]any)
	require.Equal(t, "topic-a", topics[0].(map[string]any)["topic"])
}

// tenantRequest is how a route is asked for what {who} names, an enrollment, a
// command or a topic.
type tenantRequest struct {
	query, body string
}

// TestTenants asks every route that takes keys which are bound to topics for
// what is another tenant's: the answer is that for what does not exist, and
// nothing has changed. A route that is not in the table fails the test.
func TestTenants(t *testing.T) {
	requests := map[string]tenantRequest{
		"GET /v1/enrollments":                               {},
		"GET /v1/enrollments/{id}":                          {},
		"POST /v1/enrollments/query":                        {body: `{"filter": {"ids": ["{who}"]}}`},
		"GET /v1/queue/{ids}":                               {},
		"DELETE /v1/queue/{ids}":                            {},
		"DELETE /v1/enrollments/{id}":                       {query: "?confirm={who}"},
		"GET /v1/enrollments/{id}/queue":                    {},
		"DELETE /v1/enrollments/{id}/queue":                 {},
		"POST /v1/enrollments/{id}/disable":                 {},
		"POST /v1/enrollments/{id}/enable":                  {},
		"PUT /v1/enrollments/{id}/renewal":                  {body: `{"for": "1h"}`},
		"DELETE /v1/enrollments/{id}/renewal":               {},
		"GET /v1/enrollments/{id}/applications":             {},
		"PUT /v1/enrollments/{id}/tags/{tag}":               {},
		"DELETE /v1/enrollments/{id}/tags/{tag}":            {},
		"GET /v1/tags":                                      {},
		"POST /v1/tags":                                     {body: `{"add": ["lab"], "remove": ["blue"], "ids": ["{who}"]}`},
		"PUT /v1/renewals":                                  {body: `{"for": "1h", "ids": ["{who}"]}`},
		"POST /v1/enrollments/{id}/bootstrap_token":         {},
		"POST /v1/enrollments/{id}/unlock_token":            {},
		"GET /v1/stats":                                     {},
		"PUT /v1/enqueue/{ids}":                             {body: command(newUUID)},
		"POST /v1/enqueue/{ids}":                            {body: command(newUUID)},
		"GET /v1/enqueue/{ids}":                             {body: command(newUUID)},
		"POST /v1/enqueue":                                  {body: `{"ids": ["{who}"], "plist": "` + base64.StdEncoding.EncodeToString([]byte(command(newUUID))) + `"}`},
		"POST /v1/commands":                                 {body: `{"ids": ["{who}"], "request_type": "ProfileList", "command_uuid": "` + newUUID + `"}`},
		"GET /v1/commands":                                  {},
		"GET /v1/commands/{uuid}":                           {},
		"DELETE /v1/commands/{uuid}":                        {},
		"GET /v1/commands/{uuid}/results/{id}":              {},
		"DELETE /v1/commands/{uuid}/enrollments/{id}":       {},
		"POST /v1/commands/{uuid}/enrollments/{id}/requeue": {},
		"GET /v1/push/{ids}":                                {},
		"PUT /v1/push/{ids}":                                {},
		"POST /v1/push/{ids}":                               {},
		"POST /v1/push":                                     {body: `{"ids": ["{who}"]}`},
		"PUT /v1/pushcert":                                  {body: "PEM"},
		"GET /v1/pushcert":                                  {query: "?topic={who}"},
		"GET /v1/pushcerts":                                 {},
		"DELETE /v1/pushcerts/{topic}":                      {query: "?force=true"},
		"POST /v1/escrowkeyunlock":                          {},
		"PUT /v1/escrowkeyunlock":                           {},
		"GET /v1/escrowkeyunlock":                           {},
		"GET /v1/events":                                    {},
	}
	o := newOperators(t)
	o.certify("theirs")
	o.enrollFully("theirs", "S-theirs", "theirs")
	for _, uuid := range []string{"theirs", "failed"} {
		o.asks(o.admin(), 200, "PUT", "/v1/enqueue/theirs?nopush=1", command(uuid))
	}
	o.reports("theirs", mdm.StatusError, "failed", "secret result")
	o.asks(o.admin(), 200, "PUT", "/v1/enrollments/theirs/tags/blue", "")
	state := func() string {
		require.NoError(t, o.store.Flush(t.Context()))
		var all bytes.Buffer
		for _, path := range []string{"/v1/enrollments/theirs", "/v1/enrollments/theirs/queue", "/v1/commands/theirs", "/v1/commands/failed", "/v1/pushcerts"} {
			status, answer, _ := o.do(o.admin(), "GET", path, "")
			require.Equal(t, 200, status)
			all.WriteString(answer)
		}
		return all.String()
	}
	before := state()
	key := call{key: o.makeKey("tenant", "admin", "ours")}
	for _, r := range o.api.RoutesForTest() {
		if r.Unbound {
			continue
		}
		name := r.Method + " " + r.Path
		ask, ok := requests[name]
		require.True(t, ok, "%s is not in the table of TestTenants", name)
		delete(requests, name)
		t.Run(name, func(t *testing.T) {
			request := func(who string) (int, string) {
				fill := strings.NewReplacer("{who}", who)
				body := fill.Replace(ask.body)
				if body == "PEM" {
					cert := o.issue(who, o.clock(), o.clock().Add(time.Hour))
					body = string(cert.cert) + string(cert.key)
				}
				status, answer, _ := o.do(key, r.Method, fill.Replace(inPath.ReplaceAllString(r.Path, "{who}")+ask.query), body)
				return status, answer
			}
			status, answer := request("theirs")
			otherStatus, other := request("nobody")
			require.Equal(t, otherStatus, status, "%s\n%s", answer, other)
			require.Equal(t, other, strings.ReplaceAll(answer, "theirs", "nobody"), "as for what does not exist")
			require.NotContains(t, answer, "S-theirs")
			require.NotContains(t, answer, "secret")
		})
	}
	require.Empty(t, requests, "routes that there are not")
	require.Equal(t, before, state(), "nothing has changed")
}

// waitingStore has a command that waits, and counts who looks.
type waitingStore struct {
	httpapi.Store
	waits atomic.Bool
	looks int
}

func (s *waitingStore) Command(context.Context, storage.Scope, string) (*storage.CommandInfo, error) {
	c := &storage.CommandInfo{UUID: "C1", RequestType: "ProfileList", CreatedAt: time.Now().UTC(), States: map[storage.State]int64{storage.Queued: 1}}
	if !s.waits.Load() {
		c.States = map[storage.State]int64{storage.Acknowledged: 1}
	}
	return c, nil
}

func (s *waitingStore) CommandWaits(context.Context, storage.Scope, string) (bool, error) {
	s.looks++
	return s.waits.Load(), nil
}

func (s *waitingStore) CommandItems(context.Context, storage.Scope, string, storage.State, string, int) ([]storage.QueueItem, error) {
	return nil, nil
}
