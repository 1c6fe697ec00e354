package httpapi_test

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// Cursors held ids of other tenants in plain text, and callers could make them
// up.
func TestCursorsAreOpaqueAndTheCallersOwn(t *testing.T) {
	o := newOperators(t)
	for i := range 6 {
		o.enroll(fmt.Sprint("device-", i), []string{"topic-a", "topic-b"}[i%2])
	}
	a, b := call{key: o.makeKey("a", "read", "topic-a")}, call{key: o.makeKey("b", "read", "topic-b")}
	page := o.asks(a, 200, "GET", "/v1/enrollments?limit=1", "")
	next, _ := page["next"].(string)
	require.NotEmpty(t, next)
	plain, err := base64.RawURLEncoding.DecodeString(next)
	require.NoError(t, err)
	require.NotContains(t, string(plain), "device")

	o.asks(a, 200, "GET", "/v1/enrollments?limit=1&after="+next, "")
	o.asks(call{key: o.makeKey("a2", "read", "topic-a")}, 200, "GET", "/v1/enrollments?limit=1&after="+next, "")
	for name, refused := range map[string]struct {
		caller call
		path   string
	}{
		"another tenant's":  {b, "/v1/enrollments?after=" + next},
		"an unbound key's":  {o.admin(), "/v1/enrollments?after=" + next},
		"another list's":    {a, "/v1/commands?after=" + next},
		"changed":           {a, "/v1/enrollments?after=" + next[:len(next)-2] + "AA"},
		"made up":           {a, "/v1/enrollments?after=" + base64.RawURLEncoding.EncodeToString([]byte(`{"b":"id","k":"device-1"}`))},
		"too short to open": {a, "/v1/enrollments?after=AAAA"},
	} {
		answer := o.asks(refused.caller, 400, "GET", refused.path, "")
		require.Contains(t, answer["error"], "not a next of this list's", name)
	}
}

// An idempotency key belongs to the API key that used it, not to the next one
// of that name.
func TestIdempotencyKeysDieWithTheirAPIKey(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "topic-a")
	const body = `{"ids":["A"],"request_type":"RestartDevice","options":{"idempotency_key":"k","no_push":true}}`
	_, first := o.ask(call{key: o.makeKey("bob", "enqueue")}, "POST", "/v1/commands", body)
	o.asks(o.admin(), 200, "DELETE", "/v1/keys/bob", "")
	status, second := o.ask(call{key: o.makeKey("bob", "enqueue")}, "POST", "/v1/commands", body)
	require.Equal(t, 200, status)
	require.False(t, second.Repeated)
	require.NotEqual(t, first.CommandUUID, second.CommandUUID)

	o.asks(o.admin(), 200, "GET", "/v1/audit?"+url.Values{"who": {"bob"}}.Encode(), "")
	records, err := o.store.AuditRecords(t.Context(), storage.AuditFilter{Who: "bob", Action: "command.enqueue"}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 2, "the audit shows names")
}
