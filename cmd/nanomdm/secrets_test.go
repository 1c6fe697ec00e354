package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// found names the secrets that a text holds, as they are or in the encodings
// that they come in. Secrets are long, so that nothing is found by chance.
func found(secrets map[string][]byte, text []byte) (names []string) {
	for name, secret := range secrets {
		for offset := range 3 { // where it may begin inside of something in base64
			inner := base64.RawStdEncoding.EncodeToString(append(make([]byte, offset), secret...))
			if bytes.Contains(text, []byte(inner[4:len(inner)-4])) {
				names = append(names, name+" in base64")
			}
		}
		for form, encoded := range map[string]string{
			"": string(secret), " in hex": hex.EncodeToString(secret), " in HEX": strings.ToUpper(hex.EncodeToString(secret)),
			" in base64url": base64.RawURLEncoding.EncodeToString(secret), " escaped": url.QueryEscape(string(secret)),
		} {
			if bytes.Contains(text, []byte(encoded)) {
				names = append(names, name+form)
			}
		}
	}
	return names
}

func TestFoundFinds(t *testing.T) {
	secrets := map[string][]byte{"s": []byte("a secret that is long enough")}
	require.Empty(t, found(secrets, []byte("nothing of it")))
	for _, text := range []string{
		"x a secret that is long enough x", base64.StdEncoding.EncodeToString([]byte("-- a secret that is long enough --")),
		hex.EncodeToString(secrets["s"]), "a+secret+that+is+long+enough",
	} {
		require.NotEmpty(t, found(secrets, []byte(text)), text)
	}
}

