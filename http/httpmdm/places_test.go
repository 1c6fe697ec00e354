package httpmdm

import (
	"context"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/requestlog"
)

// from is a request of the client with that address.
func from(t *testing.T, client string) *http.Request {
	t.Helper()
	var got *http.Request
	r := httptest.NewRequest("PUT", "/mdm", nil)
	r.RemoteAddr = client
	requestlog.Middleware(slog.New(slog.DiscardHandler), requestlog.Config{},
		http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got = r })).ServeHTTP(httptest.NewRecorder(), r)
	return got
}

func certificate(name string) *x509.Certificate { return &x509.Certificate{Raw: []byte(name)} }

// crowd enters n requests that wait for their bodies, and counts those that have
// to make room.
func crowd(t *testing.T, p *places, n int, request func(i int) *http.Request, cert func(i int) *x509.Certificate) (in []*place, cut *int) {
	t.Helper()
	cut = new(int)
	for i := range n {
		pl, err := p.enter(request(i), cert(i))
		require.NoError(t, err)
		pl.awaitBody(func() { *cut++ })
		in = append(in, pl)
	}
	return in, cut
}

func TestForgedRequestsMakeRoom(t *testing.T) {
	limits := newPlaceLimits(Config{MaxBody: 16 << 20, MaxInFlight: 256 << 20, MaxRequests: 4096})
	client, other := from(t, "192.0.2.1:1"), from(t, "192.0.2.2:1")
	one := func(r *http.Request) func(int) *http.Request { return func(int) *http.Request { return r } }
	same := func(int) *x509.Certificate { return certificate("victim") }
	each := func(i int) *x509.Certificate { return certificate(fmt.Sprint(i)) }
	clients := func(i int) *http.Request { return from(t, fmt.Sprintf("198.51.%d.%d:1", i>>8, i&0xff)) }
	for name, c := range map[string]struct {
		request func(int) *http.Request
		cert    func(int) *x509.Certificate
		held    int
	}{
		"one certificate, one client":        {one(client), same, requestsPerCertificate},
		"one certificate, many clients":      {clients, same, requestsPerCertificate},
		"many certificates, one client":      {one(client), each, limits.clientAwaited},
		"many certificates and many clients": {clients, each, limits.awaited},
		"no certificate":                     {one(client), func(int) *x509.Certificate { return nil }, limits.clientAwaited},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPlaces(limits)
			in, cut := crowd(t, p, 4200, c.request, c.cert)
			require.Equal(t, c.held, p.awaited.Len())
			require.Equal(t, 4200-c.held, *cut)
			for i, pl := range in {
				require.Equal(t, i < 4200-c.held, pl.isEvicted(), "who waits longest makes room")
			}
			// The certificate's owner, and others, get in and keep their place.
			for _, r := range []*http.Request{other, client} {
				pl, err := p.enter(r, certificate("victim"))
				require.NoError(t, err)
				pl.awaitBody(func() { t.Error("an honest request is cut") })
				require.False(t, pl.bodyRead())
				pl.leave()
			}
			for _, pl := range in {
				pl.leave()
				pl.leave()
			}
			require.Zero(t, p.awaited.Len())
			require.Empty(t, p.certificates)
			require.Empty(t, p.clients)
		})
	}
}

// Requests whose bodies are there do not make room: those beyond the limit are
// refused, and others are not.
func TestRequestsOfOneCertificateAreBounded(t *testing.T) {
	p := newPlaces(newPlaceLimits(Config{MaxRequests: 64}))
	r := from(t, "192.0.2.1:1")
	var in []*place
	for range requestsPerCertificate {
		pl, err := p.enter(r, certificate("a"))
		require.NoError(t, err)
		in = append(in, pl)
	}
	_, err := p.enter(from(t, "192.0.2.2:1"), certificate("a"))
	require.ErrorIs(t, err, errCrowded)
	for i := range p.limits.clientRequests - requestsPerCertificate {
		_, err := p.enter(r, certificate(fmt.Sprint(i)))
		require.NoError(t, err)
	}
	_, err = p.enter(r, certificate("b"))
	require.ErrorIs(t, err, errCrowded)
	_, err = p.enter(from(t, "192.0.2.2:1"), certificate("b"))
	require.NoError(t, err)
	in[0].leave()
	_, err = p.enter(r, certificate("a"))
	require.NoError(t, err)
}

