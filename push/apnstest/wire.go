package apnstest

import (
	"bytes"
	"crypto/tls"
	"encoding/binary"
	"encoding/json"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/net/http2"
)

// serverConn is a server's connection that can have a GOAWAY written between
// two frames of the HTTP/2 server that runs on it.
type serverConn struct {
	*tls.Conn
	raw  net.Conn
	base *http.Server

	mu       sync.Mutex
	header   []byte // of the frame being written, as far as it is known
	payload  int    // bytes of it still to come
	answered uint32 // highest stream that a HEADERS frame answered
	pending  []byte // GOAWAY debug data to be written at the frame's end
	goneAway bool   // GOAWAY was written: nothing else is
}

const frameHeaderLen = 9

// Write passes p on, frame by frame.
func (c *serverConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.goneAway {
		return len(p), nil
	}
	for rest := p; len(rest) > 0; {
		n := c.advance(rest)
		rest = rest[n:]
		if c.pending != nil && c.atBoundary() {
			if _, err := c.Conn.Write(p[:len(p)-len(rest)]); err != nil {
				return 0, err
			}
			c.writeGoAway()
			return len(p), nil
		}
	}
	return c.Conn.Write(p)
}

// advance follows the frames in p up to the end of one, or of p, and returns
// how many bytes that took.
func (c *serverConn) advance(p []byte) int {
	used := 0
	if c.payload == 0 {
		used = min(frameHeaderLen-len(c.header), len(p))
		c.header = append(c.header, p[:used]...)
		if len(c.header) < frameHeaderLen {
			return used
		}
		c.payload = int(c.header[0])<<16 | int(c.header[1])<<8 | int(c.header[2])
		if http2.FrameType(c.header[3]) == http2.FrameHeaders {
			c.answered = max(c.answered, binary.BigEndian.Uint32(c.header[5:]))
		}
	}
	n := min(c.payload, len(p)-used)
	c.payload -= n
	if c.payload == 0 {
		c.header = c.header[:0]
	}
	return used + n
}

func (c *serverConn) atBoundary() bool { return c.payload == 0 && len(c.header) == 0 }

// goAway disowns all streams that were not answered yet and closes the
// connection.
func (c *serverConn) goAway(reason string) {
	debug := []byte{}
	if reason != "" {
		debug, _ = json.Marshal(struct {
			Reason string `json:"reason"`
		}{reason}) // cannot fail
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.goneAway {
		return
	}
	c.pending = debug
	if c.atBoundary() {
		c.writeGoAway()
	}
}

func (c *serverConn) writeGoAway() {
	c.goneAway = true
	var buf bytes.Buffer
	// Writing to a buffer cannot fail.
	_ = http2.NewFramer(&buf, nil).WriteGoAway(c.answered, http2.ErrCodeNo, c.pending)
	// An error here means that the connection is gone anyway.
	_, _ = c.Conn.Write(buf.Bytes())
	_ = c.CloseWrite()
	time.AfterFunc(lingerTime, func() { c.raw.Close() })
}
