package main

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/groob/plist"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/smallstep/pkcs7"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

// actAsDaemon makes the test program a server for the demonstration. Its
// value says how that server behaves.
const actAsDaemon = "MDMSIM_TEST_DAEMON"

func TestMain(m *testing.M) {
	if mood := os.Getenv(actAsDaemon); mood != "" {
		os.Exit(fakeDaemon(mood))
	}
	goleak.VerifyTestMain(m)
}

// fakeDaemon takes the flags that the demonstration gives to the server.
func fakeDaemon(mood string) int {
	if mood == "dies" {
		fmt.Fprintln(os.Stderr, "this daemon dies")
		return 3
	}
	flags := flag.NewFlagSet("daemon", flag.ExitOnError)
	ca := flags.String("ca", "", "")
	listen := flags.String("listen", "", "")
	storage := flags.String("storage", "", "")
	flags.String("storage-dsn", "", "")
	flags.Parse(os.Args[1:])
	pem, err := os.ReadFile(*ca)
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(pem) || *storage != "sqlite" {
		fmt.Fprintln(os.Stderr, "bad flags", err)
		return 4
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	fake := newFakeServer(pool, os.Getenv("NANOMDM_API"))
	fake.mood = mood
	server := &http.Server{Addr: *listen, Handler: fake}
	go server.ListenAndServe()
	<-ctx.Done()
	server.Close()
	if mood == "bad exit" {
		return 5
	}
	return 0
}

// fakeServer is a small MDM server: an ordered queue for each enrollment,
// NotNow, and the part of the API that mdmsim uses.
type fakeServer struct {
	mux  *http.ServeMux
	pool *x509.CertPool
	key  string
	mood string

	mu       sync.Mutex
	enrolled map[string]bool
	queues   map[string][]*fakeCommand
	reports  int
	enough   func() // called at the 20th report, if set
	tokens   map[string]pushToken
	push     *pusher // nil without APNs
	pushCert []byte
}

type pushToken struct {
	token        []byte
	magic, topic string
}

type fakeCommand struct {
	uuid   string
	raw    []byte
	notNow bool
}

func newFakeServer(pool *x509.CertPool, key string) *fakeServer {
	f := &fakeServer{
		mux: http.NewServeMux(), pool: pool, key: key,
		enrolled: make(map[string]bool), tokens: make(map[string]pushToken), queues: make(map[string][]*fakeCommand),
	}
	f.mux.HandleFunc("GET /version", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, `{"version":"fake"}`) })
	f.mux.HandleFunc("PUT /v1/enqueue/{ids}", f.enqueue)
	f.mux.HandleFunc("PUT /mdm", f.device)
	f.mux.HandleFunc("PUT /v1/pushcert", func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.pushCert, _ = io.ReadAll(r.Body)
	})
	return f
}

func (f *fakeServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mux.ServeHTTP(w, r)
}

func (f *fakeServer) enqueue(w http.ResponseWriter, r *http.Request) {
	if user, key, _ := r.BasicAuth(); user != "nanomdm" || key != f.key {
		http.Error(w, "unauthorized", http.StatusUnauthorized)
		return
	}
	raw, _ := io.ReadAll(r.Body)
	command, err := mdmtest.ParseCommand(raw)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	status := make(map[string]map[string]string)
	f.mu.Lock()
	for id := range strings.SplitSeq(r.PathValue("ids"), ",") {
		status[id] = map[string]string{}
		if !f.enrolled[id] {
			status[id]["command_error"] = "not enrolled"
			continue
		}
		if f.mood != "loses commands" {
			f.queues[id] = append(f.queues[id], &fakeCommand{uuid: command.UUID, raw: raw})
		}
	}
	tokens, push, pushCert := maps.Clone(f.tokens), f.push, f.pushCert
	f.mu.Unlock()
	if push != nil {
		for id := range status {
			if err := push.send(r.Context(), pushCert, tokens[id]); err != nil {
				status[id]["push_error"] = err.Error()
			}
		}
	}
	w.WriteHeader(http.StatusMultiStatus)
	json.NewEncoder(w).Encode(map[string]any{"status": status})
}

