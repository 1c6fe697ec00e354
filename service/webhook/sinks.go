package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// refreshEvery bounds how long a replica does not know of a change to the
// sinks that was made through another one.
const refreshEvery = 3 * time.Second

// Sinks is what this replica knows of who is told events. It may be asked by
// any number of goroutines, and answers without the database.
type Sinks struct {
	store      storage.EventSinks
	configured map[string]storage.EventSink
	log        *slog.Logger

	mu      sync.Mutex // one load at a time
	known   atomic.Pointer[[]storage.EventSink]
	changed chan struct{}
}

// OpenSinks makes the configured sinks, with their keys, known to the store,
// forgets those that are configured no more, and reads all. Run keeps them
// up to date.
func OpenSinks(ctx context.Context, store storage.EventSinks, configured []storage.EventSink, logger *slog.Logger) (*Sinks, error) {
	s := &Sinks{store: store, configured: make(map[string]storage.EventSink), log: logger, changed: make(chan struct{}, 1)}
	for _, k := range configured {
		k.Configured, k.Enabled, k.Reason = true, true, ""
		s.configured[k.Name] = k
		err := store.PutEventSink(ctx, k)
		if errors.Is(err, storage.ErrConflict) {
			return nil, fmt.Errorf("a sink named %s was made through the API: delete it there, or give the configured one another name", k.Name)
		}
		if err != nil {
			return nil, err
		}
	}
	stored, err := store.EventSinks(ctx)
	if err != nil {
		return nil, err
	}
	for _, k := range stored {
		if _, ok := s.configured[k.Name]; ok || !k.Configured {
			continue
		}
		if err := store.DeleteEventSink(ctx, k.Name); err != nil && !errors.Is(err, storage.ErrNotFound) {
			return nil, err
		}
	}
	return s, s.Refresh(ctx)
}

// Refresh reads the sinks at once.
func (s *Sinks) Refresh(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	stored, err := s.store.EventSinks(ctx)
	if err != nil {
		return err
	}
	for i, k := range stored {
		if c, ok := s.configured[k.Name]; ok {
			stored[i].Keys = c.Keys // the store has none
		}
	}
	s.known.Store(&stored)
	select {
	case s.changed <- struct{}{}:
	default: // whoever waits has not looked yet
	}
	return nil
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

// deliverable lists those that this replica can send to: one that is
// configured elsewhere only has its keys there.
func (s *Sinks) deliverable() []storage.EventSink {
	var out []storage.EventSink
	for _, k := range s.all() {
		_, here := s.configured[k.Name]
		if k.Enabled && k.URL != "" && k.Configured == here {
			out = append(out, k)
		}
	}
	return out
}
