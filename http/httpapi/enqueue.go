package httpapi

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

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
	// Count is the number of enrollments that the call names. Repeated marks a
	// call whose idempotency key was used before. NanoMDM has neither.
	Count    int  `json:"count,omitempty"`
	Repeated bool `json:"repeated,omitempty"`
	// Warnings are differences between the command and Apple's schemas.
	Warnings []string `json:"warnings,omitempty"`
	// Error repeats CommandError or PushError for clients that know one word for
	// errors.
	Error string `json:"error,omitempty"`
}

type idResult struct {
	PushError  string `json:"push_error,omitempty"`
	PushResult string `json:"push_result,omitempty"`
	// PushOwed: the call did not wait for the push; it is sent later.
	PushOwed     bool   `json:"push_owed,omitempty"`
	CommandError string `json:"command_error,omitempty"`
}

// newResult makes a result without an error for any of ids.
func newResult(ids []string) *result {
	res := &result{Status: make(map[string]idResult, len(ids))}
	for _, id := range ids {
		res.Status[id] = idResult{}
	}
	return res
}

func (i idResult) failed() bool { return i.PushError != "" || i.CommandError != "" }

// httpStatus is 200 without an error, 207 if some ids failed, and 500 if all
// ids failed or the call itself did.
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
	case failed == max(len(r.Status), r.Count):
		return http.StatusInternalServerError
	}
	return http.StatusMultiStatus
}

