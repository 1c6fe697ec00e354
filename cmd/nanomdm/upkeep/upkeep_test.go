package upkeep

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// leaseTTL is short enough for a test to wait for another holder.
const leaseTTL = 15 * time.Second

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRetentionRules(t *testing.T) {
	require.Empty(t, rules(storage.Retention{}))
	require.Empty(t, rules(storage.Retention{ByType: map[string]time.Duration{"DeviceLock": 0}}))
	require.Equal(t, []rule{
		{requestType: "ProfileList", age: time.Hour},
		{except: []string{"DeviceLock", "ProfileList"}, age: time.Minute},
	}, rules(storage.Retention{Default: time.Minute, ByType: map[string]time.Duration{"ProfileList": time.Hour, "DeviceLock": 0}}))
}

// finish enrolls a device and has it answer commands.
func finish(t *testing.T, h *storagetest.Harness, id, requestType string, status mdm.Status, uuids ...string) {
	t.Helper()
	h.Enroll(t, id)
	for _, uuid := range uuids {
		failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{
			Command: &mdm.Command{CommandUUID: uuid, RequestType: requestType, Raw: []byte("<plist/>")}, IDs: []string{id},
		})
		require.NoError(t, err)
		require.Empty(t, failed)
		_, err = h.Store.Apply(t.Context(), &storage.Report{
			Src: storage.Source{Enroll: mdm.EnrollID{Type: mdm.Device, ID: id}}, Status: status, CommandUUID: uuid, Raw: []byte("result"),
		})
		require.NoError(t, err)
	}
}

// hold runs work under its lease in the background until the test ends.
func hold(t *testing.T, store storage.Leases, name, holder string, work lease.Work) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- lease.Hold(ctx, store, name, holder, leaseTTL, slog.New(slog.DiscardHandler), work) }()
	t.Cleanup(func() {
		stop()
		require.ErrorIs(t, <-done, context.Canceled)
	})
}

func TestHistorySweep(t *testing.T) {
	const day = 24 * time.Hour
	for _, tc := range []struct {
		name    string
		sweep   History
		rows    []string
		results []string
	}{
		{
			name:    "results by type",
			sweep:   History{Results: storage.Retention{Default: 30 * day, ByType: map[string]time.Duration{"InstalledApplicationList": 2 * day}}},
			rows:    []string{"apps", "failed", "profiles", "today"},
			results: []string{"failed", "profiles", "today"},
		},
		{
			name:    "commands",
			sweep:   History{Commands: storage.Retention{Default: 2 * day}},
			rows:    []string{"today"},
			results: []string{"today"},
		},
		{
			name:    "acknowledged ones at once",
			sweep:   History{DeleteAcked: true},
			rows:    []string{"failed"},
			results: []string{"failed"},
		},
	} {
		for _, engine := range storagetest.Engines(t) {
			t.Run(tc.name+"/"+engine.Name, func(t *testing.T) {
				h := storagetest.NewHarness(t, engine)
				finish(t, h, "A", "InstalledApplicationList", mdm.StatusAcknowledged, "apps")
				finish(t, h, "B", "ProfileList", mdm.StatusAcknowledged, "profiles")
				finish(t, h, "C", "ProfileList", mdm.StatusError, "failed")
				h.Clock.Advance(3 * day)
				finish(t, h, "D", "InstalledApplicationList", mdm.StatusAcknowledged, "today")
				h.Clock.Advance(time.Minute)

				sweep := tc.sweep
				sweep.Store, sweep.Log, sweep.Now = h.Store, slog.New(slog.DiscardHandler), h.Clock.Now
				require.False(t, sweep.Idle())
				hold(t, h.Store, "history", "a", sweep.Work)
				require.EventuallyWithT(t, func(c *assert.CollectT) {
					require.Equal(c, tc.rows, h.Strings(t, "SELECT command_uuid FROM nano_enrollment_queue ORDER BY command_uuid"))
					require.Equal(c, tc.results, h.Strings(t, "SELECT command_uuid FROM nano_command_results ORDER BY command_uuid"))
					require.Equal(c, tc.rows, h.Strings(t, "SELECT command_uuid FROM nano_commands ORDER BY command_uuid"))
				}, 10*time.Second, 10*time.Millisecond)
			})
		}
	}
}

func TestAuditRetention(t *testing.T) {
	h := storagetest.NewHarness(t, storagetest.Engines(t)[0])
	for range batchRows + 3 { // more than a batch
		require.NoError(t, h.Store.AppendAudit(t.Context(), &storage.AuditRecord{Who: "ann", Action: "push"}))
	}
	h.Clock.Advance(2 * time.Hour)
	require.NoError(t, h.Store.AppendAudit(t.Context(), &storage.AuditRecord{Who: "bob", Action: "push"}))
	sweep := History{Store: h.Store, Log: slog.New(slog.DiscardHandler), Now: h.Clock.Now, Audit: time.Hour}
	require.False(t, sweep.Idle())
	hold(t, h.Store, "history", "a", sweep.Work)
	require.Eventually(t, func() bool { return h.Int(t, "SELECT COUNT(*) FROM nano_audit") == 1 }, 10*time.Second, 5*time.Millisecond)
	require.Equal(t, []string{"bob"}, h.Strings(t, "SELECT who FROM nano_audit"))
}

