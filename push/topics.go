package push

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// probeEvery is the interval between two probes of a stopped topic, in case
	// APNs or a proxy before it was wrong.
	probeEvery = 5 * time.Minute
	// logEvery is the interval between two log lines about one failure.
	logEvery = 10 * time.Minute
	// storeEvery is the interval at which an unchanged last outcome of a topic
	// is stored.
	storeEvery = time.Minute
	// maxTopics is the number of topics from which on those without a push
	// certificate are forgotten. Devices choose the topics that they enroll with.
	maxTopics = 1000
)

// topics keeps which topics are stopped, and logs their failures. It uses the
// monotonic clock.
type topics struct {
	store storage.PushCerts
	certs *certificates
	log   *slog.Logger

	mu    sync.Mutex
	names map[string]*topicState
}

type topicState struct {
	stopped bool
	version int64 // of the refused certificate; 0 without one
	probeAt time.Time
	pushed  time.Time // when the last push began
	logged  map[failure]time.Time
	failing bool // APNs does not take pushes of the topic

	stored   string // the class that was stored last
	storedAt time.Time
}

type failure struct {
	class  apns.Class
	reason string
}

func newTopics(store storage.PushCerts, certs *certificates, log *slog.Logger) *topics {
	return &topics{store: store, certs: certs, log: log, names: make(map[string]*topicState)}
}

// state returns the state of a topic. The caller holds mu.
func (t *topics) state(name string) *topicState {
	st := t.names[name]
	if st == nil {
		if len(t.names) >= maxTopics {
			maps.DeleteFunc(t.names, func(name string, _ *topicState) bool { return t.certs.version(name) == 0 })
		}
		st = &topicState{logged: make(map[failure]time.Time)}
		t.names[name] = st
	}
	return st
}

// allow reports whether a push to the topic may start, and the version of the
// certificate in use. For a stopped topic it allows a probe now and then.
func (t *topics) allow(name string) (version int64, ok bool) {
	version = t.certs.version(name)
	t.mu.Lock()
	defer t.mu.Unlock()
	st := t.state(name)
	now := time.Now()
	if !st.stopped {
		st.pushed = now
		return version, true
	}
	if now.Before(st.probeAt) {
		return 0, false
	}
	st.probeAt, st.pushed = now.Add(probeEvery), now
	return version, true
}

// stopped returns the stopped topics with the versions of their certificates.
func (t *topics) stopped() map[string]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	names := make(map[string]int64)
	for name, st := range t.names {
		if st.stopped {
			names[name] = st.version
		}
	}
	return names
}

// skip returns the stopped topics for which no probe is due.
func (t *topics) skip() map[string]int64 {
	names := t.stopped()
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(names, func(name string, _ int64) bool {
		st := t.names[name] // nil: forgotten meanwhile
		return st == nil || time.Now().After(st.probeAt)
	})
	return names
}

// observe takes the outcome of a push that began with that version of the
// certificate. The refusal of a certificate that has been replaced meanwhile
// stops nothing.
func (t *topics) observe(name string, version int64, o apns.Outcome) {
	current := t.certs.version(name)
	t.mu.Lock()
	st := t.state(name)
	now := time.Now()
	var log func()
	switch {
	case o.Class == apns.CertificateFault:
		if version != 0 && version != current {
			break
		}
		if !st.stopped {
			log = func() {
				t.log.Error("pushes are stopped: the push certificate of the topic is missing or refused; upload a new one",
					"topic", name, "status", o.Status, "reason", o.Reason, "error", o.Err)
			}
		}
		if !st.stopped || st.version != current {
			st.stopped, st.version, st.probeAt = true, current, now.Add(probeEvery)
		}
	case st.stopped && (o.Class == apns.Accepted || o.Status != 0 && o.Reason != ""): // APNs itself answered
		st.stopped = false
		log = func() { t.log.Info("pushes go on: the push certificate is accepted", "topic", name) }
	case o.Class == apns.OurFault || o.Class == apns.RetryLater:
		f := failure{o.Class, o.Reason}
		if last, ok := st.logged[f]; ok && now.Sub(last) < logEvery {
			break
		}
		st.logged[f] = now
		st.failing = true
		log = func() {
			t.log.Warn("APNs does not take pushes of the topic; they are owed and tried again",
				"topic", name, "class", o.Class.String(), "status", o.Status, "reason", o.Reason, "error", o.Err)
		}
	case o.Class == apns.Accepted && st.failing:
		st.failing = false
		log = func() { t.log.Info("APNs takes pushes of the topic again", "topic", name) }
	}
	t.mu.Unlock()
	if log != nil {
		log()
	}
}

// storeDue reports whether the topic's outcome is to be stored.
func (t *topics) storeDue(name, class string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := t.state(name)
	now := time.Now()
	if st.stored == class && now.Sub(st.storedAt) < storeEvery {
		return false
	}
	st.stored, st.storedAt = class, now
	return true
}

// watch starts stopped topics again when their certificate changes, until ctx
// ends.
func (t *topics) watch(ctx context.Context, ttl time.Duration) error {
	ticker := time.NewTicker(min(ttl, time.Second))
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		for name, refused := range t.stopped() {
			version, err := t.store.PushCertVersion(ctx, name)
			if err == nil && version != refused {
				t.resume(name, ttl)
			} // otherwise there is none, or the store is away
		}
	}
}

// resume allows pushes to a stopped topic again. It waits for ttl after the
// last push began, when every sender has read the new certificate.
func (t *topics) resume(name string, ttl time.Duration) {
	t.mu.Lock()
	st := t.state(name)
	resumed := st.stopped && (ttl == 0 || time.Since(st.pushed) > ttl)
	if resumed {
		st.stopped = false
	}
	t.mu.Unlock()
	if resumed {
		t.log.Info("pushes go on: the topic has a new push certificate", "topic", name)
	}
}

// missing reports whether err means that a topic has no certificate.
func missing(err error) bool { return errors.Is(err, storage.ErrNotFound) }