// With sealing on no secret is in the database, and none is in logs, errors,
// lists or metrics in any case. Results are not sealed, and -dump shows what
// devices say: its own test is below.
func TestSecretsStaySecret(t *testing.T) {
	random := func(prefix string) []byte { return []byte(prefix + rand.Text()) }
	pair := mdmtestPushPair(t)
	block, _ := pem.Decode(pair.KeyPEM)
	secrets := map[string][]byte{
		"unlock token": random("unlock-"), "bootstrap token": random("bootstrap-"), "command payload": random("wifi-password-"),
		"send key": random("dm-send-"), "recv key": random("dm-recv-"), "hook key": random("hook-"), "sink key": random("sink-"),
		"hook password": random("hookpw-"), "backend password": random("backendpw-"), "wrong key": random("nmk_wrong"),
		"webhook key": random("webhook-"), "mirror key": random("mirror-"), "mirror password": random("mirrorpw-"), "push key": block.Bytes[len(block.Bytes)-40:], "API key": []byte(testKey + rand.Text()),
	}
	sealKey := make([]byte, 32)
	_, _ = rand.Read(sealKey)
	secrets["seal key"] = sealKey
	text := func(name string) string { return string(secrets[name]) }

	dir := t.TempDir()
	keyFile := filepath.Join(dir, "seal.key")
	require.NoError(t, os.WriteFile(keyFile, []byte(base64.StdEncoding.EncodeToString(sealKey)+"\n"), 0o600))
	hook := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		if names := found(secrets, body); len(names) > 0 {
			t.Errorf("the hook is sent %s", names)
		}
	}))
	defer hook.Close()
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	with := func(at, user, password string) string {
		return strings.Replace(at, "://", "://"+user+":"+password+"@", 1)
	}

	file := filepath.Join(dir, "mdm.db")
	keys, err := cryptoutil.ParseSealKeys([]byte(base64.StdEncoding.EncodeToString(sealKey)))
	require.NoError(t, err)
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: file, Sealer: keys, SealCommands: true})
	require.NoError(t, err)
	require.NoError(t, store.StorePushCert(t.Context(), pair))
	require.NoError(t, store.PutEventSink(t.Context(), storage.EventSink{Name: "sink", URL: with(gone.URL, "u", text("sink key")), Keys: []string{text("sink key")}, Enabled: true}))
	require.NoError(t, store.Close())

	d := begin(t, []string{
		"NANOMDM_DM_SEND_HMAC_KEY=" + text("send key"), "NANOMDM_DM_RECV_HMAC_KEY=" + text("recv key"), "NANOMDM_AUTHENTICATE_KEY=" + text("hook key"),
		"NANOMDM_WEBHOOK_HMAC_KEY=" + text("webhook key"), "NANOMDM_WEBHOOK_URL=" + with(gone.URL, "u", text("hook password")),
		"NANOMDM_MIRROR_KEY=" + text("mirror key"), "NANOMDM_MIRROR_URL=" + with(gone.URL, "u", text("mirror password")) + "/migration",
		"NANOMDM_AUTHENTICATE_URL=" + with(hook.URL, "u", text("hook password")),
		"NANOMDM_DM=" + with(gone.URL, "u", text("backend password")) + "/", "NANOMDM_AUTH_PROXY_URL=" + with(gone.URL, "u", text("backend password")) + "/",
	}, "-storage-dsn", file, "-seal-key-file", keyFile, "-seal-commands", "-debug", "-migration", "-api", text("API key"),
		"-webhook-networks", "127.0.0.1")
	d.eventually("/readyz", 200)
	var said bytes.Buffer // answers to operators and devices that should have no secrets
	api := func(method, path, user, key string, body []byte) int {
		t.Helper()
		status, text, header := d.api(method, path, user, key, body)
		fmt.Fprintln(&said, status, header, text)
		return status
	}

	// Everything goes its way.
	dev := d.device("D1-0123456789", mdmtest.Config{})
	require.NoError(t, dev.Authenticate(t.Context()))
	say := func(kind, more string) *mdmtest.Response {
		t.Helper()
		resp, err := dev.Do(t.Context(), "", "", []byte(`<plist version="1.0"><dict><key>MessageType</key><string>`+kind+
			`</string><key>UDID</key><string>D1-0123456789</string>`+more+`</dict></plist>`))
		require.NoError(t, err)
		return resp
	}
	data := func(secret []byte) string {
		return "<data>" + base64.StdEncoding.EncodeToString(secret) + "</data>"
	}
	tokens := "<key>Topic</key><string>" + mdmtest.DefaultTopic + "</string><key>PushMagic</key><string>m</string><key>Token</key><data>AAAA</data><key>UnlockToken</key>" + data(secrets["unlock token"])
	require.Equal(t, 200, say("TokenUpdate", tokens).Status)
	require.NoError(t, dev.SetBootstrapToken(t.Context(), secrets["bootstrap token"]))
	profile := mdmtest.NewCommand("C1", "InstallProfile", func(p *mdmtest.Plist) { p.Data("Payload", secrets["command payload"]) })
	require.Equal(t, 200, api("PUT", "/v1/enqueue/D1-0123456789?nopush=1", "nanomdm", text("API key"), profile))
	for name, role := range map[string]string{"helpdesk": "admin", "reader": "read"} {
		status, answer, _ := d.api("POST", "/v1/keys", "nanomdm", text("API key"), []byte(`{"name": "`+name+`", "role": "`+role+`"}`))
		require.Equal(t, 201, status)
		named := answer[strings.Index(answer, "nmk_"):]
		secrets[name+"'s key"] = []byte(named[:strings.IndexByte(named, '"')])
	}
	resp, err := dev.Do(t.Context(), "", "", []byte(`<plist version="1.0"><dict><key>UDID</key><string>D1-0123456789</string><key>Status</key><string>Idle</string></dict></plist>`))
	require.NoError(t, err)
	require.Contains(t, string(resp.Body), "InstallProfile")
	token, err := dev.GetBootstrapToken(t.Context())
	require.NoError(t, err)
	require.Equal(t, secrets["bootstrap token"], token)

	// And wrong.
	for _, credentials := range [][2]string{{"nanomdm", text("wrong key")}, {text("API key"), "x"}, {text("helpdesk's key"), text("helpdesk's key")}, {"helpdesk", text("API key")}} {
		require.Equal(t, 401, api("GET", "/v1/keys", credentials[0], credentials[1], nil))
	}
	require.Equal(t, 200, api("GET", "/v1/keys", "helpdesk", text("helpdesk's key"), nil))
	sink := `{"url": "` + with(gone.URL, "u", text("sink key")) + `", "keys": ["` + text("sink key") + `"]}`
	require.Contains(t, []int{200, 201}, api("PUT", "/v1/sinks/another", "nanomdm", text("API key"), []byte(sink)))
	require.Equal(t, 400, api("PUT", "/v1/sinks/another", "nanomdm", text("API key"), []byte(strings.Replace(sink, "keys", "kyes", 1))))
	for _, list := range []string{
		"/v1/audit", "/v1/sinks", "/v1/sinks/another", "/v1/pushcerts", "/v1/pushcert?topic=" + pair.Topic, "/v1/enrollments",
	} {
		require.Equal(t, 200, api("GET", list, "helpdesk", text("helpdesk's key"), nil), list)
	}
	// Events are in the log a moment after what they tell of.
	require.Equal(t, 200, api("GET", "/v1/events?topic=mdm.TokenUpdate&wait=30s", "reader", text("reader's key"), nil))
	require.Equal(t, 200, api("GET", "/v1/events?limit=1000", "reader", text("reader's key"), nil))
	require.Contains(t, said.String(), "mdm.TokenUpdate")
	require.Equal(t, 400, api("PUT", "/v1/pushcert", "nanomdm", text("API key"), append(pair.KeyPEM, pair.KeyPEM...)))
	require.Equal(t, 400, api("PUT", "/v1/pushcert", "nanomdm", text("API key"), pair.KeyPEM))
	require.Equal(t, 500, api("PUT", "/v1/enqueue/D1-0123456789", "nanomdm", text("API key"), append(profile, '\n')))
	require.Equal(t, 500, api("PUT", "/v1/enqueue/D1-0123456789", "nanomdm", text("API key"), profile[:len(profile)-9]))
	require.Equal(t, 500, api("PUT", "/v1/enqueue/D1-0123456789", "nanomdm", text("API key"), secrets["command payload"]))
	require.Equal(t, 400, api("POST", "/v1/keys", "nanomdm", text("API key"), []byte(`{"name": "x", "role": "admin", "key": "`+text("wrong key")+`"}`)))
	require.Equal(t, 400, api("PUT", "/migration", "nanomdm", text("API key"), []byte(`<plist version="1.0"><dict><key>MessageType</key><string>TokenUpdate</string>`+tokens+`</dict></plist>`)))
	require.Equal(t, 400, say("TokenUpdate", strings.Replace(tokens, "</data>", "</date>", 1)).Status)
	require.Equal(t, 400, say("SetBootstrapToken", "<key>BootstrapToken</key><string>"+text("bootstrap token")+"</string>").Status)
	require.Equal(t, 502, say("DeclarativeManagement", "<key>Endpoint</key><string>tokens</string>").Status)
	require.Equal(t, 502, d.authProxy(t, dev))
	stranger := d.device("D1-0123456789", mdmtest.Config{})
	resp, err = stranger.Do(t.Context(), "", "", []byte(`<plist version="1.0"><dict><key>MessageType</key><string>TokenUpdate</string><key>UDID</key><string>D1-0123456789</string>`+tokens+`</dict></plist>`))
	require.NoError(t, err)
	require.Equal(t, 400, resp.Status)
	hook.Close()
	require.Error(t, d.device("D2-0123456789", mdmtest.Config{}).Enroll(t.Context()))
	require.Equal(t, 200, api("GET", "/metrics", "nanomdm", text("API key"), nil))
	require.Contains(t, said.String(), `nanomdm_sealing{what="commands"} 1`)
	d.stop()

	require.Empty(t, found(secrets, said.Bytes()), "in answers")
	require.Empty(t, found(secrets, []byte(d.log.String())), "in the log")
	require.Empty(t, found(secrets, []byte(d.stdout.String())), "on standard output")
	database, err := filepath.Glob(file + "*")
	require.NoError(t, err)
	require.NotEmpty(t, database)
	for _, name := range database {
		content, err := os.ReadFile(name)
		require.NoError(t, err)
		require.Empty(t, found(secrets, content), name)
	}
	// They are there, though: with the key each can be had.
	store, err = sqlstore.Open(t.Context(), sqlstore.Config{Driver: "sqlite", DSN: file, Sealer: keys})
	require.NoError(t, err)
	defer store.Close()
	stored, err := store.PushCert(t.Context(), pair.Topic)
	require.NoError(t, err)
	require.Equal(t, pair.KeyPEM, stored.KeyPEM)
}

