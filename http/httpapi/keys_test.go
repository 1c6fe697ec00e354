package httpapi_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const mainKey = "main-key-of-the-test"

// operators is the API over a store of its own.
type operators struct {
	t     *testing.T
	store *sqlstore.Store
	apns  *apnstest.Server
	// pusher pushes for all replicas.
	pusher *push.Service
	api    *httpapi.API
	mux    http.Handler
	log    *logged

	mu  sync.Mutex
	now time.Time
}

// logged is a log that may be written and read at once.
type logged struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logged) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newOperators(t *testing.T) *operators {
	return newOperatorsOn(t, sqlstore.Config{Driver: "sqlite", DSN: ":memory:"})
}

func newOperatorsOn(t *testing.T, cfg sqlstore.Config) *operators {
	o := &operators{t: t, log: new(logged), now: time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)}
	cfg.Now = o.clock
	store, err := sqlstore.Open(t.Context(), cfg)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, store.Close()) })
	o.store = store
	o.apns, err = apnstest.NewServer(apnstest.Config{})
	require.NoError(t, err)
	t.Cleanup(o.apns.Close)
	o.pusher, err = push.New(store, push.Config{Wait: patience, Now: o.clock, APNs: apns.Config{
		URL: o.apns.URL(), RootCAs: o.apns.RootCAs(), Proxy: func(*url.URL) (*url.URL, error) { return nil, nil },
	}})
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, o.pusher.Close(context.Background())) })
	o.api, o.mux = o.replica(store)
	return o
}

// patience is how long an API call waits for its pushes.
const patience = 500 * time.Millisecond

