package httpapi

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// maxResultJSON bounds the results that are converted to JSON, in bytes;
	// larger ones come raw only.
	maxResultJSON = 4 << 20
	// The first and the longest pause between two polls of a command.
	firstPoll = 100 * time.Millisecond
	lastPoll  = 2 * time.Second
)

// itemInfo is a storage.QueueItem as JSON.
type itemInfo struct {
	EnrollmentID string    `json:"enrollment_id"`
	SerialNumber string    `json:"serial_number,omitempty"` // in the answer for one command
	DeviceName   string    `json:"device_name,omitempty"`   // as SerialNumber
	CommandUUID  string    `json:"command_uuid"`
	RequestType  string    `json:"request_type,omitempty"`
	State        string    `json:"state"`
	Seq          int64     `json:"seq"`
	Priority     int       `json:"priority"`
	CreatedAt    time.Time `json:"created_at"`
	NotBefore    time.Time `json:"not_before,omitzero"`
	ExpiresAt    time.Time `json:"expires_at,omitzero"`
	FinishedAt   time.Time `json:"finished_at,omitzero"`
	Attempts     int       `json:"attempts,omitempty"`
	NotNowCount  int       `json:"notnow_count,omitempty"`
	NotNowAt     time.Time `json:"notnow_at,omitzero"`
	SupersedeKey string    `json:"supersede_key,omitempty"`
}

func infoOfItem(i *storage.QueueItem) itemInfo {
	return itemInfo{
		EnrollmentID: i.Enrollment, CommandUUID: i.CommandUUID, RequestType: i.RequestType, State: i.State.String(), Seq: i.Seq, Priority: i.Priority,
		CreatedAt: i.CreatedAt, NotBefore: i.NotBefore, ExpiresAt: i.ExpiresAt, FinishedAt: i.FinishedAt, Attempts: i.Attempts,
		NotNowCount: i.NotNowCount, NotNowAt: i.NotNowAt, SupersedeKey: i.SupersedeKey,
	}
}

func infosOfItems(items []storage.QueueItem) []itemInfo {
	infos := make([]itemInfo, len(items))
	for i := range items {
		infos[i] = infoOfItem(&items[i])
	}
	return infos
}

// state reads a queue row's state; 0 if the parameter is missing.
func (q *query) state() storage.State {
	words := make([]string, 0, 9)
	for _, s := range storage.States() {
		words = append(words, s.String())
	}
	word := q.word("state", words...)
	for _, s := range storage.States() {
		if s.String() == word {
			return s
		}
	}
	return 0
}

// queuePlace is a storage.QueueKey as a cursor.
type queuePlace struct {
	Priority int   `json:"p"`
	Seq      int64 `json:"s"`
}

func (a *API) listQueue(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	state, limit := q.state(), q.limit()
	var after queuePlace
	q.cursor(&after)
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, err
	}
	items, err := a.store.Queue(ctx, callerOf(ctx).scope, id, state, storage.QueueKey(after), limit+1)
	if err != nil {
		return 0, nil, err
	}
	next := ""
	if len(items) > limit {
		items = items[:limit]
		next = a.cursors.seal(r, queuePlace{items[limit-1].Priority, items[limit-1].Seq})
	}
	return http.StatusOK, struct {
		Queue []itemInfo `json:"queue"`
		Next  string     `json:"next,omitempty"`
	}{infosOfItems(items), next}, nil
}

// clearQueue cancels the waiting commands of an enrollment.
func (a *API) clearQueue(ctx context.Context, r *http.Request) (int, any, error) {
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actClearQueue, r.PathValue("id"), err)
	}
	n, err := a.store.ClearQueue(ctx, callerOf(ctx).scope, id)
	a.audit(ctx, actClearQueue, id, fmt.Sprintf("%d cancelled", n), err)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, struct {
		Cancelled int64 `json:"cancelled"`
	}{n}, nil
}

