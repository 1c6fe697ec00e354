package httpapi

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

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
	// Count is of the enrollments that were asked for, and Repeated says that
	// a call with the idempotency key was made before; NanoMDM has neither.
	Count    int  `json:"count,omitempty"`
	Repeated bool `json:"repeated,omitempty"`
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
	case failed == max(len(r.Status), r.Count):
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

// order is a call that queues a command, in whichever form it came.
type order struct {
	// whom is who it is for.
	whom audience
	// uuid is the CommandUUID if the caller gave one, and command makes the
	// command with that or another one.
	uuid    string
	command func(uuid string) (*mdm.Command, error)
	// content is what the caller wants queued; it tells calls with one
	// idempotency key apart.
	content any
	options enqueueOptions
	async   bool
	// ours is a call in a form that NanoMDM does not have.
	ours bool
}

// enqueueIDs is NanoMDM's enqueue. It ignores query parameters that it does
// not know.
func (a *API) enqueueIDs(ctx context.Context, r *http.Request) (int, any, error) {
	ids, err := pathIDs(r)
	if err != nil {
		return 0, nil, err
	}
	raw, err := readBody(r)
	if err != nil {
		return 0, nil, err
	}
	o := &order{whom: audience{IDs: ids}}
	if err := o.plist(raw); err != nil {
		return 0, nil, err
	}
	q := queryOf(r)
	o.options = enqueueOptions{
		Priority: q.number("priority", 0, -maxPriority, maxPriority), NotBefore: q.text("not_before"), ExpiresAfter: q.text("expires_after"),
		SupersedeKey: q.text("supersede_key"), IdempotencyKey: q.text("idempotency_key"), NoPush: r.URL.Query().Get("nopush") != "",
	}
	o.async = q.async()
	if q.err != nil {
		return 0, nil, q.err
	}
	return a.carryOut(ctx, o)
}

// plist takes a command as the caller made it.
func (o *order) plist(raw []byte) error {
	cmd, err := mdm.DecodeCommand(raw)
	if err != nil {
		return badRequest("command: %v", err)
	}
	o.uuid, o.content = cmd.CommandUUID, raw
	o.command = func(string) (*mdm.Command, error) { return cmd, nil }
	return nil
}

// enqueue is enqueueIDs for any number of enrollments.
func (a *API) enqueue(ctx context.Context, r *http.Request) (int, any, error) {
	q := queryOf(r)
	o := &order{async: q.async(), ours: true}
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	var ask struct {
		audience
		Plist   []byte         `json:"plist"`
		Options enqueueOptions `json:"options"`
	}
	if err := readJSON(r, &ask); err != nil {
		return 0, nil, err
	}
	if len(ask.Plist) == 0 {
		return 0, nil, badRequest("plist: the command's property list is missing, in base64")
	}
	if err := o.plist(ask.Plist); err != nil {
		return 0, nil, err
	}
	o.whom, o.options = ask.audience, ask.Options
	return a.carryOut(ctx, o)
}

