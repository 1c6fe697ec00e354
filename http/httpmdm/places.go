package httpmdm

import (
	"container/list"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/netip"
	"sync"

	"github.com/nanomdm/nanomdm/cryptoutil"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/storage"
)

// requestsPerCertificate is how many requests of one certificate are under way
// at once. A device has one or two connections for each of its channels.
const requestsPerCertificate = 16

// minRequests is the least of every other limit on requests.
const minRequests = 16

var errCrowded = fmt.Errorf("%w: too many requests of this certificate or client are under way", storage.ErrBusy)

// placeLimits are what one certificate and one client may hold at once. In
// signature mode nobody has proven to own a certificate while its body is
// awaited: an honest body follows its header at once, and a forged one takes as
// long as its sender likes. So the request that waits longest for its body makes
// room for the next one, of its certificate, of its client, or of all.
type placeLimits struct {
	certificateRequests int
	certificateBytes    int64
	clientRequests      int
	clientAwaited       int
	clientBytes         int64
	awaited             int // bodies, of all
}

func newPlaceLimits(cfg Config) placeLimits {
	return placeLimits{
		certificateRequests: requestsPerCertificate,
		certificateBytes:    max(readCopies*cfg.MaxBody, cfg.MaxInFlight/8),
		clientRequests:      max(minRequests, cfg.MaxRequests/2),
		clientAwaited:       max(minRequests, cfg.MaxRequests/8),
		clientBytes:         max(readCopies*cfg.MaxBody, cfg.MaxInFlight/4),
		awaited:             max(minRequests, cfg.MaxRequests/2),
	}
}

// places counts the requests that are under way, by certificate and by client.
// Safe for concurrent use.
type places struct {
	limits placeLimits

	mu           sync.Mutex
	certificates map[string]*holder
	clients      map[netip.Prefix]*holder
	awaited      list.List // of *place whose bodies are awaited, the longest first
}

// holder is what one certificate or one client holds.
type holder struct {
	requests, awaited int
	bytes             int64
}

// place is what one request holds, until leave.
type place struct {
	of                  *places
	certificateKey      string
	clientKey           netip.Prefix
	certificate, client *holder // nil: not limited
	bytes               int64
	waiting             *list.Element // in awaited, or nil
	cut                 func()        // ends the wait for the body
	evicted, left       bool
}

func newPlaces(limits placeLimits) *places {
	return &places{limits: limits, certificates: make(map[string]*holder), clients: make(map[netip.Prefix]*holder)}
}

// enter takes a place for a request of cert, which may be nil, and of the client
// that the request comes from. The error is errCrowded. leave must be called.
func (p *places) enter(r *http.Request, cert *x509.Certificate) (*place, error) {
	pl := &place{of: p, clientKey: requestlog.ClientNetwork(r.Context())}
	if cert != nil {
		pl.certificateKey = cryptoutil.CertificateHash(cert)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	pl.join()
	if h := pl.certificate; h != nil && h.requests > p.limits.certificateRequests && !p.evict(func(o *place) bool { return o.certificate == h }) ||
		pl.client != nil && pl.client.requests > p.limits.clientRequests && !p.evictOf(pl.client) {
		pl.release()
		return nil, errCrowded
	}
	return pl, nil
}

// join counts the place with its certificate and client.
func (pl *place) join() {
	if pl.certificateKey != "" {
		pl.certificate = join(pl.of.certificates, pl.certificateKey)
	}
	if pl.clientKey.IsValid() {
		pl.client = join(pl.of.clients, pl.clientKey)
	}
}

func join[K comparable](holders map[K]*holder, key K) *holder {
	h := holders[key]
	if h == nil {
		h = &holder{}
		holders[key] = h
	}
	h.requests++
	return h
}

func (p *places) evictOf(client *holder) bool {
	return p.evict(func(o *place) bool { return o.client == client })
}

// evict ends the longest wait for a body among those that are meant, if any.
func (p *places) evict(meant func(*place) bool) bool {
	for e := p.awaited.Front(); e != nil; e = e.Next() {
		if pl := e.Value.(*place); meant(pl) {
			pl.evicted = true
			pl.cut() // within the lock: the request is still there
			pl.release()
			return true
		}
	}
	return false
}

// awaitBody makes the place one that may have to make room: then cut is called,
// which must not wait for anything.
func (pl *place) awaitBody(cut func()) {
	p := pl.of
	p.mu.Lock()
	defer p.mu.Unlock()
	if pl.client != nil && pl.client.awaited >= p.limits.clientAwaited {
		p.evictOf(pl.client)
	}
	if p.awaited.Len() >= p.limits.awaited {
		p.evict(func(*place) bool { return true })
	}
	pl.cut = cut
	pl.waiting = p.awaited.PushBack(pl)
	if pl.client != nil {
		pl.client.awaited++
	}
}

func (pl *place) isEvicted() bool {
	pl.of.mu.Lock()
	defer pl.of.mu.Unlock()
	return pl.evicted
}

// bodyRead ends what awaitBody began and says whether the place had to make room
// meanwhile.
func (pl *place) bodyRead() (evicted bool) {
	pl.of.mu.Lock()
	defer pl.of.mu.Unlock()
	pl.stopWaiting()
	return pl.evicted
}

// grow counts more bytes that the request holds, unless its certificate or client
// holds too many.
func (pl *place) grow(n int64) bool {
	p := pl.of
	p.mu.Lock()
	defer p.mu.Unlock()
	if pl.left || pl.certificate != nil && pl.certificate.bytes+n > p.limits.certificateBytes ||
		pl.client != nil && pl.client.bytes+n > p.limits.clientBytes {
		return false
	}
	pl.bytes += n
	pl.add(0, n)
	return true
}

// leave gives the place back.
func (pl *place) leave() {
	pl.of.mu.Lock()
	defer pl.of.mu.Unlock()
	pl.release()
}

func (pl *place) release() {
	if pl.left {
		return
	}
	pl.left = true
	pl.stopWaiting()
	pl.add(-1, -pl.bytes)
	if pl.certificate != nil && pl.certificate.requests == 0 {
		delete(pl.of.certificates, pl.certificateKey)
	}
	if pl.client != nil && pl.client.requests == 0 {
		delete(pl.of.clients, pl.clientKey)
	}
}

func (pl *place) stopWaiting() {
	if pl.waiting == nil {
		return
	}
	pl.of.awaited.Remove(pl.waiting)
	pl.waiting = nil
	if pl.client != nil {
		pl.client.awaited--
	}
}

func (pl *place) add(requests int, bytes int64) {
	for _, h := range []*holder{pl.certificate, pl.client} {
		if h != nil {
			h.requests += requests
			h.bytes += bytes
		}
	}
}
