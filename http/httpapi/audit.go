package httpapi

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/storage"
)

// The actions of the audit table.
const (
	actEnqueue       = "command.enqueue"
	actCancel        = "command.cancel"
	actRequeue       = "command.requeue"
	actClearQueue    = "queue.clear"
	actReadQueue     = "queue.read"
	actPush          = "push"
	actPushCert      = "pushcert.store"
	actDeleteCert    = "pushcert.delete"
	actDisable       = "enrollment.disable"
	actEnable        = "enrollment.enable"
	actDelete        = "enrollment.delete"
	actReadBootstrap = "enrollment.bootstrap_token.read"
	actReadUnlock    = "enrollment.unlock_token.read"
	actOpenRenewal   = "enrollment.renewal.open"
	actTags          = "enrollment.tags"
	actCloseRenewal  = "enrollment.renewal.close"
	actMakeKey       = "key.create"
	actDeleteKey     = "key.delete"
	actReseal        = "reseal"
	actStoreSink     = "sink.store"
	actDeleteSink    = "sink.delete"
	actRedeliver     = "events.redeliver"
	actEscrowUnlock  = "escrowkey.unlock"
)

// auditTime bounds the writing of a record.
const auditTime = 10 * time.Second

// auditRecord is a record of the caller's action, for methods of the store that
// append it in their own transaction.
func auditRecord(ctx context.Context, action, target, detail string) *storage.AuditRecord {
	return &storage.AuditRecord{
		Who: callerOf(ctx).name, Action: action, Target: target, Detail: detail,
		Outcome: storage.AuditDone, RequestID: requestlog.ID(ctx),
	}
}

// audit appends a record of an action that was done or, with err, refused. The
// action stands even if the record cannot be written; the log has the record
// then. It writes for callers who are gone, too.
func (a *API) audit(ctx context.Context, action, target, detail string, err error) {
	rec := auditRecord(ctx, action, target, detail)
	if err != nil {
		rec.Outcome = outcome(err)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditTime)
	defer cancel()
	if err := a.store.AppendAudit(ctx, rec); err != nil {
		a.cfg.Logger.ErrorContext(ctx, "cannot write an audit record", "who", rec.Who, "action", rec.Action, "target", rec.Target,
			"detail", rec.Detail, "outcome", rec.Outcome, "request_id", rec.RequestID, "error", err)
	}
}

// deleteAnswerLost is the time in which a caller may repeat a deletion whose
// answer was lost.
const deleteAnswerLost = 24 * time.Hour

// gone answers the deletion of what does not exist: 204 if the caller deleted
// it a while ago and repeats the call, else missing.
func (a *API) gone(ctx context.Context, action, target string, missing error) (int, any, error) {
	records, err := a.store.AuditRecords(ctx, storage.AuditFilter{
		Who: callerOf(ctx).name, Action: action, Target: target, From: a.cfg.Now().Add(-deleteAnswerLost),
	}, storage.AuditKey{}, 100)
	if err != nil {
		return 0, nil, err
	}
	if !slices.ContainsFunc(records, func(r storage.AuditRecord) bool { return r.Outcome == storage.AuditDone }) {
		return 0, nil, missing
	}
	// The deletion may have been committed without its standby. The record's
	// commit waits for the standby to have both.
	if err := a.store.AppendAudit(ctx, auditRecord(ctx, action, target, "repeated")); err != nil {
		return 0, nil, err
	}
	return http.StatusNoContent, nil, nil
}

// outcome is the text of an error in an audit record. It holds no more than
// the caller's answer does.
func outcome(err error) string {
	if p := (*problem)(nil); errors.As(err, &p) {
		return p.text
	}
	for _, known := range []error{storage.ErrNotFound, storage.ErrConflict, storage.ErrNotEnrolled, storage.ErrUnavailable, storage.ErrBusy} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return "failed"
}

// someOf lists a few of many ids, for a record's detail.
func someOf(ids []string) string {
	const few = 20
	if len(ids) <= few {
		return strings.Join(ids, ", ")
	}
	return strings.Join(ids[:few], ", ") + " and " + strconv.Itoa(len(ids)-few) + " more"
}

// auditInfo is an audit record as JSON.
type auditInfo struct {
	ID        string    `json:"id"`
	At        time.Time `json:"at"`
	Who       string    `json:"who"`
	Action    string    `json:"action"`
	Target    string    `json:"target,omitempty"`
	Detail    string    `json:"detail,omitempty"`
	Outcome   string    `json:"outcome"`
	RequestID string    `json:"request_id,omitempty"`
}

// auditQuery reads the parameters of a list of records.
func auditQuery(q *query) (f storage.AuditFilter, after storage.AuditKey, limit int, err error) {
	f = storage.AuditFilter{
		Who: q.text("who"), Action: q.text("action"), Target: q.text("target"), From: q.time("from"), To: q.time("to"),
	}
	limit, after = q.limit(), q.auditPlace()
	return f, after, limit, q.done()
}

func (a *API) listAudit(ctx context.Context, r *http.Request) (int, any, error) {
	f, after, limit, err := auditQuery(a.queryOf(r))
	if err != nil {
		return 0, nil, err
	}
	records, err := a.store.AuditRecords(ctx, f, after, limit+1)
	if err != nil {
		return 0, nil, err
	}
	page := struct {
		Audit []auditInfo `json:"audit"`
		Next  string      `json:"next,omitempty"`
	}{Audit: []auditInfo{}}
	if len(records) > limit {
		records = records[:limit]
		page.Next = a.cursors.audit(r, records[limit-1])
	}
	for _, rec := range records {
		page.Audit = append(page.Audit, auditInfo(rec))
	}
	return http.StatusOK, page, nil
}

// auditPlace is a storage.AuditKey as a cursor.
type auditPlace struct {
	At int64  `json:"t"`
	ID string `json:"i"`
}

func (c *cursors) audit(request *http.Request, r storage.AuditRecord) string {
	return c.seal(request, auditPlace{r.At.UnixMicro(), r.ID})
}

func (q *query) auditPlace() storage.AuditKey {
	var p auditPlace
	if !q.cursor(&p) {
		return storage.AuditKey{}
	}
	if textFault(p.ID) != "" {
		q.failCursor()
	}
	return storage.AuditKey{At: time.UnixMicro(p.At).UTC(), ID: p.ID}
}
