package httpapi_test

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// tells has a device of enrollOnly's say something.
func (o *operators) tells(id, topic, event string, raw []byte) {
	o.t.Helper()
	e := storage.Event{ID: event, Topic: topic, CreatedAt: o.clock(), UDID: id, Raw: raw}
	_, err := o.store.Apply(o.t.Context(), &storage.Seen{Src: storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}, Events: []storage.Event{e}}})
	require.NoError(o.t, err)
}

// number numbers events, as the holder of the lease does.
func (o *operators) number() {
	o.t.Helper()
	seen, err := o.store.PeekLease(o.t.Context(), "events")
	require.NoError(o.t, err)
	l, err := o.store.TakeLease(o.t.Context(), seen, "test")
	require.NoError(o.t, err)
	_, _, err = o.store.NumberEvents(o.t.Context(), l, 10_000)
	require.NoError(o.t, err)
}

type eventsPage struct {
	Events []struct {
		Cursor  string
		Topic   string
		EventID string `json:"event_id"`
		Checkin struct {
			IDs struct{ ID string }
			Raw []byte `json:"raw_payload"`
		} `json:"checkin_event"`
	}
	Next string
}

func (p *eventsPage) ids() string {
	ids := make([]string, len(p.Events))
	for i, e := range p.Events {
		ids[i] = e.EventID
	}
	return strings.Join(ids, " ")
}

func TestReadEvents(t *testing.T) {
	o := newOperators(t)
	o.enrollOnly("a-1", "topic-a")
	o.enrollOnly("b-1", "topic-b")
	var page eventsPage
	o.get(o.admin(), "/v1/events", &page)
	require.Empty(t, page.Events)
	require.Equal(t, "0", page.Next)
	for i := range 3 {
		o.tells("a-1", storage.TopicTokenUpdate, fmt.Sprint("token", i), []byte("secret"))
		o.tells("b-1", storage.TopicCheckOut, fmt.Sprint("out", i), []byte("bye"))
		o.number()
	}
	all := ""
	for after, next := "0", ""; ; after = next {
		page = eventsPage{}
		o.get(o.admin(), "/v1/events?limit=2&after="+after, &page)
		if next = page.Next; len(page.Events) == 0 {
			require.Equal(t, after, next, "there is always a place to go on at")
			break
		}
		require.Len(t, page.Events, 2)
		require.Equal(t, page.Events[1].Cursor, next)
		all += page.ids() + " "
	}
	require.Len(t, strings.Fields(all), 6)
	o.get(o.admin(), "/v1/events?topic=mdm.TokenUpdate&topic=mdm.Authenticate", &page)
	require.Equal(t, "token0 token1 token2", page.ids())
	require.Equal(t, "secret", string(page.Events[0].Checkin.Raw))
	require.Equal(t, "6", page.Next)

	page = eventsPage{}
	o.get(o.admin(), "/v1/events?after=last", &page)
	require.Empty(t, page.Events)
	require.Equal(t, "6", page.Next)

	bound := call{key: o.makeKey("tenant", "enqueue", "topic-a")}
	page = eventsPage{}
	o.get(bound, "/v1/events", &page)
	require.Equal(t, "token0 token1 token2", page.ids())
	require.Empty(t, page.Events[0].Checkin.Raw, "tokens are for admins")
	// A bound key's cursors do not tell how many events there are of all topics.
	require.NotRegexp(t, `^\d+$`, page.Next)
	require.NotRegexp(t, `^\d+$`, page.Events[0].Cursor)
	rest := eventsPage{}
	o.get(bound, "/v1/events?after="+page.Events[1].Cursor, &rest)
	require.Equal(t, "token2", rest.ids())
	require.Equal(t, page.Next, rest.Next, "a place has one cursor")
	last := eventsPage{}
	o.get(bound, "/v1/events?after="+page.Next, &last)
	require.Empty(t, last.Events)
	require.Equal(t, page.Next, last.Next)
	status, _, _ := o.do(bound, "GET", "/v1/events?after=2", "")
	require.Equal(t, 400, status, "a number is none of its cursors")

	for query, text := range map[string]string{
		"after=x": "after", "after=-1": "after", "limit=0": "limit", "topic=mdm.Nothing": "topic", "wait=2h": "wait", "wait=x": "wait", "sheep=1": "sheep",
	} {
		status, answer, _ := o.do(o.admin(), "GET", "/v1/events?"+query, "")
		require.Equal(t, 400, status, query)
		require.Contains(t, answer, text)
	}
}

