//go:build linux

package main

import (
	"bytes"
	"io"
	"net"
	"sync"
	"sync/atomic"
)

// relay is a TCP load balancer for a database: connections to its address go
// to the current target. Faults make it lose connections.
type relay struct {
	listener net.Listener

	mu     sync.Mutex
	target string
	open   map[*connection]struct{}
	closed bool
	away   bool // connections are refused
	wait   sync.WaitGroup

	// cutCommits loses that many connections right after a COMMIT went to the
	// server, so that nobody learns its outcome.
	cutCommits atomic.Int64
	cut        atomic.Int64 // connections lost that way
}

type connection struct{ client, server net.Conn }

func (c *connection) close() {
	_ = c.client.Close()
	_ = c.server.Close()
}

func newRelay(target string) (*relay, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &relay{listener: listener, target: target, open: make(map[*connection]struct{})}
	r.wait.Go(r.serve)
	return r, nil
}

func (r *relay) address() string { return r.listener.Addr().String() }

func (r *relay) serve() {
	for {
		client, err := r.listener.Accept()
		if err != nil {
			return
		}
		r.wait.Go(func() { r.connect(client) })
	}
}

func (r *relay) connect(client net.Conn) {
	r.mu.Lock()
	target := r.target
	r.mu.Unlock()
	server, err := net.Dial("tcp", target)
	if err != nil {
		_ = client.Close()
		return
	}
	c := &connection{client: client, server: server}
	r.mu.Lock()
	if r.closed || r.away || r.target != target {
		r.mu.Unlock()
		c.close()
		return
	}
	r.open[c] = struct{}{}
	r.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { r.upstream(c) })
	both.Go(func() {
		_, _ = io.Copy(client, server)
		c.close()
	})
	both.Wait()
	r.mu.Lock()
	delete(r.open, c)
	r.mu.Unlock()
}

// upstream copies from the client to the server, and breaks the connection
// after a COMMIT if it was asked to.
func (r *relay) upstream(c *connection) {
	defer c.close()
	buffer := make([]byte, 64<<10)
	for {
		n, err := c.client.Read(buffer)
		if n > 0 {
			if _, err := c.server.Write(buffer[:n]); err != nil {
				return
			}
			if r.cutCommits.Load() > 0 && bytes.Contains(bytes.ToLower(buffer[:n]), []byte("commit")) && r.cutCommits.Add(-1) >= 0 {
				r.cut.Add(1)
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// move sends new connections to another target and closes those there are.
func (r *relay) move(target string) {
	r.mu.Lock()
	r.target = target
	r.mu.Unlock()
	r.cutAll()
}

// refuse closes all connections, and new ones at once, until it is called with
// false.
func (r *relay) refuse(away bool) {
	r.mu.Lock()
	r.away = away
	r.mu.Unlock()
	if away {
		r.cutAll()
	}
}

// cutAll loses all connections.
func (r *relay) cutAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.open {
		c.close()
	}
}

func (r *relay) close() {
	_ = r.listener.Close()
	r.mu.Lock()
	r.closed = true
	r.mu.Unlock()
	r.cutAll()
	r.wait.Wait()
}