// replica is another server over a store, with the same clock.
func (o *operators) replica(store httpapi.Store) (*httpapi.API, http.Handler) {
	log := slog.New(slog.NewTextHandler(o.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	api, err := httpapi.New(mainKey, store, o.pusher, httpapi.Config{Logger: log, Now: o.clock})
	require.NoError(o.t, err)
	mux := http.NewServeMux()
	api.Register(mux)
	mux.Handle("GET /reader", api.Reader(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
	return api, requestlog.Middleware(log, requestlog.Config{}, mux)
}

func (o *operators) clock() time.Time {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.now
}

func (o *operators) advance(d time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.now = o.now.Add(d)
}

// call is one request.
type call struct {
	user, key string // Basic; Bearer without a user
	from      string // address with port
	handler   http.Handler
}

func (o *operators) do(c call, method, path, body string) (status int, answer string, header http.Header) {
	o.t.Helper()
	r := httptest.NewRequestWithContext(o.t.Context(), method, path, strings.NewReader(body))
	if c.from != "" {
		r.RemoteAddr = c.from
	}
	switch {
	case c.user != "":
		r.SetBasicAuth(c.user, c.key)
	case c.key != "":
		r.Header.Set("Authorization", "Bearer "+c.key)
	}
	if strings.HasPrefix(body, "{") || strings.HasPrefix(body, "[") {
		r.Header.Set("Content-Type", "application/json")
	}
	w := httptest.NewRecorder()
	if c.handler == nil {
		c.handler = o.mux
	}
	c.handler.ServeHTTP(w, r)
	documented(o.t, method, path, body, w.Code, w.Header(), w.Body.String())
	return w.Code, w.Body.String(), w.Header()
}

func (o *operators) admin() call { return call{user: httpapi.User, key: mainKey} }

// makeKey makes a named key and returns it.
func (o *operators) makeKey(name, role string, topics ...string) string {
	o.t.Helper()
	ask := map[string]any{"name": name, "role": role}
	if len(topics) > 0 {
		ask["topics"] = topics
	}
	body, err := json.Marshal(ask)
	require.NoError(o.t, err)
	status, answer, _ := o.do(o.admin(), "POST", "/v1/keys", string(body))
	require.Equal(o.t, http.StatusCreated, status, answer)
	var made struct{ Key string }
	require.NoError(o.t, json.Unmarshal([]byte(answer), &made))
	require.Len(o.t, made.Key, 47)
	return made.Key
}

func TestMainKey(t *testing.T) {
	o := newOperators(t)
	for name, c := range map[string]struct {
		call   call
		status int
	}{
		"basic":                {o.admin(), 200},
		"bearer":               {call{key: mainKey}, 200},
		"nobody":               {call{}, 401},
		"no password":          {call{user: httpapi.User}, 401},
		"other user":           {call{user: "root", key: mainKey}, 401},
		"other key":            {call{user: httpapi.User, key: mainKey + "x"}, 401},
		"beginning of the key": {call{user: httpapi.User, key: mainKey[:5]}, 401},
		"other bearer":         {call{key: "x"}, 401},
	} {
		t.Run(name, func(t *testing.T) {
			c.call.from = "192.0.2.1:1"
			status, answer, header := o.do(c.call, "GET", "/v1/keys", "")
			require.Equal(t, c.status, status, answer)
			if status == 401 {
				require.Equal(t, `Basic realm="nanomdm"`, header.Get("WWW-Authenticate"))
				require.JSONEq(t, `{"error":"API user or key is missing or wrong"}`, answer)
			}
		})
	}
}

func TestKeyLife(t *testing.T) {
	o := newOperators(t)
	key := o.makeKey("reader-1", "read")

	_, list, _ := o.do(o.admin(), "GET", "/v1/keys", "")
	require.NotContains(t, list, key, "a key is shown once")
	require.Contains(t, list, "reader-1")
	require.Contains(t, list, `"created_by": "nanomdm"`)

	for name, c := range map[string]call{"basic": {user: "reader-1", key: key}, "bearer": {key: key}} {
		status, answer, _ := o.do(c, "GET", "/reader", "")
		require.Equal(t, 200, status, "%s: %s", name, answer)
	}
	for _, user := range []string{"reader-2", "READER-1", httpapi.User} {
		status, _, _ := o.do(call{user: user, key: key}, "GET", "/reader", "")
		require.Equal(t, 401, status, user)
	}
	status, answer, _ := o.do(o.admin(), "POST", "/v1/keys", `{"name":"reader-1","role":"admin"}`)
	require.Equal(t, 409, status, answer)

	_, elsewhere := o.replica(o.store)
	there := call{key: key, handler: elsewhere}
	status, _, _ = o.do(there, "GET", "/reader", "")
	require.Equal(t, 200, status)

	status, _, _ = o.do(o.admin(), "DELETE", "/v1/keys/reader-1", "")
	require.Equal(t, 200, status)
	status, _, _ = o.do(call{key: key}, "GET", "/reader", "")
	require.Equal(t, 401, status, "where it was revoked it is dead at once")
	status, _, _ = o.do(there, "GET", "/reader", "")
	require.Equal(t, 200, status, "another replica has a copy")
	o.advance(5 * time.Second)
	status, _, _ = o.do(there, "GET", "/reader", "")
	require.Equal(t, 401, status, "which lives for seconds")
}

func TestKeyRequests(t *testing.T) {
	o := newOperators(t)
	for body, want := range map[string]string{
		``:                                          "body",
		`[]`:                                        "body",
		`{"name":"a","role":"read","x":1}`:          "unknown field",
		`{"name":"","role":"read"}`:                 "name",
		`{"name":"a b","role":"read"}`:              "name",
		`{"name":"a:b","role":"read"}`:              "name",
		`{"name":"nanomdm","role":"read"}`:          "main key",
		`{"name":"a"}`:                              "role",
		`{"name":"a","role":"none"}`:                "role",
		`{"name":"a","role":"Admin"}`:               "role",
		`{"name":"a","role":"read","topics":[]}`:    "topics",
		`{"name":"a","role":"read","topics":[""]}`:  "topics",
		`{"name":"a","role":"read","topics":"all"}`: "body",
	} {
		status, answer, _ := o.do(o.admin(), "POST", "/v1/keys", body)
		require.Equal(t, 400, status, body)
		require.Contains(t, answer, want, body)
	}
	_, list, _ := o.do(o.admin(), "GET", "/v1/keys", "")
	require.JSONEq(t, `{"keys":[]}`, list)
}

func TestRoles(t *testing.T) {
	o := newOperators(t)
	for role, reach := range map[string]map[string]int{
		"read":    {"GET /reader": 200, "PUT /v1/enqueue/x": 403, "GET /v1/keys": 403},
		"push":    {"GET /reader": 200, "PUT /v1/enqueue/x": 403, "GET /v1/keys": 403},
		"enqueue": {"GET /reader": 200, "PUT /v1/enqueue/x": 500, "GET /v1/keys": 403, "POST /v1/keys": 403, "DELETE /v1/keys/read": 403},
		"admin":   {"GET /reader": 200, "PUT /v1/enqueue/x": 500, "GET /v1/keys": 200},
	} {
		key := o.makeKey(role, role)
		bound := o.makeKey(role+"-bound", role, "com.apple.mgmt.a")
		for what, want := range reach {
			method, path, _ := strings.Cut(what, " ")
			status, answer, _ := o.do(call{key: key}, method, path, "")
			require.Equal(t, want, status, "%s %s: %s", role, what, answer)
			if !strings.Contains(path, "enqueue") {
				want = 403 // of all topics
			}
			status, answer, _ = o.do(call{key: bound}, method, path, "")
			require.Equal(t, want, status, "%s bound to a topic, %s: %s", role, what, answer)
		}
	}
}

func command(uuid string) string {
	return `<?xml version="1.0" encoding="UTF-8"?><plist version="1.0"><dict><key>CommandUUID</key><string>` + uuid +
		`</string><key>Command</key><dict><key>RequestType</key><string>ProfileList</string></dict></dict></plist>`
}

// certify stores a push certificate behind the API's back.
func (o *operators) certify(topic string) {
	o.t.Helper()
	cert, key, err := o.apns.PushCertificate(topic)
	require.NoError(o.t, err)
	require.NoError(o.t, o.store.StorePushCert(o.t.Context(), &storage.PushCert{
		Topic: topic, CertPEM: cert, KeyPEM: key, NotAfter: time.Now().AddDate(1, 0, 0),
	}))
}

// enroll makes an enrollment of a topic, which has a push certificate, behind
// the API's back.
func (o *operators) enroll(id, topic string) {
	o.t.Helper()
	if _, err := o.store.PushCert(o.t.Context(), topic); errors.Is(err, storage.ErrNotFound) {
		o.certify(topic)
	}
	o.enrollOnly(id, topic)
}

func enrollID(id string) mdm.EnrollID { return mdm.EnrollID{Type: mdm.Device, ID: id} }

// enrollOnly is enroll that leaves push certificates alone.
func (o *operators) enrollOnly(id, topic string) {
	o.t.Helper()
	src := storage.Source{Enroll: enrollID(id)}
	who := mdm.Enrollment{UDID: id}
	for _, op := range []storage.Op{
		&storage.Authenticate{Src: src, Message: &mdm.Authenticate{Enrollment: who, Topic: topic, Raw: []byte("raw")}},
		&storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{Enrollment: who, Topic: topic, PushMagic: "m", Token: []byte("token of " + id), Raw: []byte("raw")}},
	} {
		_, err := o.store.Apply(o.t.Context(), op)
		require.NoError(o.t, err)
	}
}

func (o *operators) next(id string) string {
	o.t.Helper()
	out, err := o.store.Apply(o.t.Context(), &storage.Report{
		Src: storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}, Status: mdm.StatusIdle,
	})
	require.NoError(o.t, err)
	if out.Command == nil {
		return ""
	}
	return out.Command.CommandUUID
}

func TestTenantsEnqueueForTheirOwn(t *testing.T) {
	const one, two, three = newUUID, "018F3C5E-0000-7000-8000-000000000002", "REFETCH-3f2b8d7c-1111-4222-9333-444455556666"
	o := newOperators(t)
	o.enroll("dev-a", "topic-a")
	o.enroll("dev-b", "topic-b")
	a := call{key: o.makeKey("tenant-a", "enqueue", "topic-a")}
	b := call{key: o.makeKey("tenant-b", "enqueue", "topic-b", "topic-c")}

	status, answer, _ := o.do(a, "PUT", "/v1/enqueue/dev-a,dev-b,nobody", command(one))
	require.Equal(t, 207, status, answer)
	var res struct {
		Status map[string]map[string]string `json:"status"`
	}
	require.NoError(t, json.Unmarshal([]byte(answer), &res))
	require.Empty(t, res.Status["dev-a"]["command_error"])
	require.NotEmpty(t, res.Status["dev-b"]["command_error"])
	require.Equal(t, res.Status["nobody"], res.Status["dev-b"], "another tenant's enrollment is like none")
	require.Equal(t, one, o.next("dev-a"))
	require.Empty(t, o.next("dev-b"))

	status, answer, _ = o.do(b, "PUT", "/v1/enqueue/dev-a", command(two))
	require.Equal(t, 500, status, answer)
	require.Equal(t, one, o.next("dev-a"))
	status, answer, _ = o.do(b, "PUT", "/v1/enqueue/dev-b", command(three))
	require.Equal(t, 200, status, answer)
	require.Equal(t, three, o.next("dev-b"))
}

// Tenants share the name space of CommandUUIDs, where a name that is taken is a
// conflict. So a tenant can neither guess names nor take those of others.
func TestTenantsNameCommandsAtRandom(t *testing.T) {
	o := newOperators(t)
	o.enroll("dev-a", "topic-a")
	o.enroll("dev-b", "topic-b")
	a := call{key: o.makeKey("tenant-a", "enqueue", "topic-a")}
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/dev-b?nopush=1", command("wipe-1"))
	const alike = "3f2b8d7c-1111-5222-9333-444455556666" // of version 5: a hash of a name
	for _, uuid := range []string{"wipe-1", "wipe-2", alike, "x" + newUUID, newUUID + "0"} {
		for _, ask := range []struct{ method, path, body string }{
			{"PUT", "/v1/enqueue/dev-a", command(uuid)},
			{"POST", "/v1/enqueue", `{"ids": ["dev-a"], "plist": "` + base64.StdEncoding.EncodeToString([]byte(command(uuid))) + `"}`},
			{"POST", "/v1/commands", `{"ids": ["dev-a"], "request_type": "RestartDevice", "command_uuid": "` + uuid + `"}`},
		} {
			status, answer, _ := o.do(a, ask.method, ask.path, ask.body)
			require.NotEqual(t, 200, status)
			require.Contains(t, answer, "a random UUID", uuid)
		}
	}
	require.Empty(t, o.next("dev-a"))
	o.asks(a, 200, "POST", "/v1/commands", `{"ids": ["dev-a"], "request_type": "RestartDevice"}`)
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/dev-b?nopush=1", command("wipe-2"))
}

// newUUID is a CommandUUID that keys which are bound to topics may choose.
const newUUID = "6E2B0A70-5C7E-4D1B-9E57-0B8E5F0C1D2E"

// Twelve operators and a guesser share an address, as behind a proxy that is
// not named in -trusted-proxies: every operator gets in, at any moment.
func TestWrongKeysAreSlowedAndRightOnesAreNot(t *testing.T) {
	o := newOperators(t)
	const shared = "192.0.2.66:1000"
	operators := []call{{user: httpapi.User, key: mainKey, from: shared}}
	for i := range 11 {
		operators = append(operators, call{key: o.makeKey(fmt.Sprint("operator-", i), "read"), from: shared})
	}
	guess := func(from string, i int) int {
		status, answer, header := o.do(call{user: httpapi.User, key: fmt.Sprint("guess", i), from: from}, "GET", "/reader", "")
		if status == http.StatusTooManyRequests {
			require.NotEmpty(t, header.Get("Retry-After"))
			require.Contains(t, answer, "too many")
		}
		return status
	}
	for i := range 10 {
		require.Equal(t, 401, guess(shared, i), "try %d", i)
	}
	for i := range 100 {
		require.Equal(t, 429, guess(shared, i))
		status, _, _ := o.do(operators[i%len(operators)], "GET", "/reader", "")
		require.Equal(t, 200, status, "operator %d has the right key", i%len(operators))
	}
	status, _, _ := o.do(call{from: shared}, "GET", "/reader", "")
	require.Equal(t, 401, status, "no key is no guess")
	require.Equal(t, 401, guess("192.0.2.7:1000", 0), "another address has a burst of its own")

	o.advance(5 * time.Second)
	require.Equal(t, 401, guess(shared, 1), "one more in five seconds")
	require.Equal(t, 429, guess(shared, 2))
}

func TestRevokedKeyIsRefused(t *testing.T) {
	o := newOperators(t)
	key := o.makeKey("a", "read")
	status, _, _ := o.do(call{key: key}, "GET", "/reader", "")
	require.Equal(t, 200, status)
	status, _, _ = o.do(o.admin(), "DELETE", "/v1/keys/a", "")
	require.Equal(t, 200, status)
	status, _, _ = o.do(call{key: key}, "GET", "/reader", "")
	require.Equal(t, 401, status)
}

func TestIPv6ClientsAreTheirNetwork(t *testing.T) {
	o := newOperators(t)
	for i := range 30 {
		want := 401
		if i >= 10 {
			want = 429
		}
		from := fmt.Sprintf("[2001:db8:0:1::%x]:1000", i+1)
		status, _, _ := o.do(call{key: "wrong", from: from}, "GET", "/reader", "")
		require.Equal(t, want, status, from)
	}
	status, _, _ := o.do(call{key: "wrong", from: "[2001:db8:0:2::1]:1000"}, "GET", "/reader", "")
	require.Equal(t, 401, status)
}

func TestFloodOfAddresses(t *testing.T) {
	o := newOperators(t)
	const office = "192.0.2.7:1000"
	status, _, _ := o.do(call{user: httpapi.User, key: mainKey, from: office}, "GET", "/reader", "")
	require.Equal(t, 200, status)
	for range 10 {
		o.do(call{key: "wrong", from: office}, "GET", "/reader", "")
	}
	for i := range 20_000 {
		from := fmt.Sprintf("10.%d.%d.%d:1", i>>16, i>>8&0xff, i&0xff)
		status, _, _ := o.do(call{key: "wrong", from: from}, "GET", "/reader", "")
		require.Equal(t, 401, status)
	}
	require.LessOrEqual(t, o.api.ThrottledForTest(), 8192)
	status, _, _ = o.do(call{user: httpapi.User, key: mainKey, from: office}, "GET", "/reader", "")
	require.Equal(t, 200, status)
}

func TestKeysDuringAnOutage(t *testing.T) {
	o := newOperators(t)
	key := o.makeKey("a", "read")
	status, _, _ := o.do(call{key: key}, "GET", "/reader", "")
	require.Equal(t, 200, status)
	require.NoError(t, o.store.Close())
	status, _, _ = o.do(call{key: key}, "GET", "/reader", "")
	require.Equal(t, 200, status, "a copy")
	o.advance(6 * time.Second)
	status, _, header := o.do(call{key: key}, "GET", "/reader", "")
	require.Equal(t, 503, status, "nobody can say whether it is right")
	require.NotEmpty(t, header.Get("Retry-After"))
	status, _, _ = o.do(o.admin(), "GET", "/reader", "")
	require.Equal(t, 200, status, "the main key needs no database")
}

func TestKeysAreNotLogged(t *testing.T) {
	o := newOperators(t)
	key := o.makeKey("a", "read")
	o.do(call{key: key}, "GET", "/reader", "")
	o.do(call{user: key, key: "pasted-into-the-user"}, "GET", "/reader", "")
	o.do(call{user: "a", key: "wrong-secret"}, "GET", "/reader", "")
	o.do(o.admin(), "DELETE", "/v1/keys/a", "")
	log := o.log.String()
	require.Contains(t, log, "wrong API user or key")
	require.Contains(t, log, "API key revoked")
	for _, secret := range []string{key, mainKey, "wrong-secret", "pasted-into-the-user"} {
		require.NotContains(t, log, secret)
	}
}

// A key that is looked up while it is revoked must not be copied after that.
func TestRevokedDuringLookup(t *testing.T) {
	o := newOperators(t)
	key := o.makeKey("a", "read")
	slow := &slowKeys{Store: o.store, found: make(chan struct{}), goOn: make(chan struct{})}
	_, handler := o.replica(slow)
	done := make(chan struct{})
	go func() {
		defer close(done)
		o.do(call{key: key, handler: handler}, "GET", "/reader", "")
	}()
	<-slow.found
	status, _, _ := o.do(call{user: httpapi.User, key: mainKey, handler: handler}, "DELETE", "/v1/keys/a", "")
	require.Equal(t, 200, status)
	close(slow.goOn)
	<-done
	status, _, _ = o.do(call{key: key, handler: handler}, "GET", "/reader", "")
	require.Equal(t, 401, status)
}

// slowKeys holds the first lookup between its answer and its return.
type slowKeys struct {
	httpapi.Store
	once        sync.Once
	found, goOn chan struct{}
}

func (s *slowKeys) FindAPIKey(ctx context.Context, hash storage.KeyHash) (*storage.APIKey, error) {
	k, err := s.Store.FindAPIKey(ctx, hash)
	s.once.Do(func() {
		close(s.found)
		<-s.goOn
	})
	return k, err
}

func TestReseal(t *testing.T) {
	o := newOperators(t)
	status, answer, _ := o.do(o.admin(), "POST", "/v1/reseal", "")
	require.Equal(t, 409, status)
	require.Contains(t, answer, "-seal-key-file")

	cfg := sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "nanomdm.db")}
	newOperatorsOn(t, cfg).enroll("dev", "topic")
	var err error
	cfg.Sealer, err = cryptoutil.ParseSealKeys([]byte(base64.StdEncoding.EncodeToString(make([]byte, cryptoutil.SealKeySize))))
	require.NoError(t, err)
	o = newOperatorsOn(t, cfg)
	rewritten, next := 0, ""
	for {
		path := "/v1/reseal?limit=1"
		if next != "" {
			path += "&after=" + next
		}
		status, answer, _ := o.do(o.admin(), "POST", path, "")
		require.Equal(t, 200, status, answer)
		var step struct {
			Rewritten int
			Next      string
		}
		require.NoError(t, json.Unmarshal([]byte(answer), &step))
		rewritten += step.Rewritten
		if next = step.Next; next == "" {
			break
		}
	}
	require.Equal(t, 3, rewritten, "Authenticate, TokenUpdate and a push certificate's key")

	for query, want := range map[string]string{"limit=0": "limit", "limit=x": "limit", "limit=1001": "limit", "after=x": "after"} {
		status, answer, _ := o.do(o.admin(), "POST", "/v1/reseal?"+query, "")
		require.Equal(t, 400, status, query)
		require.Contains(t, answer, want)
	}
	status, _, _ = o.do(call{key: o.makeKey("e", "enqueue")}, "POST", "/v1/reseal", "")
	require.Equal(t, 403, status)
	status, _, _ = o.do(call{key: o.makeKey("bound", "admin", "topic")}, "POST", "/v1/reseal", "")
	require.Equal(t, 403, status)
}
