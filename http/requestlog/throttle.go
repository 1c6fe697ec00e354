package requestlog

import (
	"sync"
	"time"
)

const (
	// throttleEvery is the interval between two lines about one cause.
	throttleEvery = time.Minute
	// maxCauses bounds the causes that a Throttle keeps apart.
	maxCauses = 1000
)

// Throttle lets one log line a minute pass for each cause, and counts the others.
// The zero value is ready for use, by any number of goroutines.
type Throttle struct {
	mu     sync.Mutex
	causes map[string]*throttled
}

type throttled struct {
	at      time.Time // of the last line
	skipped int       // since then
}

// Allow reports whether a line about the cause is due, and how many were skipped
// since the last one. Beyond 1,000 causes the further ones count as one.
func (t *Throttle) Allow(cause string) (skipped int, ok bool) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	c := t.causes[cause]
	if c == nil && len(t.causes) >= maxCauses {
		t.forget(now)
	}
	if c == nil && len(t.causes) >= maxCauses {
		cause = ""
		c = t.causes[cause]
	}
	switch {
	case c == nil:
		if t.causes == nil {
			t.causes = make(map[string]*throttled)
		}
		t.causes[cause] = &throttled{at: now}
		return 0, true
	case now.Sub(c.at) < throttleEvery:
		c.skipped++
		return 0, false
	}
	skipped = c.skipped
	c.at, c.skipped = now, 0
	return skipped, true
}

// forget removes the causes whose last line is old. The caller holds mu.
func (t *Throttle) forget(now time.Time) {
	for cause, c := range t.causes {
		if now.Sub(c.at) >= throttleEvery {
			delete(t.causes, cause)
		}
	}
}
