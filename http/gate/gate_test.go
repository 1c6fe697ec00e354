package gate

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ask(h http.Handler, method, path string) *httptest.ResponseRecorder {
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest(method, path, nil))
	return w
}

func served(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "served") }

func TestFailingBackgroundWork(t *testing.T) {
	g := New(slog.New(slog.DiscardHandler))
	g.Started()
	g.SetFailing("sweep", true)
	g.SetFailing("push", true)
	g.SetFailing("sweep", false)
	ok, reason := g.Ready()
	require.False(t, ok)
	require.Equal(t, "background work fails", reason)
	g.SetFailing("push", false)
	ok, _ = g.Ready()
	require.True(t, ok)
}

func TestProbesThroughALife(t *testing.T) {
	g := New(slog.New(slog.DiscardHandler))
	f := g.Front()
	expect := func(ready int, word string) {
		t.Helper()
		require.Equal(t, 200, ask(f, "GET", "/healthz").Code)
		w := ask(f, "GET", "/readyz")
		require.Equal(t, ready, w.Code)
		require.JSONEq(t, `{"status":"`+word+`"}`, w.Body.String())
	}
	expect(503, "starting")
	w := ask(f, "PUT", "/mdm")
	require.Equal(t, 503, w.Code)
	require.Equal(t, "5", w.Header().Get("Retry-After"))

	f.Open(http.HandlerFunc(served))
	g.Started()
	expect(200, "ready")
	require.Equal(t, "served", ask(f, "PUT", "/mdm").Body.String())
	require.Equal(t, 405, ask(f, "PUT", "/readyz").Code)

	g.note(true, errors.New("gone"))
	expect(503, "database unavailable")
	g.note(false, errors.New("newer"))
	expect(503, "database schema is not current")
	g.note(false, nil)
	expect(200, "ready")

	g.Drain()
	expect(503, "draining")
	require.Equal(t, "served", ask(f, "PUT", "/mdm").Body.String(), "a drain serves who comes")
}

func TestWatchShedsWhileAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		g := New(slog.New(slog.NewTextHandler(&log, nil)))
		g.Started()
		answers := make(chan error)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() {
			done <- g.Watch(ctx, func(ctx context.Context) (bool, error) {
				deadline, ok := ctx.Deadline()
				require.True(t, ok)
				require.LessOrEqual(t, time.Until(deadline), watchTimeout)
				err := <-answers
				return err != nil, err
			})
		}()
		turned := 0
		h := g.Shed(func() { turned++ }, http.HandlerFunc(served))
		answers <- nil
		synctest.Wait()
		require.Equal(t, 200, ask(h, "PUT", "/mdm").Code)

		answers <- errors.New("connection refused")
		answers <- errors.New("connection refused")
		synctest.Wait()
		w := ask(h, "PUT", "/mdm")
		require.Equal(t, 503, w.Code)
		require.Equal(t, "5", w.Header().Get("Retry-After"))
		require.Equal(t, 1, turned)
		require.Equal(t, 1, strings.Count(log.String(), "cannot serve"), "once for each outage")

		answers <- nil
		synctest.Wait()
		require.Equal(t, 200, ask(h, "PUT", "/mdm").Code)
		require.Contains(t, log.String(), "serves again")
		cancel()
		require.ErrorIs(t, <-done, context.Canceled)
	})
}

func TestLimit(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	turned := 0
	h := Limit(2, func() { turned++ }, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		entered <- struct{}{}
		<-leave
	}))
	done := make(chan struct{})
	for range 2 {
		go func() { ask(h, "PUT", "/mdm"); done <- struct{}{} }()
		<-entered
	}
	w := ask(h, "PUT", "/mdm")
	require.Equal(t, 503, w.Code)
	require.Equal(t, "5", w.Header().Get("Retry-After"))
	require.Equal(t, 1, turned)
	leave <- struct{}{}
	<-done
	go func() { ask(h, "PUT", "/mdm"); done <- struct{}{} }()
	<-entered
	close(leave)
	<-done
	<-done
}

func TestLimitSurvivesPanics(t *testing.T) {
	h := Limit(1, nil, http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("boom") }))
	for range 3 {
		require.Panics(t, func() { ask(h, "PUT", "/mdm") })
	}
}
