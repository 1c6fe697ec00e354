//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// item is how the store says a command stands for an enrollment.
type item struct {
	UUID  string `json:"command_uuid"`
	State string `json:"state"`
}

// finalStates are the states of the store by the word of a device.
var finalStates = map[string]string{"Acknowledged": "acknowledged", "Error": "error", "CommandFormatError": "format_error"}

// findings are violations, by the promise that was broken.
type findings struct{ list []string }

func (f *findings) add(format string, args ...any) {
	f.list = append(f.list, fmt.Sprintf(format, args...))
}

// snapshot is the store's final word.
type snapshot struct {
	enabled bool
	states  map[string]string // by command
	results map[string]string // raw, by command
}

// fetch reads what the store knows of a device, page by page.
func (a *api) fetch(ctx context.Context, id string) (*snapshot, error) {
	s := &snapshot{states: make(map[string]string), results: make(map[string]string)}
	var enrollment struct {
		Enabled bool `json:"enabled"`
	}
	if err := a.get(ctx, "/v1/enrollments/"+url.PathEscape(id), &enrollment); err != nil {
		return nil, err
	}
	s.enabled = enrollment.Enabled
	for _, state := range []string{"scheduled", "queued", "notnow", "acknowledged", "error", "format_error", "cancelled", "expired", "superseded"} {
		for after := ""; ; {
			var page struct {
				Queue []item `json:"queue"`
				Next  string `json:"next"`
			}
			path := "/v1/enrollments/" + url.PathEscape(id) + "/queue?limit=1000&state=" + state
			if after != "" {
				path += "&after=" + url.QueryEscape(after)
			}
			if err := a.get(ctx, path, &page); err != nil {
				return nil, err
			}
			for _, i := range page.Queue {
				s.states[i.UUID] = i.State
			}
			if after = page.Next; after == "" {
				break
			}
		}
	}
	return s, nil
}

// result reads the property list that the store keeps of a device's answer.
func (a *api) result(ctx context.Context, id, uuid string) (string, error) {
	status, content, err := a.do(ctx, http.MethodGet, "/v1/commands/"+url.PathEscape(uuid)+"/results/"+url.PathEscape(id)+"?raw=1", "", nil)
	if err != nil {
		return "", err
	}
	if status != http.StatusOK {
		return "", fmt.Errorf("%d %.200s", status, content)
	}
	return string(content), nil
}

// settled waits until each device that never enrolled again has all that was
// queued for it, and the receiver all that devices reported. It passes each new
// reason to wait on to waiting; the checks name everything that is missing.
func settled(ctx context.Context, limit time.Duration, h *history, f *fleet, sinks []sink, r *receiver, waiting func(error)) error {
	last := ""
	return await(ctx, limit, "the system to settle", func() error {
		err := unsettled(h, f, sinks, r)
		if err != nil && err.Error() != last {
			last = err.Error()
			waiting(err)
		}
		return err
	})
}

// unsettled says what is still missing, if anything is.
func unsettled(h *history, f *fleet, sinks []sink, r *receiver) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, s := range f.devices {
		if s.isEnrolling() {
			return fmt.Errorf("%s enrolls", s.id)
		}
		d := h.device(s.id)
		taken := make(map[string]bool)
		for _, x := range d.results {
			taken[x.uuid] = taken[x.uuid] || x.status != "NotNow"
		}
		for _, c := range h.calls {
			if c.acknowledged[s.id] && !taken[c.uuid] && !cleared(d, c) && !c.unwanted() {
				return fmt.Errorf("%s waits for %s", s.id, c.marker)
			}
		}
		for _, k := range sinks {
			if missing := len(terminal(d, k.takes)) - len(r.reported(k.name, s.id)); missing > 0 {
				return fmt.Errorf("the sink %s waits for %d answers of %s", k.name, missing, s.id)
			}
		}
	}
	return nil
}

// unwanted says whether the command expires before a device could get it.
func (c *call) unwanted() bool { return c.timing != nil && c.timing.unwanted }

// cleared: the device enrolled again after the first attempt to queue the
// command, so that its queue may have been cleared since.
func cleared(d *deviceHistory, c *call) bool {
	return slices.ContainsFunc(d.enrolled, func(at time.Time) bool { return c.begun.Before(at) })
}

// anyType takes all commands.
func anyType(string) bool { return true }

// terminal lists the commands of some types that a device ended, in order.
func terminal(d *deviceHistory, takes func(requestType string) bool) (uuids []string) {
	for _, x := range d.results {
		if x.status != "NotNow" && takes(x.requestType) && !slices.Contains(uuids, x.uuid) {
			uuids = append(uuids, x.uuid)
		}
	}
	return uuids
}

