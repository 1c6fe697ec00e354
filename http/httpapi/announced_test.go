package httpapi_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// queried reads all pages of a query and returns the ids.
func (o *operators) queried(query, body string) (ids []string) {
	o.t.Helper()
	for cursor := ""; ; {
		status, answer, _ := o.do(o.admin(), "POST", "/v1/enrollments/query?"+query+"&cursor="+cursor, body)
		require.Equal(o.t, 200, status, answer)
		var page struct {
			Enrollments []struct{ ID string }
			Next        string `json:"next_cursor"`
		}
		require.NoError(o.t, json.Unmarshal([]byte(answer), &page))
		for _, e := range page.Enrollments {
			ids = append(ids, e.ID)
		}
		if cursor = url.QueryEscape(page.Next); cursor == "" {
			return ids
		}
		require.Less(o.t, len(ids), 100, "the list does not end")
	}
}

func TestQueryEnrollments(t *testing.T) {
	o := newOperators(t)
	o.certify("com.apple.mgmt.a")
	url := o.served()
	for i := range 7 {
		id := fmt.Sprint("D", i)
		o.enrollFully(id, "S"+id, "com.apple.mgmt.a")
		status, answer := send(t, "PUT", url+"/migration", strings.Replace(checkin("UserAuthenticate", id, userKeys), "<key>UserID", "<key>UserShortName</key><string>anna</string><key>UserID", 1))
		require.Contains(t, []int{200, 409}, status, "%s", answer)
	}
	o.enroll("E0", "com.apple.mgmt.a")
	status, _ := send(t, "PUT", url+"/migration", checkin("TokenUpdate", "E0", tokenKeys+userKeys+"<key>UserShortName</key><string>anna</string>"))
	require.Equal(t, 200, status)
	o.asks(o.admin(), 200, "POST", "/v1/enrollments/D6/disable", "")

	for _, limit := range []string{"limit=1", "limit=3", "limit=100"} {
		for body, want := range map[string]string{
			``: "D0 D1 D2 D3 D4 D5 D6 E0 E0:U",
			`{"filter":{"ids":["D3","D1","nobody","D3"]}}`:                                          "D1 D3",
			`{"filter":{"serials":["SD4","SD2","none"]}}`:                                           "D2 D4",
			`{"filter":{"serials":["SD4","SD2"],"ids":["D2"]}}`:                                     "D2",
			`{"filter":{"user_short_names":["anna"]}}`:                                              "E0:U",
			`{"filter":{"types":["User"]}}`:                                                         "E0:U",
			`{"filter":{"types":["User","Device"],"ids":["E0","E0:U"]}}`:                            "E0 E0:U",
			`{"filter":{"enabled":false}}`:                                                          "D6",
			`{"filter":{"enabled":true,"ids":["D5","D6"]},"options":{}}`:                            "D5",
			`{"filter":{"types":["Shared iPad"]}}`:                                                  "",
			`{"filter":{"types":["Device"],"enabled":true},"options":{"include_device_cert":true}}`: "D0 D1 D2 D3 D4 D5 E0",
		} {
			ids := o.queried(limit, body)
			slices.Sort(ids)
			require.Equal(t, want, strings.Join(ids, " "), "%s %s", limit, body)
		}
	}
	_, answer, _ := o.do(o.admin(), "POST", "/v1/enrollments/query?limit=2&offset=3", `{"filter":{"ids":["D0","D1","D2","D3","D4","D5"]}}`)
	require.Contains(t, answer, `"D3"`)
	require.Contains(t, answer, `"SD4"`)
	require.NotContains(t, answer, `"D2"`)
	_, answer, _ = o.do(o.admin(), "POST", "/v1/enrollments/query?offset=8", "")
	require.Contains(t, answer, `"E0:U"`)
	require.NotContains(t, answer, `"E0"`)
}

func TestReadAndClearQueues(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	for i := range 5 {
		o.asks(o.admin(), 200, "PUT", "/v1/enqueue/A?nopush=1", command(fmt.Sprint("C", i)))
	}
	page := o.asks(o.admin(), 200, "GET", "/v1/queue/A?limit=3", "")
	require.Len(t, page["commands"], 3)
	first := page["commands"].([]any)[0].(map[string]any)
	require.Equal(t, map[string]any{
		"command_uuid": "C0", "request_type": "ProfileList", "command": base64.StdEncoding.EncodeToString([]byte(command("C0"))),
	}, first)
	page = o.asks(o.admin(), 200, "GET", "/v1/queue/A?limit=3&cursor="+page["next_cursor"].(string), "")
	require.Len(t, page["commands"], 2)
	require.NotContains(t, page, "next_cursor")
	records, err := o.store.AuditRecords(t.Context(), storage.AuditFilter{Action: "queue.read"}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 2, "commands hold secrets")

	status, answer, _ := o.do(o.admin(), "DELETE", "/v1/queue/A,nobody", "")
	require.Equal(t, 207, status)
	require.JSONEq(t, `{"status":{"nobody":"no enrollment has that id or serial number"}}`, answer)
	require.Empty(t, o.next("A"))
}
