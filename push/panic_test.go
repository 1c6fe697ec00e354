package push_test

import (
	"context"
	"log/slog"
	"net/url"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/push/apnstest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/supervise"
)

// panicking is a store whose methods panic once.
type panicking struct {
	push.Store
	mu   sync.Mutex
	next map[string]bool
}

func (p *panicking) boom(method string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.next[method] {
		delete(p.next, method)
		panic("boom in " + method)
	}
}

func (p *panicking) PushTargets(ctx context.Context, scope storage.Scope, ids []string) ([]storage.PushTarget, map[string]error, error) {
	p.boom("PushTargets")
	return p.Store.PushTargets(ctx, scope, ids)
}

func (p *panicking) PushCert(ctx context.Context, topic string) (*storage.PushCert, error) {
	p.boom("PushCert")
	return p.Store.PushCert(ctx, topic)
}

func (p *panicking) RecordPushes(ctx context.Context, records []storage.PushRecord) error {
	p.boom("RecordPushes")
	return p.Store.RecordPushes(ctx, records)
}

// TestPushesOutlivePanics: a caller of a push that panics gets an error, and the
// next push is sent and recorded.
func TestPushesOutlivePanics(t *testing.T) {
	t.Parallel()
	for _, method := range []string{"PushTargets", "PushCert", "RecordPushes"} {
		t.Run(method, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, apnstest.Config{})
			w.enroll("D1", "D2")
			failed := make(chan string, 8)
			store := &panicking{Store: w.store, next: map[string]bool{method: true}}
			cfg := push.Config{
				Logger:     slog.New(slog.NewTextHandler(w.log, nil)),
				Supervisor: supervise.New(supervise.Config{Failed: func(name string) { failed <- name }}),
			}
			cfg.APNs.URL, cfg.APNs.RootCAs = w.apns.URL(), w.apns.RootCAs()
			cfg.APNs.Proxy = func(*url.URL) (*url.URL, error) { return nil, nil }
			s, err := push.New(store, cfg)
			require.NoError(t, err)
			t.Cleanup(func() { w.close(s) })
			results, err := s.Push(t.Context(), push.Request{IDs: []string{"D1", "D2"}})
			require.NoError(t, err)
			for _, id := range []string{"D1", "D2"} {
				if method == "PushTargets" {
					require.ErrorIs(t, results[id].Err, supervise.ErrPanicked)
				}
			}
			require.NotEmpty(t, <-failed)
			require.Eventually(t, func() bool {
				results, err := s.Push(t.Context(), push.Request{IDs: []string{"D1", "D2"}})
				return err == nil && results["D1"].Err == nil && results["D2"].Err == nil
			}, 10*time.Second, time.Millisecond, "pushes go on")
		})
	}
}
