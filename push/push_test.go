package push_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

const topic = "com.apple.mgmt.External.9a2f"

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a database, a fake APNs, and what a test does around services.
type world struct {
	t     testing.TB
	store *sqlstore.Store
	apns  *apnstest.Server
	log   *logBuffer
	clock *clock
}

// clock is the real one, with what a test added.
type clock struct {
	mu    sync.Mutex
	added time.Duration
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return time.Now().Add(c.added)
}

func (c *clock) Advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.added += d
}

type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) count(part string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), part)
}

func newWorld(t testing.TB, cfg apnstest.Config) *world {
	t.Helper()
	return newWorldOn(t, sqlstore.Config{Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "mdm.db")}, cfg)
}

func newWorldOn(t testing.TB, db sqlstore.Config, cfg apnstest.Config) *world {
	t.Helper()
	w := &world{t: t, log: &logBuffer{}, clock: &clock{}}
	srv, err := apnstest.NewServer(cfg)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	w.apns = srv
	db.Now = w.clock.Now
	w.store, err = sqlstore.Open(context.Background(), db)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, w.store.Close()) })
	w.certify(srv, topic)
	return w
}

// certify stores a new push certificate that srv trusts.
func (w *world) certify(srv *apnstest.Server, topic string) {
	w.t.Helper()
	certPEM, keyPEM, err := srv.PushCertificate(topic)
	require.NoError(w.t, err)
	require.NoError(w.t, w.store.StorePushCert(context.Background(), &storage.PushCert{
		Topic: topic, CertPEM: certPEM, KeyPEM: keyPEM, NotAfter: time.Now().AddDate(1, 0, 0),
	}))
}

// service starts a replica's service. It is closed when the test ends.
func (w *world) service(cfg push.Config) *push.Service {
	w.t.Helper()
	cfg.APNs.URL = w.apns.URL()
	cfg.APNs.RootCAs = w.apns.RootCAs()
	cfg.APNs.Proxy = func(*url.URL) (*url.URL, error) { return nil, nil }
	cfg.Logger = slog.New(slog.NewTextHandler(w.log, nil))
	cfg.Now = w.clock.Now
	if cfg.SweepEvery == 0 {
		cfg.SweepEvery = 10 * time.Millisecond
	}
	s, err := push.New(w.store, cfg)
	require.NoError(w.t, err)
	w.t.Cleanup(func() { w.close(s) })
	return s
}

func (w *world) close(s *push.Service) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	require.NoError(w.t, s.Close(ctx))
}

// sweep has the service sweep under a lease until the test ends or stop is
// called.
func (w *world) sweep(s *push.Service) (stop func()) {
	w.t.Helper()
	seen, err := w.store.PeekLease(context.Background(), "push")
	require.NoError(w.t, err)
	l, err := w.store.TakeLease(context.Background(), seen, "me")
	require.NoError(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Sweep(ctx, func() storage.Lease { return l }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			w.t.Errorf("the sweep ended with %v", err)
		}
	})
	w.t.Cleanup(stop)
	return stop
}

func ids(n int) []string {
	out := make([]string, n)
	for i := range out {
		out[i] = fmt.Sprintf("D%06d", i)
	}
	return out
}

func token(id string) []byte { return []byte("token of " + id) }

// enroll enrolls devices, many at a time.
func (w *world) enroll(ids ...string) { w.enrollIn(topic, ids...) }

func (w *world) enrollIn(topic string, ids ...string) {
	w.t.Helper()
	next := make(chan string)
	var wg sync.WaitGroup
	for range 64 {
		wg.Go(func() {
			for id := range next {
				src := storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}
				_, err := w.store.Apply(context.Background(), &storage.Authenticate{Src: src, Message: &mdm.Authenticate{
					Enrollment: mdm.Enrollment{UDID: id}, Topic: topic, Raw: []byte("a")}})
				if err == nil {
					_, err = w.store.Apply(context.Background(), w.tokenUpdate(id, topic, token(id)))
				}
				if err != nil {
					w.t.Error(err)
				}
			}
		})
	}
	for _, id := range ids {
		next <- id
	}
	close(next)
	wg.Wait()
}

