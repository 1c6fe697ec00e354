package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// bedroom is a fake APNs with devices that poll when they are pushed.
type bedroom struct {
	t    *testing.T
	apns *apnstest.Server
	args []string // for the daemon
	wg   sync.WaitGroup

	mu       sync.Mutex
	sleepers map[string]*mdmtest.Device
	done     map[string][]string // command UUIDs by UDID
}

func newBedroom(t *testing.T, cfg apnstest.Config) *bedroom {
	t.Helper()
	b := &bedroom{t: t, sleepers: make(map[string]*mdmtest.Device), done: make(map[string][]string)}
	cfg.OnPush = b.wake
	var err error
	b.apns, err = apnstest.NewServer(cfg)
	require.NoError(t, err)
	t.Cleanup(func() {
		b.apns.Close()
		b.wg.Wait()
	})
	file := filepath.Join(t.TempDir(), "apns.pem")
	require.NoError(t, os.WriteFile(file, b.apns.CAPEM(), 0o600))
	b.args = []string{"-apns-url", b.apns.URL(), "-apns-ca", file}
	return b
}

func (b *bedroom) wake(p apnstest.Push) {
	b.mu.Lock()
	device := b.sleepers[string(p.Token)]
	b.mu.Unlock()
	if device == nil || device.PushMagic() != p.Magic {
		return
	}
	b.wg.Go(func() {
		visit, err := device.Poll(context.Background())
		if err != nil {
			b.t.Logf("%s: %v", device.UDID(), err)
		}
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, e := range visit.Exchanges {
			b.done[device.UDID()] = append(b.done[device.UDID()], e.Command.UUID)
		}
	})
}

// sleeps enrolls a device that wakes when pushed.
func (b *bedroom) sleeps(d *daemon, udid string) {
	b.t.Helper()
	device := d.device(udid, mdmtest.Config{})
	require.NoError(b.t, device.Enroll(b.t.Context()))
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sleepers[string(device.PushToken())] = device
}

// certify uploads a push certificate for the devices' topic.
func (b *bedroom) certify(d *daemon) {
	b.t.Helper()
	cert, key, err := b.apns.PushCertificate(mdmtest.DefaultTopic)
	require.NoError(b.t, err)
	status, body, _ := d.api("PUT", "/v1/pushcert", "nanomdm", testKey, slices.Concat(cert, key))
	require.Equal(b.t, 200, status, body)
}

func (b *bedroom) acknowledged(udid string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.done[udid])
}

func (b *bedroom) eventually(what string, f func() bool) {
	b.t.Helper()
	require.Eventually(b.t, f, time.Minute, 5*time.Millisecond, what)
}

// pushAnswer is what is read of NanoMDM's result object.
type pushAnswer struct {
	Status map[string]struct {
		PushError  string `json:"push_error"`
		PushResult string `json:"push_result"`
		PushOwed   bool   `json:"push_owed"`
	}
}

func (d *daemon) ask(method, path string, body []byte) (int, pushAnswer) {
	d.t.Helper()
	status, text, _ := d.api(method, path, "nanomdm", testKey, body)
	var a pushAnswer
	require.NoError(d.t, json.Unmarshal([]byte(text), &a), text)
	return status, a
}

func (d *daemon) metrics() string {
	d.t.Helper()
	_, text, _ := d.api("GET", "/metrics", "nanomdm", testKey, nil)
	return text
}

func TestEnqueueWakesTheDevice(t *testing.T) {
	t.Parallel()
	b := newBedroom(t, apnstest.Config{})
	d := start(t, "http", b.args...)
	b.certify(d)
	b.sleeps(d, "D1")
	status, a := d.ask("PUT", "/v1/enqueue/D1", mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status)
	require.NotEmpty(t, a.Status["D1"].PushResult)
	b.eventually("the command is acknowledged", func() bool { return slices.Equal(b.acknowledged("D1"), []string{"C1"}) })
	require.Contains(t, d.metrics(), `nanomdm_pushes_total{class="accepted",reason="",topic="`+mdmtest.DefaultTopic+`"} 1`+"\n")
}

