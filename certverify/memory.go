package certverify

import (
	"crypto/sha256"
	"sync"
)

type digest [sha256.Size]byte

// combine returns the digest of a pair, in order.
func combine(a, b digest) digest {
	var both [2 * sha256.Size]byte
	copy(both[:], a[:])
	copy(both[sha256.Size:], b[:])
	return sha256.Sum256(both[:])
}

// memory is a bounded map. When it is full an arbitrary entry makes room, so
// that a fleet larger than it loses only its share of hits. Safe for concurrent
// use.
type memory[V any] struct {
	mu     sync.RWMutex
	size   int // below 1: nothing is kept
	values map[digest]V
}

func newMemory[V any](size int) *memory[V] {
	return &memory[V]{size: size, values: make(map[digest]V)}
}

func (m *memory[V]) get(key digest) (V, bool) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	v, ok := m.values[key]
	return v, ok
}

func (m *memory[V]) put(key digest, v V) {
	if m.size < 1 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if _, replaced := m.values[key]; !replaced && len(m.values) >= m.size {
		for old := range m.values {
			delete(m.values, old)
			break
		}
	}
	m.values[key] = v
}

func (m *memory[V]) len() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	return len(m.values)
}
