package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// Every action of an operator is in the audit table, whoever's key it was, and what
// came of it.
func TestDeedsAreAudited(t *testing.T) {
	d := start(t, "http")
	require.NoError(t, d.device("D1", mdmtest.Config{}).Enroll(t.Context()))
	status, answer, _ := d.api("POST", "/v1/keys", "nanomdm", testKey, []byte(`{"name": "ann", "role": "admin"}`))
	require.Equal(t, 201, status, answer)
	var made struct{ Key string }
	require.NoError(t, json.Unmarshal([]byte(answer), &made))
	do := func(want int, method, path, body string) {
		t.Helper()
		status, answer, _ := d.api(method, path, "ann", made.Key, []byte(body))
		require.Equal(t, want, status, answer)
	}
	command := string(mdmtest.NewCommand("C1", "ProfileList", nil))
	do(200, "PUT", "/v1/enqueue/D1?nopush=1", command)
	do(500, "PUT", "/v1/enqueue/nobody?nopush=1", string(mdmtest.NewCommand("C2", "ProfileList", nil)))
	do(500, "PUT", "/v1/enqueue/D1?nopush=1", command+"\n")
	do(500, "POST", "/v1/push/D1", "")
	do(400, "PUT", "/v1/pushcert", "no PEM")
	do(201, "POST", "/v1/keys", `{"name": "bob", "role": "read", "topics": ["t"]}`)
	do(200, "DELETE", "/v1/keys/bob", "")
	do(409, "POST", "/v1/reseal", "")
	pair := mdmtestPushPair(t)
	do(200, "PUT", "/v1/pushcert", string(pair.CertPEM)+string(pair.KeyPEM))

	list := func(query string) (lines []string) {
		t.Helper()
		status, text, _ := d.api("GET", "/v1/audit?"+query, "nanomdm", testKey, nil)
		require.Equal(t, 200, status, text)
		var page struct {
			Audit []struct{ Who, Action, Target, Outcome, RequestID, Detail string }
			Next  string
		}
		require.NoError(t, json.Unmarshal([]byte(text), &page))
		for _, r := range page.Audit {
			require.NotEmpty(t, r.Outcome)
			outcome := "refused"
			if r.Outcome == "done" {
				outcome = "done"
			}
			lines = append(lines, strings.TrimSpace(fmt.Sprintf("%s %s %s %s", r.Who, outcome, r.Action, r.Target)))
		}
		return lines
	}
	all := list("")
	for _, want := range []string{
		"nanomdm done key.create ann", "ann done command.enqueue C1", "ann done key.create bob", "ann done key.delete bob",
		"ann done pushcert.store " + pair.Topic, "ann refused command.enqueue C1", "ann refused pushcert.store",
	} {
		require.Contains(t, all, want)
	}
	require.Equal(t, []string{"ann done key.delete bob"}, list("who=ann&action=key.delete"))
	require.Equal(t, []string{"nanomdm done key.create ann"}, list("target=ann"))
	require.Len(t, list("limit=2"), 2)
	require.Empty(t, list("to=2020-01-01T00:00:00Z"))

	// It is for administrators of all topics.
	for _, body := range []string{`{"name": "reader", "role": "enqueue"}`, `{"name": "tenant", "role": "admin", "topics": ["t"]}`} {
		status, answer, _ := d.api("POST", "/v1/keys", "nanomdm", testKey, []byte(body))
		require.Equal(t, 201, status)
		var made struct{ Name, Key string }
		require.NoError(t, json.Unmarshal([]byte(answer), &made))
		status, _, _ = d.api("GET", "/v1/audit", made.Name, made.Key, nil)
		require.Equal(t, 403, status)
	}
}
