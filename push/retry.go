package push

import (
	"math/rand/v2"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/storage"
)

// retryPauses space pushes that APNs could not take.
var retryPauses = backoff.Policy{First: 30 * time.Second, Max: time.Hour}

// faultPause is the pause after a request that APNs finds wrong: a person has
// to correct something first.
const faultPause = 24 * time.Hour

// outcomeRecord returns the record of a push, with the time of the next one.
func (s *Service) outcomeRecord(t storage.PushTarget, at time.Time, o apns.Outcome) topicRecord {
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
		r.NextAt = now.Add(retryPause(r.Attempts, 0)) // in case the enrollment has a newer token
	case apns.DoNotRetry: // only a new token helps
	case apns.OurFault:
		r.NextAt = now.Add(backoff.Jitter(faultPause))
	case apns.CertificateFault:
		r.KeepPlan = true // the sweep skips the topic until it has a new certificate
	default:
		r.NextAt = now.Add(retryPause(r.Attempts, o.RetryAfter))
	}
	return topicRecord{r, t.Topic}
}

// retryPause returns the pause after the nth failure in a row. It is at least
// least, and then spread over half as much again.
func retryPause(n int, least time.Duration) time.Duration {
	d := retryPauses.Pause(n)
	if d < least {
		d = least + rand.N(least/2+1)
	}
	return d
}
