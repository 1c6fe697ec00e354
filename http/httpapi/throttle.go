package httpapi

import (
	"net/netip"
	"sync"
	"time"
)

const (
	// failureBurst is the number of wrong keys that an address may send at
	// once; it regains one each failureEvery.
	failureBurst = 10
	failureEvery = 5 * time.Second
	// maxThrottled bounds the remembered addresses, some 100 bytes each.
	maxThrottled = 8192
)

// throttle counts wrong keys by address. It judges wrong keys only, so that a
// right one gets in beside any number of wrong ones. Its memory is bounded: it
// forgets arbitrary addresses when it is full. Safe for concurrent use.
type throttle struct {
	now func() time.Time

	mu      sync.Mutex
	buckets map[netip.Prefix]failures
}

// failures is a leaky bucket: count goes down by one each failureEvery.
type failures struct {
	count float64
	at    time.Time
}

func newThrottle(now func() time.Time) *throttle {
	return &throttle{now: now, buckets: make(map[netip.Prefix]failures)}
}

// network is the smallest network of one client: its address with IPv4, the
// /64 with IPv6. Clients without an address, as of a Unix socket, share the
// zero one.
func network(client string) netip.Prefix {
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

// failed counts a wrong key. It returns the time after which the address may
// send another; 0 while its burst lasts.
func (t *throttle) failed(from netip.Prefix) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	f := t.buckets[from].leak(now)
	wait := time.Duration(max(0, f.count-(failureBurst-1)) * float64(failureEvery))
	if wait == 0 {
		f.count++
	}
	t.put(from, f)
	return wait
}

func (f failures) leak(now time.Time) failures {
	gone := float64(now.Sub(f.at)) / float64(failureEvery)
	return failures{count: max(0, f.count-max(0, gone)), at: now}
}

func (t *throttle) put(from netip.Prefix, f failures) {
	if _, replaces := t.buckets[from]; !replaces && len(t.buckets) >= maxThrottled {
		for other := range t.buckets {
			delete(t.buckets, other)
			break
		}
	}
	t.buckets[from] = f
}