func (f *fakeServer) device(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	if err := f.verify(r, body); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	var m struct {
		MessageType, UDID, UserID, Status, CommandUUID string
		Topic, PushMagic                               string
		Token                                          []byte
	}
	if err := plist.Unmarshal(body, &m); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	id := m.UDID
	if m.UserID != "" {
		id += ":" + m.UserID
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	switch {
	case m.MessageType == "TokenUpdate":
		f.enrolled[id] = true
		f.tokens[id] = pushToken{m.Token, m.PushMagic, m.Topic}
	case m.MessageType == "":
		w.Write(f.report(id, m.Status, m.CommandUUID))
	}
}

func (f *fakeServer) report(id, status, uuid string) []byte {
	f.reports++
	if f.reports == 20 && f.enough != nil {
		f.enough()
	}
	queue := f.queues[id]
	for i, command := range queue {
		switch {
		case command.uuid != uuid || f.mood == "repeats commands":
			continue
		case status == "NotNow":
			command.notNow = true
		default:
			f.queues[id] = append(queue[:i:i], queue[i+1:]...)
		}
		break
	}
	if f.mood == "repeats commands" && f.reports%3 == 0 {
		return nil
	}
	for _, command := range f.queues[id] {
		if !command.notNow || status == "Idle" {
			return command.raw
		}
	}
	return nil
}

func (f *fakeServer) verify(r *http.Request, body []byte) error {
	if r.Header.Get("X-Cert") != "" || r.TLS != nil && len(r.TLS.VerifiedChains) > 0 {
		return nil
	}
	raw, err := base64.StdEncoding.DecodeString(r.Header.Get("Mdm-Signature"))
	if err != nil {
		return err
	}
	p7, err := pkcs7.Parse(raw)
	if err != nil {
		return err
	}
	p7.Content = body
	return p7.VerifyWithChain(f.pool)
}

// result is what a run of the program left.
type result struct {
	code     int
	out, err string
}

func mdmsim(ctx context.Context, env map[string]string, args ...string) result {
	var out, errs bytes.Buffer
	code := run(ctx, streams{out: &out, err: &errs, env: func(name string) string { return env[name] }}, args)
	return result{code, out.String(), errs.String()}
}

func TestUsage(t *testing.T) {
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 2, "mdmsim load"},
		{[]string{"-help"}, 0, "mdmsim demo"},
		{[]string{"nonsense"}, 2, `no command "nonsense"`},
		{[]string{"load", "-help"}, 0, "-commands-per-device"},
		{[]string{"load", "-nonsense"}, 2, "not defined"},
		{[]string{"load", "extra"}, 2, `unexpected argument "extra"`},
		{[]string{"load", "-devices", "0"}, 2, "at least 1"},
		{[]string{"load", "-tls-client-auth"}, 2, "-tls-client-auth needs a -url that begins with https://"},
		{[]string{"load", "-tls-client-auth", "-cert-header", "X"}, 2, "exclude each other"},
		{[]string{"apns", "-api", "key", "-server-ca", "/nowhere"}, 2, "-server-ca: open /nowhere"},
		{[]string{"apns", "-api", "key", "-rotate", "-1s"}, 2, "-rotate is not negative"},
		{[]string{"load", "-polls", "-1"}, 2, "not negative"},
		{[]string{"load", "-notnow", "0.6", "-error", "0.6"}, 2, "between 0 and 1"},
		{[]string{"load", "-commands-per-device", "1"}, 2, "NANOMDM_API"},
		{[]string{"demo", "-help"}, 0, "-nanomdm"},
		{[]string{"demo", "-nanomdm", "/does/not/exist"}, 1, "starting the server"},
		{[]string{"ca", "-help"}, 0, "-dir"},
		{[]string{"apns", "-help"}, 0, "-latency"},
		{[]string{"apns"}, 2, "NANOMDM_API"},
		{[]string{"apns", "-api", "x", "-time", "-1"}, 2, "not negative"},
		{[]string{"apns", "-api", "x", "-connections", "0"}, 2, "at least 1"},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			got := mdmsim(t.Context(), nil, test.args...)
			require.Equal(t, test.code, got.code)
			require.Contains(t, got.out+got.err, test.want)
		})
	}
}

