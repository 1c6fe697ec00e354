package gate

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"

	"golang.org/x/sync/semaphore"
)

const (
	// freeHeader is how much of each header takes nothing from the budget, in
	// bytes: more than those of devices have.
	freeHeader = 16 << 10
	// HeaderCopies is how many bytes each byte of a header counts for: reading
	// and parsing it allocates that many.
	HeaderCopies = 8
)

// errHeaders ends a connection. It is wrapped as an error of the network, since
// net/http answers others.
var errHeaders = errors.New("headers of all requests take too much memory")

// Headers bounds the memory that the headers of all connections take, from their
// arrival to the end of the request. Safe for concurrent use.
type Headers struct {
	budget *semaphore.Weighted
}

// NewHeaders makes a budget of that many bytes.
func NewHeaders(bytes int64) *Headers { return &Headers{budget: semaphore.NewWeighted(bytes)} }

// take takes what a header of that many bytes needs, beyond what is held for it.
func (h *Headers) take(read, held int64) (more int64, ok bool) {
	more = max(0, (read-freeHeader)*HeaderCopies-held)
	return more, h.budget.TryAcquire(more)
}

// Serve has a server count the headers of its connections; listener is what it
// is to accept from. turned counts connections that are cut and requests that are
// turned away; it may be nil.
func (h *Headers) Serve(server *http.Server, listener net.Listener, turned func()) net.Listener {
	next := server.Handler
	server.ConnContext = func(ctx context.Context, conn net.Conn) context.Context {
		if secured, ok := conn.(*tls.Conn); ok {
			conn = secured.NetConn()
		}
		return context.WithValue(ctx, headerConnKey{}, conn)
	}
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn, _ := r.Context().Value(headerConnKey{}).(*headerConn)
		switch {
		case conn == nil:
		case r.ProtoMajor >= 2:
			conn.share()
			held, ok := h.take(headerSize(r), 0)
			if !ok {
				turnAway(w, turned)
				return
			}
			defer h.budget.Release(held)
		default:
			conn.begin()
			defer conn.end()
		}
		next.ServeHTTP(w, r)
	})
	return &headerListener{listener, h, turned}
}

type headerConnKey struct{}

// headerSize is about what the header of a request takes on the wire.
func headerSize(r *http.Request) int64 {
	n := len(r.RequestURI)
	for name, values := range r.Header {
		for _, v := range values {
			n += len(name) + len(v)
		}
	}
	return int64(n)
}

type headerListener struct {
	net.Listener
	of     *Headers
	turned func()
}

// Accept implements net.Listener.
func (l *headerListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &headerConn{Conn: conn, of: l.of, turned: l.turned, counting: true}, nil
}

// headerConn counts what is read of a connection while that is a header.
type headerConn struct {
	net.Conn
	of     *Headers
	turned func()

	mu         sync.Mutex
	read, held int64
	counting   bool
}

// Read implements net.Conn.
func (c *headerConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 && !c.count(int64(n)) {
		if c.turned != nil {
			c.turned()
		}
		_ = c.Close()
		return 0, &net.OpError{Op: "read", Net: c.RemoteAddr().Network(), Addr: c.RemoteAddr(), Err: errHeaders}
	}
	return n, err
}

func (c *headerConn) count(n int64) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.counting {
		return true
	}
	c.read += n
	more, ok := c.of.take(c.read, c.held)
	if ok {
		c.held += more
	}
	return ok
}

// begin ends a header: its request is handled, and the body follows.
func (c *headerConn) begin() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.counting = false
}

// end ends a request: the next header follows.
func (c *headerConn) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.release()
	c.counting = true
}

// share notes that the connection carries several requests at once: the headers
// of each are counted as a whole.
func (c *headerConn) share() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.release()
	c.counting = false
}

// Close implements net.Conn.
func (c *headerConn) Close() error {
	c.share()
	return c.Conn.Close()
}

// release gives back what the last header took; the caller holds mu.
func (c *headerConn) release() {
	c.of.budget.Release(c.held)
	c.read, c.held = 0, 0
}