// check compares the history with the store and the receiver. The error is
// for a store that cannot be read.
func check(ctx context.Context, a *api, h *history, f *fleet, sinks []sink, r *receiver, times *punctuality) ([]string, error) {
	var found findings
	for _, s := range f.devices {
		snap, err := a.fetch(ctx, s.id)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", s.id, err)
		}
		d := h.devices[s.id]
		if d == nil {
			d = &deviceHistory{}
		}
		for _, uuid := range terminal(d, anyType) {
			if snap.results[uuid], err = a.result(ctx, s.id, uuid); err != nil {
				found.add("%s: the answer to %s was taken and cannot be read: %v", s.id, uuid, err)
			}
		}
		checkDevice(&found, s.id, d, h.calls, snap)
		times.checkTimes(&found, s.id, d, h.calls, snap)
		for _, k := range sinks {
			checkEvents(&found, s.id, k.name, terminal(d, k.takes), r.reported(k.name, s.id))
		}
	}
	return found.list, nil
}

// checkDevice compares what one device saw and said with the rest.
func checkDevice(found *findings, id string, d *deviceHistory, calls []*call, snap *snapshot) {
	if !snap.enabled {
		found.add("%s: its last TokenUpdate was taken and it is not enrolled", id)
	}
	checkResults(found, id, d, snap)
	checkOffers(found, id, d, calls)
	for _, c := range calls {
		if !c.acknowledged[id] || cleared(d, c) || c.unwanted() {
			continue
		}
		if state, ok := snap.states[c.uuid]; !ok {
			found.add("%s: command %s (%s) was queued and is gone", id, c.marker, c.uuid)
		} else if !slices.Contains([]string{"acknowledged", "error", "format_error"}, state) {
			found.add("%s: command %s (%s) was queued, and is %s at the end", id, c.marker, c.uuid, state)
		}
	}
}

// checkResults: an answer that got its 200 is stored as it was.
func checkResults(found *findings, id string, d *deviceHistory, snap *snapshot) {
	for _, x := range d.results {
		if x.status == "NotNow" {
			continue
		}
		if state := snap.states[x.uuid]; state != finalStates[x.status] {
			found.add("%s: %s was answered %s, and the store has it as %q", id, x.uuid, x.status, state)
		}
		if raw, ok := snap.results[x.uuid]; ok && raw != "" && !strings.Contains(raw, x.nonce) {
			found.add("%s: the stored answer to %s is not the one that was sent", id, x.uuid)
		}
	}
}

// checkOffers: nothing is offered after its answer was taken, the commands of
// one operator come in order, and no call makes two commands.
func checkOffers(found *findings, id string, d *deviceHistory, calls []*call) {
	ended := make(map[string]time.Time)
	for _, x := range d.results {
		if x.status != "NotNow" {
			if _, again := ended[x.uuid]; !again {
				ended[x.uuid] = x.at
			}
		}
	}
	first := make(map[string]string) // command by marker
	latest := make(map[int]int)      // number by operator
	seen := make(map[string]bool)
	byMarker := make(map[string]*call)
	for _, c := range calls {
		byMarker[c.marker] = c
	}
	for _, o := range d.offers {
		if at, ok := ended[o.uuid]; ok && o.at.After(at) {
			found.add("%s: %s was offered %v after its answer had been taken", id, o.uuid, o.at.Sub(at))
		}
		if other, ok := first[o.marker]; ok && other != o.uuid {
			found.add("%s: the call %s made two commands, %s and %s", id, o.marker, other, o.uuid)
		}
		first[o.marker] = o.uuid
		c := byMarker[o.marker]
		if c == nil || seen[o.uuid] {
			continue
		}
		seen[o.uuid] = true
		if c.timing != nil {
			continue // its time decides
		}
		if c.number < latest[c.operator] {
			found.add("%s: command %d of operator %d was offered after number %d", id, c.number, c.operator, latest[c.operator])
		}
		latest[c.operator] = max(latest[c.operator], c.number)
	}
}

// checkEvents: each answer that was taken arrived at the sink, in order.
func checkEvents(found *findings, id, sink string, taken, events []string) {
	for i, uuid := range taken {
		if !slices.Contains(events, uuid) {
			found.add("%s: the event of the answer to %s never arrived at %s", id, uuid, sink)
			continue
		}
		if i > 0 && slices.Contains(events, taken[i-1]) && slices.Index(events, taken[i-1]) > slices.Index(events, uuid) {
			found.add("%s: the event of %s arrived at %s before that of %s", id, uuid, sink, taken[i-1])
		}
	}
}

var errUnsettled = errors.New("the system did not settle")