func (w *world) tokenUpdate(id, topic string, token []byte) *storage.TokenUpdate {
	return &storage.TokenUpdate{Src: storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}, Message: &mdm.TokenUpdate{
		Enrollment: mdm.Enrollment{UDID: id}, Topic: topic, PushMagic: `magic "` + id + `"`, Token: token, Raw: []byte("t"),
	}}
}

// reports has a device report, and its activity written.
func (w *world) reports(id string, status mdm.Status, uuid string) {
	w.t.Helper()
	_, err := w.store.Apply(context.Background(), &storage.Report{
		Src: storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}, Status: status, CommandUUID: uuid, Raw: []byte("r")})
	require.NoError(w.t, err)
	require.NoError(w.t, w.store.Flush(context.Background()))
}

func (w *world) enqueue(uuid string, ids ...string) {
	w.t.Helper()
	failed, err := w.store.Enqueue(context.Background(), storage.Scope{}, &storage.Enqueue{
		Command: &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte("<plist/>")}, IDs: ids})
	require.NoError(w.t, err)
	require.Empty(w.t, failed)
}

func (w *world) owed() int64 {
	w.t.Helper()
	n, err := w.store.CountOwedPushes(context.Background())
	require.NoError(w.t, err)
	return n
}

func (w *world) state(id string) storage.PushState {
	w.t.Helper()
	states, err := w.store.PushStates(context.Background(), storage.Scope{}, []string{id})
	require.NoError(w.t, err)
	return states[id]
}

func (w *world) eventually(what string, f func() bool) {
	w.t.Helper()
	require.Eventually(w.t, f, 30*time.Second, 5*time.Millisecond, what)
}

// pushOne pushes to one enrollment and returns its result.
func (w *world) pushOne(s *push.Service, id string) push.Result {
	w.t.Helper()
	results, err := s.Push(context.Background(), push.Request{IDs: []string{id}, Owed: true})
	require.NoError(w.t, err)
	require.Len(w.t, results, 1)
	return results[id]
}

// Each answer of APNs, as it is told and stored.
func TestOutcomes(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	longAgo := time.Now().Add(-time.Hour)
	for _, test := range []struct {
		name    string
		answer  apnstest.Answer
		class   apns.Class
		owed    bool
		dead    bool
		planned time.Duration // 0: no time is planned
	}{
		{"accepted", apnstest.Answer{}, apns.Accepted, false, false, 3 * time.Minute},
		{"dead", apnstest.Answer{Status: 410, Reason: "Unregistered", Timestamp: time.Now().Add(time.Hour)}, apns.TokenDead, true, true, 0},
		{"dead without a time", apnstest.Answer{Status: 410, Reason: "ExpiredToken"}, apns.TokenDead, true, true, 0},
		{"dead before the token came", apnstest.Answer{Status: 410, Reason: "Unregistered", Timestamp: longAgo}, apns.TokenDead, true, false, 30 * time.Second},
		{"bad token", apnstest.Answer{Status: 400, Reason: "BadDeviceToken"}, apns.DoNotRetry, true, false, 0},
		{"other topic", apnstest.Answer{Status: 400, Reason: "DeviceTokenNotForTopic"}, apns.DoNotRetry, true, false, 0},
		{"forbidden", apnstest.Answer{Status: 403, Reason: "Forbidden"}, apns.DoNotRetry, true, false, 0},
		{"too large", apnstest.Answer{Status: 413, Reason: "PayloadTooLarge"}, apns.DoNotRetry, true, false, 0},
		{"our fault", apnstest.Answer{Status: 400, Reason: "BadTopic"}, apns.OurFault, true, false, 24 * time.Hour},
		{"too many", apnstest.Answer{Status: 429, Reason: "TooManyRequests"}, apns.RetryLater, true, false, time.Minute},
		{"asked to wait", apnstest.Answer{Status: 429, Reason: "TooManyRequests", RetryAfter: time.Hour}, apns.RetryLater, true, false, time.Hour},
		{"their fault", apnstest.Answer{Status: 500, Reason: "InternalServerError"}, apns.RetryLater, true, false, 15 * time.Minute},
		{"unavailable", apnstest.Answer{Status: 503, Reason: "ServiceUnavailable"}, apns.RetryLater, true, false, 15 * time.Minute},
	} {
		t.Run(test.name, func(t *testing.T) {
			w.enroll(test.name)
			w.enqueue("C-"+test.name, test.name)
			s := w.service(push.Config{Retry: []time.Duration{3 * time.Minute, time.Hour}})
			w.apns.SetAnswer(func(apnstest.Push) apnstest.Answer { return test.answer })
			at := time.Now()
			result := w.pushOne(s, test.name)
			w.close(s) // stores the outcome
			state := w.state(test.name)
			if test.class == apns.Accepted {
				require.NoError(t, result.Err)
				require.Equal(t, state.LastAPNsID, result.APNsID)
				require.NotEmpty(t, result.APNsID)
			} else {
				var refused *push.Refused
				require.ErrorAs(t, result.Err, &refused)
				require.Equal(t, test.class, refused.Outcome.Class)
				require.ErrorContains(t, result.Err, test.answer.Reason)
				require.Equal(t, test.answer.Reason, state.LastReason)
				require.Equal(t, test.answer.Status, state.LastStatus)
			}
			require.Equal(t, test.class.String(), state.LastClass)
			require.Equal(t, test.owed, state.Owed)
			require.Equal(t, test.dead, !state.TokenDeadAt.IsZero())
			require.Equal(t, 1, state.Attempts)
			if test.planned == 0 {
				require.Zero(t, state.NextAt)
				return
			}
			require.WithinDuration(t, at.Add(test.planned), state.NextAt, test.planned/2+5*time.Second)
			if test.class == apns.Accepted || strings.HasPrefix(test.name, "asked") {
				require.False(t, state.NextAt.Before(at.Add(test.planned)), "not before its time")
			}
		})
	}
}

