package apns

import (
	"crypto/tls"
	"net"
	"runtime"
	"sync"
	"time"
)

const (
	// maxGathered is how much is gathered before writers wait.
	maxGathered = 64 << 10
	// lastWords is how long a connection that cannot be written to is read,
	// for what the server said before it hung up: an alert, or a GOAWAY.
	lastWords = 100 * time.Millisecond
	// closeTime is how long Close tries to send what was written.
	closeTime = 250 * time.Millisecond
)

// gathered is a connection to which a write does not wait: while one piece is
// on its way the next one gathers. HTTP/2 writes the headers and the body of
// each request by themselves; so many requests become one TLS record, and one
// system call. That a write has failed is told to later ones, and by the end
// of the connection to whoever reads.
type gathered struct {
	*tls.Conn
	timeout time.Duration // of sending one piece

	mu      sync.Mutex
	changed sync.Cond
	buf     []byte // written and not sent
	spare   []byte
	sending bool // there is a goroutine that sends
	closing bool
	err     error // that ended the sending
}

func gather(tc *tls.Conn, timeout time.Duration) *gathered {
	g := &gathered{Conn: tc, timeout: timeout}
	g.changed.L = &g.mu
	return g
}

// Write has p sent. It waits only if a lot has gathered.
func (g *gathered) Write(p []byte) (int, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for len(g.buf) >= maxGathered && g.err == nil && !g.closing {
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

// send sends until nothing is left.
func (g *gathered) send() {
	runtime.Gosched() // to requests of the same moment
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
		_, err := g.Conn.Write(piece)
		g.mu.Lock()
		g.spare = piece
		if err != nil {
			g.err = err
			g.SetReadDeadline(time.Now().Add(lastWords))
		}
	}
	g.sending = false
	g.changed.Broadcast()
}

// Close sends what was written, if that can be done soon, and closes the
// connection.
func (g *gathered) Close() error {
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
		return g.NetConn().Close() // there is no room for a goodbye
	}
	return g.Conn.Close()
}
