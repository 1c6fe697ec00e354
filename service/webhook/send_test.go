package webhook

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/storage"
)

// countingConn counts what is written.
type countingConn struct {
	net.Conn
	writes *atomic.Int64
}

func (c countingConn) Write(b []byte) (int, error) {
	c.writes.Add(1)
	return c.Conn.Write(b)
}

// TestEventIsOneWrite: each write is a call of the system, and a packet.
func TestEventIsOneWrite(t *testing.T) {
	var got atomic.Int64
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		got.Add(n)
	}))
	defer receiver.Close()
	var writes atomic.Int64
	s := newSender(nil, 10*time.Second, 1, nil, callout.Guard{}, func(ctx context.Context, network, address string) (net.Conn, error) {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		return countingConn{conn, &writes}, err
	})
	defer s.close()
	e := &storage.Event{ID: "E", Topic: storage.TopicConnect, Raw: bytes.Repeat([]byte("x"), 20_000)}
	require.Nil(t, s.send(t.Context(), &storage.EventSink{URL: receiver.URL, Keys: []string{"key"}}, e, 1))
	require.Greater(t, got.Load(), int64(20_000))
	require.EqualValues(t, 1, writes.Load())
}

// Sinks that were made through the API reach no private network, and those
// that are configured do.
func TestGuardedSinks(t *testing.T) {
	receiver := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer receiver.Close()
	e := &storage.Event{ID: "E", Topic: storage.TopicConnect}
	s := newSender(nil, 10*time.Second, 1, nil, callout.Guard{}, nil)
	defer s.close()
	require.Nil(t, s.send(t.Context(), &storage.EventSink{URL: receiver.URL, Configured: true}, e, 1))
	f := s.send(t.Context(), &storage.EventSink{URL: receiver.URL}, e, 1)
	require.NotNil(t, f)
	require.Contains(t, f.text, callout.ErrInternal.Error())
	require.False(t, f.received)
	allowing := newSender(nil, 10*time.Second, 1, nil, callout.Guard{Allowed: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/32")}}, nil)
	defer allowing.close()
	require.Nil(t, allowing.send(t.Context(), &storage.EventSink{URL: receiver.URL}, e, 1))
}

// TestCheckinForm: a migration endpoint gets the bytes that the device sent, and
// a check-in that is not kept any more is never tried.
func TestCheckinForm(t *testing.T) {
	body, err := bodyOf(storage.FormCheckin, &storage.Event{Raw: []byte("<plist/>")})
	require.NoError(t, err)
	k := Mirror(&url.URL{Scheme: "https", Host: "old.example.org", Path: "/migration"}, "secret")
	req, err := request(t.Context(), &k, "E1", body)
	require.NoError(t, err)
	require.Equal(t, "PUT https://old.example.org/migration", req.Method+" "+req.URL.String())
	require.Equal(t, "application/x-apple-aspen-mdm-checkin", req.Header.Get("Content-Type"))
	user, password, _ := req.BasicAuth()
	require.Equal(t, []string{"nanomdm", "secret"}, []string{user, password})
	require.Empty(t, req.Header.Get("X-Hmac-Signature"))
	sent, err := io.ReadAll(req.Body)
	require.NoError(t, err)
	require.Equal(t, "<plist/>", string(sent))
	_, err = bodyOf(storage.FormCheckin, &storage.Event{})
	require.ErrorIs(t, err, errNoCheckin)
	for _, topic := range []string{storage.TopicAuthenticate, storage.TopicTokenUpdate, storage.TopicCheckOut, storage.TopicSetBootstrapToken} {
		require.True(t, k.Match(&storage.Event{Topic: topic}), topic)
	}
	require.False(t, k.Match(&storage.Event{Topic: storage.TopicConnect}))
}