// A replica dies between its answer and the push.
func TestAnotherReplicaWakesTheDevice(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			t.Parallel()
			anotherReplicaWakes(t, engine.Config(t))
		})
	}
}

func anotherReplicaWakes(t *testing.T, db sqlstore.Config) {
	b := newBedroom(t, apnstest.Config{})
	storage := []string{"-storage", db.Driver, "-storage-dsn", db.DSN}
	d := start(t, "http", append(storage, b.args...)...)
	b.certify(d)
	b.sleeps(d, "D1")

	// APNs answers everybody but the one that is to die.
	deaf, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer deaf.Close()
	dies := *d
	dies.log = &syncBuffer{}
	cmd := exec.Command(os.Args[0], append(storage, "-ca", filepath.Join(d.dir, "ca.pem"), "-listen", "127.0.0.1:0",
		"-apns-url", "https://"+deaf.Addr().String())...)
	cmd.Env = append(os.Environ(), asDaemon+"=1", "NANOMDM_API="+testKey)
	cmd.Stderr = dies.log
	require.NoError(t, cmd.Start())
	defer func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	b.eventually("the other replica is ready", func() bool {
		m := listenAttr.FindStringSubmatch(dies.log.String())
		if m != nil {
			dies.url = "http://" + m[1]
		}
		return m != nil
	})
	status, a := dies.ask("PUT", "/v1/enqueue/D1?push=async", mdmtest.NewCommand("C1", "ProfileList", nil))
	require.NoError(t, cmd.Process.Kill())
	require.Equal(t, 200, status)
	require.True(t, a.Status["D1"].PushOwed)
	require.Empty(t, b.acknowledged("D1"))
	b.eventually("the device is woken by the other", func() bool { return slices.Equal(b.acknowledged("D1"), []string{"C1"}) })
	require.Contains(t, d.metrics(), "nanomdm_push_swept_total 1\n")
}

func TestRenewedPushCertificate(t *testing.T) {
	t.Parallel()
	b := newBedroom(t, apnstest.Config{})
	d := start(t, "http", b.args...)
	b.certify(d)
	b.sleeps(d, "D1")
	push := func() int {
		status, _ := d.ask("GET", "/v1/push/D1", nil)
		return status
	}
	require.Equal(t, 200, push())
	require.Equal(t, 1, b.apns.Counts().Handshakes)
	b.certify(d)
	require.Equal(t, 200, push())
	require.Equal(t, 2, b.apns.Counts().Handshakes, "the new certificate is in use at once")
	b.eventually("only the connection with the new certificate is left", func() bool { return b.apns.Counts().Connections == 1 })

	// A refused one stops its topic, until there is another.
	b.apns.SetAnswer(func(apnstest.Push) apnstest.Answer { return apnstest.Answer{Status: 403, Reason: "BadCertificate"} })
	status, a := d.ask("GET", "/v1/push/D1", nil)
	require.Equal(t, 500, status)
	require.Contains(t, a.Status["D1"].PushError, "BadCertificate")
	before := b.apns.Counts().Requests
	_, a = d.ask("GET", "/v1/push/D1", nil)
	require.Contains(t, a.Status["D1"].PushError, "stopped")
	require.Equal(t, before, b.apns.Counts().Requests)
	require.Contains(t, d.metrics(), "nanomdm_push_stopped_topics 1\n")
	b.apns.SetAnswer(nil)
	b.certify(d)
	require.Equal(t, 200, push(), "pushes go on at once")
	require.Contains(t, d.metrics(), "nanomdm_push_stopped_topics 0\n")
}