func TestUnknownIDs(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.enroll("A")
	s := w.service(push.Config{})
	results, err := s.Push(t.Context(), push.Request{IDs: []string{"A", "A", "nobody"}})
	require.NoError(t, err)
	require.Len(t, results, 2)
	require.NotEmpty(t, results["A"].APNsID)
	require.ErrorIs(t, results["nobody"].Err, storage.ErrNotEnrolled)
	results, err = s.Push(t.Context(), push.Request{Scope: storage.Scope{Topics: []string{"other"}}, IDs: []string{"A"}})
	require.NoError(t, err)
	require.ErrorIs(t, results["A"].Err, storage.ErrNotEnrolled, "not in the scope")
	results, err = s.Push(t.Context(), push.Request{Scope: storage.Scope{Topics: []string{"other"}}, IDs: []string{"A"}, Async: true})
	require.NoError(t, err)
	require.ErrorIs(t, results["A"].Err, storage.ErrNotEnrolled)
	require.Equal(t, 1, w.apns.Accepted(token("A")))
	results, err = s.Push(t.Context(), push.Request{})
	require.NoError(t, err)
	require.Empty(t, results)
}

// Callers that ask while a push is under way share the next one.
func TestOnePushInFlight(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 100)
	release := make(chan struct{})
	w := newWorld(t, apnstest.Config{OnPush: func(apnstest.Push) {
		arrived <- struct{}{}
		<-release
	}})
	w.enroll("A")
	s := w.service(push.Config{})
	results := make(chan push.Result, 100)
	ask := func() {
		out, err := s.Push(context.Background(), push.Request{IDs: []string{"A"}})
		if err != nil {
			t.Error(err)
		}
		results <- out["A"]
	}
	go ask()
	<-arrived
	for range 50 {
		go ask()
	}
	w.eventually("all wait", func() bool { return s.Stats().Waiting == 1 && len(results) == 0 })
	// Calls that come later get into the second push or a third.
	close(release)
	first := <-results
	require.NoError(t, first.Err)
	seen := map[string]bool{first.APNsID: true}
	for range 50 {
		r := <-results
		require.NoError(t, r.Err)
		seen[r.APNsID] = true
	}
	require.Less(t, len(seen), 10)
	require.Equal(t, len(seen), w.apns.Accepted(token("A")))
}

