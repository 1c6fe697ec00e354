package httpapi

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/schema"
)

// enqueueJSON queues a command that comes as JSON. Keys that are not the call's
// own are the command's.
func (a *API) enqueueJSON(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	o := &enqueueRequest{async: q.async(), strict: q.strict(), extended: true}
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	var parts map[string]json.RawMessage
	if err := readJSON(r, &parts); err != nil {
		return 0, nil, err
	}
	var requestType string
	for name, into := range map[string]any{
		"ids": &o.targets.IDs, "udid": &o.targets.UDID, "selector": &o.targets.Selector, "confirm": &o.targets.Confirm,
		"request_type": &requestType, "command_uuid": &o.uuid, "options": &o.options,
	} {
		part, ok := parts[name]
		if !ok {
			continue
		}
		delete(parts, name)
		if err := decodePart(part, into); err != nil {
			return 0, nil, badRequest("%s: %v", name, err)
		}
	}
	if requestType == "" {
		return 0, nil, badRequest("request_type: it is missing")
	}
	keys := make(map[string]any, len(parts))
	for _, name := range slices.Sorted(maps.Keys(parts)) {
		var value any
		if err := decodePart(parts[name], &value); err != nil {
			return 0, nil, badRequest("%s: %v", name, err)
		}
		keys[name] = value
	}
	keys = schema.AppleNames(requestType, keys)
	for _, name := range slices.Sorted(maps.Keys(keys)) {
		if name == strings.ToLower(name) {
			return 0, nil, badRequest("%s: there is no such key; a command's own keys are written as Apple or MicroMDM has them, such as Identifier or identifier", name)
		}
	}
	o.content = struct {
		RequestType string
		Keys        map[string]any
	}{requestType, keys}
	o.command = func(uuid string) (*mdm.Command, error) {
		cmd, err := mdm.EncodeCommand(uuid, requestType, keys)
		if err != nil {
			return nil, badRequest("command: %v", err)
		}
		return cmd, nil
	}
	return a.enqueueOnce(ctx, o)
}

func decodePart(part json.RawMessage, into any) error {
	dec := json.NewDecoder(bytes.NewReader(part))
	dec.DisallowUnknownFields()
	dec.UseNumber()
	return dec.Decode(into)
}
