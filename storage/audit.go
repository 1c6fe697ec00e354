package storage

import (
	"context"
	"time"
)

// AuditRecord is one deed of an operator.
type AuditRecord struct {
	ID string    // set by the store
	At time.Time // set by the store
	// Who is the name of the API key.
	Who string
	// Action is a word of package httpapi, such as "enrollment.delete".
	Action string
	// Target is what it was done to: an enrollment's id, a CommandUUID, a
	// name. Longer ones are cut at 255 characters.
	Target string
	// Detail is for people to read. No secrets.
	Detail string
	// Outcome is AuditDone, or why it was not done.
	Outcome   string
	RequestID string
}

// AuditDone is the Outcome of a deed that was done.
const AuditDone = "done"

// AuditFilter says which records are listed; zero fields ask for nothing.
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

// Audit keeps what operators did. Methods of other roles that take an
// AuditRecord append it in the transaction of the deed; what was refused, and
// deeds of several transactions, are appended by whoever asked for them.
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
