package apns

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

const (
	maxDialWait = time.Second            // the longest back-off that a push waits for
	recheck     = 250 * time.Millisecond // for streams that come free without a signal
	sourceRetry = time.Second            // pause after the source failed and there is no certificate
	knownTopics = 1000                   // beyond it, topics without a certificate are forgotten
)

// dialPauses space dials in a row that led to no answer.
var dialPauses = backoff.Policy{First: 100 * time.Millisecond, Max: 30 * time.Second}

// topic is the certificate and the connection pool of one push topic.
type topic struct {
	c    *Client
	name string
	uses int // pushes under way; guarded by Client.mu

	mu sync.Mutex

	// The certificate in use.
	cert      *tls.Certificate // nil if there is none
	version   string
	nextAsk   time.Time
	sourceErr error         // the reason why cert is nil, a *sourceError
	asking    chan struct{} // closed when the running call ends; nil without one
	changes   uint64        // calls of CertificateChanged
	known     uint64        // changes before the source's last answer began

	// The connections.
	conns    []*conn
	waiters  list.List // of *waiter, first come first served
	dialing  bool
	failures int // dials in a row that led to no answer
	retryAt  time.Time
	dialErr  error // of the last failure
}

// waiter is a push that waits for a stream.
type waiter struct {
	elem  *list.Element // nil once it is served
	serve chan grant    // buffered
}

// grant is a stream, or the reason why there is none.
type grant struct {
	cn  *conn
	err error
}

// isBare says whether the topic has neither a certificate nor connections.
func (t *topic) isBare() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.cert == nil && len(t.conns) == 0 && !t.dialing
}

// acquire returns a connection with a reserved stream. The caller gives the
// stream back with release.
func (t *topic) acquire(ctx context.Context) (*conn, error) {
	if err := t.refreshCertificate(ctx); err != nil {
		return nil, err
	}
	t.mu.Lock()
	if t.waiters.Len() == 0 {
		if cn := t.reserveLocked(); cn != nil {
			t.mu.Unlock()
			return cn, nil
		}
	}
	if len(t.conns) == 0 && !t.dialing && time.Until(t.retryAt) > maxDialWait {
		err := t.dialErr
		t.mu.Unlock()
		return nil, &dialError{err}
	}
	w := &waiter{serve: make(chan grant, 1)}
	w.elem = t.waiters.PushBack(w)
	t.serveWaitersLocked()
	full := w.elem != nil && len(t.conns) >= t.c.cfg.MaxConnsPerTopic
	t.mu.Unlock()
	if full {
		t.c.workers.giveUp(t)
	}

	tick := time.NewTicker(recheck)
	defer tick.Stop()
	for {
		select {
		case g := <-w.serve:
			return g.cn, g.err
		case <-tick.C:
			t.mu.Lock()
			t.serveWaitersLocked()
			t.mu.Unlock()
		case <-ctx.Done():
			t.mu.Lock()
			if w.elem != nil {
				t.waiters.Remove(w.elem)
			} else if g := <-w.serve; g.cn != nil {
				t.releaseLocked(g.cn)
				t.serveWaitersLocked() // the stream goes to the next one
			}
			t.mu.Unlock()
			return nil, ctx.Err()
		}
	}
}

// release gives a stream back. answered reports that the server answered on it;
// otherwise err ended the stream, or nil if the push cancelled it.
func (t *topic) release(cn *conn, answered bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if answered && !cn.answered {
		cn.answered = true
		t.failures = 0
	}
	if err != nil && !cn.retired && cn.lost() {
		t.retireLocked(cn)
		if !cn.answered {
			// A connection that ends unused counts as a failed dial.
			t.failedLocked(err)
		}
	}
	t.releaseLocked(cn)
	t.serveWaitersLocked()
}

// releaseLocked gives a stream back, and closes a retired connection after its
// last stream.
func (t *topic) releaseLocked(cn *conn) {
	cn.inUse--
	if cn.retired && cn.inUse == 0 {
		t.c.closeConn(cn)
	}
}

// retire takes cn out of the pool. It closes when its streams have ended.
func (t *topic) retire(cn *conn) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retireLocked(cn)
}

func (t *topic) retireLocked(cn *conn) {
	if cn.retired {
		return
	}
	cn.retired = true
	for i, other := range t.conns {
		if other == cn {
			t.conns = append(t.conns[:i], t.conns[i+1:]...)
			break
		}
	}
	if cn.inUse == 0 {
		t.c.closeConn(cn)
	}
}

// retireAll takes all connections out of the pool.
func (t *topic) retireAll() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.retireAllLocked()
}

func (t *topic) retireAllLocked() {
	for len(t.conns) > 0 {
		t.retireLocked(t.conns[len(t.conns)-1])
	}
}

// reserveLocked reserves a stream on the first connection that has a free one.
func (t *topic) reserveLocked() *conn {
	now := time.Now()
	for i := 0; i < len(t.conns); {
		cn := t.conns[i]
		if !cn.usable() {
			t.retireLocked(cn) // takes it out of t.conns
			continue
		}
		if now.Sub(cn.limitAt) > limitCheck {
			cn.refreshLimit(now)
		}
		if cn.inUse < cn.limit {
			cn.inUse++
			return cn
		}
		i++
	}
	return nil
}

