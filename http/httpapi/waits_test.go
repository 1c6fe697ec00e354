package httpapi_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/storage"
)

// quietLog is a store with named keys and a log in which nothing happens until
// told. It counts the polls of the log.
type quietLog struct {
	httpapi.Store
	newest atomic.Int64
	polls  atomic.Int64
}

func (s *quietLog) LastEvent(context.Context) (int64, error) {
	s.polls.Add(1)
	return s.newest.Load(), nil
}

func (s *quietLog) ReadEvents(_ context.Context, _ storage.Scope, q storage.EventQuery) ([]storage.Event, int64, error) {
	if newest := s.newest.Load(); newest > q.After {
		return []storage.Event{{Seq: newest, ID: "e", Topic: storage.TopicCheckOut}}, newest, nil
	}
	return nil, q.After, nil
}

// A named key stands for a role in its text.
func (s *quietLog) FindAPIKey(_ context.Context, hash storage.KeyHash) (*storage.APIKey, error) {
	for _, role := range []string{"read", "admin"} {
		for i := range 20 {
			if storage.HashKey(keyOf(role, i)) == hash {
				return &storage.APIKey{Name: role, Role: role, Hash: hash}, nil
			}
		}
	}
	return nil, storage.ErrNotFound
}

func keyOf(role string, i int) string {
	return "nmk_" + (role + string(rune('A'+i)) + strings.Repeat("x", 43))[:43]
}

// waiter starts calls that wait, and counts what becomes of them.
type waiter struct {
	t       *testing.T
	handler http.Handler
	wg      sync.WaitGroup
	refused atomic.Int64
	served  atomic.Int64
}

func (w *waiter) start(key string, n int) {
	for range n {
		w.wg.Go(func() {
			r := httptest.NewRequestWithContext(w.t.Context(), "GET", "/v1/events?wait=1m", nil)
			r.Header.Set("Authorization", "Bearer "+key)
			recorder := httptest.NewRecorder()
			w.handler.ServeHTTP(recorder, r)
			switch recorder.Code {
			case http.StatusOK:
				w.served.Add(1)
			case http.StatusServiceUnavailable:
				if recorder.Header().Get("Retry-After") == "" {
					w.t.Error("no Retry-After")
				}
				w.refused.Add(1)
			default:
				w.t.Errorf("%d %s", recorder.Code, recorder.Body)
			}
		})
	}
	synctest.Wait()
}

// One read key held as many waiting calls as it liked, and each polled the log.
func TestWaitsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(quietLog)
		api, err := httpapi.New(mainKey, store, nil, httpapi.Config{})
		require.NoError(t, err)
		mux := http.NewServeMux()
		api.Register(mux)
		w := &waiter{t: t, handler: mux}

		w.start(keyOf("read", 0), 100)
		require.EqualValues(t, 68, w.refused.Swap(0), "one key has 32 places")
		for i := 1; i < 7; i++ {
			w.start(keyOf("read", i), 32)
		}
		require.EqualValues(t, 32, w.refused.Swap(0), "keys that are no admins' have 192 places")
		w.start(keyOf("admin", 0), 32)
		w.start(mainKey, 32)
		require.Zero(t, w.refused.Load(), "places are kept for admins")
		w.start(keyOf("admin", 1), 1)
		require.EqualValues(t, 1, w.refused.Load(), "256 places in all")

		before := store.polls.Load()
		time.Sleep(10 * time.Second)
		synctest.Wait()
		require.InDelta(t, 20, store.polls.Load()-before, 2, "one poll for all each half second")
		store.newest.Store(1)
		w.wg.Wait()
		require.EqualValues(t, 256, w.served.Load(), "every one of them is told")

		w.start(keyOf("read", 0), 1)
		w.wg.Wait()
		require.EqualValues(t, 257, w.served.Load(), "places are given back")
	})
}

// The caller that polls for the others may leave first.
func TestAnotherCallPollsWhenOneLeaves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := new(quietLog)
		api, err := httpapi.New(mainKey, store, nil, httpapi.Config{})
		require.NoError(t, err)
		mux := http.NewServeMux()
		api.Register(mux)
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		call := func(ctx context.Context) {
			r := httptest.NewRequestWithContext(ctx, "GET", "/v1/events?wait=1m", nil)
			r.SetBasicAuth(httpapi.User, mainKey)
			mux.ServeHTTP(httptest.NewRecorder(), r)
		}
		wg.Go(func() { call(ctx) })
		synctest.Wait()
		began := time.Now()
		wg.Go(func() { call(t.Context()) })
		synctest.Wait()
		cancel()
		time.Sleep(3 * time.Second)
		store.newest.Store(1)
		wg.Wait()
		require.InDelta(t, 3, time.Since(began).Seconds(), 0.6)
	})
}