// authProxy asks for something behind /authproxy/.
func (d *daemon) authProxy(t *testing.T, dev *mdmtest.Device) int {
	t.Helper()
	signature, err := mdmtest.Sign(dev.Identity(), nil, mdmtest.SignOptions{SignedAttributes: true})
	require.NoError(t, err)
	req, err := http.NewRequest("GET", d.url+"/authproxy/x", nil)
	require.NoError(t, err)
	req.Header.Set("Mdm-Signature", signature)
	resp, err := http.DefaultClient.Do(req)
	require.NoError(t, err)
	resp.Body.Close()
	return resp.StatusCode
}

// mdmtestPushPair is a push certificate with its key.
func mdmtestPushPair(t *testing.T) *storage.PushCert {
	t.Helper()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	const topic = "com.apple.mgmt.External.secret"
	id, err := ca.Issue("APSP", mdmtest.WithPushTopic(topic))
	require.NoError(t, err)
	both, err := id.PEM()
	require.NoError(t, err)
	certificate, key := pem.Decode(both)
	return &storage.PushCert{Topic: topic, CertPEM: pem.EncodeToMemory(certificate), KeyPEM: key, NotAfter: id.Cert.NotAfter}
}

// The errors of a start that fails hold no password and no key.
func TestFailedStartsShowNoSecrets(t *testing.T) {
	dir := t.TempDir()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	write := func(name, content string) string {
		file := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, []byte(content), 0o600))
		return file
	}
	caFile := write("ca.pem", string(ca.PEM()))
	const secret = "correct-horse-battery-staple"
	secrets := map[string][]byte{"secret": []byte(secret)}
	for name, args := range map[string][]string{
		"a PostgreSQL URL":        {"-storage", "pgsql", "-storage-dsn", "postgres://u:" + secret + "@h:port/x"},
		"another one":             {"-storage", "pgsql", "-storage-dsn", "postgres://u:" + secret + "@[::1/x"},
		"PostgreSQL's keywords":   {"-storage", "pgsql", "-storage-dsn", "host=h port=x password=" + secret},
		"a MySQL DSN":             {"-storage", "mysql", "-storage-dsn", "u:" + secret + "@tcp(h:3306"},
		"another MySQL DSN":       {"-storage", "mysql", "-storage-dsn", "u:" + secret + "@tcp(h:3306)/x?loc=" + secret},
		"a seal key":              {"-seal-key-file", write("seal", secret+"\n")},
		"a hook":                  {"-authenticate-url", "ftp://u:" + secret + "@h/"},
		"a backend":               {"-dm", "http://u:" + secret + "@h:port/"},
		"a backend with a query":  {"-dm", "http://u:" + secret + "@h/?a=" + secret},
		"a webhook":               {"-webhook-url", "//u:" + secret + "@h/"},
		"an authproxy":            {"-auth-proxy-url", "u:" + secret + "@h"},
		"keys that do nothing":    {"-dm-send-hmac-key", secret, "-webhook-hmac-key", secret, "-authenticate-key", secret, "-storage-dsn", filepath.Join(dir, "no", "such.db")},
		"a key and its file":      {"-api", secret, "-api-file", write("api", secret)},
		"a TLS key":               {"-tls-cert", write("tls", secret), "-tls-key", write("key", secret)},
		"a file that is no plist": {"-return-to-service", write("rts", secret)},
	} {
		t.Run(name, func(t *testing.T) {
			var out, log syncBuffer
			code := make(chan int, 1)
			go func() {
				code <- run(context.Background(), append([]string{"-ca", caFile, "-listen", "127.0.0.1:0", "-storage-dsn", filepath.Join(dir, "x", "y.db")}[:4:4], args...), nil, &out, &log, nil)
			}()
			require.NotZero(t, within(t, code))
			require.NotEmpty(t, log.String())
			require.Empty(t, found(secrets, []byte(log.String()+out.String())), log.String())
		})
	}
}