// A push without an answer in time stays owed, and is sent again.
func TestPatience(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.enroll("A", "B")
	var once sync.Mutex
	stalled := false
	w.apns.SetAnswer(func(p apnstest.Push) apnstest.Answer {
		once.Lock()
		defer once.Unlock()
		if string(p.Token) == string(token("A")) && !stalled {
			stalled = true
			return apnstest.Answer{Stall: true}
		}
		return apnstest.Answer{}
	})
	s := w.service(push.Config{Wait: 2 * time.Second, APNs: apns.Config{StreamTimeout: 5 * time.Second, PingInterval: 2 * time.Second, PingTimeout: 5 * time.Second}})
	results, err := s.Push(t.Context(), push.Request{IDs: []string{"A", "B"}})
	require.NoError(t, err)
	require.Equal(t, push.Result{Owed: true}, results["A"])
	require.NotEmpty(t, results["B"].APNsID)
	require.EqualValues(t, 1, w.owed())
	w.sweep(s)
	w.eventually("the stalled push has ended", func() bool { return w.state("A").LastClass == "retry_later" })
	w.clock.Advance(2 * time.Minute)
	w.eventually("A is pushed", func() bool { return w.apns.Accepted(token("A")) == 1 })
	w.eventually("the debt is paid", func() bool { return w.owed() == 0 })
}

func TestAsync(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{Latency: 50 * time.Millisecond})
	all := ids(300)
	w.enroll(all...)
	s := w.service(push.Config{})
	results, err := s.Push(t.Context(), push.Request{IDs: append([]string{"nobody"}, all...), Async: true})
	require.NoError(t, err)
	require.ErrorIs(t, results["nobody"].Err, storage.ErrNotEnrolled)
	for _, id := range all {
		require.True(t, results[id].Owed)
	}
	require.NotZero(t, w.owed(), "they are durable")
	w.eventually("all are pushed", func() bool { return w.owed() == 0 })
	require.Equal(t, 300, w.apns.Counts().Accepted)
	// A push that another replica sent is not sent again.
	results, err = s.Push(t.Context(), push.Request{IDs: []string{all[0]}, Async: true, Owed: true})
	require.NoError(t, err)
	require.True(t, results[all[0]].Owed)
	w.eventually("it was looked up", func() bool { st := s.Stats(); return st.Waiting+st.InFlight == 0 })
	require.Equal(t, 300, w.apns.Counts().Accepted)
}

// A replica that dies after it queued a command and before it pushed.
func TestAnotherReplicaPays(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.enroll("A", "polled", "gone")
	w.enqueue("C1", "A", "polled", "gone") // and its replica is no more
	w.reports("polled", mdm.StatusIdle, "")
	_, err := w.store.Apply(t.Context(), &storage.CheckOut{Src: storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: "gone"}}})
	require.NoError(t, err)
	s := w.service(push.Config{Retry: []time.Duration{time.Hour}})
	w.sweep(s)
	w.clock.Advance(31 * time.Second)
	w.eventually("A is pushed", func() bool { return w.apns.Accepted(token("A")) == 1 })
	w.eventually("and it is noted", func() bool { return w.owed() == 0 && w.state("A").LastClass == "accepted" })
	require.Equal(t, 1, w.apns.Counts().Requests, "nobody else is")
	require.EqualValues(t, 1, s.Stats().Swept)

	w.clock.Advance(time.Hour + 10*time.Minute)
	w.eventually("A is silent, with a command", func() bool { return w.apns.Accepted(token("A")) == 2 })
	w.eventually("so is the other", func() bool { return w.apns.Accepted(token("polled")) == 1 })
	w.reports("A", mdm.StatusAcknowledged, "C1")
	w.reports("polled", mdm.StatusAcknowledged, "C1")
	w.clock.Advance(1000 * time.Hour)
	w.eventually("nothing is planned any more", func() bool { return w.state("A").NextAt.IsZero() && w.state("polled").NextAt.IsZero() })
	require.Equal(t, 3, w.apns.Counts().Requests)
}