func TestReadLargeEvents(t *testing.T) {
	o := newOperators(t)
	o.enrollOnly("a-1", "topic-a")
	large := []byte(strings.Repeat("large ", 1<<19)) // 3 MB
	for i := range 5 {
		o.tells("a-1", storage.TopicCheckOut, fmt.Sprint(i), large)
	}
	o.number()
	var page eventsPage
	o.get(o.admin(), "/v1/events", &page)
	require.Equal(t, "0 1", page.ids(), "a page ends before it gets too large")
	require.Equal(t, large, page.Events[1].Checkin.Raw)
	require.Equal(t, "2", page.Next)
	o.get(o.admin(), "/v1/events?after=2", &page)
	require.Equal(t, "2 3", page.ids())
}

func TestWaitForEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: ":memory:"})
		require.NoError(t, err)
		defer func() { require.NoError(t, store.Close()) }()
		draining := make(chan struct{})
		api, err := httpapi.New(mainKey, store, nil, httpapi.Config{Draining: draining})
		require.NoError(t, err)
		mux := http.NewServeMux()
		api.Register(mux)
		o := &operators{t: t, store: store, mux: mux}
		waiting := o.admin()
		o.enrollOnly("a-1", "topic-a")

		begun := time.Now()
		var page eventsPage
		o.get(waiting, "/v1/events?wait=30s", &page)
		require.Empty(t, page.Events)
		require.Equal(t, 30*time.Second, time.Since(begun))

		begun = time.Now()
		time.AfterFunc(10*time.Second, func() {
			o.tells("a-1", storage.TopicAuthenticate, "other", nil)
			o.number()
		})
		time.AfterFunc(20*time.Second, func() {
			o.tells("a-1", storage.TopicCheckOut, "out", nil)
			o.number()
		})
		o.get(waiting, "/v1/events?wait=1m&topic=mdm.CheckOut", &page)
		require.Equal(t, "out", page.ids())
		require.InDelta(t, 20*time.Second, time.Since(begun), float64(time.Second))

		begun = time.Now()
		time.AfterFunc(5*time.Second, func() { close(draining) })
		o.get(waiting, "/v1/events?wait=1m&after="+page.Next, &page)
		require.Empty(t, page.Events)
		require.Equal(t, 5*time.Second, time.Since(begun), "the server may stop")
	})
}

func TestRedeliver(t *testing.T) {
	o := newOperators(t)
	o.enrollOnly("a-1", "topic-a")
	status, answer, _ := o.do(o.admin(), "PUT", "/v1/sinks/hook", `{"url": "https://hook.example.org/"}`)
	require.Equal(t, 200, status, answer)
	for i := range 4 {
		o.tells("a-1", storage.TopicCheckOut, fmt.Sprint("out", i), []byte("bye"))
	}
	o.number()
	sinks, err := o.store.EventSinks(t.Context())
	require.NoError(t, err)
	l, err := o.store.PeekLease(t.Context(), "events")
	require.NoError(t, err)
	require.NoError(t, o.store.Settle(t.Context(), l, &sinks[0], storage.Settlement{
		Cursor: 4, Put: []storage.Delivery{{Seq: 4, Enrollment: "a-1", State: storage.DeliveryDead}},
	}))
	for body, want := range map[string]string{
		`{"sink": "hook", "after": "1", "through": "3"}`: `"redelivering": 2`,
		`{"sink": "hook", "dead": true}`:                 `"redelivering": 1`,
	} {
		status, answer, _ := o.do(o.admin(), "POST", "/v1/events/redeliver", body)
		require.Equal(t, 200, status, answer)
		require.Contains(t, answer, want)
	}
	for body, want := range map[string]int{
		`{"sink": "nobody", "dead": true}`: 404, `{"sink": "hook"}`: 400, `{"dead": true}`: 400, `{"sink": "hook", "after": "x"}`: 400,
		`{"sink": "hook", "after": "1", "through": "-1"}`: 400, `{"sheep": 1}`: 400,
	} {
		status, answer, _ := o.do(o.admin(), "POST", "/v1/events/redeliver", body)
		require.Equal(t, want, status, answer)
	}
	require.Contains(t, o.audited(), "events.redeliver hook 2 events, after 1, through 3, dead letters only: false")
	status, _, _ = o.do(call{key: o.makeKey("clerk", "enqueue")}, "POST", "/v1/events/redeliver", `{"sink": "hook", "dead": true}`)
	require.Equal(t, 403, status)
}

