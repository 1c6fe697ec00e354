package storage

import (
	"context"
	"time"
)

// Retention is the age at which rows are removed; 0 is never.
type Retention struct {
	Default time.Duration
	// ByType has the ages of request types that differ from Default.
	ByType map[string]time.Duration
}

// Removal chooses the old rows of history that one step removes.
type Removal struct {
	// Before: rows that ended, and results that came in, at this time or later
	// stay.
	Before time.Time
	// Type is the request type of the rows. Empty is every type but those in
	// Except. A row whose command does not exist has type "".
	Type   string
	Except []string
	// After is the place to continue at: the Next of the step before, zero at
	// the beginning.
	After HistoryKey
	// Limit bounds the rows that are read.
	Limit int
}

// HistoryKey is a place in history, which is ordered by time.
type HistoryKey struct {
	At              time.Time
	ID, CommandUUID string
}

// Removed is the outcome of a Removal.
type Removed struct {
	Looked   int // rows that were read
	Rows     int // of the queue
	Results  int
	Bytes    int64 // of the results, as stored
	Commands int
	// Next is the place to continue at. Done says that no row is left after it.
	Next HistoryKey
	Done bool
}

// HistorySize counts the rows of the tables that grow.
type HistorySize struct {
	Waiting  int64 // queue rows that are scheduled, queued or notnow
	Finished int64 // queue rows that have ended
	Results  int64
	Commands int64
}

// UserUpkeep bounds the users that never enrolled.
type UserUpkeep interface {
	// RemoveUsers removes up to limit users without an enrollment whose last
	// UserAuthenticate was before a time, and returns how many, under a lease
	// (ErrLeaseLost).
	RemoveUsers(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
}

// Sweeps is the periodic work on the queue and on history. Each call is one
// small transaction, which checks the lease (ErrLeaseLost) and locks rows in
// key order; the caller paces the calls. Calls by several replicas at once are
// safe, though useless.
type Sweeps interface {
	// ExpireCommands makes up to limit waiting rows whose ExpiresAt has passed
	// Expired, and returns how many. A report that is committed first ends the
	// row instead; the result of a later one is stored as late.
	ExpireCommands(ctx context.Context, l Lease, limit int) (int, error)
	// PromoteCommands queues up to limit scheduled rows whose not-before time
	// has come, makes a push owed for them, and returns how many. They come
	// after the waiting rows, in the order of their times, and at equal times in
	// the order in which they were enqueued.
	PromoteCommands(ctx context.Context, l Lease, limit int) (int, error)
	// RemoveResults removes results by the time when they came in. Their queue
	// rows and commands stay.
	RemoveResults(ctx context.Context, l Lease, r Removal) (Removed, error)
	// RemoveFinished removes queue rows that ended in state, by the time when
	// they ended, with their results, and then the commands without rows. A
	// device that repeats a report of such a row reports an unknown command.
	RemoveFinished(ctx context.Context, l Lease, state State, r Removal) (Removed, error)
	// HistorySize counts. It reads an index of each table from end to end:
	// call it rarely.
	HistorySize(ctx context.Context) (HistorySize, error)
}
