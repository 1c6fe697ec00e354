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
	// probeEvery is how often one push is let through to a stopped topic, in
	// case that APNs, or a proxy before it, was wrong.
	probeEvery = 5 * time.Minute
	// sayEvery is how often one complaint is logged.
	sayEvery = 10 * time.Minute
	// stampEvery is how often a topic's last outcome is stored, if it is the
	// same as before.
	stampEvery = time.Minute
)

// topics knows which topics may be pushed to, and says what is wrong with
// them. It goes by the monotonic clock.
type topics struct {
	store storage.PushCerts
	certs *certificates
	log   *slog.Logger

	mu    sync.Mutex
	names map[string]*topicState
}

type topicState struct {
	stopped bool
	version int64 // that was refused; 0 is none
	probeAt time.Time
	passed  time.Time // when the last push began
	said    map[complaint]time.Time
	failing bool // the last complaint was that APNs does not take pushes now
	stamp   string
	stampAt time.Time
}

type complaint struct {
	class  apns.Class
	reason string
}

func newTopics(store storage.PushCerts, certs *certificates, log *slog.Logger) *topics {
	return &topics{store: store, certs: certs, log: log, names: make(map[string]*topicState)}
}

// state returns a topic's; the caller holds mu.
func (t *topics) state(name string) *topicState {
	st := t.names[name]
	if st == nil {
		st = &topicState{said: make(map[complaint]time.Time)}
		t.names[name] = st
	}
	return st
}

// pass asks whether a push to the topic may go out, and tells the version of
// the certificate it goes with. Of a stopped topic one may, now and then.
func (t *topics) pass(name string) (version int64, ok bool) {
	version = t.certs.version(name)
	t.mu.Lock()
	defer t.mu.Unlock()
	st := t.state(name)
	now := time.Now()
	if !st.stopped {
		st.passed = now
		return version, true
	}
	if now.Before(st.probeAt) {
		return 0, false
	}
	st.probeAt, st.passed = now.Add(probeEvery), now
	return version, true
}

// stopped lists the topics that are stopped, with the certificates' versions.
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

// skip lists those of them of which no push may pass now.
func (t *topics) skip() map[string]int64 {
	names := t.stopped()
	t.mu.Lock()
	defer t.mu.Unlock()
	maps.DeleteFunc(names, func(name string, _ int64) bool { return time.Now().After(t.names[name].probeAt) })
	return names
}

// note takes the outcome of a push that passed with the version. A refusal of
// a certificate that has been replaced meanwhile stops nothing.
func (t *topics) note(name string, version int64, o apns.Outcome) {
	current := t.certs.version(name)
	t.mu.Lock()
	st := t.state(name)
	now := time.Now()
	var say func()
	switch {
	case o.Class == apns.CertificateFault:
		if version != 0 && version != current {
			break
		}
		if !st.stopped {
			say = func() {
				t.log.Error("pushes are stopped: the push certificate of the topic is missing or refused; upload a new one",
					"topic", name, "status", o.Status, "reason", o.Reason, "error", o.Err)
			}
		}
		if !st.stopped || st.version != current {
			st.stopped, st.version, st.probeAt = true, current, now.Add(probeEvery)
		}
	case o.Status != 0 && st.stopped:
		st.stopped = false
		say = func() { t.log.Info("pushes go on: the push certificate is accepted", "topic", name) }
	case o.Class == apns.OurFault || o.Class == apns.RetryLater:
		c := complaint{o.Class, o.Reason}
		if last, ok := st.said[c]; ok && now.Sub(last) < sayEvery {
			break
		}
		st.said[c] = now
		st.failing = true
		say = func() {
			t.log.Warn("APNs does not take pushes of the topic; they are owed and tried again",
				"topic", name, "class", o.Class.String(), "status", o.Status, "reason", o.Reason, "error", o.Err)
		}
	case o.Class == apns.Accepted && st.failing:
		st.failing = false
		say = func() { t.log.Info("APNs takes pushes of the topic again", "topic", name) }
	}
	t.mu.Unlock()
	if say != nil {
		say()
	}
}

// stampDue says whether the topic's outcome is to be stored.
func (t *topics) stampDue(name, class string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	st := t.state(name)
	now := time.Now()
	if st.stamp == class && now.Sub(st.stampAt) < stampEvery {
		return false
	}
	st.stamp, st.stampAt = class, now
	return true
}

// watch starts stopped topics again when their certificate changes, until ctx
// ends.
func (t *topics) watch(ctx context.Context, ttl time.Duration) {
	ticker := time.NewTicker(min(ttl, time.Second))
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		for name, refused := range t.stopped() {
			version, err := t.store.PushCertVersion(ctx, name)
			if err == nil && version != refused {
				t.resume(name, ttl)
			} // else there is none, or it is not to be known now
		}
	}
}

// resume lets pushes pass that will find the new certificate: the sender asks
// for it when it has not for as long as ttl.
func (t *topics) resume(name string, ttl time.Duration) {
	t.mu.Lock()
	st := t.state(name)
	resumed := st.stopped && time.Since(st.passed) > ttl
	if resumed {
		st.stopped = false
	}
	t.mu.Unlock()
	if resumed {
		t.log.Info("pushes go on: the topic has a new push certificate", "topic", name)
	}
}

// missing says that a topic has no certificate.
func missing(err error) bool { return errors.Is(err, storage.ErrNotFound) }
