//go:build linux

package main

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"path"
	"sync"
	"time"
)

// receiver takes webhook events of all sinks, each at a path of its own, and
// fails one request in ten.
type receiver struct {
	server *http.Server
	base   string
	done   chan struct{}

	mu    sync.Mutex
	count int
	away  time.Time                  // until then each request fails
	sinks map[string]*receivedEvents // by name
}

// receivedEvents are what one sink received.
type receivedEvents struct {
	reports map[string][]string // commands in order of their first event, by enrollment
	seen    map[string]bool     // enrollment and command
}

type event struct {
	Topic  string `json:"topic"`
	Report *struct {
		IDs struct {
			ID string `json:"id"`
		} `json:"ids"`
		Status      string `json:"status"`
		CommandUUID string `json:"command_uuid"`
	} `json:"acknowledge_event"`
}

func newReceiver() (*receiver, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r := &receiver{base: "http://" + listener.Addr().String(), done: make(chan struct{}), sinks: make(map[string]*receivedEvents)}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		_ = r.server.Serve(listener) // Close ends it
		close(r.done)
	}()
	return r, nil
}

// url is where a sink sends its events.
func (r *receiver) url(sink string) string { return r.base + "/" + sink }

func (r *receiver) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	body, err := io.ReadAll(request.Body)
	var e event
	if err != nil || json.Unmarshal(body, &e) != nil {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count++
	if r.count%10 == 0 || time.Now().Before(r.away) {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	// NotNow is no answer: the same command comes again.
	if e.Report != nil && e.Report.CommandUUID != "" && e.Report.Status != "NotNow" {
		r.sink(path.Base(request.URL.Path)).add(e.Report.IDs.ID, e.Report.CommandUUID)
	}
}

func (r *receiver) sink(name string) *receivedEvents {
	k := r.sinks[name]
	if k == nil {
		k = &receivedEvents{reports: make(map[string][]string), seen: make(map[string]bool)}
		r.sinks[name] = k
	}
	return k
}

func (k *receivedEvents) add(id, uuid string) {
	if key := id + "\x00" + uuid; !k.seen[key] {
		k.seen[key] = true
		k.reports[id] = append(k.reports[id], uuid)
	}
}

// reported are the commands whose answers arrived at a sink, in order.
func (r *receiver) reported(sink, id string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.sink(sink).reports[id]...)
}

// fail makes all requests fail for some time.
func (r *receiver) fail(d time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.away = time.Now().Add(d)
}

func (r *receiver) close() {
	_ = r.server.Close()
	<-r.done
}
