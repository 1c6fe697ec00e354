//go:build linux

package main

import (
	"encoding/json"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// receiver takes webhook events and fails one request in ten.
type receiver struct {
	server *http.Server
	url    string
	done   chan struct{}

	mu      sync.Mutex
	count   int
	reports map[string][]string // commands in order of their first event, by enrollment
	seen    map[string]bool     // enrollment and command
	last    time.Time
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
	r := &receiver{url: "http://" + listener.Addr().String() + "/events", done: make(chan struct{}),
		reports: make(map[string][]string), seen: make(map[string]bool)}
	r.server = &http.Server{Handler: r, ReadHeaderTimeout: 10 * time.Second}
	go func() {
		_ = r.server.Serve(listener) // Close ends it
		close(r.done)
	}()
	return r, nil
}

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
	if r.count%10 == 0 {
		w.WriteHeader(http.StatusServiceUnavailable)
		return
	}
	r.last = time.Now()
	// NotNow is no answer: the same command comes again.
	if e.Report != nil && e.Report.CommandUUID != "" && e.Report.Status != "NotNow" {
		id, key := e.Report.IDs.ID, e.Report.IDs.ID+"\x00"+e.Report.CommandUUID
		if !r.seen[key] {
			r.seen[key] = true
			r.reports[id] = append(r.reports[id], e.Report.CommandUUID)
		}
	}
}

// reported are the commands whose answers arrived, in order.
func (r *receiver) reported(id string) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return append([]string(nil), r.reports[id]...)
}

func (r *receiver) close() {
	_ = r.server.Close()
	<-r.done
}
