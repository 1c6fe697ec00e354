package certauth

import (
	"net/netip"
	"sync"
)

// places bounds the questions that are open at once: in all, and for each
// certificate, device and client address, so that one device that asks again
// and again leaves the places of a slow hook to others.
type places struct {
	total, perAddress int

	mu      sync.Mutex
	open    int
	holders map[string]int
}

func newPlaces(total, perAddress int) *places {
	return &places{total: total, perAddress: perAddress, holders: make(map[string]int)}
}

// take takes a place, or reports that there is none. The caller gives the
// place back by calling release once.
func (p *places) take(certificate, device, address string) (release func(), ok bool) {
	limits := map[string]int{"certificate " + certificate: 1, "device " + device: 1}
	if address != "" {
		limits["address "+network(address)] = p.perAddress
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.open >= p.total {
		return nil, false
	}
	for holder, limit := range limits {
		if p.holders[holder] >= limit {
			return nil, false
		}
	}
	p.open++
	for holder := range limits {
		p.holders[holder]++
	}
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.open--
		for holder := range limits {
			if p.holders[holder]--; p.holders[holder] == 0 {
				delete(p.holders, holder)
			}
		}
	}, true
}

// network is the address, or the /64 of an IPv6 address: a client chooses
// among those addresses.
func network(address string) string {
	addr, err := netip.ParseAddr(address)
	if err != nil || !addr.Is6() {
		return address
	}
	prefix, err := addr.WithZone("").Prefix(64)
	if err != nil {
		return address
	}
	return prefix.String()
}
