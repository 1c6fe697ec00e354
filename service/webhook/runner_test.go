package webhook

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// emptyPageStore calls onEmpty after the first page without events, before
// the caller sees that page.
type emptyPageStore struct {
	*sqlstore.Store
	once    sync.Once
	onEmpty func()
}

func (s *emptyPageStore) SinkPage(ctx context.Context, after int64, limit int) ([]storage.Event, error) {
	events, err := s.Store.SinkPage(ctx, after, limit)
	if err == nil && len(events) == 0 {
		s.once.Do(s.onEmpty)
	}
	return events, err
}

// removeAll numbers the events of the log and removes them while no sink is
// enabled, so that the numbers after the sink's cursor are missing.
func (w *world) removeAll() {
	w.t.Helper()
	require.NoError(w.t, w.store.PutEventSink(w.t.Context(), hook(func(k *storage.EventSink) { k.Configured, k.Enabled = true, false })))
	free, err := w.store.PeekLease(w.t.Context(), leaseName)
	require.NoError(w.t, err)
	held, err := w.store.TakeLease(w.t.Context(), free, "test")
	require.NoError(w.t, err)
	_, _, err = w.store.NumberEvents(w.t.Context(), held, 1000)
	require.NoError(w.t, err)
	_, err = w.store.RemoveEvents(w.t.Context(), held, time.Now().Add(time.Hour), 1000)
	require.NoError(w.t, err)
	require.NoError(w.t, w.store.ReleaseLease(w.t.Context(), held))
	require.NoError(w.t, w.store.PutEventSink(w.t.Context(), hook(func(k *storage.EventSink) { k.Configured = true })))
	require.NoError(w.t, w.sinks.Refresh(w.t.Context()))
}

// Events that are numbered while a runner reads an empty page are delivered:
// the page says nothing about numbers that did not exist before it was read.
func TestNumberedBehindAnEmptyPage(t *testing.T) {
	for name, backlog := range map[string]int64{"read": 1000, "too many behind": 1} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				w := newWorld(t)
				w.enroll("removed")
				w.removeAll()
				store := &emptyPageStore{Store: w.store}
				d := w.deliverFrom(store, "a", Config{MaxBacklog: backlog})
				store.onEmpty = func() {
					before := d.last.Load()
					w.enroll("new")
					for d.last.Load() < before+2 {
						time.Sleep(10 * time.Millisecond)
					}
				}
				w.drained(time.Minute)
				if name == "read" {
					require.Equal(t, []string{"Authenticate", "TokenUpdate"}, w.receiver.taken("new"))
				} else {
					require.EqualValues(t, 2, int64(len(w.receiver.taken("new")))+w.backlog().Dropped)
				}
			})
		})
	}
}