// commandInfo is a storage.CommandInfo as JSON.
type commandInfo struct {
	CommandUUID string           `json:"command_uuid"`
	RequestType string           `json:"request_type"`
	CreatedAt   time.Time        `json:"created_at"`
	States      map[string]int64 `json:"states"`
	// Counted is the number of enrollments that were counted, if there are more.
	Counted int64 `json:"counted,omitempty"`
}

func infoOfCommand(c *storage.CommandInfo) commandInfo {
	info := commandInfo{CommandUUID: c.UUID, RequestType: c.RequestType, CreatedAt: c.CreatedAt, States: make(map[string]int64), Counted: c.Counted}
	for state, n := range c.States {
		info.States[state.String()] = n
	}
	return info
}

// commandPlace is a storage.CommandKey as a cursor.
type commandPlace struct {
	At   int64  `json:"t"`
	UUID string `json:"u"`
}

func (a *API) listCommands(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	f := storage.CommandFilter{
		RequestType: q.text("request_type"), State: q.state(), CreatedAfter: q.time("created_after"), CreatedBefore: q.time("created_before"),
	}
	limit := q.limit()
	var after storage.CommandKey
	if p := (commandPlace{}); q.cursor(&p) {
		after = storage.CommandKey{At: time.UnixMicro(p.At).UTC(), UUID: p.UUID}
		if textFault(p.UUID) != "" {
			q.failCursor()
		}
	}
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	list, next, err := a.store.FindCommands(ctx, callerOf(ctx).scope, f, after, limit)
	if err != nil {
		return 0, nil, err
	}
	page := struct {
		Commands []commandInfo `json:"commands"`
		Next     string        `json:"next,omitempty"`
	}{Commands: make([]commandInfo, len(list))}
	for i := range list {
		page.Commands[i] = infoOfCommand(&list[i])
	}
	if next != (storage.CommandKey{}) {
		page.Next = a.cursors.seal(r, commandPlace{next.At.UnixMicro(), next.UUID})
	}
	return http.StatusOK, page, nil
}

// commandStatus is a command with a page of its enrollments.
type commandStatus struct {
	commandInfo
	Done        bool       `json:"done"`
	Enrollments []itemInfo `json:"enrollments"`
	Next        string     `json:"next,omitempty"`
}

// itemPlace is the beginning of a command's next page of enrollments.
type itemPlace struct {
	ID string `json:"i"`
}

func (a *API) showCommand(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	state, limit, wait := q.state(), q.limit(), q.wait()
	var after itemPlace
	if q.cursor(&after) && textFault(after.ID) != "" {
		q.failCursor()
	}
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	scope, uuid := callerOf(ctx).scope, r.PathValue("uuid")
	c, err := a.store.Command(ctx, scope, uuid)
	if err != nil {
		return 0, nil, noCommand(err)
	}
	if wait > 0 && waitsFor(c) {
		end, err := a.waits.begin(callerOf(ctx))
		if err != nil {
			return 0, nil, err
		}
		defer end()
		a.waitFor(ctx, scope, uuid, wait)
		if c, err = a.store.Command(ctx, scope, uuid); err != nil {
			return 0, nil, noCommand(err)
		}
	}
	items, err := a.store.CommandItems(ctx, scope, uuid, state, after.ID, limit+1)
	if err != nil {
		return 0, nil, err
	}
	answer := commandStatus{commandInfo: infoOfCommand(c), Done: !waitsFor(c)}
	if len(items) > limit {
		items = items[:limit]
		answer.Next = a.cursors.seal(r, itemPlace{items[limit-1].Enrollment})
	}
	if answer.Enrollments, err = a.namedItems(ctx, items); err != nil {
		return 0, nil, err
	}
	return http.StatusOK, answer, nil
}

func waitsFor(c *storage.CommandInfo) bool {
	return c.States[storage.Scheduled]+c.States[storage.Queued]+c.States[storage.NotNow] > 0
}

