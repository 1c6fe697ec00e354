package webhook

import (
	"context"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/supervise"
)

// panicking is a store whose methods panic some times.
type panicking struct {
	Store
	mu    sync.Mutex
	times map[string]int
}

func (p *panicking) boom(method string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.times[method] > 0 {
		p.times[method]--
		panic("boom in " + method)
	}
}

func (p *panicking) NumberEvents(ctx context.Context, l storage.Lease, limit int) (int, int64, error) {
	p.boom("NumberEvents")
	return p.Store.NumberEvents(ctx, l, limit)
}

func (p *panicking) DropPayloads(ctx context.Context, l storage.Lease, limit int) (int, error) {
	p.boom("DropPayloads")
	return p.Store.DropPayloads(ctx, l, limit)
}

func (p *panicking) SinkPage(ctx context.Context, after int64, limit int) ([]storage.Event, error) {
	p.boom("SinkPage")
	return p.Store.SinkPage(ctx, after, limit)
}

func (p *panicking) Settle(ctx context.Context, l storage.Lease, k *storage.EventSink, s storage.Settlement) error {
	p.boom("Settle")
	return p.Store.Settle(ctx, l, k, s)
}

func (p *panicking) EventPayload(ctx context.Context, seq int64) ([]byte, error) {
	p.boom("EventPayload")
	return p.Store.EventPayload(ctx, seq)
}

// TestDeliveryOutlivesPanics: whatever goroutine of the deliverer panics, the
// others go on, it starts again, and every event is delivered, in order.
func TestDeliveryOutlivesPanics(t *testing.T) {
	for _, method := range []string{"NumberEvents", "DropPayloads", "SinkPage", "Settle"} {
		t.Run(method, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				w := newWorld(t)
				var mu sync.Mutex
				failed, failing := 0, map[string]bool{}
				store := &panicking{Store: w.store, times: map[string]int{method: supervise.ManyFailures}}
				w.deliverFrom(store, "a", Config{Supervisor: supervise.New(supervise.Config{
					Logger:  w.logger(),
					Failed:  func(string) { mu.Lock(); defer mu.Unlock(); failed++ },
					Failing: func(name string, now bool) { mu.Lock(); defer mu.Unlock(); failing[name] = failing[name] || now },
				})})
				w.enroll("A", "B")
				for _, c := range commands(5) {
					w.report("A", c)
				}
				w.drained(20 * time.Minute)
				time.Sleep(5 * time.Minute) // of the bubble: what nobody waits for has its failures, too
				require.Equal(t, append([]string{"Authenticate", "TokenUpdate"}, commands(5)...), firsts(w.receiver.taken("A")))
				require.Equal(t, []string{"Authenticate", "TokenUpdate"}, firsts(w.receiver.taken("B")))
				mu.Lock()
				defer mu.Unlock()
				require.Equal(t, supervise.ManyFailures, failed)
				require.Len(t, failing, 1, "a component that fails again and again is reported")
				require.Positive(t, w.log.count("boom in "+method))
			})
		})
	}
}

// firsts leaves repetitions out.
func firsts(what []string) (out []string) {
	seen := map[string]bool{}
	for _, name := range what {
		if !seen[name] {
			seen[name] = true
			out = append(out, name)
		}
	}
	return out
}

// TestEventThatPanics: an event whose sending panics becomes a dead letter. Those
// behind it, and other enrollments, get their turn.
func TestEventThatPanics(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		store := &panicking{Store: w.store, times: map[string]int{"EventPayload": 1}}
		d := w.deliverFrom(store, "a", Config{})
		w.enroll("A", "B")
		large := []byte(strings.Repeat("x", 1<<20)) // its payload is read apart
		_, err := w.store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{IDs: []string{"A"},
			Command: &mdm.Command{CommandUUID: "C1", RequestType: "ProfileList", Raw: []byte("C1")}})
		require.NoError(t, err)
		w.says("A", &mdm.Report{Enrollment: mdm.Enrollment{UDID: "A"}, Status: mdm.StatusAcknowledged, CommandUUID: "C1", Raw: large})
		w.report("A", "C2")
		w.report("B", "C3")
		w.drained(time.Minute)
		require.Equal(t, []string{"Authenticate", "TokenUpdate", "C2"}, w.receiver.taken("A"))
		require.Equal(t, []string{"Authenticate", "TokenUpdate", "C3"}, w.receiver.taken("B"))
		require.EqualValues(t, 1, w.backlog().Dead)
		require.Len(t, d.Stats(), 1)
		require.Positive(t, w.log.count("boom in EventPayload"))
	})
}
