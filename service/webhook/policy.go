package webhook

import (
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// maxSkipTries is how often a sink that skips has an event reach its
	// receiver before the event becomes a dead letter.
	maxSkipTries = 3
	// slowAfter is the time after which a try that has no answer yet leaves
	// its place to another enrollment, if the sink skips, and slowFactor
	// bounds all tries in flight, in multiples of Config.Workers.
	slowAfter  = time.Second
	slowFactor = 8
)

// skipPause is the pause of a sink that skips after an event's nth failure:
// all its tries begin within a minute if they are answered at once.
func skipPause(n int) time.Duration {
	if n <= 1 {
		return backoff.Jitter(2 * time.Second)
	}
	return backoff.Jitter(20 * time.Second)
}

// verdict is the effect of a failure by the sink's policy.
type verdict struct {
	// attempts is stored with the event: all failed tries, or, of a sink that
	// skips, those that reached the receiver.
	attempts int
	pause    time.Duration // before the next try
	dead     bool          // the event becomes a dead letter
	refused  bool          // since the receiver has it and failed too often
	// ofReceiver: the failure counts when a receiver is said to be down.
	ofReceiver bool
}

// assess applies a policy to an event whose last try failed, the last one of
// tries made just now. before counts the failures of the receiver at the same
// event that attempts does not count.
func assess(policy storage.OnError, e *storage.Event, f *failure, tries, before int, retry backoff.Policy) verdict {
	switch {
	case f.permanent:
		return verdict{attempts: e.Attempts + tries, dead: true}
	case policy != storage.OnErrorSkip:
		n := e.Attempts + tries
		return verdict{attempts: n, pause: retry.Pause(n), ofReceiver: true}
	case !f.received:
		return verdict{attempts: e.Attempts, pause: retry.Pause(before + tries), ofReceiver: true}
	}
	n := e.Attempts + 1
	return verdict{attempts: n, pause: skipPause(n), dead: n >= maxSkipTries, refused: n >= maxSkipTries}
}