// serveWaitersLocked serves waiting pushes and dials if some remain.
func (t *topic) serveWaitersLocked() {
	for t.waiters.Len() > 0 {
		cn := t.reserveLocked()
		if cn == nil {
			break
		}
		t.serveLocked(grant{cn: cn})
	}
	if t.waiters.Len() == 0 || t.dialing || t.cert == nil ||
		len(t.conns) >= t.c.cfg.MaxConnsPerTopic || time.Now().Before(t.retryAt) {
		return
	}
	t.dialing = t.c.goDial(t, t.cert, t.version)
}

// serveLocked gives g to the first waiter.
func (t *topic) serveLocked(g grant) {
	w := t.waiters.Remove(t.waiters.Front()).(*waiter)
	w.elem = nil
	w.serve <- g
}

// dialed takes the result of the running dial.
func (t *topic) dialed(cn *conn, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dialing = false
	switch {
	case err != nil:
		t.failedLocked(err)
		// With other connections the pushes go on waiting for a stream.
		for len(t.conns) == 0 && t.waiters.Len() > 0 {
			t.serveLocked(grant{err: &dialError{err}})
		}
	case cn.version != t.version || t.cert == nil:
		cn.retired = true
		t.c.closeConn(cn)
	default:
		t.conns = append(t.conns, cn)
	}
	t.serveWaitersLocked()
}

// failedLocked sets the earliest time of the next dial.
func (t *topic) failedLocked(err error) {
	t.failures++
	d := dialPauses.Pause(t.failures)
	t.retryAt = time.Now().Add(d)
	t.dialErr = err
	t.c.cfg.Logger.Warn("connecting to APNs failed", "topic", t.name, "failures", t.failures, "retry_in", d, "error", err)
}

// refreshCertificate asks the source for the certificate when CertificateTTL is
// over, or when it has changed. While one push asks, others use the certificate
// that the client holds, unless it has changed.
func (t *topic) refreshCertificate(ctx context.Context) error {
	changes, ask, err := t.beginAsking(ctx)
	if !ask {
		return err
	}
	cert, version, err := t.askSource(ctx)
	t.mu.Lock()
	defer t.mu.Unlock()
	t.endAskingLocked()
	if err != nil && ctx.Err() != nil {
		return ctx.Err() // the source did not fail
	}
	t.answeredLocked(&cert, version, err, changes)
	return t.sourceErr
}

// beginAsking says whether the caller has to ask the source, and returns the
// number of changes that the answer then covers. Otherwise the error is that of
// the last answer. It waits while another push asks about a change.
func (t *topic) beginAsking(ctx context.Context) (changes uint64, ask bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		if t.changes == t.known && t.c.cfg.Now().Before(t.nextAsk) {
			return 0, false, t.sourceErr
		}
		if t.asking == nil {
			t.asking = make(chan struct{})
			return t.changes, true, nil
		}
		if t.cert != nil && t.changes == t.known {
			return 0, false, nil
		}
		asking := t.asking
		t.mu.Unlock()
		select {
		case <-asking:
			t.mu.Lock()
		case <-ctx.Done():
			t.mu.Lock()
			return 0, false, ctx.Err()
		}
	}
}

// askSource asks the source. If that panics, others ask again.
func (t *topic) askSource(ctx context.Context) (cert tls.Certificate, version string, err error) {
	answered := false
	defer func() {
		if !answered {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.endAskingLocked()
		}
	}()
	cert, version, err = t.c.source.PushCertificate(ctx, t.name)
	answered = true
	return cert, version, err
}

func (t *topic) endAskingLocked() {
	close(t.asking)
	t.asking = nil
}

// answeredLocked notes the source's answer, which covers a number of changes.
func (t *topic) answeredLocked(cert *tls.Certificate, version string, err error, changes uint64) {
	changed := changes != t.known
	t.known = changes
	t.nextAsk = t.c.cfg.Now().Add(t.c.cfg.CertificateTTL)
	soon := t.c.cfg.Now().Add(min(sourceRetry, t.c.cfg.CertificateTTL))
	switch {
	case err == nil:
		t.useLocked(cert, version)
	case errors.Is(err, ErrNoCertificate):
		t.sourceErr = &sourceError{err}
		t.cert, t.version = nil, ""
		t.retireAllLocked()
	case t.cert == nil:
		t.sourceErr = &sourceError{err}
		t.nextAsk = soon
	default:
		if changed {
			t.nextAsk = soon
		}
		t.c.cfg.Logger.Warn("asking for the push certificate failed, using the last one", "topic", t.name, "error", err)
	}
}

// useLocked makes cert the certificate of new connections, and drains those
// with another version.
func (t *topic) useLocked(cert *tls.Certificate, version string) {
	t.sourceErr = nil
	if t.cert != nil && t.version == version {
		return
	}
	if t.cert != nil {
		t.c.cfg.Logger.Info("push certificate changed, draining connections", "topic", t.name)
	}
	t.cert, t.version = cert, version
	t.retireAllLocked()
	t.failures, t.retryAt = 0, time.Time{}
}

// dialError is the failure of a dial; failures of streams have other types.
type dialError struct{ err error }

func (e *dialError) Error() string { return "connecting to APNs: " + e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// sourceError is the failure of the certificate source.
type sourceError struct{ err error }

func (e *sourceError) Error() string { return "push certificate: " + e.err.Error() }
func (e *sourceError) Unwrap() error { return e.err }
