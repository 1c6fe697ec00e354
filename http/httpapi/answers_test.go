package httpapi_test

import (
	"encoding/base64"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/service/core"
)

var updateAnswers = flag.Bool("update", false, "rewrite testdata/answers.txt")

// checkin is a check-in message of a device as an exporter sends it.
func checkin(kind, udid, more string) string {
	return `<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict><key>MessageType</key><string>` + kind +
		`</string><key>UDID</key><string>` + udid + `</string>` + more + `</dict></plist>`
}

const (
	topicKey  = `<key>Topic</key><string>com.apple.mgmt.a</string>`
	tokenKeys = topicKey + `<key>PushMagic</key><string>magic</string><key>Token</key><data>dG9rZW4gb2YgTQ==</data>`
	userKeys  = `<key>UserID</key><string>U</string>`
)

// request is a row of the table of answers.
type request struct {
	name, method, path, body string
	header                   string // "Name: value", or empty
	key                      string // main unless given
}

// answerRequests are requests to every endpoint, for every error that a caller
// can cause. Their order matters: some rely on the effects of earlier ones.
func answerRequests() []request {
	form := "Content-Type: application/x-www-form-urlencoded"
	unlock := "topic=com.apple.mgmt.a&serial=S&productType=P&escrowKey=E&orgName=O&guid=G"
	return []request{
		// NanoMDM's endpoints.
		{name: "version", method: "GET", path: "/version", key: "none"},
		{name: "version by another method", method: "POST", path: "/version", key: "none"},

		{name: "migration, no key", method: "PUT", path: "/migration", key: "none"},
		{name: "migration, wrong key", method: "PUT", path: "/migration", key: "wrong"},
		{name: "migration, role", method: "PUT", path: "/migration", key: "enqueue"},
		{name: "migration, bound key", method: "PUT", path: "/migration", key: "bound"},
		{name: "migration, Authenticate", method: "PUT", path: "/migration", body: checkin("Authenticate", "M", topicKey)},
		{name: "migration, Authenticate by POST", method: "POST", path: "/migration", body: checkin("Authenticate", "M", topicKey)},
		{name: "migration, Authenticate without Topic", method: "PUT", path: "/migration", body: checkin("Authenticate", "M2", "")},
		{name: "migration, TokenUpdate", method: "PUT", path: "/migration", body: checkin("TokenUpdate", "M", tokenKeys)},
		{name: "migration, TokenUpdate without Topic", method: "PUT", path: "/migration", body: checkin("TokenUpdate", "M", "")},
		{name: "migration, TokenUpdate of an unknown device", method: "PUT", path: "/migration", body: checkin("TokenUpdate", "unknown", tokenKeys)},
		{name: "migration, TokenUpdate of a user", method: "PUT", path: "/migration", body: checkin("TokenUpdate", "M", tokenKeys+userKeys)},
		{name: "migration, SetBootstrapToken", method: "PUT", path: "/migration", body: checkin("SetBootstrapToken", "M", `<key>BootstrapToken</key><data>AAAA</data>`)},
		{name: "migration, UserAuthenticate", method: "PUT", path: "/migration", body: checkin("UserAuthenticate", "M", userKeys)},
		{name: "migration, UserAuthenticate of a device", method: "PUT", path: "/migration", body: checkin("UserAuthenticate", "M", "")},
		{name: "migration, CheckOut", method: "PUT", path: "/migration", body: checkin("CheckOut", "M2", "")},
		{name: "migration, another message", method: "PUT", path: "/migration", body: checkin("GetBootstrapToken", "M", "")},
		{name: "migration, unknown message", method: "PUT", path: "/migration", body: checkin("Nonsense", "M", "")},
		{name: "migration, no identity", method: "PUT", path: "/migration", body: checkin("CheckOut", "", "")},
		{name: "migration, no property list", method: "PUT", path: "/migration", body: "garbage"},
		{name: "migration, empty", method: "GET", path: "/migration"},

		{name: "enqueue, no key", method: "PUT", path: "/v1/enqueue/A", body: command("N"), key: "none"},
		{name: "enqueue, wrong key", method: "PUT", path: "/v1/enqueue/A", body: command("N"), key: "wrong"},
		{name: "enqueue, no key in a browser", method: "GET", path: "/v1/enqueue/A", header: "Sec-Fetch-Site: none", key: "none"},
		{name: "enqueue, role", method: "PUT", path: "/v1/enqueue/A", body: command("N"), key: "read"},
		{name: "enqueue from another origin", method: "PUT", path: "/v1/enqueue/A", body: command("N"), header: "Sec-Fetch-Site: cross-site"},
		{name: "enqueue", method: "PUT", path: "/v1/enqueue/A", body: command("C1")},
		{name: "enqueue again, the same bytes", method: "PUT", path: "/v1/enqueue/A", body: command("C1")},
		{name: "enqueue again, other bytes", method: "PUT", path: "/v1/enqueue/A", body: command("C1") + "\n"},
		{name: "enqueue without a push", method: "PUT", path: "/v1/enqueue/A?nopush=1", body: command("C2")},
		{name: "enqueue by GET with a body", method: "GET", path: "/v1/enqueue/A", body: command("C3")},
		{name: "enqueue by POST", method: "POST", path: "/v1/enqueue/A", body: command("C4")},
		{name: "enqueue by DELETE", method: "DELETE", path: "/v1/enqueue/A", body: command("C5")},
		{name: "enqueue of a form's type", method: "PUT", path: "/v1/enqueue/A", body: command("C6"), header: form},
		{name: "enqueue for two", method: "PUT", path: "/v1/enqueue/A,B", body: command("C7")},
		{name: "enqueue, escaped comma", method: "PUT", path: "/v1/enqueue/A%2CB", body: command("C8")},
		{name: "enqueue, escaped colon", method: "PUT", path: "/v1/enqueue/M%3AU?nopush=1", body: command("C9")},
		{name: "enqueue, one unknown", method: "PUT", path: "/v1/enqueue/A,nobody", body: command("C10")},
		{name: "enqueue, all unknown", method: "PUT", path: "/v1/enqueue/nobody", body: command("C11")},
		{name: "enqueue, another tenant's", method: "PUT", path: "/v1/enqueue/A", body: command(newUUID), key: "bound"},
		{name: "enqueue, a name that a tenant chose", method: "POST", path: "/v1/enqueue", body: `{"ids": ["A"], "plist": "` + base64.StdEncoding.EncodeToString([]byte(command("C12"))) + `"}`, key: "bound"},
		{name: "enqueue, no ids", method: "PUT", path: "/v1/enqueue/", body: command("N")},
		{name: "enqueue, commas only", method: "PUT", path: "/v1/enqueue/,,", body: command("N")},
		{name: "enqueue, unknown parameter", method: "PUT", path: "/v1/enqueue/A?color=red&nopush=1", body: command("C13")},
		{name: "enqueue, bad priority", method: "PUT", path: "/v1/enqueue/A?priority=x", body: command("N")},
		{name: "enqueue, empty body", method: "PUT", path: "/v1/enqueue/A"},
		{name: "enqueue, empty body by GET", method: "GET", path: "/v1/enqueue/A,nobody"},
		{name: "enqueue, empty body without a push", method: "PUT", path: "/v1/enqueue/A?nopush=1"},
		{name: "enqueue, no property list", method: "PUT", path: "/v1/enqueue/A", body: "garbage"},
		{name: "enqueue, no command", method: "PUT", path: "/v1/enqueue/A", body: `<plist version="1.0"><dict></dict></plist>`},
		{name: "enqueue, too large", method: "PUT", path: "/v1/enqueue/A", body: strings.Repeat("x", maxBody+1)},
		{name: "enqueue, APNs refuses", method: "PUT", path: "/v1/enqueue/dead", body: command("C14")},
		{name: "enqueue, no push certificate", method: "PUT", path: "/v1/enqueue/uncertified", body: command("C15")},

		{name: "push, no key", method: "GET", path: "/v1/push/A", key: "none"},
		{name: "push, role", method: "GET", path: "/v1/push/A", key: "read"},
		{name: "push from another origin", method: "GET", path: "/v1/push/A", header: "Sec-Fetch-Site: cross-site"},
		{name: "push from another origin, old browser", method: "POST", path: "/v1/push/A", header: "Origin: https://evil.example"},
		{name: "push", method: "GET", path: "/v1/push/A"},
		{name: "push by PUT", method: "PUT", path: "/v1/push/A"},
		{name: "push by DELETE", method: "DELETE", path: "/v1/push/A"},
		{name: "push, escaped comma", method: "GET", path: "/v1/push/A%2CB"},
		{name: "push, one unknown", method: "GET", path: "/v1/push/A,nobody"},
		{name: "push, all unknown", method: "GET", path: "/v1/push/nobody"},
		{name: "push, another tenant's", method: "GET", path: "/v1/push/A", key: "bound"},
		{name: "push, no ids", method: "GET", path: "/v1/push/"},
		{name: "push, bad parameter", method: "GET", path: "/v1/push/A?push=never"},
		{name: "push, dead token", method: "GET", path: "/v1/push/dead"},
		{name: "push, no push certificate", method: "GET", path: "/v1/push/uncertified"},

		{name: "pushcert, no key", method: "GET", path: "/v1/pushcert?topic=com.apple.mgmt.a", key: "none"},
		{name: "pushcert", method: "GET", path: "/v1/pushcert?topic=com.apple.mgmt.a"},
		{name: "pushcert, no topic", method: "GET", path: "/v1/pushcert"},
		{name: "pushcert, unknown topic", method: "GET", path: "/v1/pushcert?topic=x"},
		{name: "pushcert, another tenant's", method: "GET", path: "/v1/pushcert?topic=com.apple.mgmt.a", key: "bound"},
		{name: "pushcert, no PEM", method: "PUT", path: "/v1/pushcert", body: "x"},
		{name: "pushcert, role", method: "PUT", path: "/v1/pushcert", body: "x", key: "enqueue"},
		{name: "pushcert by another method", method: "POST", path: "/v1/pushcert"},
		{name: "pushcert from another origin", method: "PUT", path: "/v1/pushcert", body: "x", header: "Sec-Fetch-Site: same-site"},

		{name: "escrowkeyunlock, no key", method: "POST", path: "/v1/escrowkeyunlock", key: "none"},
		{name: "escrowkeyunlock, no parameters", method: "POST", path: "/v1/escrowkeyunlock", header: form},
		{name: "escrowkeyunlock by GET", method: "GET", path: "/v1/escrowkeyunlock"},
		{name: "escrowkeyunlock, no push certificate", method: "POST", path: "/v1/escrowkeyunlock", body: strings.Replace(unlock, "mgmt.a", "mgmt.x", 1), header: form},
		{name: "escrowkeyunlock", method: "POST", path: "/v1/escrowkeyunlock", body: unlock, header: form},

		// The endpoints that upstream NanoMDM announced.
		{name: "query, no key", method: "POST", path: "/v1/enrollments/query", key: "none"},
		{name: "query", method: "POST", path: "/v1/enrollments/query?limit=2", body: `{"filter":{"types":["Device"]}}`},
		{name: "query without a body", method: "POST", path: "/v1/enrollments/query?limit=1&offset=1"},
		{name: "query, user channel", method: "POST", path: "/v1/enrollments/query", body: `{"filter":{"ids":["M:U"]}}`},
		{name: "query, another tenant's", method: "POST", path: "/v1/enrollments/query", body: `{"filter":{"ids":["A"]}}`, key: "bound"},
		{name: "query, bad type", method: "POST", path: "/v1/enrollments/query", body: `{"filter":{"types":["Phone"]}}`},
		{name: "query, unknown filter", method: "POST", path: "/v1/enrollments/query", body: `{"filter":{"color":["red"]}}`},
		{name: "query, bad limit", method: "POST", path: "/v1/enrollments/query?limit=x"},
		{name: "query, bad cursor", method: "POST", path: "/v1/enrollments/query?cursor=x"},
		{name: "query for unlock tokens", method: "POST", path: "/v1/enrollments/query", body: `{"options":{"include_unlock_token":true}}`},
		{name: "queue", method: "GET", path: "/v1/queue/M:U"},
		{name: "queue, role", method: "GET", path: "/v1/queue/M:U", key: "enqueue"},
		{name: "queue, unknown", method: "GET", path: "/v1/queue/nobody"},
		{name: "queue of two", method: "GET", path: "/v1/queue/A,B"},
		{name: "queue, clear", method: "DELETE", path: "/v1/queue/M:U"},
		{name: "queue, clear one unknown", method: "DELETE", path: "/v1/queue/M:U,nobody"},
		{name: "queue, clear unknown", method: "DELETE", path: "/v1/queue/nobody"},
		{name: "queue, clear none", method: "DELETE", path: "/v1/queue/,"},

		// The other endpoints.
		{name: "no endpoint", method: "GET", path: "/v1/nothing"},
		{name: "other method", method: "PATCH", path: "/v1/keys"},
		{name: "enrollments, no key", method: "GET", path: "/v1/enrollments", key: "none"},
		{name: "enrollments, wrong key", method: "GET", path: "/v1/enrollments", key: "wrong"},
		{name: "enrollments, bound key", method: "GET", path: "/v1/enrollments", key: "bound"},
		{name: "enrollments, unknown filter", method: "GET", path: "/v1/enrollments?color=red"},
		{name: "enrollments, bad filter", method: "GET", path: "/v1/enrollments?type=Phone"},
		{name: "enrollments, bad limit", method: "GET", path: "/v1/enrollments?limit=0"},
		{name: "enrollments, bad cursor", method: "GET", path: "/v1/enrollments?after=x"},
		{name: "enrollment, unknown", method: "GET", path: "/v1/enrollments/nobody"},
		{name: "queue of nobody", method: "GET", path: "/v1/enrollments/nobody/queue"},
		{name: "delete without confirm", method: "DELETE", path: "/v1/enrollments/A"},
		{name: "delete, role", method: "DELETE", path: "/v1/enrollments/A?confirm=A", key: "enqueue"},
		{name: "disable from another origin", method: "POST", path: "/v1/enrollments/A/disable", header: "Sec-Fetch-Site: cross-site"},
		{name: "disable by a form", method: "POST", path: "/v1/enrollments/A/disable", header: form},
		{name: "disable", method: "POST", path: "/v1/enrollments/B/disable"},
		{name: "enable", method: "POST", path: "/v1/enrollments/B/enable"},
		{name: "renewal without an end", method: "PUT", path: "/v1/enrollments/A/renewal", body: `{}`},
		{name: "renewal of a user channel", method: "PUT", path: "/v1/enrollments/M:U/renewal", body: `{"for":"1h"}`},
		{name: "renewals, text", method: "PUT", path: "/v1/renewals", body: `{"for":"1h","ids":["A"]}`, header: "Content-Type: text/plain"},
		{name: "bootstrap token, none", method: "POST", path: "/v1/enrollments/A/bootstrap_token"},
		{name: "bootstrap token", method: "POST", path: "/v1/enrollments/M/bootstrap_token"},
		{name: "unlock token, role", method: "POST", path: "/v1/enrollments/A/unlock_token", key: "read"},
		{name: "enqueue in JSON", method: "POST", path: "/v1/enqueue", body: enqueueBody("J1", `"ids":["A","nobody"],"options":{"no_push":true}`)},
		{name: "enqueue in JSON, no ids", method: "POST", path: "/v1/enqueue", body: enqueueBody("J2", `"ids":[]`)},
		{name: "enqueue in JSON, two values", method: "POST", path: "/v1/enqueue", body: `{} {}`},
		{name: "enqueue in JSON, other bytes", method: "POST", path: "/v1/enqueue", body: `{"ids":["A"],"plist":"` + base64.StdEncoding.EncodeToString([]byte(command("C1")+"\n")) + `"}`},
		{name: "enqueue in JSON, too large", method: "POST", path: "/v1/enqueue", body: `{"ids":["` + strings.Repeat("x", maxBody) + `"]}`},
		{name: "command in JSON, no type", method: "POST", path: "/v1/commands", body: `{"ids":["A"]}`},
		{name: "command in JSON, by a form", method: "POST", path: "/v1/commands", body: `{"ids":["A"],"request_type":"EraseDevice"}`, header: "Content-Type: text/plain"},
		{name: "command in JSON, no content type", method: "POST", path: "/v1/commands", body: `{"ids":["A"],"request_type":"EraseDevice"}`, header: "Content-Type: "},
		{name: "command, unknown", method: "GET", path: "/v1/commands/none"},
		{name: "command, another tenant's", method: "GET", path: "/v1/commands/C1", key: "bound"},
		{name: "command, cancel unknown", method: "DELETE", path: "/v1/commands/none"},
		{name: "result, none", method: "GET", path: "/v1/commands/C1/results/A"},
		{name: "result", method: "GET", path: "/v1/commands/done/results/A?raw=1"},
		{name: "requeue of a waiting command", method: "POST", path: "/v1/commands/C1/enrollments/A/requeue"},
		{name: "push in JSON, nobody", method: "POST", path: "/v1/push", body: `{"ids":["nobody"]}`},
		{name: "events, bad cursor", method: "GET", path: "/v1/events?after=x"},
		{name: "events, bad wait", method: "GET", path: "/v1/events?wait=2m"},
		{name: "redeliver to nobody", method: "POST", path: "/v1/events/redeliver", body: `{"sink":"none","dead":true}`},
		{name: "sink, unknown", method: "GET", path: "/v1/sinks/none"},
		{name: "sink, bad", method: "PUT", path: "/v1/sinks/x", body: `{"url":"ftp://x"}`},
		{name: "sinks, bound key", method: "GET", path: "/v1/sinks", key: "bound"},
		{name: "key, bad role", method: "POST", path: "/v1/keys", body: `{"name":"x","role":"god"}`},
		{name: "key, taken", method: "POST", path: "/v1/keys", body: `{"name":"read","role":"read"}`},
		{name: "key, unknown", method: "DELETE", path: "/v1/keys/none"},
		{name: "reseal, off", method: "POST", path: "/v1/reseal"},
		{name: "audit, bad time", method: "GET", path: "/v1/audit?from=today"},
	}
}

