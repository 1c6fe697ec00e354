package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var (
	_ storage.Audit       = (*Store)(nil)
	_ storage.AuditUpkeep = (*Store)(nil)
)

// maxAuditDetail bounds the detail of a record, in bytes.
const maxAuditDetail = 8 << 10

// AppendAudit implements storage.Audit.
func (s *Store) AppendAudit(ctx context.Context, r *storage.AuditRecord) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error { return audit(ctx, t, r) })
	if err != nil {
		return fmt.Errorf("appending an audit record: %w", err)
	}
	return nil
}

// audit appends a record in the caller's transaction.
func audit(ctx context.Context, t *tx, r *storage.AuditRecord) error {
	r.ID, r.At = eventID(t.Now), fromMicros(t.Now)
	detail := legible(r.Detail)
	if len(detail) > maxAuditDetail {
		detail = strings.ToValidUTF8(detail[:maxAuditDetail], "") + "…"
	}
	_, err := t.Exec(ctx, `INSERT INTO nano_audit (id, created_at, who, action, target, detail, outcome, request_id)
VALUES (?, ?, ?, ?, ?, ?, ?, ?)`, r.ID, t.Now, clip(r.Who), clip(r.Action), clip(r.Target), detail, clip(r.Outcome), clip(r.RequestID))
	return err
}

// AuditRecords implements storage.Audit.
func (s *Store) AuditRecords(ctx context.Context, f storage.AuditFilter, after storage.AuditKey, limit int) (records []storage.AuditRecord, err error) {
	where, args := auditWhere(f, after)
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		records, err = sqldb.Collect(t.Query(ctx, `SELECT id, created_at, who, action, target, detail, outcome, request_id FROM nano_audit`+
			t.Dialect.Index(auditIndex(f))+where+` ORDER BY created_at DESC, id DESC LIMIT ?`, append(slices.Clone(args), limit)...), scanAudit)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading audit records: %w", err)
	}
	return records, nil
}

// auditIndex names the index that has the records of a filter in order.
func auditIndex(f storage.AuditFilter) string {
	switch {
	case f.Target != "":
		return "nano_audit_target"
	case f.Who != "":
		return "nano_audit_who"
	case f.Action != "":
		return "nano_audit_action"
	}
	return "nano_audit_created_at"
}

func auditWhere(f storage.AuditFilter, after storage.AuditKey) (where string, args []any) {
	conditions := []string{"1 = 1"}
	add := func(condition string, values ...any) {
		conditions = append(conditions, condition)
		args = append(args, values...)
	}
	for _, c := range [...]struct{ column, value string }{{"who", f.Who}, {"action", f.Action}, {"target", clip(f.Target)}} {
		if c.value != "" {
			add(c.column+" = ?", c.value)
		}
	}
	if !f.From.IsZero() {
		add("created_at >= ?", micros(f.From))
	}
	if !f.To.IsZero() {
		add("created_at < ?", micros(f.To))
	}
	if after != (storage.AuditKey{}) {
		at := micros(after.At)
		add("created_at <= ? AND (created_at < ? OR id < ?)", at, at, after.ID)
	}
	return " WHERE " + strings.Join(conditions, " AND "), args
}

func scanAudit(row sqldb.Row, r *storage.AuditRecord) error {
	var at int64
	if err := row.Scan(&r.ID, &at, &r.Who, &r.Action, &r.Target, &r.Detail, &r.Outcome, &r.RequestID); err != nil {
		return err
	}
	r.At = fromMicros(at)
	return nil
}

// RemoveAudit implements storage.AuditUpkeep.
func (s *Store) RemoveAudit(ctx context.Context, l storage.Lease, before time.Time, limit int) (removed int, err error) {
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		removed = 0
		old, err := sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_audit WHERE created_at < ? ORDER BY created_at LIMIT ?", micros(before), limit))
		if err != nil || len(old) == 0 {
			return err
		}
		slices.Sort(old)
		place, args := sqldb.InList(old)
		n, err := t.Exec(ctx, "DELETE FROM nano_audit WHERE id IN "+place, args...)
		removed = int(n)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("removing audit records: %w", err)
	}
	return removed, nil
}
