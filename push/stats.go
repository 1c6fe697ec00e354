package push

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"github.com/nanomdm/nanomdm/push/apns"
)

// maxCounted bounds the outcomes that are counted apart, for reasons come from
// outside: Apple has about thirty.
const maxCounted = 1000

// OutcomeCount counts the pushes that ended one way.
type OutcomeCount struct {
	Topic  string // "" if there is no certificate for it: devices name topics
	Class  string // of apns.Class
	Reason string // APNs' own, "" without one
	Count  uint64
}

// Stats is a snapshot of what a Service is doing and did.
type Stats struct {
	// Outcomes by topic, class and reason. What is beyond 1,000 kinds has the
	// topic and the reason "other".
	Outcomes []OutcomeCount
	// Waiting are enrollments that callers want pushed next, Flying those
	// whose push is under way.
	Waiting, Flying int
	// Stopped are the topics whose certificate is missing or refused.
	Stopped []string
	// Swept counts pushes that the sweep claimed, RecordsDropped outcomes that
	// could not be stored.
	Swept, RecordsDropped int64
	// APNs is the sender's.
	APNs apns.Stats
}

// Stats returns a snapshot, good for gauges and counters.
func (s *Service) Stats() Stats {
	st := Stats{
		Outcomes: s.tally.list(), Stopped: slices.Sorted(maps.Keys(s.topics.stopped())), APNs: s.client.Stats(),
		Swept: s.swept.Load(), RecordsDropped: s.book.dropped.Load(),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Waiting, st.Flying = len(s.wanted), len(s.flying)
	return st
}

type tally struct {
	mu     sync.Mutex
	counts map[OutcomeCount]uint64 // by the other fields
}

func newTally() *tally { return &tally{counts: make(map[OutcomeCount]uint64)} }

func (t *tally) count(topic string, o apns.Outcome) {
	k := OutcomeCount{Topic: topic, Class: o.Class.String(), Reason: o.Reason}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, ok := t.counts[k]; !ok && len(t.counts) >= maxCounted {
		k.Topic, k.Reason = "other", "other"
	}
	t.counts[k]++
}

func (t *tally) list() []OutcomeCount {
	t.mu.Lock()
	defer t.mu.Unlock()
	out := make([]OutcomeCount, 0, len(t.counts))
	for k, n := range t.counts {
		k.Count = n
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b OutcomeCount) int {
		return cmp.Or(cmp.Compare(a.Topic, b.Topic), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Reason, b.Reason))
	})
	return out
}
