package storage

import (
	"context"
	"time"
)

// Retention says how long something is kept, as ages. 0 is for ever.
type Retention struct {
	Default time.Duration
	// ByType has the ages of single request types, instead of Default.
	ByType map[string]time.Duration
}

// Removal is a look through history for what is too old.
type Removal struct {
	// Before: what ended, or came in, at this time or later stays.
	Before time.Time
	// Type is the request type to look for. Empty is every type but those in
	// Except; a row whose command is not there counts as being of type "".
	Type   string
	Except []string
	// After is where to go on: the Next of the step before, zero to begin.
	After HistoryKey
	// Limit is how many rows are looked at, at most.
	Limit int
}

// HistoryKey is a place in history, which is ordered by time.
type HistoryKey struct {
	At              time.Time
	ID, CommandUUID string
}

// Removed is what a Removal did.
type Removed struct {
	Looked   int // rows
	Rows     int // of the queue
	Results  int
	Bytes    int64 // of the results, as stored
	Commands int
	// Next is where to go on. Done says that there is nothing left there now.
	Next HistoryKey
	Done bool
}

// HistorySize is how many rows the tables that grow have.
type HistorySize struct {
	Waiting  int64 // queue rows that are scheduled, queued or notnow
	Finished int64 // queue rows that have ended
	Results  int64
	Commands int64
}

// Sweeps is the periodic work on the queue and on history. Each call is one
// small transaction, which checks the lease (ErrLeaseLost) and locks rows in
// key order; what the caller does between calls is the pace. Calls by several
// replicas at once are safe, if pointless.
type Sweeps interface {
	// ExpireCommands ends up to limit rows that wait and whose time has come,
	// as Expired, and returns how many. A device's report that is committed
	// first wins; one that comes later is stored as late.
	ExpireCommands(ctx context.Context, l Lease, limit int) (int, error)
	// PromoteCommands queues up to limit scheduled rows whose not-before time
	// has come, behind what waits already and in the order of their times, or
	// of one time in that in which they were queued, makes a push owed for
	// them, and returns how many.
	PromoteCommands(ctx context.Context, l Lease, limit int) (int, error)
	// RemoveResults removes results, by the time when they came in. Their
	// queue rows and commands stay.
	RemoveResults(ctx context.Context, l Lease, r Removal) (Removed, error)
	// RemoveFinished removes queue rows that ended in state, by the time when
	// they ended, their results with them, and the commands that no row
	// refers to any more. A report that repeats one of theirs afterwards is
	// one for an unknown command.
	RemoveFinished(ctx context.Context, l Lease, state State, r Removal) (Removed, error)
	// HistorySize counts. It reads an index of each table from end to end, so
	// it is for now and then.
	HistorySize(ctx context.Context) (HistorySize, error)
}
