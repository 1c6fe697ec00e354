package apns

import (
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/supervise"
)

const (
	// maxBuffered is how many bytes are buffered before writers wait.
	maxBuffered = 64 << 10
	// finalRead is how long a connection is read after a write has failed, for
	// an alert or a GOAWAY that the server sent before.
	finalRead = 100 * time.Millisecond
	// closeTime is how long Close tries to send the buffered bytes.
	closeTime = 250 * time.Millisecond
)

// bufferedConn is a connection whose writes do not wait: the next piece gathers
// while one is sent. HTTP/2 writes the headers and the body of each request by
// themselves; the buffer joins many requests to one TLS record and one system
// call. A failed write fails later writes, and ends the connection for readers.
type bufferedConn struct {
	*tls.Conn
	timeout time.Duration // of sending one piece

	mu      sync.Mutex
	changed sync.Cond
	buf     []byte // written, not yet sent
	spare   []byte
	sending bool // a goroutine sends
	closing bool
	err     error // of the failed write
}

func newBufferedConn(tc *tls.Conn, timeout time.Duration) *bufferedConn {
	g := &bufferedConn{Conn: tc, timeout: timeout}
	g.changed.L = &g.mu
	return g
}

// Write buffers p for sending. It waits only while the buffer is full.
func (g *bufferedConn) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.buf) >= maxBuffered && g.err == nil && !g.closing {
		g.changed.Wait()
	}
	switch {
	case g.err != nil:
		return 0, g.err
	case g.closing:
		return 0, net.ErrClosed
	}
	g.buf = append(g.buf, p...)
	if !g.sending {
		g.sending = true
		go g.send() // Close waits for it
	}
	return len(p), nil
}

// send sends until the buffer is empty.
func (g *bufferedConn) send() {
	runtime.Gosched() // let requests of the same moment join
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.buf) > 0 && g.err == nil {
		piece := g.buf
		g.buf = g.spare[:0]
		if !g.closing {
			g.SetWriteDeadline(time.Now().Add(g.timeout))
		}
		g.changed.Broadcast()
		g.mu.Unlock()
		err := supervise.Recovered(func() error {
			_, err := g.Conn.Write(piece)
			return err
		})
		g.mu.Lock()
		g.spare = piece
		if err != nil {
			g.err = err
			g.SetReadDeadline(time.Now().Add(finalRead))
		}
	}
	g.sending = false
	g.changed.Broadcast()
}

// Close sends the buffered bytes, within closeTime, and closes the connection.
func (g *bufferedConn) Close() error {
	g.mu.Lock()
	g.closing = true
	if g.sending {
		g.SetWriteDeadline(time.Now().Add(closeTime))
	}
	g.changed.Broadcast()
	for g.sending {
		g.changed.Wait()
	}
	failed := g.err != nil
	g.mu.Unlock()
	if failed {
		return g.NetConn().Close() // a close_notify could not be sent
	}
	return g.Conn.Close()
}