func TestSilentDeviceIsPushedAgain(t *testing.T) {
	t.Parallel()
	b := newBedroom(t, apnstest.Config{})
	d := start(t, "http", append(b.args, "-push-retry", "1s")...)
	b.certify(d)
	sound := d.device("D1", mdmtest.Config{}) // asleep
	require.NoError(t, sound.Enroll(t.Context()))
	status, _ := d.ask("PUT", "/v1/enqueue/D1", mdmtest.NewCommand("C1", "ProfileList", nil))
	require.Equal(t, 200, status)
	b.eventually("it is pushed again, and again", func() bool { return b.apns.Accepted(sound.PushToken()) >= 3 })
	visit, err := sound.Poll(t.Context())
	require.NoError(t, err)
	require.Len(t, visit.Exchanges, 1)
	store := d.store()
	b.eventually("until it has nothing to do", func() bool {
		states, err := store.PushStates(t.Context(), storage.Scope{}, []string{"D1"})
		require.NoError(t, err)
		return states["D1"].NextAt.IsZero()
	})
}

// store opens the daemon's database.
func (d *daemon) store() *sqlstore.Store {
	d.t.Helper()
	store, err := sqlstore.Open(d.t.Context(), sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(d.dir, "mdm.db")})
	require.NoError(d.t, err)
	d.t.Cleanup(func() { require.NoError(d.t, store.Close()) })
	return store
}

// enrollMany enrolls devices in the daemon's database.
func (d *daemon) enrollMany(ids []string) {
	d.t.Helper()
	store := d.store()
	var wg sync.WaitGroup
	for chunk := range slices.Chunk(ids, len(ids)/64+1) {
		wg.Go(func() {
			for _, id := range chunk {
				src := storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}
				for _, op := range []storage.Op{
					&storage.Authenticate{Src: src, Message: &mdm.Authenticate{Enrollment: mdm.Enrollment{UDID: id}, Topic: mdmtest.DefaultTopic, Raw: []byte("a")}},
					&storage.TokenUpdate{Src: src, Message: &mdm.TokenUpdate{Enrollment: mdm.Enrollment{UDID: id}, Topic: mdmtest.DefaultTopic,
						Token: []byte("token " + id), PushMagic: "m", Raw: []byte("t")}},
				} {
					if _, err := store.Apply(context.Background(), op); err != nil {
						d.t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
}

func TestManyPushes(t *testing.T) {
	t.Parallel()
	b := newBedroom(t, apnstest.Config{Latency: 50 * time.Millisecond})
	d := start(t, "http", append(b.args, "-push-workers", "50", "-push-timeout", "300ms")...)
	b.certify(d)
	ids := make([]string, 3000)
	for i := range ids {
		ids[i] = fmt.Sprintf("D%05d", i)
	}
	d.enrollMany(ids)
	body, err := json.Marshal(map[string]any{"ids": ids})
	require.NoError(t, err)

	// Nobody waits: the answer knows of no push that was made.
	status, a := d.ask("POST", "/v1/push?push=async", body)
	require.Equal(t, 200, status)
	require.Len(t, a.Status, 3000)
	for _, s := range a.Status {
		require.True(t, s.PushOwed)
	}
	b.eventually("all are pushed", func() bool { return b.apns.Counts().Accepted == 3000 })

	// The caller waits, but no longer than -push-timeout: 3,000 pushes take
	// three seconds at least.
	status, a = d.ask("POST", "/v1/push", body)
	require.Equal(t, 200, status)
	pushed, owed := 0, 0
	for _, s := range a.Status {
		if s.PushOwed {
			owed++
		} else if s.PushResult != "" {
			pushed++
		}
	}
	require.Equal(t, 3000, pushed+owed)
	require.Positive(t, owed)
	b.eventually("what is owed is paid", func() bool { return b.apns.Counts().Accepted >= 6000 })
}

// TestPushCertificateInPKCS12: what the keychain exports is refused with the
// command that converts it.
func TestPushCertificateInPKCS12(t *testing.T) {
	t.Parallel()
	d := start(t, "http")
	status, body, _ := d.api("PUT", "/v1/pushcert", "nanomdm", testKey, []byte("\x30\x0d\x02\x01\x03\x30\x08\x06\x06\x2a\x86\x48\x86\xf7\x0d"))
	require.Equal(t, 400, status)
	require.Contains(t, body, "openssl pkcs12 -in FILE.p12 -nodes -out FILE.pem")
}
