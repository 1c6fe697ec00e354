package webhook

import (
	"bufio"
	"context"
	"encoding/base64"
	"encoding/hex"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/storage"
)

func TestSign(t *testing.T) {
	at := time.Unix(1614265330, 0)
	body := []byte(`{"test": 2432232314}`)
	const id = "msg_p5jXN8AQM9LWM0D4loKWxJek"
	signed := func(keys ...string) http.Header {
		h := make(http.Header)
		sign(h, keys, id, at, body)
		return h
	}
	// The example of the specification's libraries.
	h := signed("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
	require.Equal(t, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=", h.Get("webhook-signature"))
	require.Equal(t, id, h.Get("webhook-id"))
	require.Equal(t, "1614265330", h.Get("webhook-timestamp"))

	// RFC 4231, test case 2, which NanoMDM's header comes to with that body.
	h = make(http.Header)
	sign(h, []string{"Jefe"}, id, at, []byte("what do ya want for nothing?"))
	want, err := hex.DecodeString("5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843")
	require.NoError(t, err)
	require.Equal(t, base64.StdEncoding.EncodeToString(want), h.Get("X-Hmac-Signature"))

	first, second, both := signed("new"), signed("old"), signed("new", "old")
	require.Equal(t, first.Get("X-Hmac-Signature"), both.Get("X-Hmac-Signature"))
	require.Equal(t, first.Get("webhook-signature")+" "+second.Get("webhook-signature"), both.Get("webhook-signature"))
	require.NotEqual(t, first.Get("webhook-signature"), second.Get("webhook-signature"))

	h = signed()
	require.Equal(t, id, h.Get("webhook-id"), "receivers know repeats by it")
	require.Empty(t, h.Get("webhook-signature")+h.Get("X-Hmac-Signature"))
}

func TestCheckKey(t *testing.T) {
	for key, ok := range map[string]bool{"anything": true, "whsec_c2VjcmV0": true, "whsec_": false, "whsec_!": false, "whsec_c2VjcmV0=": false} {
		require.Equal(t, ok, CheckKey(key) == nil, key)
	}
}

// freeAddress is a port that nobody listens on just now.
func freeAddress(t *testing.T) (host, port string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	host, port, err = net.SplitHostPort(l.Addr().String())
	require.NoError(t, err)
	return host, port
}

// The consumers of the documentation take what is signed with their key and
// nothing else.
func TestConsumers(t *testing.T) {
	const dir = "../../docs/webhook-consumer"
	for name, start := range map[string]func(t *testing.T, host, port string) *exec.Cmd{
		"go": func(t *testing.T, host, port string) *exec.Cmd {
			program := filepath.Join(t.TempDir(), "consumer")
			out, err := exec.Command("go", "build", "-o", program, "./"+dir).CombinedOutput()
			require.NoError(t, err, string(out))
			return exec.Command(program, net.JoinHostPort(host, port))
		},
		"python": func(t *testing.T, _, port string) *exec.Cmd {
			python, err := exec.LookPath("python3")
			if err != nil && os.Getenv("CI") != "true" {
				t.Skip("no python3 here")
			}
			require.NoError(t, err)
			return exec.Command(python, filepath.Join(dir, "consumer.py"), port)
		},
	} {
		for _, key := range []string{"a plain key", "whsec_c2VjcmV0"} {
			t.Run(name+" "+key, func(t *testing.T) {
				host, port := freeAddress(t)
				cmd := start(t, host, port)
				cmd.Env = append(os.Environ(), "WEBHOOK_KEY="+key)
				cmd.Stderr = io.Discard
				out, err := cmd.StdoutPipe()
				require.NoError(t, err)
				require.NoError(t, cmd.Start())
				t.Cleanup(func() {
					require.NoError(t, cmd.Process.Kill())
					_ = cmd.Wait() // it was killed
				})
				address := net.JoinHostPort(host, port)
				require.Eventually(t, func() bool {
					c, err := net.Dial("tcp", address)
					if err == nil {
						err = c.Close()
					}
					return err == nil
				}, 20*time.Second, 20*time.Millisecond)

				s := newSender(nil, 10*time.Second, 1, nil, callout.Guard{Allowed: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}, nil)
				defer s.close()
				r := examples()[6]
				post := func(keys ...string) *failure {
					k := &storage.EventSink{URL: "http://" + address + "/", Keys: keys}
					return s.send(t.Context(), k, &r, 1)
				}
				require.Nil(t, post(key))
				require.Nil(t, post(key, "the former one"))
				lines := bufio.NewScanner(out)
				require.True(t, lines.Scan())
				body, err := render(&r)
				require.NoError(t, err)
				require.Equal(t, r.ID+" "+string(body), lines.Text())
				for _, wrong := range [][]string{nil, {"another key"}, {"another key", key}} {
					f := post(wrong...)
					require.NotNil(t, f, wrong)
					require.Equal(t, "HTTP 401", f.text)
				}
				for what, change := range map[string]func(h http.Header, body *string){
					"another body": func(_ http.Header, body *string) { *body += " " },
					"an old time": func(h http.Header, body *string) {
						sign(h, []string{key}, r.ID, time.Now().Add(-time.Hour), []byte(*body))
					},
					"no time":    func(h http.Header, _ *string) { h.Del("webhook-timestamp") },
					"another id": func(h http.Header, _ *string) { h.Set("webhook-id", "x") },
				} {
					h, text := make(http.Header), string(body)
					sign(h, []string{key}, r.ID, time.Now(), body)
					change(h, &text)
					req, err := http.NewRequestWithContext(t.Context(), "POST", "http://"+address+"/", strings.NewReader(text))
					require.NoError(t, err)
					req.Header = h
					resp, err := s.client.Do(req)
					require.NoError(t, err)
					require.NoError(t, resp.Body.Close())
					require.Equal(t, 401, resp.StatusCode, what)
				}
			})
		}
	}
}

func TestDocumentedConfig(t *testing.T) {
	page, err := os.ReadFile("../../docs/webhooks.md")
	require.NoError(t, err)
	_, rest, ok := strings.Cut(string(page), "```json\n{\"sinks\"")
	require.True(t, ok)
	text, _, _ := strings.Cut(rest, "```")
	sinks, err := ParseConfig([]byte(`{"sinks"` + text))
	require.NoError(t, err)
	require.Len(t, sinks, 3)
	require.Equal(t, []string{"DeviceInformation", "SecurityInfo"}, sinks[0].Filter.RequestTypes)
	for _, k := range sinks {
		require.True(t, k.Enabled)
		require.False(t, k.Tokens)
	}
}

func TestParseConfig(t *testing.T) {
	sinks, err := ParseConfig([]byte(`{"sinks": [{"name": "off", "disabled": true}, {"name": "on"}]}`))
	require.NoError(t, err)
	require.Len(t, sinks, 1)
	require.Equal(t, "on", sinks[0].Name)
	require.Equal(t, storage.OnErrorHold, sinks[0].OnError, "the strict order is the default")
	for text, want := range map[string]string{
		`{"sinks": [{}]}`:                                                  "name",
		`{"sinks": [{"name": "A"}]}`:                                       "name",
		`{"sinks": [{"name": "a", "url": "http://"}]}`:                     "url",
		`{"sinks": [{"name": "a", "url": "x://y"}]}`:                       "url",
		`{"sinks": [{"name": "a", "keys": [""]}]}`:                         "number 1 is empty",
		`{"sinks": [{"name": "a", "keys": ["1","2","3","4","5"]}]}`:        "at most 4",
		`{"sinks": [{"name": "a", "filter": {"topics": ["x"]}}]}`:          `no topic "x"`,
		`{"sinks": [{"name": "a", "filter": {"enrollment_types": [""]}}]}`: "enrollment_types",
		`{"sinks": [{"name": "a"}, {"name": "a"}]}`:                        "twice",
		`{"sinks": [{"name": "a", "on_error": "stop"}]}`:                   "on_error",
		`{"sinks": []} x`:                                                  "follows",
	} {
		_, err := ParseConfig([]byte(text))
		require.ErrorContains(t, err, want, text)
		require.NotContains(t, err.Error(), "hunter2")
	}
}

// A replica that does not have a sink in its configuration neither deletes it
// nor keeps it for ever.
func TestConfiguredSinksOfOthers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		other, err := OpenSinks(t.Context(), w.store, nil, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		e := &storage.Event{Topic: storage.TopicConnect}
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan error, 1)
		go func() { first <- w.sinks.Run(ctx) }()
		second, stop := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- other.Run(second) }()
		time.Sleep(10 * time.Minute)
		require.True(t, other.Wants(e, "Device"))
		require.Len(t, other.deliverable(), 1, "any replica may deliver")
		cancel()
		require.ErrorIs(t, <-first, context.Canceled)
		time.Sleep(30 * time.Second)
		require.True(t, other.Wants(e, "Device"))
		time.Sleep(30 * time.Second)
		require.False(t, other.Wants(e, "Device"), "no running replica has it")
		require.Empty(t, other.deliverable())
		stored, err := w.store.EventSinks(t.Context())
		require.NoError(t, err)
		require.Len(t, stored, 1, "it is kept for when one has it again")

		_, err = OpenSinks(t.Context(), w.store, []storage.EventSink{hook(nil)}, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		require.NoError(t, other.Refresh(t.Context()))
		require.True(t, other.Wants(e, "Device"))
		stop()
		require.ErrorIs(t, <-ended, context.Canceled)

		// One that was deleted behind the back of who has it is made again.
		require.NoError(t, w.store.DeleteEventSink(t.Context(), "hook"))
		require.NoError(t, w.sinks.Refresh(t.Context()))
		require.True(t, w.sinks.Wants(e, "Device"))
		require.Equal(t, 1, w.log.count("stored again"))

		api := hook(func(k *storage.EventSink) { k.Name = "api" })
		require.NoError(t, w.store.PutEventSink(t.Context(), api))
		_, err = OpenSinks(t.Context(), w.store, []storage.EventSink{api}, slog.New(slog.DiscardHandler))
		require.ErrorContains(t, err, "made through the API")
	})
}

func TestNothingIsWrittenForNobody(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t, hook(func(k *storage.EventSink) {
			k.Tokens = false
			k.Filter = storage.EventFilter{Topics: []string{storage.TopicTokenUpdate, storage.TopicCheckOut, storage.TopicPushFailed}}
		}))
		w.enroll("A")
		w.report("A", "C")
		n, err := w.store.WaitingCounts(t.Context())
		require.NoError(t, err)
		require.Zero(t, n.Unnumbered, "neither what no filter takes, nor tokens for those who are not trusted with them")
	})
}