func noCommand(err error) error {
	if errors.Is(err, storage.ErrNotFound) {
		return &problem{http.StatusNotFound, "there is no such command"}
	}
	return err
}

// waitFor returns when a command has ended for every enrollment, after
// patience, when the caller is gone, or when the server is about to stop. It polls, and holds nothing between two polls.
func (a *API) waitFor(ctx context.Context, scope storage.Scope, uuid string, patience time.Duration) {
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	poll := time.NewTimer(firstPoll)
	defer poll.Stop()
	for pause := firstPoll; ; poll.Reset(pause) {
		select {
		case <-poll.C:
		case <-timeout.C:
			return
		case <-ctx.Done():
			return
		case <-a.cfg.Draining:
			return
		}
		waits, err := a.store.CommandWaits(ctx, scope, uuid)
		if err != nil || !waits {
			return // the next read reports the fault
		}
		pause = min(pause*3/2, lastPoll)
	}
}

// resultInfo is a result as JSON.
type resultInfo struct {
	EnrollmentID string         `json:"enrollment_id"`
	CommandUUID  string         `json:"command_uuid"`
	RequestType  string         `json:"request_type,omitempty"`
	State        string         `json:"state"`
	Status       string         `json:"status"`
	Late         bool           `json:"late,omitempty"`
	CreatedAt    time.Time      `json:"created_at"`
	Size         int            `json:"size"`
	Result       map[string]any `json:"result,omitempty"`
	Raw          []byte         `json:"raw,omitempty"`
	LeftOut      string         `json:"left_out,omitempty"`
}

func (a *API) showResult(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	raw := q.text("raw")
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	scope, uuid := callerOf(ctx).scope, r.PathValue("uuid")
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, err
	}
	item, err := a.store.QueueItem(ctx, scope, id, uuid)
	if err != nil {
		return 0, nil, noItem(err)
	}
	result, err := a.store.CommandResult(ctx, scope, id, uuid)
	if errors.Is(err, storage.ErrNotFound) {
		return 0, nil, &problem{http.StatusNotFound, "there is no result; the command is " + item.State.String()}
	} else if err != nil {
		return 0, nil, err
	}
	if raw != "" || wantsXML(r) {
		return http.StatusOK, attachment(result.Raw), nil
	}
	info := resultInfo{
		EnrollmentID: id, CommandUUID: uuid, RequestType: item.RequestType, State: item.State.String(),
		Status: result.Status, Late: result.Late, CreatedAt: result.CreatedAt, Size: len(result.Raw),
	}
	if len(result.Raw) > maxResultJSON {
		info.LeftOut = "the result is too large for JSON; ask for it with raw=1"
		return http.StatusOK, info, nil
	}
	info.Raw = result.Raw
	if dict, err := mdm.DecodePlist(result.Raw); err != nil {
		info.LeftOut = "the result cannot be shown as JSON: " + err.Error()
	} else {
		info.Result, _ = plainJSON(dict).(map[string]any)
	}
	return http.StatusOK, info, nil
}

func noItem(err error) error {
	if errors.Is(err, storage.ErrNotFound) {
		return &problem{http.StatusNotFound, "the enrollment does not have that command"}
	}
	return err
}

// wantsXML reports whether the caller accepts the bare property list.
func wantsXML(r *http.Request) bool {
	for part := range strings.SplitSeq(r.Header.Get("Accept"), ",") {
		media, _, _ := strings.Cut(part, ";")
		switch strings.TrimSpace(media) {
		case "application/xml", "text/xml", "application/x-plist":
			return true
		case "application/json", "*/*", "application/*":
			return false
		}
	}
	return false
}

