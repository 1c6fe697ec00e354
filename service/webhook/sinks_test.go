package webhook

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// outageStore is a store of sinks that can be away, or slow to answer.
type outageStore struct {
	sinks
	away, hangs atomic.Bool
}

// sinks names the embedded interface otherwise than its method.
type sinks = storage.EventSinks

var errAway = errors.New("the database is away")

func (s *outageStore) wait(ctx context.Context) error {
	for s.hangs.Load() {
		time.Sleep(time.Second)
	}
	if s.away.Load() {
		return errAway
	}
	return ctx.Err()
}

func (s *outageStore) EventSinks(ctx context.Context) ([]storage.EventSink, error) {
	if err := s.wait(ctx); err != nil {
		return nil, err
	}
	return s.sinks.EventSinks(ctx)
}

func (s *outageStore) SeeEventSinks(ctx context.Context, names []string) error {
	if err := s.wait(ctx); err != nil {
		return err
	}
	return s.sinks.SeeEventSinks(ctx, names)
}

// Replicas whose configurations differ: during an outage of the database
// nobody can say that a sink is configured, and nobody may conclude from it
// that none has it.
func TestOutageDoesNotMakeSinksStale(t *testing.T) {
	for name, c := range map[string]struct{ away, hangs bool }{"errors": {away: true}, "no answer": {hangs: true}} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				w := newWorld(t)
				store := &outageStore{sinks: w.store}
				with, err := OpenSinks(t.Context(), store, []storage.EventSink{hook(nil)}, slog.New(slog.DiscardHandler))
				require.NoError(t, err)
				without, err := OpenSinks(t.Context(), store, nil, slog.New(slog.DiscardHandler))
				require.NoError(t, err)
				ctx, stop := context.WithCancel(t.Context())
				last, cancel := context.WithCancel(t.Context())
				var running sync.WaitGroup
				defer running.Wait()
				defer stop()
				defer cancel()
				defer store.hangs.Store(false)
				running.Go(func() { _ = with.Run(ctx) })
				time.Sleep(time.Second) // the other one reads first after the outage
				running.Go(func() { _ = without.Run(last) })
				e := &storage.Event{Topic: storage.TopicConnect}
				wanted := func(length time.Duration) {
					t.Helper()
					for end := time.Now().Add(length); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
						require.True(t, without.Wants(e, "Device"))
					}
				}
				wanted(time.Minute)
				for range 3 {
					store.away.Store(c.away)
					store.hangs.Store(c.hangs)
					wanted(2 * time.Minute)
					store.away.Store(false)
					store.hangs.Store(false)
					wanted(20 * time.Second)
				}
				// A sink of nobody is stale, and an outage does not bring it back.
				stop()
				time.Sleep(time.Minute)
				require.False(t, without.Wants(e, "Device"))
				store.away.Store(true)
				time.Sleep(time.Minute)
				store.away.Store(false)
				time.Sleep(10 * time.Second)
				require.False(t, without.Wants(e, "Device"))
			})
		})
	}
}
