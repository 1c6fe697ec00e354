//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// api calls the operators' side of a server.
type api struct {
	base   string
	client *http.Client
}

func newAPI(base string) *api {
	return &api{base: base, client: &http.Client{Timeout: 8 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 16}}}
}

func (a *api) do(ctx context.Context, method, path, contentType string, body []byte) (int, []byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	request.SetBasicAuth("nanomdm", apiKey)
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	reply, err := a.client.Do(request)
	if err != nil {
		return 0, nil, err
	}
	defer reply.Body.Close()
	content, err := io.ReadAll(reply.Body)
	return reply.StatusCode, content, err
}

// get reads a JSON answer.
func (a *api) get(ctx context.Context, path string, into any) error {
	status, content, err := a.do(ctx, http.MethodGet, path, "", nil)
	if err != nil {
		return err
	}
	if status != http.StatusOK {
		return fmt.Errorf("GET %s: %d %.200s", path, status, content)
	}
	return json.Unmarshal(content, into)
}

// operator queues one command after the other, each for some devices, and
// repeats a call until all of them have it. A call with an idempotency key has
// an effect once: it is complete when the server refused the rest, which enrolls
// again at that moment.
type operator struct {
	number  int
	keyed   bool // lets the server make the UUID, and sends an idempotency key
	api     *api
	history *history
	ids     []string
	rng     *rand.Rand
	pause   time.Duration
	// plan changes each call before it is made; nil: none.
	plan func(o *operator, c *call)
}

// answer is the part of an enqueue's answer that says who got it.
type answer struct {
	Status map[string]struct {
		CommandError string `json:"command_error"`
	} `json:"status"`
	CommandError string `json:"command_error"`
	CommandUUID  string `json:"command_uuid"`
	Error        string `json:"error"`
}

// requestTypes are the commands that operators queue in turn. Each carries the
// call's marker under one key.
var requestTypes = []struct{ name, key string }{{"RemoveProfile", "Identifier"}, {"RemoveProvisioningProfile", "UUID"}}

type operators struct {
	busy       sync.WaitGroup
	mu         sync.Mutex
	violations []string // calls with an idempotency key that were done twice
	givenUp    []string // calls that were not complete when the time to settle was over
}

func (o *operators) giveUp(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.givenUp = append(o.givenUp, fmt.Sprintf(format, args...))
}

func (o *operators) violation(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.violations = append(o.violations, fmt.Sprintf(format, args...))
}

// run queues until the context ends; a call that was begun is repeated until
// it is acknowledged, or finish ends.
func (o *operator) run(ctx, finish context.Context, all *operators) {
	for n := 0; ctx.Err() == nil; n++ {
		c := &call{
			operator: o.number, number: n, marker: fmt.Sprintf("op-%d-%d", o.number, n),
			requestType: requestTypes[n%len(requestTypes)].name, ids: o.some(),
		}
		if o.plan != nil {
			o.plan(o, c)
		}
		if !o.keyed {
			c.uuid = uuid.NewString()
		}
		o.history.begin(c)
		o.repeat(finish, c, all)
		if o.keyed && c.uuid != "" && o.rng.IntN(3) == 0 {
			o.again(ctx, c, all)
		}
		_ = backoff.Sleep(ctx, o.pause)
	}
}

// markerKey is the key of a command's marker.
func markerKey(requestType string) string {
	for _, t := range requestTypes {
		if t.name == requestType {
			return t.key
		}
	}
	panic("no key for " + requestType)
}

func (o *operator) some() []string {
	ids := append([]string(nil), o.ids...)
	o.rng.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
	return ids[:1+o.rng.IntN(len(ids))]
}

func (o *operator) repeat(ctx context.Context, c *call, all *operators) {
	var last error
	for ctx.Err() == nil {
		queued, refused, uuid, err := o.send(ctx, c)
		last = err
		o.history.answered(err == nil)
		if err == nil {
			if o.keyed && c.uuid != "" && uuid != c.uuid {
				all.violation("call %s with an idempotency key made commands %s and %s", c.marker, c.uuid, uuid)
			}
			o.history.accept(c, uuid, queued)
			if len(c.acknowledged) == len(c.ids) || o.keyed && len(queued)+refused == len(c.ids) {
				return
			}
		}
		_ = backoff.Sleep(ctx, 50*time.Millisecond+time.Duration(o.rng.Int64N(int64(300*time.Millisecond))))
	}
	all.giveUp("call %s for %d enrollments is given up; %d have the command, and the last error is: %v", c.marker, len(c.ids), len(c.acknowledged), last)
}

// again repeats a call that was acknowledged, as a client does that lost the
// answer.
func (o *operator) again(ctx context.Context, c *call, all *operators) {
	_, _, uuid, err := o.send(ctx, c)
	if err == nil && uuid != c.uuid {
		all.violation("call %s, repeated, made command %s besides %s", c.marker, uuid, c.uuid)
	}
}

// send makes the call once, and returns the enrollments that have the command
// and how many were refused.
func (o *operator) send(ctx context.Context, c *call) (queued []string, refused int, uuid string, err error) {
	var status int
	var content []byte
	if o.keyed {
		options := c.timing.enqueueOptions()
		options["idempotency_key"] = c.marker
		body, err := json.Marshal(map[string]any{
			"ids": c.ids, "request_type": c.requestType, markerKey(c.requestType): c.marker, "options": options,
		})
		if err != nil {
			return nil, 0, "", err
		}
		status, content, err = o.api.do(ctx, http.MethodPost, "/v1/commands?push=async", "application/json", body)
		if err != nil {
			return nil, 0, "", err
		}
	} else {
		command := mdmtest.NewCommand(c.uuid, c.requestType, func(p *mdmtest.Plist) { p.String(markerKey(c.requestType), c.marker) })
		path := "/v1/enqueue/" + url.PathEscape(strings.Join(c.ids, ",")) + "?push=async"
		status, content, err = o.api.do(ctx, http.MethodPut, strings.ReplaceAll(path, "%2C", ","), "", command)
		if err != nil {
			return nil, 0, "", err
		}
	}
	var a answer
	if err := json.Unmarshal(content, &a); err != nil {
		return nil, 0, "", fmt.Errorf("%d %.100s", status, content)
	}
	// 500 is also the answer of a call whose enrollments were all refused.
	allRefused := status == http.StatusInternalServerError && a.Error == "" && a.CommandError == "" && len(a.Status) == len(c.ids)
	if status != http.StatusOK && status != http.StatusMultiStatus && !allRefused {
		return nil, 0, "", fmt.Errorf("%d %s%s", status, a.Error, a.CommandError)
	}
	for id, one := range a.Status {
		if one.CommandError == "" {
			queued = append(queued, id)
		} else {
			refused++
		}
	}
	return queued, refused, a.CommandUUID, nil
}
