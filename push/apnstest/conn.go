package apnstest

import (
	"bufio"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net"
	"runtime"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	maxHeaderList = 64 << 10
	// bodyWindow is how many bytes of bodies a client may send before the
	// server acknowledges them.
	bodyWindow = 1 << 20
	// maxOut bounds the output that waits while a client does not read.
	maxOut = 1 << 20
	// initialWindow is the flow-control window of a client by default.
	initialWindow = 65535
)

// conn is a connection with the part of HTTP/2 (RFC 9113) that a service with
// small requests and small answers needs. One goroutine reads; the timer of the
// latency makes an answer; another goroutine writes the gathered answers, so
// that answers of the same moment are one write. A server with a goroutine for
// each stream needs several times the CPU of the sender that it measures.
type conn struct {
	s       *Server
	raw     net.Conn
	tls     *tls.Conn
	topic   string // of the client's certificate
	streams uint32 // that may be open

	unread int // bytes of bodies not acknowledged yet; used by the reader alone

	mu        sync.Mutex
	changed   sync.Cond // out, closing or dead
	out       frames    // to be written
	framer    *http2.Framer
	hpack     *hpack.Encoder
	header    frames // the output of hpack
	open      map[uint32]*stream
	last      uint32 // the highest stream of the client
	answered  uint32 // the highest answered stream
	window    int64  // of the client, for bodies
	newWindow int64  // of the client, for each new stream
	draining  bool   // no new streams
	closing   bool   // the connection ends after out is written
	dead      bool   // no more writes
}

// frames is a buffer of output.
type frames []byte

func (f *frames) Write(p []byte) (int, error) {
	*f = append(*f, p...)
	return len(p), nil
}

// stream is a request until its answer or reset.
type stream struct {
	id       uint32
	headers  *http2.MetaHeadersFrame
	body     []byte      // up to one byte more than allowed
	complete bool        // the client has sent the whole request
	timer    *time.Timer // of the answer
	window   int64       // of the answer's body, that the client takes
	rest     []byte      // of the answer's body, to be sent
}

func newConn(s *Server, raw net.Conn, tc *tls.Conn, streams uint32) *conn {
	c := &conn{
		s: s, raw: raw, tls: tc, topic: certificateTopic(tc.ConnectionState().PeerCertificates[0]),
		streams: streams, open: make(map[uint32]*stream), window: initialWindow, newWindow: initialWindow,
	}
	c.changed.L = &c.mu
	c.hpack = hpack.NewEncoder(&c.header)
	c.framer = http2.NewFramer(&c.out, bufio.NewReaderSize(tc, 32<<10))
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.framer.MaxHeaderListSize = maxHeaderList
	c.framer.SetReuseFrames()
	return c
}

// run serves the connection to its end. Writes of the framer go to memory and
// cannot fail.
func (c *conn) run() {
	var writer sync.WaitGroup
	writer.Go(c.write)
	err := c.read()
	c.mu.Lock()
	var fault http2.ConnectionError
	if errors.As(err, &fault) && !c.closing {
		_ = c.framer.WriteGoAway(c.last, http2.ErrCode(fault), nil)
		c.closing = true
	} else {
		c.dead = true
		c.raw.Close()
	}
	c.dropAllLocked()
	c.changed.Broadcast()
	c.mu.Unlock()
	writer.Wait()
}

// write sends the gathered output.
func (c *conn) write() {
	var spare frames
	c.mu.Lock()
	defer c.mu.Unlock()
	for !c.dead {
		if len(c.out) == 0 {
			if c.closing {
				// The reader goes on for a while, so that no reset
				// discards the last frames.
				_ = c.tls.CloseWrite()
				_ = c.raw.SetReadDeadline(time.Now().Add(lingerTime))
				return
			}
			c.changed.Wait()
			c.mu.Unlock()
			runtime.Gosched() // let answers of the same moment join
			c.mu.Lock()
			continue
		}
		batch := c.out
		c.out = spare[:0]
		c.changed.Broadcast() // the reader may wait for room
		c.mu.Unlock()
		_, err := c.tls.Write(batch)
		spare = batch
		if err != nil {
			c.raw.Close() // ends the reader
		}
		c.mu.Lock()
		c.dead = c.dead || err != nil
	}
}

