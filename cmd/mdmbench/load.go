package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

const requestTimeout = 30 * time.Second

// message is a request in the form in which it goes over the wire, and what
// its reply must contain; a reply to nothing wanted must be empty.
type message struct {
	wire []byte
	want string
}

// The kinds of messages, as their content types tell them.
const (
	checkinType = "application/x-apple-aspen-mdm-checkin"
	reportType  = "application/x-apple-aspen-mdm; charset=UTF-8"
)

// sign makes a message of a device.
func sign(id *mdmtest.Identity, contentType string, body []byte, want string) (message, error) {
	signature, err := mdmtest.Sign(id, body, mdmtest.SignOptions{})
	if err != nil {
		return message{}, err
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "PUT /mdm HTTP/1.1\r\nHost: mdmbench\r\nUser-Agent: MDM/1.0\r\n"+
		"Content-Type: %s\r\nMdm-Signature: %s\r\nContent-Length: %d\r\n\r\n", contentType, signature, len(body))
	b.Write(body)
	return message{wire: b.Bytes(), want: want}, nil
}

// device is an enrollment with its identity.
type device struct {
	id   *mdmtest.Identity
	udid string
}

// newDevices makes devices with identities of ca.
func newDevices(ctx context.Context, ca *mdmtest.CA, first, count int) ([]device, error) {
	return parallel(ctx, count, func(i int) (device, error) {
		udid := deviceID(first + i)
		id, err := ca.Issue("bench " + udid)
		return device{id, udid}, err
	})
}

func deviceID(n int) string { return fmt.Sprintf("%08X-0000-4000-8000-%012X", n, n) }

// parallel makes count values on all processors.
func parallel[T any](ctx context.Context, count int, make1 func(int) (T, error)) ([]T, error) {
	out := make([]T, count)
	errs := make([]error, runtime.NumCPU())
	var next atomic.Int64
	var workers sync.WaitGroup
	for w := range errs {
		workers.Go(func() {
			for ctx.Err() == nil && errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= count {
					return
				}
				out[i], errs[w] = make1(i)
			}
		})
	}
	workers.Wait()
	for _, err := range append(errs, ctx.Err()) {
		if err != nil {
			return nil, err
		}
	}
	return out, nil
}

func (d device) document(fill func(*mdmtest.Plist)) []byte {
	var p mdmtest.Plist
	p.String("UDID", d.udid)
	fill(&p)
	return p.Document()
}

// enrollment is Authenticate and TokenUpdate.
func (d device) enrollment() ([]message, error) {
	authenticate, err := sign(d.id, checkinType, d.authenticate(), "")
	if err != nil {
		return nil, err
	}
	tokenUpdate, err := sign(d.id, checkinType, d.tokenUpdate(), "")
	return []message{authenticate, tokenUpdate}, err
}

func (d device) authenticate() []byte {
	return d.document(func(p *mdmtest.Plist) {
		p.String("MessageType", "Authenticate").String("Topic", mdmtest.DefaultTopic)
		p.String("DeviceName", "Mac").String("Model", "Mac16,1").String("ModelName", "MacBook Pro")
		p.String("OSVersion", "26.0").String("BuildVersion", "25A354").String("SerialNumber", "S"+d.udid[:8])
	})
}

func (d device) tokenUpdate() []byte {
	return d.document(func(p *mdmtest.Plist) {
		p.String("MessageType", "TokenUpdate").String("Topic", mdmtest.DefaultTopic)
		p.Data("Token", []byte("token "+d.udid)).String("PushMagic", "magic "+d.udid)
	})
}

// idle is a poll that wants a command, or nothing.
func (d device) idle(want string) (message, error) {
	return sign(d.id, reportType, d.document(func(p *mdmtest.Plist) { p.String("Status", "Idle") }), want)
}

// fetch is a whole connection: a poll, and a report for each command. The last
// one is answered with the command after them, or nothing.
func (d device) fetch(uuids []string, after string) ([]message, error) {
	poll, err := d.idle(uuids[0])
	if err != nil {
		return nil, err
	}
	visit := []message{poll}
	for i, uuid := range uuids {
		next := after
		if i+1 < len(uuids) {
			next = uuids[i+1]
		}
		m, err := sign(d.id, reportType, d.document(func(p *mdmtest.Plist) {
			p.String("Status", "Acknowledged").String("CommandUUID", uuid)
			p.Dict("QueryResponses", func(p *mdmtest.Plist) {
				p.String("DeviceName", "Mac").String("OSVersion", "26.0").String("SerialNumber", "S"+d.udid[:8])
				p.Bool("IsSupervised", true).Real("DeviceCapacity", 494.38).Real("AvailableDeviceCapacity", 301.2)
			})
		}), next)
		if err != nil {
			return nil, err
		}
		visit = append(visit, m)
	}
	return visit, nil
}