// maxBody is the limit of the bodies in the table of answers.
const maxBody = 4096

// wholeServer is the API with the endpoints that other packages serve.
func (o *operators) wholeServer(cfg httpapi.Config) http.Handler {
	o.t.Helper()
	log := slog.New(slog.DiscardHandler)
	cfg.Logger, cfg.Now = log, o.clock
	api, err := httpapi.New(mainKey, o.store, o.pusher, cfg)
	require.NoError(o.t, err)
	mux := http.NewServeMux()
	api.Register(mux)
	mux.Handle("/version", httpapi.Version("v1"))
	protocol := core.New(o.store, core.Config{})
	mux.Handle("/migration", api.Migration(httpmdm.New(protocol, nil, httpmdm.Config{}).Migration(protocol)))
	return requestlog.Middleware(log, requestlog.Config{}, mux)
}

// A dead token is refused by APNs, or by the store once that is written.
var varying = regexp.MustCompile(`APNs: Unregistered \(410, token_dead\)|push token is dead|[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}|"seq": \d+|[A-Za-z0-9_-]{40,}|20\d\d-\d\d-\d\dT[0-9:.]+Z`)

// TestAnswers holds the answers to a table of requests to testdata/answers.txt:
// status, headers and body, byte for byte but for ids and times.
func TestAnswers(t *testing.T) {
	o := newOperators(t)
	o.enroll("A", "com.apple.mgmt.a")
	o.enroll("B", "com.apple.mgmt.a")
	o.enroll("dead", "com.apple.mgmt.a")
	o.enrollOnly("uncertified", "com.apple.mgmt.none")
	o.apns.SetAnswer(func(p apnstest.Push) apnstest.Answer {
		if string(p.Token) == string(tokenOf("dead")) {
			return apnstest.Answer{Status: 410, Reason: "Unregistered"}
		}
		return apnstest.Answer{}
	})
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/A?nopush=1", command("done"))
	o.reports("A", mdm.StatusAcknowledged, "done", `<plist version="1.0" onload="alert(1)"><dict/></plist>`)
	keys := map[string]call{
		"": o.admin(), "none": {}, "wrong": {user: httpapi.User, key: "wrong"},
		"read": {key: o.makeKey("read", "read")}, "enqueue": {key: o.makeKey("enqueue", "enqueue")},
		"bound": {key: o.makeKey("bound", "admin", "com.apple.mgmt.b")},
	}

	apple := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, "<script>")
	}))
	defer apple.Close()
	handler := o.wholeServer(httpapi.Config{MaxBody: maxBody, EscrowURL: apple.URL})
	var table strings.Builder
	for _, row := range answerRequests() {
		o.advance(time.Second)
		r := httptest.NewRequestWithContext(t.Context(), row.method, row.path, strings.NewReader(row.body))
		if strings.HasPrefix(row.body, "{") {
			r.Header.Set("Content-Type", "application/json")
		}
		if name, value, ok := strings.Cut(row.header, ": "); ok {
			r.Header.Set(name, value)
			if value == "" {
				r.Header.Del(name)
			}
		}
		switch c := keys[row.key]; {
		case c.user != "":
			r.SetBasicAuth(c.user, c.key)
		case c.key != "":
			r.Header.Set("Authorization", "Bearer "+c.key)
		}
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		header := w.Header()
		for name, want := range map[string]string{
			"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Cross-Origin-Resource-Policy": "same-origin",
			"Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'; sandbox",
		} {
			require.Equal(t, want, header.Get(name), "%s: %s", row.name, name)
		}
		if !strings.HasPrefix(row.path, "/migration") && len(row.body) <= maxBody {
			documented(t, row.method, row.path, row.body, w.Code, header, w.Body.String())
		}
		fmt.Fprintf(&table, "== %s\n%s %s\n%d %s\n", row.name, row.method, row.path, w.Code, header.Get("Content-Type"))
		for _, name := range []string{"Www-Authenticate", "Retry-After", "Content-Disposition", "Allow"} {
			if value := header.Get(name); value != "" {
				fmt.Fprintf(&table, "%s: %s\n", name, value)
			}
		}
		fmt.Fprintf(&table, "%s\n", varying.ReplaceAllString(w.Body.String(), "~"))
	}
	const file = "testdata/answers.txt"
	if *updateAnswers {
		require.NoError(t, os.WriteFile(file, []byte(table.String()), 0o644))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), table.String())
}