// TestQueueSweepOfTwoReplicas: one of them sweeps, and the other one when the
// first has stopped.
func TestQueueSweepOfTwoReplicas(t *testing.T) {
	for _, engine := range storagetest.Engines(t) {
		t.Run(engine.Name, func(t *testing.T) {
			h := storagetest.NewHarness(t, engine)
			second := h.Open(t, nil)
			h.Enroll(t, "D")
			log := slog.New(slog.DiscardHandler)
			plan := func(uuid string) {
				failed, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{
					Command: &mdm.Command{CommandUUID: uuid, RequestType: "ProfileList", Raw: []byte("<plist/>")}, IDs: []string{"D"},
					NotBefore: h.Clock.Now().Add(time.Hour),
				})
				require.NoError(t, err)
				require.Empty(t, failed)
				h.Clock.Advance(time.Hour)
			}
			queued := func(n int64) {
				require.Eventually(t, func() bool {
					return h.Int(t, "SELECT COUNT(*) FROM nano_enrollment_queue WHERE state = ?", int(storage.Queued)) == n
				}, 10*time.Second, 10*time.Millisecond)
			}
			t.Run("first", func(t *testing.T) {
				hold(t, h.Store, "queue", "a", (&Queue{Store: h.Store, Log: log, Now: h.Clock.Now}).Work)
				hold(t, second, "queue", "b", (&Queue{Store: second, Log: log, Now: h.Clock.Now}).Work)
				plan("1")
				queued(1)
			})
			hold(t, second, "queue", "b2", (&Queue{Store: second, Log: log, Now: h.Clock.Now}).Work)
			plan("2")
			queued(2)
			require.Eventually(t, func() bool { // counted once it is committed
				return h.Store.Stats().Promoted+second.Stats().Promoted == 2
			}, 10*time.Second, time.Millisecond)

			_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{
				Command: &mdm.Command{CommandUUID: "3", RequestType: "ProfileList", Raw: []byte("<plist/>")}, IDs: []string{"D"},
				Once: &storage.Once{Caller: "ann", Key: "k", Digest: "d"},
			})
			require.NoError(t, err)
			_, err = h.Store.FindEnqueued(t.Context(), "ann", "k")
			require.NoError(t, err)
			h.Clock.Advance(keysAge + keysEvery)
			require.Eventually(t, func() bool {
				_, err := h.Store.FindEnqueued(t.Context(), "ann", "k")
				return errors.Is(err, storage.ErrNotFound)
			}, 10*time.Second, 10*time.Millisecond, "old keys are forgotten")
		})
	}
}

// stubbornStore has a history of so many batches, and can fail.
type stubbornStore struct {
	Store
	batches []time.Duration // how long each takes
	took    []time.Time
	looks   []storage.Removal
	err     error
}

func (s *stubbornStore) RemoveResults(_ context.Context, _ storage.Lease, r storage.Removal) (storage.Removed, error) {
	s.looks = append(s.looks, r)
	if s.err != nil {
		return storage.Removed{}, s.err
	}
	n := len(s.took)
	time.Sleep(s.batches[n%len(s.batches)])
	s.took = append(s.took, time.Now())
	return storage.Removed{
		Looked: 1, Next: storage.HistoryKey{At: r.Before.Add(-time.Minute), ID: fmt.Sprint(n)}, Done: (n+1)%len(s.batches) == 0,
	}, nil
}

func TestHistorySweepPaces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stubbornStore{batches: []time.Duration{time.Millisecond, time.Second, time.Millisecond}}
		h := &History{
			Store: s, Log: slog.New(slog.DiscardHandler), Now: time.Now, scanned: make(map[string]time.Time),
			Results: storage.Retention{Default: time.Hour},
		}
		began := time.Now()
		require.NoError(t, h.removeOld(t.Context(), func() storage.Lease { return storage.Lease{} }))
		require.Len(t, s.took, 3)
		require.Equal(t, minPause+time.Second, s.took[1].Sub(s.took[0]))
		require.Equal(t, time.Second+time.Millisecond, s.took[2].Sub(s.took[1]), "as long as the batch took")
		require.True(t, s.looks[0].After.At.IsZero())
		require.Equal(t, "0", s.looks[1].After.ID)

		time.Sleep(historyEvery)
		require.NoError(t, h.removeOld(t.Context(), func() storage.Lease { return storage.Lease{} }))
		require.Equal(t, began.Add(-time.Hour-overlap), s.looks[3].After.At, "goes on where it ended")
	})
}

func TestRepeat(t *testing.T) {
	t.Run("one complaint for each outage", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var b bytes.Buffer
			ctx, stop := context.WithCancel(t.Context())
			outcomes := []error{nil, errors.New("away"), errors.New("away"), nil, errors.New("again")}
			n := 0
			err := repeat(ctx, time.Second, slog.New(slog.NewTextHandler(&b, nil)), "cannot", func() error {
				if n == len(outcomes) {
					stop()
					return nil
				}
				n++
				return outcomes[n-1]
			})
			require.ErrorIs(t, err, context.Canceled)
			require.Equal(t, 2, bytes.Count(b.Bytes(), []byte("msg=cannot")))
		})
	})
	t.Run("a lost lease is waited out", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ctx, stop := context.WithCancel(t.Context())
			var calls atomic.Int32
			var wg sync.WaitGroup
			wg.Go(func() {
				require.ErrorIs(t, repeat(ctx, time.Second, slog.New(slog.DiscardHandler), "cannot", func() error {
					calls.Add(1)
					return storage.ErrLeaseLost
				}), context.Canceled)
			})
			time.Sleep(time.Minute)
			require.EqualValues(t, 1, calls.Load())
			stop()
			wg.Wait()
		})
	})
}