func TestNotNowIsPushed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.enroll("A")
	w.enqueue("C1", "A")
	w.enqueue("C2", "A")
	w.reports("A", mdm.StatusNotNow, "C1")
	require.Zero(t, w.apns.Counts().Requests)
	w.reports("A", mdm.StatusAcknowledged, "C2")
	s := w.service(push.Config{})
	w.sweep(s)
	w.eventually("the device is woken for C1", func() bool { return w.apns.Accepted(token("A")) == 1 })
}

func TestDeadTokenWaitsForANewOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.enroll("A")
	w.apns.SetAnswer(func(p apnstest.Push) apnstest.Answer {
		if string(p.Token) == string(token("A")) {
			return apnstest.Answer{Status: 410, Reason: "Unregistered", Timestamp: time.Now().Add(time.Minute)}
		}
		return apnstest.Answer{}
	})
	s := w.service(push.Config{Retry: []time.Duration{time.Minute}})
	w.sweep(s)
	w.enqueue("C1", "A")
	require.Error(t, w.pushOne(s, "A").Err)
	w.eventually("it is noted", func() bool { return !w.state("A").TokenDeadAt.IsZero() })
	require.ErrorIs(t, w.pushOne(s, "A").Err, storage.ErrTokenDead)
	w.enqueue("C2", "A")
	w.clock.Advance(10 * time.Minute)
	stays := w.apns.Counts().Requests
	require.Equal(t, 1, stays)
	_, err := w.store.Apply(t.Context(), w.tokenUpdate("A", topic, []byte("new")))
	require.NoError(t, err)
	w.eventually("the new token is pushed to", func() bool { return w.apns.Accepted([]byte("new")) == 1 })
}

// A refused certificate stops its topic, once and loudly, until there is a new
// one; other topics go on.
func TestRefusedCertificate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	const other = "com.apple.mgmt.External.other"
	w.certify(w.apns, other)
	refused := ids(50)
	w.enroll(refused...)
	w.enrollIn(other, "other")
	var mu sync.Mutex
	bad := true
	w.apns.SetAnswer(func(p apnstest.Push) apnstest.Answer {
		mu.Lock()
		defer mu.Unlock()
		if p.Topic == topic && bad {
			return apnstest.Answer{Status: 403, Reason: "BadCertificate"}
		}
		return apnstest.Answer{}
	})
	s := w.service(push.Config{APNs: apns.Config{CertificateTTL: 50 * time.Millisecond}})
	w.sweep(s)
	w.enqueue("C1", append([]string{"other"}, refused...)...)
	require.ErrorContains(t, w.pushOne(s, refused[0]).Err, "BadCertificate")
	require.ErrorIs(t, w.pushOne(s, refused[1]).Err, push.ErrStopped)
	require.NoError(t, w.pushOne(s, "other").Err)
	require.Equal(t, []string{topic}, s.Stats().Stopped)
	w.eventually("the outcomes are stored", func() bool {
		return w.state("other").LastClass == "accepted" && w.state(refused[0]).LastClass == "certificate_fault"
	})
	w.clock.Advance(5 * time.Minute)
	w.eventually("the sweep passes the topic over", func() bool { return w.state(refused[2]).NextAt.After(w.clock.Now().Add(10 * time.Minute)) })
	require.Equal(t, 2, w.apns.Counts().Requests)
	require.EqualValues(t, 50, w.owed())
	require.Equal(t, 1, w.log.count("pushes are stopped"))
	w.eventually("the certificate's outcome is stored", func() bool {
		infos, err := w.store.PushCertInfos(t.Context(), storage.Scope{Topics: []string{topic}})
		return err == nil && infos[0].LastClass == "certificate_fault"
	})

	mu.Lock()
	bad = false
	mu.Unlock()
	w.certify(w.apns, topic)
	w.eventually("all are pushed with the new certificate", func() bool { return w.owed() == 0 })
	require.Empty(t, s.Stats().Stopped)
	require.Equal(t, 1, w.log.count("new push certificate"))
	for _, id := range refused {
		require.Equal(t, 1, w.apns.Accepted(token(id)), id)
	}
}

