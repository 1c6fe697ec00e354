package apnstest_test

import (
	"bytes"
	"crypto/tls"
	"io"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/nanomdm/nanomdm/push/apnstest"
)

const topic = "com.apple.mgmt.External.test"

// client is an HTTP/2 client that sends what frames a test says.
type client struct {
	*http2.Framer
	t *testing.T
}

func dial(t *testing.T, srv *apnstest.Server, settings ...http2.Setting) *client {
	t.Helper()
	cert, err := srv.ClientCertificate(topic)
	require.NoError(t, err)
	nc, err := tls.Dial("tcp", srv.URL()[len("https://"):], &tls.Config{
		RootCAs: srv.RootCAs(), Certificates: []tls.Certificate{cert}, NextProtos: []string{"h2"},
	})
	require.NoError(t, err)
	t.Cleanup(func() { nc.Close() })
	require.NoError(t, nc.SetDeadline(time.Now().Add(30*time.Second)))
	c := &client{http2.NewFramer(nc, nc), t}
	c.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	_, err = io.WriteString(nc, http2.ClientPreface)
	require.NoError(t, err)
	require.NoError(t, c.WriteSettings(settings...))
	return c
}

// ask begins a request whose headers come in pieces and whose body is to come.
func (c *client) ask(id uint32) {
	c.t.Helper()
	var block bytes.Buffer
	enc := hpack.NewEncoder(&block)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":authority", Value: "localhost"},
		{Name: ":path", Value: "/3/device/0102"}, {Name: "apns-topic", Value: topic},
	} {
		require.NoError(c.t, enc.WriteField(f))
	}
	b := block.Bytes()
	require.NoError(c.t, c.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: b[:10]}))
	require.NoError(c.t, c.WriteContinuation(id, false, b[10:20]))
	require.NoError(c.t, c.WriteContinuation(id, true, b[20:]))
}

func (c *client) body(id uint32) {
	c.t.Helper()
	require.NoError(c.t, c.WriteData(id, false, []byte(`{"mdm":`)))
	require.NoError(c.t, c.WriteDataPadded(id, true, []byte(`"magic"}`), make([]byte, 7)))
}

// next returns the next frame of the type T, and skips others.
func next[T http2.Frame](c *client) T {
	c.t.Helper()
	for {
		f, err := c.ReadFrame()
		require.NoError(c.t, err)
		if f, ok := f.(T); ok {
			return f
		}
	}
}

func newServer(t *testing.T, cfg apnstest.Config) *apnstest.Server {
	t.Helper()
	srv, err := apnstest.NewServer(cfg)
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	return srv
}

func TestFrames(t *testing.T) {
	srv := newServer(t, apnstest.Config{MaxConcurrentStreams: 2})
	c := dial(t, srv)
	streams, ok := next[*http2.SettingsFrame](c).Value(http2.SettingMaxConcurrentStreams)
	require.True(t, ok)
	require.EqualValues(t, 2, streams)
	require.True(t, next[*http2.SettingsFrame](c).IsAck())
	require.NoError(t, c.WriteSettingsAck())
	require.NoError(t, c.WritePing(false, [8]byte{1, 2}))
	require.Equal(t, [8]byte{1, 2}, next[*http2.PingFrame](c).Data)

	c.ask(1)
	c.ask(3)
	c.ask(5)
	refused := next[*http2.RSTStreamFrame](c)
	require.EqualValues(t, 5, refused.StreamID)
	require.Equal(t, http2.ErrCodeRefusedStream, refused.ErrCode)
	c.body(3)
	answer := next[*http2.MetaHeadersFrame](c)
	require.EqualValues(t, 3, answer.StreamID)
	require.Equal(t, "200", answer.PseudoValue("status"))
	require.True(t, answer.StreamEnded())
	require.NoError(t, c.WriteRSTStream(1, http2.ErrCodeCancel))
	c.ask(7)
	c.body(7)
	require.EqualValues(t, 7, next[*http2.MetaHeadersFrame](c).StreamID)
	require.Equal(t, 2, srv.Accepted([]byte{1, 2}))

	// The server answers the running requests when it leaves, and no others.
	c.ask(9)
	require.NoError(t, c.WritePing(false, [8]byte{3}))
	next[*http2.PingFrame](c)
	require.Equal(t, 1, srv.GoAway(apnstest.Graceful, ""))
	require.EqualValues(t, 9, next[*http2.GoAwayFrame](c).LastStreamID)
	c.ask(11)
	c.body(11)
	c.body(9)
	require.EqualValues(t, 9, next[*http2.MetaHeadersFrame](c).StreamID)
	_, err := c.ReadFrame()
	require.ErrorIs(t, err, io.EOF)
}

// The body of an answer waits for the client's window.
func TestWindows(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	srv.SetAnswer(func(apnstest.Push) apnstest.Answer { return apnstest.Answer{Status: 400, Reason: "BadDeviceToken"} })
	c := dial(t, srv, http2.Setting{ID: http2.SettingInitialWindowSize, Val: 4})
	c.ask(1)
	c.body(1)
	require.Equal(t, "400", next[*http2.MetaHeadersFrame](c).PseudoValue("status"))
	first := next[*http2.DataFrame](c)
	body := string(first.Data())
	require.Len(t, body, 4)
	require.False(t, first.StreamEnded())
	require.NoError(t, c.WriteWindowUpdate(1, 3))
	body += string(next[*http2.DataFrame](c).Data())
	require.Len(t, body, 7)
	require.NoError(t, c.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100}))
	last := next[*http2.DataFrame](c)
	require.JSONEq(t, `{"reason":"BadDeviceToken"}`, body+string(last.Data()))
	require.True(t, last.StreamEnded())
}

func TestBrokenFrames(t *testing.T) {
	srv := newServer(t, apnstest.Config{})
	for name, send := range map[string]func(c *client){
		"a stream of the server's": func(c *client) { c.ask(2) },
		"an idle stream":           func(c *client) { c.body(1) },
		"a stream that was": func(c *client) {
			c.ask(3)
			c.ask(1)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, srv)
			send(c)
			require.Equal(t, http2.ErrCodeProtocol, next[*http2.GoAwayFrame](c).ErrCode)
		})
	}
}