func TestCA(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	first := mdmsim(t.Context(), nil, "ca", "-dir", dir)
	require.Zero(t, first.code, first.err)
	require.Contains(t, first.err, "made")
	require.Equal(t, "-ca "+filepath.Join(dir, "ca.pem")+"\n", first.out)
	pem, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	require.NoError(t, err)
	second := mdmsim(t.Context(), nil, "ca", "-dir", dir)
	require.Contains(t, second.err, "kept")
	again, err := os.ReadFile(filepath.Join(dir, "ca.pem"))
	require.NoError(t, err)
	require.Equal(t, pem, again)
	info, err := os.Stat(filepath.Join(dir, "ca.key"))
	require.NoError(t, err)
	require.Equal(t, os.FileMode(0o600), info.Mode().Perm())

	require.NoError(t, os.WriteFile(filepath.Join(dir, "ca.key"), []byte("torn"), 0o600))
	require.Equal(t, 1, mdmsim(t.Context(), nil, "ca", "-dir", dir).code, "a broken CA is not replaced")
}

func TestDemo(t *testing.T) {
	program, err := os.Executable()
	require.NoError(t, err)
	for _, test := range []struct {
		mood string
		code int
		want []string
	}{
		{"good", 0, []string{
			"Server fake answers", "Mac, user ada", "NotNow", "later, please", "1 profiles: Office Wi-Fi",
			"the profile is not there", "RestartDevice", "All as expected.",
		}},
		{"loses commands", 1, []string{"Mac: 0 commands came, 4 were expected", "log ends with"}},
		{"dies", 1, []string{"ended at once", "exit status 3", "this daemon dies"}},
		{"bad exit", 1, []string{"exit status 5"}},
	} {
		t.Run(test.mood, func(t *testing.T) {
			t.Setenv(actAsDaemon, test.mood)
			t.Setenv("NANOMDM_API", "the key of another server")
			t.Setenv("TMPDIR", t.TempDir())
			got := mdmsim(t.Context(), nil, "demo", "-nanomdm", program)
			require.Equal(t, test.code, got.code, got.out+got.err)
			for _, want := range test.want {
				require.Contains(t, got.out+got.err, want)
			}
			left, err := os.ReadDir(os.Getenv("TMPDIR"))
			require.NoError(t, err)
			require.Empty(t, left, "the temporary directory stays behind")
		})
	}
}

// newLoadServer starts a fake server and returns the arguments for load.
func newLoadServer(t *testing.T) (*fakeServer, []string) {
	t.Helper()
	dir := t.TempDir()
	ca, _, err := openCA(dir)
	require.NoError(t, err)
	fake := newFakeServer(ca.Pool(), "key")
	server := httptest.NewServer(fake)
	t.Cleanup(server.Close)
	return fake, []string{"load", "-url", server.URL, "-ca-dir", dir, "-devices", "10"}
}