func TestNoCertificate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	const later = "com.apple.mgmt.External.later"
	w.enrollIn(later, "A", "B")
	s := w.service(push.Config{APNs: apns.Config{CertificateTTL: 50 * time.Millisecond}})
	w.sweep(s)
	w.enqueue("C1", "A", "B")
	require.ErrorContains(t, w.pushOne(s, "A").Err, "no push certificate")
	require.ErrorIs(t, w.pushOne(s, "B").Err, push.ErrStopped)
	w.certify(w.apns, later)
	w.eventually("both are pushed", func() bool { return w.owed() == 0 })
}

// A renewed certificate is used without a restart, and old connections drain.
func TestRenewedCertificate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.enroll("A")
	s := w.service(push.Config{APNs: apns.Config{CertificateTTL: 50 * time.Millisecond}})
	require.NoError(t, w.pushOne(s, "A").Err)
	require.Equal(t, 1, w.apns.Counts().Handshakes)
	w.certify(w.apns, topic)
	w.eventually("there is a connection with the new certificate, and only that", func() bool {
		require.NoError(t, w.pushOne(s, "A").Err)
		c := w.apns.Counts()
		return c.Handshakes == 2 && c.Connections == 1
	})
}

// TestCertificateChanged: the replica that stores a certificate uses it for the
// next push, whatever the refresh interval is, and a stopped topic goes on.
func TestCertificateChanged(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.enroll("A", "B")
	s := w.service(push.Config{APNs: apns.Config{CertificateTTL: time.Hour}})
	require.NoError(t, w.pushOne(s, "A").Err)
	w.certify(w.apns, topic)
	s.CertificateChanged(topic)
	require.NoError(t, w.pushOne(s, "A").Err)
	require.Equal(t, 2, w.apns.Counts().Handshakes)

	w.apns.SetAnswer(func(apnstest.Push) apnstest.Answer { return apnstest.Answer{Status: 403, Reason: "BadCertificate"} })
	require.ErrorContains(t, w.pushOne(s, "A").Err, "BadCertificate")
	require.ErrorIs(t, w.pushOne(s, "B").Err, push.ErrStopped)
	w.apns.SetAnswer(nil)
	w.certify(w.apns, topic)
	s.CertificateChanged(topic)
	require.NoError(t, w.pushOne(s, "B").Err)
	require.Equal(t, 3, w.apns.Counts().Handshakes)

	s.CertificateChanged("com.apple.mgmt.External.unused") // no push has used it
}

// TestTopicWithoutCertificateGetsOne: the client remembers that there was none,
// until it is told.
func TestTopicWithoutCertificateGetsOne(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	const later = "com.apple.mgmt.External.later"
	w.enrollIn(later, "A")
	s := w.service(push.Config{APNs: apns.Config{CertificateTTL: time.Hour}})
	require.ErrorContains(t, w.pushOne(s, "A").Err, "no push certificate")
	w.certify(w.apns, later)
	s.CertificateChanged(later)
	require.NoError(t, w.pushOne(s, "A").Err)
}

// The default bound is what the documentation states.
func TestCertificateRefreshBound(t *testing.T) {
	require.Equal(t, 10*time.Second, push.CertificateRefresh)
}

func TestCutConnectionsLoseNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{Latency: 20 * time.Millisecond})
	all := ids(2000)
	w.enroll(all...)
	s := w.service(push.Config{Wait: time.Minute, APNs: apns.Config{Workers: 100}})
	w.enqueue("C1", all...)
	done := make(chan map[string]push.Result, 1)
	go func() {
		results, err := s.Push(context.Background(), push.Request{IDs: all, Owed: true})
		if err != nil {
			t.Error(err)
		}
		done <- results
	}()
	for cut := 1; cut <= 5; cut++ {
		w.eventually("a fifth is pushed", func() bool { return w.apns.Counts().Accepted >= cut*350-200 })
		w.eventually("a connection is cut", func() bool { return w.apns.CutConnections(1) == 1 })
	}
	results := <-done
	for _, id := range all {
		require.NoError(t, results[id].Err)
		require.NotEmpty(t, results[id].APNsID)
	}
	w.eventually("all is paid", func() bool { return w.owed() == 0 })
}