// read reads frames until the connection ends. A http2.ConnectionError is the
// client's fault, and goes to the client in a GOAWAY.
func (c *conn) read() error {
	c.mu.Lock()
	_ = c.framer.WriteSettings(
		http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: c.streams},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: maxHeaderList})
	_ = c.framer.WriteWindowUpdate(0, bodyWindow-initialWindow)
	c.changed.Broadcast()
	c.mu.Unlock()
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(c.tls, preface); err != nil {
		return err
	}
	if string(preface) != http2.ClientPreface {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	for {
		f, err := c.framer.ReadFrame()
		c.mu.Lock()
		for len(c.out) > maxOut && !c.dead {
			c.changed.Wait()
		}
		if !c.closing && !c.dead { // otherwise the frame is discarded
			var wrong http2.StreamError
			switch {
			case errors.As(err, &wrong):
				c.last = max(c.last, wrong.StreamID)
				c.resetLocked(wrong.StreamID, wrong.Code)
				err = nil
			case err == nil:
				err = c.takeLocked(f)
			}
			c.changed.Broadcast()
		}
		c.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// takeLocked handles a frame.
func (c *conn) takeLocked(f http2.Frame) error {
	id := f.Header().StreamID
	switch f := f.(type) {
	case *http2.SettingsFrame:
		return c.settingsLocked(f)
	case *http2.PingFrame:
		if !f.IsAck() {
			_ = c.framer.WritePing(true, f.Data)
		}
	case *http2.MetaHeadersFrame:
		return c.headersLocked(f)
	case *http2.DataFrame:
		return c.dataLocked(f)
	case *http2.RSTStreamFrame:
		if id > c.last {
			return http2.ConnectionError(http2.ErrCodeProtocol)
		}
		if st := c.open[id]; st != nil {
			c.dropLocked(st)
		}
	case *http2.WindowUpdateFrame:
		if st := c.open[id]; st != nil {
			st.window += int64(f.Increment)
			c.sendBodyLocked(st)
		} else if id == 0 {
			c.window += int64(f.Increment)
			c.sendBodiesLocked()
		}
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	return nil
}

func (c *conn) settingsLocked(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	err := f.ForeachSetting(func(s http2.Setting) error {
		switch s.ID {
		case http2.SettingInitialWindowSize:
			for _, st := range c.open {
				st.window += int64(s.Val) - c.newWindow
			}
			c.newWindow = int64(s.Val)
		case http2.SettingHeaderTableSize:
			c.hpack.SetMaxDynamicTableSize(min(s.Val, 4096))
		}
		return s.Valid()
	})
	if err != nil {
		return err
	}
	_ = c.framer.WriteSettingsAck()
	c.sendBodiesLocked()
	return nil
}

// headersLocked begins a request, or ends one whose body has trailers.
func (c *conn) headersLocked(f *http2.MetaHeadersFrame) error {
	id := f.StreamID
	if st := c.open[id]; st != nil && !st.complete && f.StreamEnded() {
		c.completeLocked(st)
		return nil
	}
	switch {
	case id%2 == 0, id <= c.last:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case c.draining: // a GOAWAY came before
		return nil
	}
	c.last = id
	switch {
	case len(c.open) >= int(c.streams):
		c.resetLocked(id, http2.ErrCodeRefusedStream)
		return nil
	case f.Truncated:
		c.resetLocked(id, http2.ErrCodeEnhanceYourCalm)
		return nil
	}
	st := &stream{id: id, headers: f, window: c.newWindow}
	c.open[id] = st
	if f.StreamEnded() {
		c.completeLocked(st)
	}
	return nil
}

// dataLocked takes a piece of a body and opens the window again.
func (c *conn) dataLocked(f *http2.DataFrame) error {
	n := int(f.Length)
	if c.unread += n; c.unread > bodyWindow/2 {
		_ = c.framer.WriteWindowUpdate(0, uint32(c.unread))
		c.unread = 0
	}
	st := c.open[f.StreamID]
	switch {
	case f.StreamID > c.last && !c.draining:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case st == nil: // the stream was reset
		return nil
	case st.complete:
		c.resetLocked(st.id, http2.ErrCodeStreamClosed)
		return nil
	}
	data := f.Data()
	st.body = append(st.body, data[:min(len(data), maxPayload+1-len(st.body))]...)
	if f.StreamEnded() {
		c.completeLocked(st)
	} else if n > 0 {
		_ = c.framer.WriteWindowUpdate(st.id, uint32(n))
	}
	return nil
}

// completeLocked schedules the answer to a complete request.
func (c *conn) completeLocked(st *stream) {
	st.complete = true
	p, refusal := check(st, c.topic)
	m, stall := c.s.arrived(refusal == nil)
	if stall {
		return
	}
	c.s.wg.Add(1) // from within a goroutine that is counted, so that Wait has not returned
	st.timer = time.AfterFunc(m.latency, func() {
		defer c.s.wg.Done()
		if c.has(st) {
			c.answer(st, c.s.answerTo(m, p, refusal))
		}
	})
}

// has reports whether the stream is still open.
func (c *conn) has(st *stream) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open[st.id] == st
}

// answer answers a request, unless it has been reset meanwhile.
func (c *conn) answer(st *stream, a Answer) {
	id := st.header("apns-id")
	if !isLowerUUID(id) {
		id = uuid.NewString()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[st.id] != st || a.Stall {
		return
	}
	defer c.changed.Broadcast()
	if a.Reset {
		c.resetLocked(st.id, http2.ErrCodeInternal)
		return
	}
	c.header = c.header[:0]
	c.fieldLocked(":status", strconv.Itoa(a.Status))
	// Not to be remembered: it never comes again.
	_ = c.hpack.WriteField(hpack.HeaderField{Name: "apns-id", Value: id, Sensitive: true})
	if a.Status != 200 {
		c.fieldLocked("content-type", "application/json")
		st.rest = reasonBody(a)
	}
	if a.RetryAfter > 0 {
		c.fieldLocked("retry-after", strconv.Itoa(int(a.RetryAfter/time.Second)))
	}
	c.answered = max(c.answered, st.id)
	_ = c.framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: st.id, BlockFragment: c.header, EndHeaders: true, EndStream: len(st.rest) == 0})
	if len(st.rest) > 0 {
		c.sendBodyLocked(st)
	} else {
		c.dropLocked(st)
	}
}

func (c *conn) fieldLocked(name, value string) {
	_ = c.hpack.WriteField(hpack.HeaderField{Name: name, Value: value})
}

// sendBodyLocked sends what the client takes of an answer's body.
func (c *conn) sendBodyLocked(st *stream) {
	n := min(int64(len(st.rest)), st.window, c.window)
	if n <= 0 {
		return
	}
	_ = c.framer.WriteData(st.id, n == int64(len(st.rest)), st.rest[:n])
	st.window -= n
	c.window -= n
	if st.rest = st.rest[n:]; len(st.rest) == 0 {
		c.dropLocked(st)
	}
}

func (c *conn) sendBodiesLocked() {
	for _, st := range c.open {
		c.sendBodyLocked(st)
	}
}

func (c *conn) resetLocked(id uint32, code http2.ErrCode) {
	_ = c.framer.WriteRSTStream(id, code)
	if st := c.open[id]; st != nil {
		c.dropLocked(st)
	}
}

// dropLocked forgets a stream. The last one of a connection that drains ends
// that.
func (c *conn) dropLocked(st *stream) {
	delete(c.open, st.id)
	if st.timer != nil && st.timer.Stop() {
		c.s.wg.Done()
	}
	c.closing = c.closing || c.draining && len(c.open) == 0
}

func (c *conn) dropAllLocked() {
	for _, st := range c.open {
		c.dropLocked(st)
	}
}

// goAway ends the connection. Abruptly, the streams that were not answered yet
// are disowned; gracefully, they are answered and others are not taken.
func (c *conn) goAway(mode GoAwayMode, reason string) {
	var debug []byte
	if reason != "" {
		debug = reasonBody(Answer{Reason: reason})
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closing || c.dead || c.draining && mode == Graceful {
		return
	}
	last := c.answered
	if mode == Graceful {
		last = c.last
	}
	_ = c.framer.WriteGoAway(last, http2.ErrCodeNo, debug)
	if mode == Abrupt {
		c.closing = true
		c.dropAllLocked()
	}
	c.draining = true
	c.closing = c.closing || len(c.open) == 0
	c.changed.Broadcast()
}

// reasonBody is the JSON of an answer other than 200.
func reasonBody(a Answer) []byte {
	body := struct {
		Reason    string `json:"reason"`
		Timestamp int64  `json:"timestamp,omitempty"`
	}{Reason: a.Reason}
	if !a.Timestamp.IsZero() {
		body.Timestamp = a.Timestamp.UnixMilli()
	}
	b, _ := json.Marshal(body) // cannot fail
	return b
}