func TestLoad(t *testing.T) {
	key := map[string]string{"NANOMDM_API": "key"}
	for _, test := range []struct {
		name string
		mood string
		args []string
		code int
		want []string
		deny []string
	}{
		{
			name: "enroll and poll",
			want: []string{"10 devices, 10 channels, 8 connections: 30 requests", "Authenticate", "p99 ms"},
			deny: []string{"errors"},
		},
		{
			name: "users and commands",
			args: []string{"-users", "2", "-commands-per-device", "5", "-batch", "7", "-polls", "2"},
			want: []string{"10 devices, 30 channels", "enqueue", "Acknowledged    150"},
		},
		{
			name: "certificate header and NotNow",
			args: []string{"-cert-header", "X-Cert", "-commands-per-device", "5", "-notnow", "1"},
			want: []string{"NotNow", "50 commands still wait"},
		},
		{
			name: "errors as told",
			args: []string{"-commands-per-device", "2", "-error", "1", "-signed-attributes"},
			want: []string{"Error      20"},
		},
		{
			name: "duration",
			args: []string{"-duration", "50ms"},
			want: []string{"Idle"},
		},
		{
			name: "lost commands", mood: "loses commands",
			args: []string{"-commands-per-device", "2"},
			code: 1,
			want: []string{"20 commands were queued and not offered"},
		},
		{
			name: "repeated commands", mood: "repeats commands",
			args: []string{"-commands-per-device", "1", "-connections", "1"},
			code: 1,
			want: []string{"offered again after its result was taken"},
		},
		{
			name: "refused",
			args: []string{"-checkin-path", "/nowhere"},
			code: 1,
			want: []string{"10 × Authenticate: the server answered 404"},
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			fake, args := newLoadServer(t)
			fake.mood = test.mood
			got := mdmsim(t.Context(), key, append(args, test.args...)...)
			require.Equal(t, test.code, got.code, got.out+got.err)
			for _, want := range test.want {
				require.Contains(t, strings.Join(strings.Fields(got.out), " "), strings.Join(strings.Fields(want), " "))
			}
			for _, deny := range test.deny {
				require.NotContains(t, got.out, deny)
			}
		})
	}
}

func TestLoadKeepsItsDevices(t *testing.T) {
	fake, args := newLoadServer(t)
	require.Zero(t, mdmsim(t.Context(), nil, args...).code)
	enrolled := len(fake.enrolled)
	key := map[string]string{"NANOMDM_API": "key"}
	got := mdmsim(t.Context(), key, append(args, "-enroll=false", "-commands-per-device", "1")...)
	require.Zero(t, got.code, got.out)
	require.NotContains(t, got.out, "Authenticate")
	require.Len(t, fake.enrolled, enrolled)
	got = mdmsim(t.Context(), key, append(args, "-devices", "12")...)
	require.Zero(t, got.code, got.out)
	require.Len(t, fake.enrolled, 12, "two devices more, ten the same")
}

func TestLoadStopsWhenTold(t *testing.T) {
	fake, args := newLoadServer(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	fake.enough = cancel
	got := mdmsim(ctx, nil, append(args, "-duration", "1h")...)
	require.Equal(t, 1, got.code)
	require.Contains(t, got.out, "Idle", "the summary comes all the same")
	require.NotContains(t, got.out, "errors:")
}

func TestUnreachable(t *testing.T) {
	address, err := freeAddress()
	require.NoError(t, err)
	got := mdmsim(t.Context(), nil, "load", "-url", "http://"+address, "-ca-dir", t.TempDir(), "-devices", "2")
	require.Equal(t, 1, got.code)
	require.Contains(t, got.out, "connection refused")
}

func TestHistogram(t *testing.T) {
	var h histogram
	for i := 1; i <= 10_000; i++ {
		h.add(time.Duration(i) * time.Microsecond)
	}
	for _, q := range []float64{0, .5, .9, .99, 1} {
		exact := max(1, q*10_000)
		got := float64(h.quantile(q).Microseconds())
		require.GreaterOrEqual(t, got, exact-1, q)
		require.LessOrEqual(t, got, exact*1.02+1, q)
	}
	require.Equal(t, 10*time.Millisecond, h.quantile(1))
	h.add(time.Duration(1<<63 - 1))
	h.add(-1)
	for micros := range uint64(100_000) {
		end := bucketEnd(bucketOf(micros))
		require.GreaterOrEqual(t, end, micros)
		require.Equal(t, bucketOf(micros), bucketOf(end))
	}
}

func TestLogTail(t *testing.T) {
	var b logBuffer
	for i := range 10_000 {
		fmt.Fprintf(&b, "line %d of the log\n", i)
	}
	require.Equal(t, "line 9998 of the log\nline 9999 of the log", b.tail(2))
	require.LessOrEqual(t, len(b.buf), logKept)
}