func TestRate(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	all := ids(60)
	w.enroll(all...)
	s := w.service(push.Config{Rate: 50})
	w.sweep(s)
	w.enqueue("C1", all...)
	w.clock.Advance(time.Minute)
	begin := time.Now()
	w.eventually("all is paid", func() bool { return w.owed() == 0 })
	require.Greater(t, time.Since(begin), time.Second, "60 pushes, of which 5 at once, at 50 a second")
}

// A trouble of APNs is told once, not once for each device.
func TestTroubleIsLoggedOnce(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	all := ids(200)
	w.enroll(all...)
	w.apns.SetAnswer(func(apnstest.Push) apnstest.Answer { return apnstest.Answer{Status: 503, Reason: "ServiceUnavailable"} })
	s := w.service(push.Config{})
	results, err := s.Push(t.Context(), push.Request{IDs: all})
	require.NoError(t, err)
	require.Len(t, results, 200)
	require.Equal(t, 1, w.log.count("APNs does not take pushes"))
	w.apns.SetAnswer(nil)
	_, err = s.Push(t.Context(), push.Request{IDs: all})
	require.NoError(t, err)
	require.Equal(t, 1, w.log.count("APNs takes pushes"))
	require.Equal(t, 2, strings.Count(w.log.b.String(), "\n"))
	require.Equal(t, []push.OutcomeCount{
		{Topic: topic, Class: "accepted", Count: 200},
		{Topic: topic, Class: "retry_later", Reason: "ServiceUnavailable", Count: 200},
	}, s.Stats().Outcomes)
}

// Closing leaves what waits to others and loses no outcome.
func TestClose(t *testing.T) {
	t.Parallel()
	arrived := make(chan struct{}, 1)
	release := make(chan struct{})
	w := newWorld(t, apnstest.Config{OnPush: func(apnstest.Push) {
		arrived <- struct{}{}
		<-release
	}})
	w.enroll("A")
	s := w.service(push.Config{})
	w.enqueue("C1", "A")
	results := make(chan push.Result, 2)
	go func() { results <- w.pushOne(s, "A") }()
	<-arrived
	go func() { results <- w.pushOne(s, "A") }() // a push of its own
	w.eventually("the other waits", func() bool { return s.Stats().Waiting == 1 })
	closed := make(chan struct{})
	go func() {
		w.close(s)
		close(closed)
	}()
	require.ErrorIs(t, (<-results).Err, push.ErrClosed)
	close(release)
	require.NoError(t, (<-results).Err)
	<-closed
	require.Zero(t, w.owed())
	require.ErrorIs(t, w.pushOne(s, "A").Err, push.ErrClosed)
}

// At the end of its context Close does not wait for APNs.
func TestCloseInTime(t *testing.T) {
	t.Parallel()
	w := newWorld(t, apnstest.Config{})
	w.apns.SetStall(1)
	w.enroll("A")
	s := w.service(push.Config{})
	w.enqueue("C1", "A")
	done := make(chan push.Result, 1)
	go func() { done <- w.pushOne(s, "A") }()
	w.eventually("it is under way", func() bool { return w.apns.Counts().Stalled == 1 })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_ = s.Close(ctx)
	require.ErrorIs(t, (<-done).Err, push.ErrClosed)
	require.EqualValues(t, 1, w.owed())
}

func TestBadConfig(t *testing.T) {
	t.Parallel()
	for field, cfg := range map[string]push.Config{
		"Rate":    {Rate: -1},
		"Retry":   {Retry: []time.Duration{time.Minute, 0}},
		"Workers": {APNs: apns.Config{Workers: -1}},
	} {
		_, err := push.New(nil, cfg)
		require.ErrorContains(t, err, field)
	}
}
