// Package gate is what a request passes before anything else looks at it: is
// the daemon up, can it serve, is there room?
//
// A daemon has one Gate and a Front for each listener. A Front answers
// /healthz and /readyz by itself at any time, and everything else with 503
// and Retry-After until the daemon has started. Behind it, Shed turns requests
// away while the database is out of reach, and Limit those that are too many.
// Nothing here says more than a word about the reason: probes are not
// authenticated.
package gate

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"sync"
	"sync/atomic"
	"time"
)

// retryAfter is the Retry-After of a refused request, in seconds.
const retryAfter = "5"

// How often Watch looks at the database, and how long it waits for an answer.
const (
	watchEvery   = time.Second
	watchTimeout = 4 * time.Second
)

// Gate knows whether the daemon can serve. Its methods may be called
// concurrently.
type Gate struct {
	log *slog.Logger
	// away: requests that need the database are turned away.
	away atomic.Bool

	mu       sync.Mutex
	started  bool
	draining bool
	trouble  string          // with the database; empty is none
	failing  map[string]bool // background components that fail again and again
}

// New makes a Gate of a daemon that is starting.
func New(log *slog.Logger) *Gate { return &Gate{log: log} }

// Started says that the daemon serves from now on.
func (g *Gate) Started() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.started = true
}

// Drain makes the daemon unready, so that load balancers send new requests
// elsewhere. It still serves requests that come nevertheless.
func (g *Gate) Drain() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.draining = true
}

// Ready says whether the daemon can serve, and why not, in a few words.
func (g *Gate) Ready() (ok bool, reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.draining:
		return false, "draining"
	case !g.started:
		return false, "starting"
	case g.trouble != "":
		return false, g.trouble
	case len(g.failing) > 0:
		return false, "background work fails"
	}
	return true, ""
}

// SetFailing notes that a background component fails again and again, which makes
// the daemon unready, or that it runs again.
func (g *Gate) SetFailing(component string, failing bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !failing {
		delete(g.failing, component)
		return
	}
	if g.failing == nil {
		g.failing = make(map[string]bool)
	}
	g.failing[component] = true
}

// StoreUp says whether the database answers with the right schema, as far as
// Watch knows.
func (g *Gate) StoreUp() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.started && g.trouble == ""
}

// Check asks the database whether it can serve. away says that it is out of
// reach; an error without that leaves requests to try for themselves.
type Check func(ctx context.Context) (away bool, err error)

// Watch asks check again and again until ctx ends. Its answers decide what
// Ready says and whether Shed turns requests away. A change is logged once.
func (g *Gate) Watch(ctx context.Context, check Check) error {
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	var since time.Time // of the trouble
	for {
		askCtx, cancel := context.WithTimeout(ctx, watchTimeout)
		away, err := check(askCtx)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		switch {
		case err != nil && since.IsZero():
			since = time.Now()
			g.log.Error("the database cannot serve; not ready until it can", "error", err)
		case err == nil && !since.IsZero():
			g.log.Info("the database serves again", "after", time.Since(since).Round(time.Second))
			since = time.Time{}
		}
		g.note(away, err)
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func (g *Gate) note(away bool, err error) {
	g.away.Store(away)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case away:
		g.trouble = "database unavailable"
	case err != nil:
		g.trouble = "database schema is not current"
	default:
		g.trouble = ""
	}
}

// Shed answers 503 with Retry-After at once while the database is out of
// reach, instead of letting each request find out by waiting. turned counts
// them; it may be nil.
func (g *Gate) Shed(turned func(), next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if g.away.Load() {
			turnAway(w, turned)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// Limit lets at most n requests in at once, each from its header to its end,
// and answers others 503 with Retry-After, before they cost memory. turned
// counts them; it may be nil.
func Limit(n int, turned func(), next http.Handler) http.Handler {
	places := make(chan struct{}, n)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case places <- struct{}{}:
		default:
			turnAway(w, turned)
			return
		}
		defer func() { <-places }()
		next.ServeHTTP(w, r)
	})
}

// turnAway also closes the connection, so that the rest of the body is not
// read.
func turnAway(w http.ResponseWriter, turned func()) {
	if turned != nil {
		turned()
	}
	w.Header().Set("Connection", "close")
	w.Header().Set("Retry-After", retryAfter)
	w.Header().Set("Content-Length", "0")
	w.WriteHeader(http.StatusServiceUnavailable)
}

// Front is the outermost handler of one listener.
type Front struct {
	gate *Gate
	next atomic.Pointer[http.Handler]
}

// Front makes a Front that turns everything but probes away until Open.
func (g *Gate) Front() *Front { return &Front{gate: g} }

// Open lets requests through to next.
func (f *Front) Open(next http.Handler) { f.next.Store(&next) }

// ServeHTTP implements http.Handler.
func (f *Front) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/healthz":
		f.probe(w, r, http.StatusOK, "ok")
	case "/readyz":
		if ok, reason := f.gate.Ready(); !ok {
			f.probe(w, r, http.StatusServiceUnavailable, reason)
		} else {
			f.probe(w, r, http.StatusOK, "ready")
		}
	default:
		next := f.next.Load()
		if next == nil {
			turnAway(w, nil)
			return
		}
		(*next).ServeHTTP(w, r)
	}
}

func (f *Front) probe(w http.ResponseWriter, r *http.Request, status int, word string) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	w.Header().Set("Content-Type", "application/json; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(struct {
		Status string `json:"status"`
	}{word}) // a prober that is gone gets nothing
}
