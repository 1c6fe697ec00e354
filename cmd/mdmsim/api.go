package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
)

// api is the server's HTTP API, as far as the simulation uses it.
type api struct {
	client *http.Client
	base   string // without a trailing slash
	key    string
}

// errNoKey: commands can be queued only with an API key.
var errNoKey = errors.New("an API key is needed: -api or NANOMDM_API")

// version asks GET /version, which needs no key.
func (a *api) version(ctx context.Context) (string, error) {
	body, err := a.do(ctx, http.MethodGet, "/version", nil)
	if err != nil {
		return "", err
	}
	var reply struct {
		Version string `json:"version"`
	}
	if err := json.Unmarshal(body, &reply); err != nil {
		return "", fmt.Errorf("GET /version: %w", err)
	}
	return reply.Version, nil
}

// enqueue queues one command for all ids.
func (a *api) enqueue(ctx context.Context, ids []string, command []byte, push bool) error {
	if a.key == "" {
		return errNoKey
	}
	path := "/v1/enqueue/" + strings.Join(ids, ",")
	if !push {
		path += "?nopush=1"
	}
	body, err := a.do(ctx, http.MethodPut, path, command)
	if err != nil {
		return fmt.Errorf("queueing a command: %w", err)
	}
	var reply struct {
		CommandError string `json:"command_error"`
		PushError    string `json:"push_error"`
		Status       map[string]struct {
			CommandError string `json:"command_error"`
			PushError    string `json:"push_error"`
		} `json:"status"`
	}
	if err := json.Unmarshal(body, &reply); err != nil {
		return fmt.Errorf("queueing a command: reading the reply: %w", err)
	}
	if what := cmp.Or(reply.CommandError, reply.PushError); what != "" {
		return fmt.Errorf("queueing a command: %s", what)
	}
	for id, status := range reply.Status {
		if what := cmp.Or(status.CommandError, status.PushError); what != "" {
			return fmt.Errorf("queueing a command for %s: %s", id, what)
		}
	}
	return nil
}

// do makes one request; what is neither 200 nor 207 is an error.
func (a *api) do(ctx context.Context, method, path string, body []byte) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	if a.key != "" {
		request.SetBasicAuth("nanomdm", a.key)
	}
	reply, err := a.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer reply.Body.Close()
	content, err := io.ReadAll(io.LimitReader(reply.Body, 64<<20))
	if err != nil {
		return nil, err
	}
	if reply.StatusCode != http.StatusOK && reply.StatusCode != http.StatusMultiStatus {
		endpoint, _, _ := strings.Cut(strings.TrimPrefix(path, "/v1"), "?")
		if len(endpoint) > 40 {
			endpoint = endpoint[:40] + "..."
		}
		return nil, fmt.Errorf("%s %s: %s: %.200s", method, endpoint, reply.Status, content)
	}
	return content, nil
}