// storage is what the store is asked for, but for command and ids. now is
// when the call came.
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
		if why := unfit(key); why != "" {
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

// maxKey bounds the keys that callers make up.
const maxKey = 255

// carryOut does what a call asks for. With an idempotency key it may have been
// done before.
func (a *API) carryOut(ctx context.Context, o *order) (int, any, error) {
	if err := o.whom.check(); err != nil {
		return 0, nil, err
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
	for range 3 { // the key may come into use while we look
		e.Once = &storage.Once{Caller: callerOf(ctx).name, Key: o.options.IdempotencyKey, Digest: digest}
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

// digest is of everything that is asked for.
func (o *order) digest() (string, error) {
	whom := o.whom
	whom.IDs, whom.UDID, whom.Confirm = o.whom.named(), nil, nil
	text, err := json.Marshal(struct {
		Whom    audience
		UUID    string
		Content any
		Options enqueueOptions
	}{whom, o.uuid, o.content, o.options})
	if err != nil {
		return "", fmt.Errorf("writing what a call asks for: %w", err)
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:]), nil
}

// repeated answers a call that was done before.
func (o *order) repeated(done *storage.Enqueued) (int, any, error) {
	cmd, err := o.command(done.CommandUUID)
	if err != nil {
		return 0, nil, err
	}
	res := newResult(o.whom.named())
	res.CommandUUID, res.RequestType, res.Repeated, res.Count = cmd.CommandUUID, cmd.RequestType, true, done.Count
	for _, id := range done.Failed {
		res.Status[id] = idResult{CommandError: storage.ErrNotEnrolled.Error()}
	}
	return o.answer(res)
}

// answer is the reply to a call that was carried out. NanoMDM's form leaves
// out ids of which there is nothing to say, as NanoMDM does.
func (o *order) answer(res *result) (int, any, error) {
	status := res.httpStatus()
	if !o.ours {
		maps.DeleteFunc(res.Status, func(_ string, r idResult) bool { return r == idResult{} })
	}
	return status, res, nil
}

// queue queues the command and wakes the devices.
func (a *API) queue(ctx context.Context, o *order, e *storage.Enqueue) (int, any, error) {
	if o.uuid == "" {
		o.uuid = newUUID()
	}
	cmd, err := o.command(o.uuid)
	if err != nil {
		return 0, nil, err
	}
	ids, refusal, err := a.resolve(ctx, &o.whom)
	if err != nil {
		return 0, nil, err
	}
	if refusal != nil {
		return http.StatusConflict, refusal, nil
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
	res.NoPush, res.CommandUUID, res.RequestType = e.NoPush, cmd.CommandUUID, cmd.RequestType
	if o.ours {
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
func (o *order) describe(cmd *mdm.Command, ids []string) string {
	detail := cmd.RequestType + " for " + strconv.Itoa(len(ids)) + " enrollments: " + someOf(ids)
	if s := o.whom.Selector; s != nil {
		text, _ := json.Marshal(s) // plain values
		detail += "; selected by " + string(text)
	}
	if o.options != (enqueueOptions{}) {
		text, _ := json.Marshal(o.options)
		detail += "; options " + string(text)
	}
	return detail
}

// newUUID makes a CommandUUID as Apple's own tools write them.
func newUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%X-%X-%X-%X-%X", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// audience is who a call is for, as JSON: some enrollments by their ids (udid
// is MicroMDM's word for them), or those that a selector chooses.
type audience struct {
	IDs      []string  `json:"ids,omitempty"`
	UDID     udids     `json:"udid,omitempty"`
	Selector *selector `json:"selector,omitempty"`
	// Confirm is how many enrollments a selector may choose.
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

// check says what is wrong with it.
func (w *audience) check() error {
	ways := 0
	for _, given := range []bool{len(w.IDs) > 0, len(w.UDID) > 0, w.Selector != nil} {
		if given {
			ways++
		}
	}
	switch {
	case ways == 0:
		return badRequest("ids: no enrollment is named; give ids or a selector")
	case ways > 1:
		return badRequest("ids: give ids or a selector, one of them")
	case slices.Contains(w.IDs, "") || slices.Contains(w.UDID, ""):
		return badRequest("ids: one of them is empty")
	case w.Selector != nil && *w.Selector == selector{}:
		return badRequest("selector: it is empty; to choose every enrollment that takes commands, use {\"enabled\": true}")
	case w.Confirm != nil && w.Selector == nil:
		return badRequest("confirm: that is for a selector")
	}
	return nil
}

// named are the ids, each once; none with a selector.
func (w *audience) named() []string {
	return slices.Compact(slices.Sorted(slices.Values(slices.Concat(w.IDs, w.UDID))))
}

// unconfirmed is the answer to a selector that chooses more enrollments than
// the caller expects.
type unconfirmed struct {
	Error string `json:"error"`
	Count int    `json:"count"`
}

// resolve lists the ids, or says that a selector has to be confirmed.
func (a *API) resolve(ctx context.Context, w *audience) (ids []string, refusal *unconfirmed, err error) {
	if w.Selector == nil {
		return w.named(), nil, nil
	}
	f, err := w.Selector.filter()
	if err != nil {
		return nil, nil, err
	}
	if ids, err = a.selected(ctx, callerOf(ctx).scope, f); err != nil {
		return nil, nil, err
	}
	if n := len(ids); n > confirmAbove && (w.Confirm == nil || *w.Confirm < n) {
		return nil, &unconfirmed{fmt.Sprintf("the selector chooses %d enrollments; repeat the call with \"confirm\": %d", n, n), n}, nil
	}
	return ids, nil, nil
}
