package push

import (
	"cmp"
	"maps"
	"slices"
	"sync"

	"github.com/nanomdm/nanomdm/push/apns"
)

// maxCounted bounds the outcomes that are counted apart, since reasons come from
// outside. Apple has about thirty.
const maxCounted = 1000

// OutcomeCount is the number of pushes with one outcome.
type OutcomeCount struct {
	Topic  string // "" without a certificate for the topic, since devices name topics
	Class  string // of apns.Class
	Reason string // of APNs; may be empty
	Count  uint64
}

// Stats is a snapshot of a Service.
type Stats struct {
	// Outcomes by topic, class and reason. Beyond 1,000 kinds, topic and reason
	// are "other".
	Outcomes []OutcomeCount
	// Waiting is the number of enrollments that callers asked to push next,
	// InFlight the number of those that are being pushed.
	Waiting, InFlight int
	// Stopped are the topics whose certificate is missing or refused.
	Stopped []string
	// Swept is the number of pushes that the sweep claimed, RecordsDropped the
	// number of outcomes that were not stored.
	Swept, RecordsDropped int64
	// APNs is the sender's.
	APNs apns.Stats
}

// Stats returns a snapshot, good for gauges and counters.
func (s *Service) Stats() Stats {
	st := Stats{
		Outcomes: s.counter.list(), Stopped: slices.Sorted(maps.Keys(s.topics.stopped())), APNs: s.client.Stats(),
		Swept: s.swept.Load(), RecordsDropped: s.outcomes.dropped.Load(),
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Waiting, st.InFlight = len(s.pending), len(s.inFlight)
	return st
}

// outcomeCounter counts outcomes by topic, class and reason.
type outcomeCounter struct {
	mu     sync.Mutex
	counts map[OutcomeCount]uint64 // by the other fields
}

func newOutcomeCounter() *outcomeCounter {
	return &outcomeCounter{counts: make(map[OutcomeCount]uint64)}
}

func (c *outcomeCounter) count(topic string, o apns.Outcome) {
	k := OutcomeCount{Topic: topic, Class: o.Class.String(), Reason: o.Reason}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.counts[k]; !ok && len(c.counts) >= maxCounted {
		k.Topic, k.Reason = "other", "other"
	}
	c.counts[k]++
}

func (c *outcomeCounter) list() []OutcomeCount {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make([]OutcomeCount, 0, len(c.counts))
	for k, n := range c.counts {
		k.Count = n
		out = append(out, k)
	}
	slices.SortFunc(out, func(a, b OutcomeCount) int {
		return cmp.Or(cmp.Compare(a.Topic, b.Topic), cmp.Compare(a.Class, b.Class), cmp.Compare(a.Reason, b.Reason))
	})
	return out
}