// audited lists what was done: action, target and detail.
func (o *operators) audited() (list []string) {
	o.t.Helper()
	records, err := o.store.AuditRecords(o.t.Context(), storage.AuditFilter{}, storage.AuditKey{}, 1000)
	require.NoError(o.t, err)
	for _, r := range records {
		list = append(list, strings.Join([]string{r.Action, r.Target, r.Detail}, " "))
	}
	return list
}

func TestSinks(t *testing.T) {
	o := newOperators(t)
	put := func(name, body string, want int) string {
		t.Helper()
		status, answer, _ := o.do(o.admin(), "PUT", "/v1/sinks/"+name, body)
		require.Equal(t, want, status, answer)
		return answer
	}
	const url = "https://user:hunter2@hook.example.org/events"
	answer := put("hook", `{"url": "`+url+`", "keys": ["secret-1", "secret-2"], "tokens": true, "filter": {"topics": ["mdm.Connect", "nanomdm.PushFailed"], "idle": true}}`, 200)
	require.NotContains(t, answer, "secret")
	require.NotContains(t, answer, "hunter2")
	var shown struct {
		URL      string
		KeyCount int `json:"key_count"`
		Disabled bool
		Filter   storage.EventFilter
	}
	o.get(o.admin(), "/v1/sinks/hook", &shown)
	require.Equal(t, 2, shown.KeyCount)
	require.True(t, shown.Filter.Idle)

	for _, internal := range []string{"http://127.0.0.1/", "http://localhost:8080/", "https://10.0.0.1/", "http://169.254.169.254/latest/", "http://[::1]/"} {
		require.Contains(t, put("internal", `{"url": "`+internal+`"}`, 400), "-webhook-networks")
	}
	require.Contains(t, put("clear", `{"url": "http://hook.example.org/", "tokens": true}`, 200), `"warning": "tokens are sent over http`)
	status, _, _ := o.do(o.admin(), "DELETE", "/v1/sinks/clear", "")
	require.Equal(t, 200, status)

	// Keys that the answer does not show stay.
	body, err := json.Marshal(map[string]any{"url": shown.URL, "disabled": true})
	require.NoError(t, err)
	put("hook", string(body), 200)
	sinks, err := o.store.EventSinks(t.Context())
	require.NoError(t, err)
	require.Equal(t, url, sinks[0].URL)
	require.Equal(t, []string{"secret-1", "secret-2"}, sinks[0].Keys)
	require.False(t, sinks[0].Enabled)
	require.Empty(t, sinks[0].Filter)
	put("hook", `{"url": "http://other.example.org/", "keys": []}`, 200)
	sinks, err = o.store.EventSinks(t.Context())
	require.NoError(t, err)
	require.Empty(t, sinks[0].Keys)
	require.Equal(t, "http://other.example.org/", sinks[0].URL)
	put("log", `{}`, 200)

	for body, text := range map[string]string{
		`{"url": "ftp://x/"}`: "url", `{"filter": {"topics": ["mdm.Sheep"]}}`: "mdm.Sheep", `{"keys": ["whsec_!"]}`: "keys", `{"name": "else"}`: "name",
		`{"sheep": 1}`: "sheep", `{} {}`: "body", `{"keys": ["1", "2", "3", "4", "5"]}`: "at most 4", `{"filter": {"enrollment_types": ["Sheep"]}}`: "Sheep",
	} {
		require.Contains(t, put("hook", body, 400), text)
	}
	put("Bad%20Name", `{}`, 400)

	require.NoError(t, o.store.PutEventSink(t.Context(), storage.EventSink{Name: "configured", URL: "http://c/", Enabled: true, Configured: true}))
	put("configured", `{}`, 409)
	status, answer, _ = o.do(o.admin(), "DELETE", "/v1/sinks/configured", "")
	require.Equal(t, 409, status, answer)
	o.advance(2 * time.Minute)
	for _, name := range []string{"configured", "hook"} {
		status, answer, _ = o.do(o.admin(), "DELETE", "/v1/sinks/"+name, "")
		require.Equal(t, 200, status, answer)
	}
	status, _, _ = o.do(o.admin(), "GET", "/v1/sinks/hook", "")
	require.Equal(t, 404, status)
	status, answer, _ = o.do(o.admin(), "GET", "/v1/sinks", "")
	require.Equal(t, 200, status)
	require.Contains(t, answer, `"log"`)
	for i := range 31 {
		put(fmt.Sprint("more", i), `{}`, 200)
	}
	put("one-more", `{}`, 409)
	put("more1", `{"tokens": true}`, 200)
	require.NotContains(t, strings.Join(o.audited(), "\n")+o.log.String(), "hunter2")
	require.NotContains(t, strings.Join(o.audited(), "\n")+o.log.String(), "secret-1")
}
