package httpapi

import (
	"context"
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// result is NanoMDM's answer to enqueue and push.
type result struct {
	Status       map[string]idResult `json:"status,omitempty"`
	NoPush       bool                `json:"no_push,omitempty"`
	PushError    string              `json:"push_error,omitempty"`
	CommandError string              `json:"command_error,omitempty"`
	CommandUUID  string              `json:"command_uuid,omitempty"`
	RequestType  string              `json:"request_type,omitempty"`
}

type idResult struct {
	PushError  string `json:"push_error,omitempty"`
	PushResult string `json:"push_result,omitempty"`
	// PushOwed: the push was not waited for, and will be paid.
	PushOwed     bool   `json:"push_owed,omitempty"`
	CommandError string `json:"command_error,omitempty"`
}

// newResult begins with no error for any of ids.
func newResult(ids []string) *result {
	res := &result{Status: make(map[string]idResult, len(ids))}
	for _, id := range ids {
		res.Status[id] = idResult{}
	}
	return res
}

func (i idResult) failed() bool { return i.PushError != "" || i.CommandError != "" }

// httpStatus is 200 without an error, 207 if some ids failed and 500 if all
// did or the call itself.
func (r *result) httpStatus() int {
	if r.PushError != "" || r.CommandError != "" {
		return http.StatusInternalServerError
	}
	failed := 0
	for _, s := range r.Status {
		if s.failed() {
			failed++
		}
	}
	switch {
	case failed == 0:
		return http.StatusOK
	case failed == len(r.Status):
		return http.StatusInternalServerError
	}
	return http.StatusMultiStatus
}

// pathIDs reads the comma-separated ids of the path's last element. They are
// split before they are unescaped, so that an id may hold an escaped comma.
func pathIDs(r *http.Request) ([]string, error) {
	escaped := r.URL.EscapedPath()
	escaped = escaped[strings.LastIndexByte(escaped, '/')+1:]
	var ids []string
	for part := range strings.SplitSeq(escaped, ",") {
		id, err := url.PathUnescape(part)
		if err != nil {
			return nil, badRequest("enrollment id %q: %v", part, err)
		}
		if id != "" {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil, badRequest("no enrollment ids in the path")
	}
	return ids, nil
}

func (a *API) enqueue(ctx context.Context, r *http.Request) (int, any, error) {
	ids, err := pathIDs(r)
	if err != nil {
		return 0, nil, err
	}
	raw, err := readBody(r)
	if err != nil {
		return 0, nil, err
	}
	cmd, err := mdm.DecodeCommand(raw)
	if err != nil {
		return 0, nil, badRequest("command: %v", err)
	}
	res := newResult(ids)
	res.NoPush, res.CommandUUID, res.RequestType = r.URL.Query().Get("nopush") != "", cmd.CommandUUID, cmd.RequestType
	failed, err := a.store.Enqueue(ctx, callerOf(ctx).scope, &storage.Enqueue{Command: cmd, IDs: ids, NoPush: res.NoPush})
	switch {
	case errors.Is(err, storage.ErrConflict):
		return 0, nil, &problem{http.StatusConflict, "a command with CommandUUID " + cmd.CommandUUID + " exists with other contents; use a new CommandUUID"}
	case err != nil:
		return 0, nil, err
	}
	a.audit(ctx, actEnqueue, cmd.CommandUUID, cmd.RequestType+" for "+pushDetail(ids, false), nil)
	queued := make([]string, 0, len(ids))
	for id := range res.Status {
		if err := failed[id]; err != nil {
			res.Status[id] = idResult{CommandError: err.Error()}
		} else {
			queued = append(queued, id)
		}
	}
	if !res.NoPush {
		if err := a.push(ctx, res, queued, true, r.URL.Query().Get("push") == pushAsync); err != nil {
			return 0, nil, err
		}
	}
	return res.httpStatus(), res, nil
}