// plainJSON converts a value of a property list for JSON: data becomes base64,
// a date RFC 3339.
func plainJSON(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			v[key] = plainJSON(value)
		}
	case []any:
		for i, value := range v {
			v[i] = plainJSON(value)
		}
	case time.Time:
		return v.UTC().Format(time.RFC3339)
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return fmt.Sprint(v)
		}
	}
	return v // []byte is base64 already
}

// cancelCommand cancels a command for all enrollments.
func (a *API) cancelCommand(ctx context.Context, r *http.Request) (int, any, error) {
	uuid := r.PathValue("uuid")
	cancelled, finished, err := a.store.CancelCommand(ctx, callerOf(ctx).scope, uuid)
	a.audit(ctx, actCancel, uuid, fmt.Sprintf("cancelled for %d enrollments; %d had ended", cancelled, finished), noCommand(err))
	if err != nil {
		return 0, nil, noCommand(err)
	}
	return http.StatusOK, struct {
		Cancelled int64 `json:"cancelled"`
		Finished  int64 `json:"finished"`
	}{cancelled, finished}, nil
}

// cancelItem cancels a command for one enrollment.
func (a *API) cancelItem(ctx context.Context, r *http.Request) (int, any, error) {
	uuid := r.PathValue("uuid")
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actCancel, uuid, err)
	}
	was, err := a.store.CancelItem(ctx, callerOf(ctx).scope, id, uuid, auditRecord(ctx, actCancel, uuid, "for "+id))
	switch {
	case err != nil:
		return 0, nil, a.auditRefusal(ctx, actCancel, uuid, noItem(err))
	case was == storage.Cancelled:
		return http.StatusNoContent, nil, nil // a repeated call
	case was.Terminal():
		return 0, nil, a.auditRefusal(ctx, actCancel, uuid, &problem{http.StatusConflict, "the command has ended for " + id + ": " + was.String()})
	}
	return a.itemNow(ctx, id, uuid)
}

// requeue queues a command again for one enrollment.
func (a *API) requeue(ctx context.Context, r *http.Request) (int, any, error) {
	uuid, scope := r.PathValue("uuid"), callerOf(ctx).scope
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actRequeue, uuid, err)
	}
	was, err := a.store.Requeue(ctx, scope, id, uuid, auditRecord(ctx, actRequeue, uuid, "for "+id))
	switch {
	case errors.Is(err, storage.ErrNotEnrolled):
		return 0, nil, a.auditRefusal(ctx, actRequeue, uuid, &problem{http.StatusConflict, id + " is not enrolled"})
	case err != nil:
		return 0, nil, a.auditRefusal(ctx, actRequeue, uuid, noItem(err))
	case !was.Requeueable():
		return 0, nil, a.auditRefusal(ctx, actRequeue, uuid, &problem{http.StatusConflict,
			"the command is " + was.String() + " for " + id + "; only one that ended as error, format_error, cancelled or expired can be queued again"})
	}
	a.wakeSoon(ctx, []string{id})
	return a.itemNow(ctx, id, uuid)
}

func (a *API) itemNow(ctx context.Context, id, uuid string) (int, any, error) {
	item, err := a.store.QueueItem(ctx, callerOf(ctx).scope, id, uuid)
	if err != nil {
		return 0, nil, noItem(err)
	}
	return http.StatusOK, infoOfItem(item), nil
}

// wakeSoon pushes to enrollments that are owed a push, without waiting for
// APNs.
func (a *API) wakeSoon(ctx context.Context, ids []string) {
	if _, err := a.pusher.Push(ctx, push.Request{Scope: callerOf(ctx).scope, IDs: ids, Owed: true, Async: true}); err != nil {
		a.cfg.Logger.WarnContext(ctx, "pushes are left to the sweep", "request_id", requestlog.ID(ctx), "pushes", len(ids), "error", err)
	}
}

// auditRefusal records an action that was refused, and returns its error.
func (a *API) auditRefusal(ctx context.Context, action, target string, err error) error {
	a.audit(ctx, action, target, "", err)
	return err
}