func TestBytesOfOneCertificateAreBounded(t *testing.T) {
	p := newPlaces(newPlaceLimits(Config{MaxBody: 16, MaxInFlight: 256, MaxRequests: 64}))
	r := from(t, "192.0.2.1:1")
	var total int64
	for i := range 16 {
		pl, err := p.enter(r, certificate(fmt.Sprint(i/4)))
		require.NoError(t, err)
		for pl.grow(8) {
			total += 8
		}
		if i%4 > 0 || i > 4 {
			require.Zero(t, pl.bytes, "the first request of the certificate holds all it may")
		}
	}
	require.Equal(t, int64(2*256/8), total)
	pl, err := p.enter(r, certificate("another"))
	require.NoError(t, err)
	require.False(t, pl.grow(8), "a quarter of all is the client's")
	pl, err = p.enter(from(t, "[2001:db8::1]:1"), certificate("another"))
	require.NoError(t, err)
	require.True(t, pl.grow(8))
}

// deadlines records them; a body is read through it.
type deadlines struct {
	*httptest.ResponseRecorder
	after []time.Duration
}

func (d *deadlines) SetReadDeadline(t time.Time) error {
	if !t.IsZero() {
		d.after = append(d.after, time.Until(t))
	}
	return nil
}

func TestBodyDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New(nil, nil, Config{})
		ask := func(body io.Reader) []time.Duration {
			w := &deadlines{ResponseRecorder: httptest.NewRecorder()}
			r := httptest.NewRequest("PUT", "/mdm", body)
			_, release, err := h.readBody(w, r, nil, nil)
			require.NoError(t, err)
			release()
			return w.after
		}
		require.Equal(t, []time.Duration{bodyFirst}, ask(strings.NewReader("at once")))
		require.Equal(t, []time.Duration{bodyFirst, bodyGrace + freeBytes*time.Second/bodyMinRate}, ask(iotest.OneByteReader(strings.NewReader("in pieces"))))
		large := ask(strings.NewReader(strings.Repeat("x", 1<<20)))
		require.Equal(t, bodyFirst, large[0])
		require.Equal(t, bodyGrace+64*time.Second, large[len(large)-1])
	})
}

// A body that was cut before the deadline is set stays cut.
func TestEvictedBodyIsNotRead(t *testing.T) {
	h := New(nil, nil, Config{})
	for range 2 {
		r := httptest.NewRequest("PUT", "/mdm", strings.NewReader("x"))
		pl, err := h.places.enter(r, nil)
		require.NoError(t, err)
		in := &bodyReader{handler: h, place: pl, control: http.NewResponseController(httptest.NewRecorder()), body: r.Body, size: 1}
		pl.awaitBody(in.cut)
		require.True(t, h.places.evict(func(*place) bool { return true }))
		_, err = in.readAll()
		require.ErrorIs(t, err, errCrowded)
		require.True(t, pl.bodyRead())
		require.False(t, pl.grow(1))
		pl.leave()
	}
}

// TestMemoryForWork: a body that was read waits for memory until others give
// theirs back, but not for ever, and a small one does not wait.
func TestMemoryForWork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 100 << 10
		body := make([]byte, size)
		m := newMemory(2 * workCopies * size)
		release, err := m.work(t.Context(), body)
		require.NoError(t, err)
		small, err := m.work(t.Context(), body[:freeBytes])
		require.NoError(t, err)
		small()
		began := time.Now()
		_, err = m.work(t.Context(), body)
		require.ErrorIs(t, err, errOverload)
		require.Equal(t, workPatience, time.Since(began))
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err = m.work(ctx, body)
		require.ErrorIs(t, err, context.Canceled)
		time.AfterFunc(time.Second, release)
		began = time.Now()
		release, err = m.work(t.Context(), body)
		require.NoError(t, err)
		require.Equal(t, time.Second, time.Since(began))
		release()
	})
}
