package push

import (
	"math/rand/v2"
	"time"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// Pauses after pushes that APNs could not take now.
	firstPause = 30 * time.Second
	maxPause   = time.Hour
	// faultPause is the pause after a request that APNs finds wrong: somebody
	// has to mend something first.
	faultPause = 24 * time.Hour
)

// record says what is stored of a push, and when the sweep looks next.
func (s *Service) record(t storage.PushTarget, at time.Time, o apns.Outcome) pushRecord {
	r := storage.PushRecord{
		ID: t.ID, At: at, Class: o.Class.String(), Status: o.Status, Reason: o.Reason, APNsID: o.APNsID,
		Attempts: 1, TokenAt: t.TokenAt,
	}
	if o.Reason == "" && o.Err != nil {
		r.Reason = o.Err.Error()
	}
	if t.LastClass != "" && (t.LastClass == storage.PushAccepted) == (o.Class == apns.Accepted) {
		r.Attempts = t.Attempts + 1
	}
	now := s.cfg.Now()
	switch o.Class {
	case apns.Accepted:
		r.Paid = t.Owed
		if n := len(s.cfg.Retry); n > 0 {
			d := s.cfg.Retry[min(r.Attempts, n)-1]
			r.NextAt = now.Add(d + rand.N(d/10+1))
		}
	case apns.TokenDead:
		r.TokenDeadAt = o.TokenDeadSince
		if r.TokenDeadAt.IsZero() {
			r.TokenDeadAt = now
		}
		r.NextAt = now.Add(pause(r.Attempts, 0)) // if the token was not that one
	case apns.DoNotRetry: // the next token may be better
	case apns.OurFault:
		r.NextAt = now.Add(jittered(faultPause))
	case apns.CertificateFault:
		r.KeepPlan = true // the sweep passes the topic over, and comes back with a new one
	default:
		r.NextAt = now.Add(pause(r.Attempts, o.RetryAfter))
	}
	return pushRecord{r, t.Topic}
}

// pause is how long the nth failure in a row is waited out, at least.
func pause(n int, least time.Duration) time.Duration {
	d := maxPause
	if n < 8 {
		d = min(d, firstPause<<(n-1))
	}
	d = jittered(d)
	if d < least { // spread over half as much again
		d = least + rand.N(least/2+1)
	}
	return d
}

// jittered is d, give or take a quarter.
func jittered(d time.Duration) time.Duration { return d*3/4 + rand.N(d/2+1) }

// pushRecord is a record with the topic that it is about.
type pushRecord struct {
	storage.PushRecord
	topic string
}
