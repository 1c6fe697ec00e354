package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// refreshEvery bounds the time until a replica knows of a change to the sinks
// that was made through another one.
const refreshEvery = 3 * time.Second

const (
	// seeEvery is how often a replica says that it has sinks in its
	// configuration, and staleAfter how long others believe it after the last
	// time.
	seeEvery   = 9 * time.Second
	staleAfter = 45 * time.Second
	// watchGap is the time without a look at the sinks after which nothing
	// follows from what was seen before.
	watchGap = 10 * time.Second
)

// Sinks is what this replica knows of the sinks. Any number of goroutines may
// ask it, and it answers without the database.
//
// A configured sink counts on every replica for as long as one of them has it
// in its configuration: replicas may differ while they are restarted one by
// one, and one that serves the API alone may have no sinks at all. The sink is
// kept for some time after that, in case those replicas were all down.
type Sinks struct {
	store      storage.EventSinks
	configured map[string]storage.EventSink
	log        *slog.Logger

	mu      sync.Mutex // one load at a time
	watched map[string]sighting
	readAt  time.Time // when the sinks were last read
	seenAt  time.Time // when ours were last said to be configured
	known   atomic.Pointer[[]storage.EventSink]
	changed chan struct{}
}

// sighting is the SeenAt of another replica's sink, and since when it is the
// same by the clock of this one.
type sighting struct {
	seen  time.Time
	since time.Time
	stale bool // it was the same for staleAfter
}

// OpenSinks stores the configured sinks and reads all. Run keeps them up to
// date.
func OpenSinks(ctx context.Context, store storage.EventSinks, configured []storage.EventSink, logger *slog.Logger) (*Sinks, error) {
	s := &Sinks{
		store: store, configured: make(map[string]storage.EventSink), log: logger,
		watched: make(map[string]sighting), changed: make(chan struct{}, 1),
	}
	for _, k := range configured {
		if SendsTokensInClear(&k) {
			logger.WarnContext(ctx, "an event sink sends tokens over http, which anybody on the way can read: use https", "sink", k.Name)
		}
		k.Configured, k.Enabled, k.Reason = true, true, ""
		s.configured[k.Name] = k
		if err := s.put(ctx, k); err != nil {
			return nil, err
		}
	}
	s.seenAt = time.Now()
	return s, s.Refresh(ctx)
}

func (s *Sinks) put(ctx context.Context, k storage.EventSink) error {
	err := s.store.PutEventSink(ctx, k)
	if errors.Is(err, storage.ErrConflict) {
		return fmt.Errorf("a sink named %s was made through the API: delete it there, or give the configured one another name", k.Name)
	}
	return err
}

// Refresh reads the sinks at once.
func (s *Sinks) Refresh(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	stored, err := s.read(ctx)
	s.forgetSightings(err)
	if err != nil {
		return err
	}
	if now := time.Now(); len(s.configured) > 0 && now.Sub(s.seenAt) >= seeEvery {
		if err := s.store.SeeEventSinks(ctx, slices.Collect(maps.Keys(s.configured))); err != nil {
			return err
		}
		s.seenAt = now
	}
	stored = slices.DeleteFunc(stored, func(k storage.EventSink) bool { return s.stale(ctx, k) })
	s.known.Store(&stored)
	select {
	case s.changed <- struct{}{}:
	default: // the reader has not looked yet
	}
	return nil
}

// read lists all sinks. Configured ones that are missing are stored again: a
// database may have been restored from a backup.
func (s *Sinks) read(ctx context.Context) ([]storage.EventSink, error) {
	stored, err := s.store.EventSinks(ctx)
	if err != nil {
		return nil, err
	}
	missing := maps.Clone(s.configured)
	for _, k := range stored {
		delete(missing, k.Name)
	}
	if len(missing) == 0 {
		return stored, nil
	}
	for _, k := range missing {
		s.log.WarnContext(ctx, "a configured event sink is not in the database, and is stored again", "sink", k.Name)
		if err := s.put(ctx, k); err != nil {
			return nil, err
		}
	}
	return s.store.EventSinks(ctx)
}

// forgetSightings begins to watch anew after the sinks could not be read for
// some time: other replicas could not say in that time either that they have
// a sink. One that is stale stays so until somebody has it again.
func (s *Sinks) forgetSightings(err error) {
	now := time.Now()
	if err != nil || now.Sub(s.readAt) > watchGap {
		for name, w := range s.watched {
			w.since = now
			s.watched[name] = w
		}
	}
	if err == nil {
		s.readAt = now
	}
}

// stale says whether no running replica has the sink in its configuration.
// Clocks of machines are not compared: it is watched here.
func (s *Sinks) stale(ctx context.Context, k storage.EventSink) bool {
	if _, ours := s.configured[k.Name]; ours || !k.Configured {
		return false
	}
	w := s.watched[k.Name]
	now := time.Now()
	if w.since.IsZero() || !w.seen.Equal(k.SeenAt) {
		w = sighting{seen: k.SeenAt, since: now}
	}
	if !w.stale && now.Sub(w.since) >= staleAfter {
		w.stale = true
		s.log.WarnContext(ctx, "an event sink is in no running replica's configuration any more, and gets no events", "sink", k.Name)
	}
	s.watched[k.Name] = w
	return w.stale
}

// Run refreshes until ctx ends.
func (s *Sinks) Run(ctx context.Context) error {
	ticker := time.NewTicker(refreshEvery)
	defer ticker.Stop()
	failing := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
		err := s.Refresh(ctx)
		if err != nil && ctx.Err() == nil && !failing { // once for each outage
			s.log.WarnContext(ctx, "cannot read the event sinks; those known stay", "error", err)
		}
		failing = err != nil
	}
}

// all returns what is known; it must not be changed.
func (s *Sinks) all() []storage.EventSink { return *s.known.Load() }

func (s *Sinks) any() bool { return len(s.all()) > 0 }

// Wants says whether some sink may take an event.
func (s *Sinks) Wants(e *storage.Event, typ mdm.EnrollType) bool {
	return slices.ContainsFunc(s.all(), func(k storage.EventSink) bool { return k.Wants(e, typ) })
}

// deliverable lists those that events are sent to.
func (s *Sinks) deliverable() []storage.EventSink {
	return slices.DeleteFunc(slices.Clone(s.all()), func(k storage.EventSink) bool { return !k.Enabled || k.URL == "" })
}