// enqueue queues one command for all devices, without push, with many ids a
// call, and returns its UUID.
func enqueue(ctx context.Context, p *process, devices []device) (string, error) {
	uuid := mdmtest.NewUUID()
	for chunk := range slices.Chunk(udidsOf(devices), chunkIDs) {
		if err := enqueueCommand(ctx, p, uuid, chunk); err != nil {
			return "", err
		}
	}
	return uuid, nil
}

// enqueueCommand queues a command for ids, without push.
func enqueueCommand(ctx context.Context, p *process, uuid string, ids []string) error {
	command := mdmtest.NewCommand(uuid, "DeviceInformation", nil)
	if _, err := p.call(ctx, http.MethodPut, "/v1/enqueue/"+strings.Join(ids, ",")+"?nopush=1", command); err != nil {
		return fmt.Errorf("enqueueing: %w", err)
	}
	return nil
}

func udidsOf(devices []device) []string {
	udids := make([]string, len(devices))
	for i, d := range devices {
		udids[i] = d.udid
	}
	return udids
}

// outcome is what a load did.
type outcome struct {
	requests, failed int
	took             time.Duration
	latencies        []time.Duration // sorted
	failure          string          // the first
}

func (o outcome) rate() float64 { return float64(o.requests-o.failed) / o.took.Seconds() }

func (o outcome) percentile(p float64) time.Duration {
	if len(o.latencies) == 0 {
		return 0
	}
	return o.latencies[int(float64(len(o.latencies)-1)*p)]
}

// load is how requests are sent.
type load struct {
	connections int
	duration    time.Duration // 0: each visit once
	rate        int           // messages a second; 0: as many as get an answer
	lax         bool          // replies need only be 200
}

// drive sends each of the visits once, or again and again for a duration, over
// kept connections; a visit's messages follow each other on one of them.
func drive(ctx context.Context, addr string, l load, visits [][]message) (outcome, error) {
	conns := make([]*conn, l.connections)
	due := &schedule{rate: l.rate}
	for i := range conns {
		nc, err := net.Dial("tcp", addr)
		if err != nil {
			return outcome{}, err
		}
		defer nc.Close()
		conns[i] = &conn{Conn: nc, reader: bufio.NewReader(nc), due: due, lax: l.lax}
	}
	var next atomic.Int64
	var workers sync.WaitGroup
	runtime.GC() // now, and not in the middle
	start := time.Now()
	due.start = start
	for _, c := range conns {
		workers.Go(func() {
			for ctx.Err() == nil && (l.duration == 0 || time.Since(start) < l.duration) {
				i := int(next.Add(1)) - 1
				if l.duration == 0 && i >= len(visits) {
					return
				}
				if !c.visit(visits[i%len(visits)]) {
					return
				}
			}
		})
	}
	workers.Wait()
	total := outcome{took: time.Since(start)}
	for _, c := range conns {
		total.requests += c.requests
		total.failed += c.failed
		total.latencies = append(total.latencies, c.latencies...)
		if total.failure == "" {
			total.failure = c.failure
		}
	}
	slices.Sort(total.latencies)
	return total, ctx.Err()
}

// schedule tells when messages are to be sent.
type schedule struct {
	rate  int
	start time.Time
	sent  atomic.Int64
}

// next waits for the time of the next message and returns it, so that what
// is late counts as slow.
func (s *schedule) next() time.Time {
	if s.rate == 0 {
		return time.Now()
	}
	at := s.start.Add(time.Duration(s.sent.Add(1)) * time.Second / time.Duration(s.rate))
	time.Sleep(time.Until(at))
	return at
}

// conn is one connection with what it saw.
type conn struct {
	net.Conn
	reader    *bufio.Reader
	due       *schedule
	lax       bool
	requests  int
	failed    int
	failure   string
	latencies []time.Duration
}

// visit sends messages; it is false once the connection is broken.
func (c *conn) visit(messages []message) bool {
	for _, m := range messages {
		start := c.due.next()
		c.requests++
		reply, err := c.exchange(m.wire, start)
		if err != nil {
			c.fail(err.Error())
			return false
		}
		switch {
		case reply.status != http.StatusOK:
			c.fail(fmt.Sprintf("status %d: %.100q", reply.status, reply.body))
		case c.lax:
		case (m.want == "") != (len(reply.body) == 0), !bytes.Contains(reply.body, []byte(m.want)):
			c.fail(fmt.Sprintf("a reply with %q, not %q", reply.body, m.want))
		}
		c.latencies = append(c.latencies, time.Since(start))
	}
	return true
}

func (c *conn) fail(what string) {
	c.failed++
	if c.failure == "" {
		c.failure = what
	}
}

type reply struct {
	status int
	body   []byte
}

func (c *conn) exchange(wire []byte, start time.Time) (reply, error) {
	if err := c.SetDeadline(start.Add(requestTimeout)); err != nil {
		return reply{}, err
	}
	if _, err := c.Write(wire); err != nil {
		return reply{}, err
	}
	response, err := http.ReadResponse(c.reader, nil)
	if err != nil {
		return reply{}, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return reply{response.StatusCode, body}, err
}
