package httpapi

import (
	"net/netip"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// How many wrong keys an address may send, and how fast it regains them.
const (
	failureBurst = 10
	failureEvery = 5 * time.Second

	// throttled bounds the addresses that are remembered, and the pairs of
	// address and key. Each takes some 100 bytes.
	throttled = 8192
	// proven is how long a key that was right is known of an address.
	proven = time.Hour
)

// throttle slows the guessing of keys, by address. Its memory is bounded: when
// it is full it forgets arbitrary addresses, which lets some guesses through
// and never keeps a right key out. What proves addresses is kept apart from
// what accuses them, and only right keys write there, so that no flood of
// wrong ones makes it forget who is welcome. Safe for concurrent use.
type throttle struct {
	now func() time.Time

	mu      sync.Mutex
	accused map[netip.Prefix]failures
	welcome map[pass]time.Time // until when
}

// failures is a leaky bucket: count goes down by one each failureEvery.
type failures struct {
	count float64
	at    time.Time
}

type pass struct {
	from netip.Prefix
	key  storage.KeyHash
}

func newThrottle(now func() time.Time) *throttle {
	return &throttle{now: now, accused: make(map[netip.Prefix]failures), welcome: make(map[pass]time.Time)}
}

// origin is the network that one client has at least: its address with IPv4,
// the /64 with IPv6. Clients without an address, as of a Unix socket, share
// the zero one.
func origin(client string) netip.Prefix {
	addr, err := netip.ParseAddr(client)
	if err != nil {
		return netip.Prefix{}
	}
	addr = addr.Unmap().WithZone("")
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	p, _ := addr.Prefix(bits) // an address has as many bits
	return p
}

// wait says for how long an address may not try this key; 0 if it may.
func (t *throttle) wait(from netip.Prefix, key storage.KeyHash) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	if until, ok := t.welcome[pass{from, key}]; ok && now.Before(until) {
		return 0
	}
	f, ok := t.accused[from]
	if !ok {
		return 0
	}
	f = f.leak(now)
	if f.count <= failureBurst-1 {
		return 0
	}
	return time.Duration((f.count - (failureBurst - 1)) * float64(failureEvery))
}

// failed counts a wrong key.
func (t *throttle) failed(from netip.Prefix) {
	t.mu.Lock()
	defer t.mu.Unlock()
	f := t.accused[from].leak(t.now())
	f.count = min(f.count+1, failureBurst)
	put(t.accused, from, f)
}

// passed notes a right key.
func (t *throttle) passed(from netip.Prefix, key storage.KeyHash) {
	t.mu.Lock()
	defer t.mu.Unlock()
	put(t.welcome, pass{from, key}, t.now().Add(proven))
}

func (f failures) leak(now time.Time) failures {
	gone := float64(now.Sub(f.at)) / float64(failureEvery)
	return failures{count: max(0, f.count-max(0, gone)), at: now}
}

// put sets a value of a map that is kept within bounds.
func put[K comparable, V any](m map[K]V, key K, value V) {
	if _, replaces := m[key]; !replaces && len(m) >= throttled {
		for other := range m {
			delete(m, other)
			break
		}
	}
	m[key] = value
}