// pathIDs reads the comma-separated ids of the path. Clients may escape the
// commas, so that an id with a comma needs an endpoint with a JSON body.
func pathIDs(r *http.Request) ([]string, error) {
	var ids []string
	for id := range strings.SplitSeq(r.PathValue("ids"), ",") {
		if id != "" {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		return nil, badRequest("no enrollment ids in the path")
	}
	return ids, nil
}

// maxPriority bounds priorities, up and down.
const maxPriority = 1_000_000

// confirmAbove is the number of enrollments above which a selector has to be
// confirmed.
const confirmAbove = 100

// enqueueOptions are the options of a command as JSON.
type enqueueOptions struct {
	Priority       int    `json:"priority,omitempty"`
	NotBefore      string `json:"not_before,omitempty"`
	ExpiresAfter   string `json:"expires_after,omitempty"`
	SupersedeKey   string `json:"supersede_key,omitempty"`
	IdempotencyKey string `json:"idempotency_key,omitempty"`
	NoPush         bool   `json:"no_push,omitempty"`
}

// enqueueRequest is a call that queues a command, from any of the endpoints.
type enqueueRequest struct {
	targets targetSet
	// uuid is the CommandUUID that the caller chose; empty lets the API choose.
	uuid string
	// command makes the command with a CommandUUID.
	command func(uuid string) (*mdm.Command, error)
	// content distinguishes calls that share an idempotency key.
	content any
	options enqueueOptions
	async   bool
	// strict calls are refused where others get warnings.
	strict bool
	// extended calls come through an endpoint that NanoMDM does not have.
	extended bool
}

// enqueueIDs is NanoMDM's enqueue. It ignores unknown query parameters, and an
// empty body is a push.
func (a *API) enqueueIDs(ctx context.Context, r *http.Request) (int, any, error) {
	ids, err := pathIDs(r)
	if err != nil {
		return 0, nil, err
	}
	raw, err := readBody(r)
	if err != nil {
		return 0, nil, err
	}
	noPush := r.URL.Query().Get("nopush") != ""
	if len(raw) == 0 {
		if noPush {
			return 0, nil, badRequest("the body is empty and nopush is set: there is neither a command nor a push")
		}
		return a.pushIDs(ctx, r)
	}
	o := &enqueueRequest{targets: targetSet{IDs: ids}}
	if err := o.plist(raw); err != nil {
		return 0, nil, err
	}
	q := a.queryOf(r)
	o.options = enqueueOptions{
		Priority: q.number("priority", 0, -maxPriority, maxPriority), NotBefore: q.text("not_before"), ExpiresAfter: q.text("expires_after"),
		SupersedeKey: q.text("supersede_key"), IdempotencyKey: q.text("idempotency_key"), NoPush: noPush,
	}
	o.async, o.strict = q.async(), q.strict()
	if q.err != nil {
		return 0, nil, q.err
	}
	return a.enqueueOnce(ctx, o)
}

// plist reads a command that the caller encoded.
func (o *enqueueRequest) plist(raw []byte) error {
	cmd, err := mdm.DecodeCommand(raw)
	if err != nil {
		return badRequest("command: %v", err)
	}
	o.uuid, o.content = cmd.CommandUUID, raw
	o.command = func(string) (*mdm.Command, error) { return cmd, nil }
	return nil
}

// enqueue takes a command and any number of enrollments in a JSON body.
func (a *API) enqueue(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	o := &enqueueRequest{async: q.async(), strict: q.strict(), extended: true}
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	var body struct {
		targetSet
		Plist   []byte         `json:"plist"`
		Options enqueueOptions `json:"options"`
	}
	if err := readJSON(r, &body); err != nil {
		return 0, nil, err
	}
	if len(body.Plist) == 0 {
		return 0, nil, badRequest("plist: the command's property list is missing, in base64")
	}
	if err := o.plist(body.Plist); err != nil {
		return 0, nil, err
	}
	o.targets, o.options = body.targetSet, body.Options
	return a.enqueueOnce(ctx, o)
}

// storage checks the options and turns them into the store's form, without
// command and ids. now is the time of the call.
func (o *enqueueOptions) storage(now time.Time) (*storage.Enqueue, error) {
	e := &storage.Enqueue{Priority: o.Priority, NoPush: o.NoPush, SupersedeKey: o.SupersedeKey}
	if o.Priority < -maxPriority || o.Priority > maxPriority {
		return nil, badRequest("priority: a number from %d to %d is wanted", -maxPriority, maxPriority)
	}
	begins := now
	if o.NotBefore != "" {
		at, err := time.Parse(time.RFC3339, o.NotBefore)
		if err != nil || at.UnixMicro() <= 0 {
			return nil, badRequest("not_before: %q is not a time such as 2026-03-01T12:00:00Z", o.NotBefore)
		}
		if at.After(now) {
			e.NotBefore, begins = at.UTC(), at.UTC()
		}
	}
	if o.ExpiresAfter != "" {
		d, err := time.ParseDuration(o.ExpiresAfter)
		if err != nil || d <= 0 {
			return nil, badRequest("expires_after: %q is not a duration such as 24h or 90m", o.ExpiresAfter)
		}
		e.ExpiresAt = begins.Add(d)
	}
	for name, key := range map[string]string{"supersede_key": o.SupersedeKey, "idempotency_key": o.IdempotencyKey} {
		if key == "" {
			continue
		}
		if why := textFault(key); why != "" {
			return nil, badRequest("%s: %s", name, why)
		}
		if len(key) > maxKey {
			return nil, badRequest("%s: it has more than %d bytes", name, maxKey)
		}
	}
	if o.NoPush && !e.NotBefore.IsZero() {
		return nil, badRequest("no_push: a command with not_before is pushed for when its time comes")
	}
	return e, nil
}

// maxKey bounds the keys that callers choose, in bytes.
const maxKey = 255

// enqueueOnce queues a command. A repeated call with an idempotency key gets
// the answer of the first one.
func (a *API) enqueueOnce(ctx context.Context, o *enqueueRequest) (int, any, error) {
	if err := o.targets.check(); err != nil {
		return 0, nil, err
	}
	if len(callerOf(ctx).scope.Topics) > 0 && o.uuid != "" && !randomUUID.MatchString(o.uuid) {
		return 0, nil, badRequest("CommandUUID: keys that are bound to topics need one with a random UUID in it, of version 4 or 7")
	}
	e, err := o.options.storage(a.cfg.Now())
	if err != nil {
		return 0, nil, err
	}
	if o.options.IdempotencyKey == "" {
		return a.queue(ctx, o, e)
	}
	digest, err := o.digest()
	if err != nil {
		return 0, nil, err
	}
	given := o.uuid
	for range 3 { // another call may take the key between read and write
		e.Once = &storage.Once{Caller: callerOf(ctx).id, Key: o.options.IdempotencyKey, Digest: digest}
		done, err := a.store.FindEnqueued(ctx, e.Once.Caller, e.Once.Key)
		switch {
		case errors.Is(err, storage.ErrNotFound):
			o.uuid = given
		case err != nil:
			return 0, nil, err
		case done.Digest != digest:
			return 0, nil, errKeyUsed
		default:
			if o.uuid = done.CommandUUID; done.Done {
				return o.repeated(done)
			}
		}
		status, body, err := a.queue(ctx, o, e)
		if !errors.Is(err, storage.ErrKeyUsed) {
			return status, body, err
		}
	}
	return 0, nil, errKeyUsed
}

var errKeyUsed = &problem{http.StatusConflict, "idempotency_key: it was used for another call; use a new one for each"}

// digest covers everything that the caller chose.
func (o *enqueueRequest) digest() (string, error) {
	targets := o.targets
	targets.IDs, targets.UDID, targets.Confirm = o.targets.named(), nil, nil
	text, err := json.Marshal(struct {
		Targets targetSet
		UUID    string
		Content any
		Options enqueueOptions
	}{targets, o.uuid, o.content, o.options})
	if err != nil {
		return "", fmt.Errorf("encoding a call for its digest: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// repeated answers a call whose work was done by an earlier one.
func (o *enqueueRequest) repeated(done *storage.Enqueued) (int, any, error) {
	cmd, err := o.command(done.CommandUUID)
	if err != nil {
		return 0, nil, err
	}
	res := newResult(o.targets.named())
	res.CommandUUID, res.RequestType, res.Repeated, res.Count = cmd.CommandUUID, cmd.RequestType, true, done.Count
	for _, id := range done.Failed {
		res.Status[id] = idResult{CommandError: storage.ErrNotEnrolled.Error()}
	}
	return o.answer(res)
}

// answer is the reply of a completed call. NanoMDM's endpoint leaves out ids
// that have neither error nor push result, as NanoMDM does.
func (o *enqueueRequest) answer(res *result) (int, any, error) {
	status := res.httpStatus()
	if !o.extended {
		maps.DeleteFunc(res.Status, func(_ string, r idResult) bool { return r == idResult{} })
	}
	return status, res, nil
}

// queue queues the command and wakes the devices.
func (a *API) queue(ctx context.Context, o *enqueueRequest, e *storage.Enqueue) (int, any, error) {
	if o.uuid == "" {
		o.uuid = newUUID()
	}
	cmd, err := o.command(o.uuid)
	if err != nil {
		return 0, nil, err
	}
	ids, refusal, err := a.resolve(ctx, &o.targets)
	if err != nil {
		return 0, nil, err
	}
	if refusal != nil {
		return http.StatusConflict, refusal, nil
	}
	warnings, err := a.warnings(ctx, o, cmd, ids)
	if err != nil {
		return 0, nil, err
	}
	if o.strict && len(warnings) > 0 {
		return refuseWarned(warnings)
	}
	detail := o.describe(cmd, ids)
	e.Command, e.IDs = cmd, ids
	e.Audit = auditRecord(ctx, actEnqueue, cmd.CommandUUID, detail)
	failed, err := a.store.Enqueue(ctx, callerOf(ctx).scope, e)
	switch {
	case errors.Is(err, storage.ErrKeyUsed):
		return 0, nil, err
	case errors.Is(err, storage.ErrConflict):
		err = &problem{http.StatusConflict, "a command with CommandUUID " + cmd.CommandUUID + " exists with other contents; use a new CommandUUID"}
	}
	if err != nil {
		a.audit(ctx, actEnqueue, cmd.CommandUUID, detail, err)
		return 0, nil, err
	}
	res := newResult(ids)
	res.NoPush, res.CommandUUID, res.RequestType, res.Warnings = e.NoPush, cmd.CommandUUID, cmd.RequestType, warnings
	if o.extended {
		res.Count = len(ids)
	}
	queued := make([]string, 0, len(ids))
	for _, id := range ids {
		if err := failed[id]; err != nil {
			res.Status[id] = idResult{CommandError: err.Error()}
		} else {
			queued = append(queued, id)
		}
	}
	if e.Once != nil && e.Once.Repeated {
		res.Repeated = true
	} else if !e.NoPush && e.NotBefore.IsZero() && len(queued) > 0 {
		if err := a.push(ctx, res, queued, true, o.async); err != nil {
			return 0, nil, err
		}
	}
	return o.answer(res)
}

// describe is the detail of the call's audit record.
func (o *enqueueRequest) describe(cmd *mdm.Command, ids []string) string {
	detail := cmd.RequestType + " for " + strconv.Itoa(len(ids)) + " enrollments: " + someOf(ids)
	if s := o.targets.Selector; s != nil {
		text, _ := json.Marshal(s) // plain values
		detail += "; selected by " + string(text)
	}
	if o.options != (enqueueOptions{}) {
		text, _ := json.Marshal(o.options)
		detail += "; options " + string(text)
	}
	return detail
}

// randomUUID is a UUID of a version that others cannot guess. Tenants share the
// name space of commands, and a name that is taken is a conflict: a tenant whose
// names hold one can neither find another's commands by guessing nor take names
// that another will use.
var randomUUID = regexp.MustCompile(`(?i)\b[0-9a-f]{8}-[0-9a-f]{4}-[47][0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\b`)

// newUUID makes a CommandUUID in upper case, as Apple's own tools write them.
func newUUID() string { return strings.ToUpper(uuid.NewString()) }

// targetSet names the enrollments of a call, as JSON: by id (MicroMDM's word
// is udid) or by a selector.
type targetSet struct {
	IDs      []string  `json:"ids,omitempty"`
	UDID     udids     `json:"udid,omitempty"`
	Selector *selector `json:"selector,omitempty"`
	// Confirm bounds the number of enrollments that a selector chooses.
	Confirm *int `json:"confirm,omitempty"`
}

// udids is one id, or a list of them.
type udids []string

// UnmarshalJSON implements json.Unmarshaler.
func (u *udids) UnmarshalJSON(text []byte) error {
	var one string
	if json.Unmarshal(text, &one) == nil {
		*u = udids{one}
		return nil
	}
	var list []string
	if err := json.Unmarshal(text, &list); err != nil {
		return errors.New("udid: an id or a list of ids is wanted")
	}
	*u = list
	return nil
}

// check refuses a set that names no enrollment, or names them in two ways.
func (t *targetSet) check() error {
	ways := 0
	for _, given := range []bool{len(t.IDs) > 0, len(t.UDID) > 0, t.Selector != nil} {
		if given {
			ways++
		}
	}
	switch {
	case ways == 0:
		return badRequest("ids: no enrollment is named; give ids or a selector")
	case ways > 1:
		return badRequest("ids: give ids or a selector, one of them")
	case slices.Contains(t.IDs, "") || slices.Contains(t.UDID, ""):
		return badRequest("ids: one of them is empty")
	case t.Selector != nil && *t.Selector == selector{}:
		return badRequest("selector: it is empty; to choose every enrollment that takes commands, use {\"enabled\": true}")
	case t.Confirm != nil && t.Selector == nil:
		return badRequest("confirm: that is for a selector")
	}
	return nil
}

// named lists the ids, each once; a selector has none.
func (t *targetSet) named() []string {
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(t.IDs, t.UDID))))
}

// unconfirmed is the answer to a selector that chooses more enrollments than
// the caller confirmed.
type unconfirmed struct {
	Error string `json:"error"`
	Count int    `json:"count"`
}

// resolve lists the ids, or refuses a selector that needs confirmation.
func (a *API) resolve(ctx context.Context, t *targetSet) (ids []string, refusal *unconfirmed, err error) {
	if t.Selector == nil {
		return t.named(), nil, nil
	}
	f, err := t.Selector.filter()
	if err != nil {
		return nil, nil, err
	}
	if ids, err = a.selected(ctx, callerOf(ctx).scope, f); err != nil {
		return nil, nil, err
	}
	if n := len(ids); n > confirmAbove && (t.Confirm == nil || *t.Confirm < n) {
		return nil, &unconfirmed{fmt.Sprintf("the selector chooses %d enrollments; repeat the call with \"confirm\": %d", n, n), n}, nil
	}
	return ids, nil, nil
}
