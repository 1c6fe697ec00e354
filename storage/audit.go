package storage

import (
	"context"
	"time"
)

// AuditRecord is one action of an operator.
type AuditRecord struct {
	ID string    // set by the store
	At time.Time // set by the store
	// The name of the API key.
	Who string
	// Action is a word of package httpapi, such as "enrollment.delete".
	Action string
	// Target is the id of an enrollment, a CommandUUID or another name, cut at
	// 255 characters.
	Target string
	// Detail is text for people, without secrets.
	Detail string
	// Outcome is AuditDone, or the reason why the action was not carried out.
	Outcome   string
	RequestID string
}

// AuditDone is the Outcome of an action that was carried out.
const AuditDone = "done"

// AuditFilter chooses records; zero fields choose all.
type AuditFilter struct {
	Who, Action, Target string
	From                time.Time // at this time or later
	To                  time.Time // before
}

// AuditKey is a place in the list of records.
type AuditKey struct {
	At time.Time
	ID string
}

// Audit keeps the actions of operators. Methods of other interfaces that take an
// AuditRecord append it in the transaction of the action. For refused actions,
// and for actions of several transactions, the caller appends the record.
type Audit interface {
	// AppendAudit appends a record and sets its ID and At.
	AppendAudit(ctx context.Context, r *AuditRecord) error
	// AuditRecords lists up to limit records after a place, newest first; the
	// zero AuditKey is the beginning.
	AuditRecords(ctx context.Context, f AuditFilter, after AuditKey, limit int) ([]AuditRecord, error)
}

// AuditUpkeep bounds the records.
type AuditUpkeep interface {
	// RemoveAudit removes up to limit of the oldest records from before a
	// time and returns how many, under a lease (ErrLeaseLost).
	RemoveAudit(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
}
