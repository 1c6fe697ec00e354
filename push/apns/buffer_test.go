package apns

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/push/apnstest"
)

// bufferedPair returns both ends of a TLS connection, and what is below the
// first one.
func bufferedPair(t *testing.T, timeout time.Duration) (*bufferedConn, *tls.Conn, *counted) {
	t.Helper()
	srv, err := apnstest.NewServer(apnstest.Config{})
	require.NoError(t, err)
	t.Cleanup(srv.Close)
	cert, err := srv.ClientCertificate("topic")
	require.NoError(t, err)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	raw, err := net.Dial("tcp", l.Addr().String())
	require.NoError(t, err)
	far, err := l.Accept()
	require.NoError(t, err)
	t.Cleanup(func() { far.Close() })
	server := tls.Server(far, &tls.Config{Certificates: []tls.Certificate{cert}})
	shaken := make(chan error, 1)
	go func() { shaken <- server.Handshake() }()
	below := &counted{Conn: raw}
	client := tls.Client(below, &tls.Config{InsecureSkipVerify: true}) // it is about bytes only
	require.NoError(t, client.Handshake())
	require.NoError(t, <-shaken)
	below.writes = 0
	return newBufferedConn(client, timeout), server, below
}

// counted counts writes; the first waits for hold.
type counted struct {
	net.Conn
	hold   chan struct{}
	writes int
}

func (c *counted) Write(p []byte) (int, error) {
	c.writes++
	if c.hold != nil {
		<-c.hold
	}
	return c.Conn.Write(p)
}

func TestGatheredWrites(t *testing.T) {
	g, server, below := bufferedPair(t, time.Minute)
	below.hold = make(chan struct{})
	var sent bytes.Buffer
	for i := range 1000 {
		piece := bytes.Repeat([]byte{byte(i)}, 1+i%50)
		sent.Write(piece)
		n, err := g.Write(piece)
		require.NoError(t, err)
		require.Len(t, piece, n)
	}
	close(below.hold)
	require.NoError(t, g.Close(), "what was written goes out first")
	got, err := io.ReadAll(server) // no error: there was a goodbye
	require.NoError(t, err)
	require.Equal(t, sent.Bytes(), got)
	require.Less(t, below.writes, 20)
	_, err = g.Write([]byte("late"))
	require.ErrorIs(t, err, net.ErrClosed)
}

// A peer that does not read blocks writers, then fails them, and is not waited
// for in Close.
func TestGatheredPeerDoesNotRead(t *testing.T) {
	g, _, _ := bufferedPair(t, 200*time.Millisecond)
	reads := make(chan error, 1)
	go func() {
		_, err := g.Read(make([]byte, 1))
		reads <- err
	}()
	piece := make([]byte, 64<<10)
	begin := time.Now()
	var err error
	for written := 0; err == nil && written < 1<<30; written += len(piece) {
		_, err = g.Write(piece)
	}
	require.ErrorIs(t, err, os.ErrDeadlineExceeded)
	require.Less(t, time.Since(begin), 30*time.Second)
	require.Error(t, <-reads, "who reads learns of it")
	begin = time.Now()
	require.NoError(t, g.Close())
	require.Less(t, time.Since(begin), 2*time.Second)
}

// Close ends a write that is stuck.
func TestGatheredCloseIsSoon(t *testing.T) {
	g, _, _ := bufferedPair(t, time.Minute)
	stuck := make(chan error, 1)
	go func() {
		piece := make([]byte, 64<<10)
		for {
			if _, err := g.Write(piece); err != nil {
				stuck <- err
				return
			}
		}
	}()
	time.Sleep(100 * time.Millisecond) // the sockets' buffers fill, or it takes Close less
	begin := time.Now()
	g.Close()
	require.Less(t, time.Since(begin), 5*time.Second)
	require.Error(t, <-stuck)
}