// A wrong seal key stops the start, and says which key is missing.
func TestWrongSealKeyStopsTheStart(t *testing.T) {
	dir := t.TempDir()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(filepath.Join(dir, "ca.pem"), ca.PEM(), 0o600))
	key := func(name string) (file, id string) {
		raw := make([]byte, 32)
		_, _ = rand.Read(raw)
		text := []byte(base64.StdEncoding.EncodeToString(raw) + "\n")
		keys, err := cryptoutil.ParseSealKeys(text)
		require.NoError(t, err)
		file = filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(file, text, 0o600))
		return file, keys.KeyIDs()[0]
	}
	right, id := key("right")
	wrong, _ := key("wrong")
	d := begin(t, nil, "-storage-dsn", filepath.Join(dir, "mdm.db"), "-seal-key-file", right)
	d.eventually("/readyz", 200)
	dev := d.device("D1", mdmtest.Config{})
	require.NoError(t, dev.Enroll(t.Context()))
	require.NoError(t, dev.SetBootstrapToken(t.Context(), []byte("b")))
	d.stop()
	for _, args := range [][]string{{"-seal-key-file", wrong}, nil} {
		log := &syncBuffer{}
		code := make(chan int, 1)
		go func() {
			code <- run(context.Background(), append([]string{"-ca", filepath.Join(dir, "ca.pem"), "-listen", "127.0.0.1:0", "-storage-dsn", filepath.Join(dir, "mdm.db")}, args...), nil, io.Discard, log, nil)
		}()
		require.Equal(t, 1, within(t, code), log.String())
		require.Contains(t, log.String(), id, "which key is missing")
	}
	d = begin(t, nil, "-storage-dsn", filepath.Join(dir, "mdm.db"), "-seal-key-file", right)
	d.eventually("/readyz", 200)
}
