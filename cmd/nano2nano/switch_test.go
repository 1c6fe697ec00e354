package main

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/certverify"
	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/certauth"
	"github.com/nanomdm/nanomdm/service/core"
	"github.com/nanomdm/nanomdm/storage"
)

// oldServer takes check-ins and keeps what a source would.
type oldServer struct {
	mu      sync.Mutex
	devices map[string]*storage.DeviceRecord
}

func (s *oldServer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	raw, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	m, err := mdm.DecodeCheckin(raw)
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	id, err := m.Identity().Resolve()
	if err != nil {
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch m := m.(type) {
	case *mdm.Authenticate:
		d := &storage.DeviceRecord{SerialNumber: m.SerialNumber, Authenticate: storage.Checkin{Raw: raw, At: begun}}
		d.Channel = storage.ChannelRecord{ID: id.ID, Type: id.Type, Topic: m.Topic, LastSeenAt: begun}
		s.devices[id.ID] = d
	case *mdm.TokenUpdate:
		d := s.devices[id.DeviceID()]
		c := &d.Channel
		if id.IsUserChannel() {
			d.Users = append(d.Users, storage.UserRecord{UserID: m.UserID, UserShortName: m.UserShortName, UserLongName: m.UserLongName, TokenUpdate: storage.Checkin{Raw: raw, At: begun}})
			c = &d.Users[len(d.Users)-1].Channel
		} else {
			d.TokenUpdate = storage.Checkin{Raw: raw, At: begun}
		}
		*c = storage.ChannelRecord{ID: id.ID, Type: id.Type, Topic: m.Topic, PushMagic: m.PushMagic, Token: m.Token, TokenAt: begun, Enabled: true, Tally: 1, EnrolledAt: begun, LastSeenAt: begun}
	}
}

// Devices that enrolled at the source go on here: with the certificates that
// were pinned there, through their queues, woken by pushes, without enrolling.
func TestFleetGoesOn(t *testing.T) {
	const n = 8
	old := &oldServer{devices: make(map[string]*storage.DeviceRecord)}
	var current atomic.Pointer[http.Handler] // behind the host name
	lead := func(to http.Handler) { current.Store(&to) }
	lead(old)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { (*current.Load()).ServeHTTP(w, r) }))
	defer server.Close()
	ca, err := mdmtest.NewCA()
	require.NoError(t, err)

	woken := make(map[string]*mdmtest.Channel)
	var wakes sync.WaitGroup
	var polled sync.Map
	a, err := apnstest.NewServer(apnstest.Config{OnPush: func(p apnstest.Push) {
		c := woken[string(p.Token)]
		wakes.Go(func() {
			visit, err := c.Poll(context.Background())
			if err != nil {
				t.Errorf("%s: %v", c.EnrollmentID(), err)
			}
			polled.Store(c.EnrollmentID(), len(visit.Exchanges))
		})
	}})
	require.NoError(t, err)
	defer a.Close()

	f := new(fleet)
	f.cert.Topic = mdmtest.DefaultTopic
	f.cert.CertPEM, f.cert.KeyPEM, err = a.PushCertificate(mdmtest.DefaultTopic)
	require.NoError(t, err)
	for c := range fleetCommands {
		uuid := commandUUID(0, c)
		f.commands = append(f.commands, storage.CommandRecord{UUID: uuid, RequestType: "ProfileList", Raw: mdmtest.NewCommand(uuid, "ProfileList", nil), CreatedAt: begun})
	}
	var ids []string
	for i := range n {
		identity, err := ca.Issue(fmt.Sprintf("device %d", i))
		require.NoError(t, err)
		d, err := mdmtest.NewDevice(server.URL+"/mdm", identity, mdmtest.Config{Kind: []mdmtest.Kind{mdmtest.Mac, mdmtest.IPhone, mdmtest.UserEnrollment}[i%3]})
		require.NoError(t, err)
		require.NoError(t, d.Enroll(t.Context()))
		channels := []*mdmtest.Channel{d.Channel}
		if d.Kind() == mdmtest.Mac {
			user := d.User("jane")
			require.NoError(t, user.TokenUpdate(t.Context()))
			channels = append(channels, user)
		}
		record := old.devices[d.UDID()]
		sum := sha256.Sum256(identity.Cert.Raw)
		record.Pins = []storage.PinRecord{{SHA256: hex.EncodeToString(sum[:]), CreatedAt: begun}}
		for _, c := range allChannels(record) {
			fillQueue(c, i)
		}
		f.devices = append(f.devices, record)
		for _, c := range channels {
			woken[string(c.PushToken())] = c
			ids = append(ids, c.EnrollmentID())
		}
	}

	dir := t.TempDir()
	files{t, dir}.writeFileKV(f)
	x := newTrial(t, "filekv", dir)
	x.now = time.Now().Add(-time.Hour) // so that the pushes are due
	require.Zero(t, x.run(), "%s", x.out)

	store := x.store()
	verifier, err := certverify.New(ca.PEM(), nil, certverify.Config{})
	require.NoError(t, err)
	h := httpmdm.New(service.Chain(core.New(store, core.Config{}), certauth.New(certauth.Config{})), httpmdm.SignatureIdentity(verifier), httpmdm.Config{})
	lead(h.MDM(httpmdm.Any))
	roots := x509.NewCertPool()
	require.True(t, roots.AppendCertsFromPEM(a.CAPEM()))
	pusher, err := push.New(store, push.Config{APNs: apns.Config{URL: a.URL(), RootCAs: roots}, SweepEvery: 10 * time.Millisecond})
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	var sweep sync.WaitGroup
	lease := takeLease(t, store)
	sweep.Go(func() { _ = pusher.Sweep(ctx, func() storage.Lease { return lease }) })
	require.Eventually(t, func() bool {
		for _, id := range ids {
			if _, ok := polled.Load(id); !ok {
				return false
			}
		}
		return true
	}, time.Minute, 5*time.Millisecond, "every channel is pushed and polls")
	wakes.Wait()
	cancel()
	sweep.Wait()
	require.NoError(t, pusher.Close(t.Context()))
	for _, id := range ids {
		done, _ := polled.Load(id)
		require.Equal(t, 3, done, "%s: what waited and what was put off", id)
		queue, err := store.Queue(t.Context(), storage.Scope{}, id, 0, storage.QueueKey{}, 10)
		require.NoError(t, err)
		require.Empty(t, queue, id)
	}
}

func takeLease(t *testing.T, store storage.Leases) storage.Lease {
	t.Helper()
	seen, err := store.PeekLease(t.Context(), "push")
	require.NoError(t, err)
	lease, err := store.TakeLease(t.Context(), seen, "test")
	require.NoError(t, err)
	return lease
}
