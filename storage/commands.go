package storage

import (
	"context"
	"time"
)

// States lists all states of queue rows.
func States() []State {
	return []State{Scheduled, Queued, NotNow, Acknowledged, Failed, FormatError, Cancelled, Expired, Superseded}
}

// QueueItem is a command of an enrollment, as it stands.
type QueueItem struct {
	Enrollment  string // the id of the enrollment
	CommandUUID string
	RequestType string // "" if the command is gone
	State       State
	Seq         int64
	Priority    int
	CreatedAt   time.Time
	// Zero times: never.
	NotBefore   time.Time // while it is scheduled
	ExpiresAt   time.Time
	FinishedAt  time.Time
	NotNowAt    time.Time
	NotNowCount int
	// Attempts counts how often the device was offered it and did not answer
	// within some hundred milliseconds. It may lag as last-seen times do.
	Attempts     int
	SupersedeKey string
}

// QueueKey is a place in a queue.
type QueueKey struct {
	Priority int
	Seq      int64
}

// Queues reads queues.
type Queues interface {
	// Queue lists up to limit commands of an enrollment after a place: those
	// of one state, or with 0 those that a device can be offered now, in the
	// order in which it is. ErrNotFound if there is no such enrollment.
	Queue(ctx context.Context, scope Scope, id string, state State, after QueueKey, limit int) ([]QueueItem, error)
	// QueueItem reads one, or fails with ErrNotFound.
	QueueItem(ctx context.Context, scope Scope, id, commandUUID string) (*QueueItem, error)
	// CommandResult reads the result of one, or fails with ErrNotFound.
	CommandResult(ctx context.Context, scope Scope, id, commandUUID string) (*CommandResult, error)
}

// CommandResult is what a device reported of a command.
type CommandResult struct {
	Status string // the device's word
	// Late: the command had been cancelled, had expired or been superseded.
	Late      bool
	CreatedAt time.Time
	Raw       []byte // the property list
}

// CommandFilter chooses commands; zero fields ask for nothing.
type CommandFilter struct {
	RequestType string
	// State is one that the command is in for some enrollment.
	State         State
	CreatedAfter  time.Time // or at that time
	CreatedBefore time.Time
}

// CommandKey is a place in the list of commands.
type CommandKey struct {
	At   time.Time
	UUID string
}

// CommandInfo is a command and how many enrollments it is in each state for.
type CommandInfo struct {
	UUID        string
	RequestType string
	CreatedAt   time.Time
	States      map[State]int64
	// Counted is how many were counted if there are more.
	Counted int64
}

// Commands reads commands. In a Scope, a command is there if it is for one of
// the scope's enrollments, and others' are not counted.
type Commands interface {
	// FindCommands returns up to limit commands after a place, newest first,
	// and where to go on, zero at the end. It looks at a bounded number of
	// them, so that a page may be short, or empty, before the end; and it
	// counts a bounded number of enrollments of each.
	FindCommands(ctx context.Context, scope Scope, f CommandFilter, after CommandKey, limit int) (list []CommandInfo, next CommandKey, err error)
	// Command reads one and counts all, or fails with ErrNotFound.
	Command(ctx context.Context, scope Scope, uuid string) (*CommandInfo, error)
	// CommandItems lists up to limit of a command's enrollments after one, by
	// id: all, or those in a state.
	CommandItems(ctx context.Context, scope Scope, uuid string, state State, after string, limit int) ([]QueueItem, error)
	// CommandPayloads reads the property lists of commands as they were queued,
	// by CommandUUID; those that do not exist are missing. It asks for no
	// scope: the caller has the commands from a list that did.
	CommandPayloads(ctx context.Context, uuids []string) (map[string][]byte, error)
	// CommandWaits says whether the command waits for an enrollment.
	CommandWaits(ctx context.Context, scope Scope, uuid string) (bool, error)
}

// Steering changes what waits. A report of a device at the same moment and
// what is done here come one after the other: a row ends once. The record is
// appended with the change, if there is one.
type Steering interface {
	// CancelItem cancels one command of an enrollment, if it waits, and
	// returns the state that it was in; if that is terminal nothing has
	// changed. ErrNotFound if there is none.
	CancelItem(ctx context.Context, scope Scope, id, commandUUID string, r *AuditRecord) (was State, err error)
	// CancelCommand cancels a command for all enrollments that it waits for,
	// in chunks of a transaction each, and returns for how many, and for how
	// many it had ended before. Repeating it is safe. ErrNotFound as Command.
	CancelCommand(ctx context.Context, scope Scope, uuid string) (cancelled, finished int64, err error)
	// ClearQueue cancels all that waits for an enrollment at that moment, in
	// chunks, and returns how many. ErrNotFound if there is no such
	// enrollment.
	ClearQueue(ctx context.Context, scope Scope, id string) (cancelled int64, err error)
	// Requeue queues a command again that Requeueable lets, behind what waits,
	// makes a push owed for it, and removes the result that there was, since a
	// new one is to come. It returns the state that the row was in; one that
	// is not Requeueable is left. An expiry that has passed is dropped.
	// ErrNotFound if there is no such row or its command is gone,
	// ErrNotEnrolled as Enqueue.
	Requeue(ctx context.Context, scope Scope, id, commandUUID string, r *AuditRecord) (was State, err error)
}

// Requeueable says whether a row that ended so can be queued again.
func (s State) Requeueable() bool {
	return s == Failed || s == FormatError || s == Cancelled || s == Expired
}

// EnrollmentSteering changes enrollments for an operator.
type EnrollmentSteering interface {
	// SetDisabled sets or clears the flag of operators on an enrollment, and
	// if it is a device on its user channels, and returns whose. Commands stay
	// queued, and are neither offered nor pushed; pushes owed are due at once
	// when the flag is cleared. ErrNotFound.
	SetDisabled(ctx context.Context, scope Scope, id string, disabled bool, r *AuditRecord) (ids []string, err error)
	// DeleteEnrollment removes an enrollment, with its queue, results, tokens
	// and activity, and if it is a device with its user channels; one that
	// others' commands and events refer to stays referred to. From its first
	// transaction, which appends the record and writes
	// TopicEnrollmentDeleted, the enrollment is dead; the rest is removed in
	// small ones, and repeating the call finishes one that was interrupted.
	// Certificates of a device are retired and stay so: it can only enroll
	// anew with another one. ErrNotFound; ErrConflict if it enrolled anew
	// while it was removed.
	DeleteEnrollment(ctx context.Context, scope Scope, id string, r *AuditRecord) error
	// SetRenewal opens the renewal windows of devices until a time, or closes
	// them (zero), in chunks, and returns whose. Those that are not there, or
	// are user channels, are left out.
	SetRenewal(ctx context.Context, scope Scope, ids []string, until time.Time) (changed []string, err error)
}

// Secrets reads what only an explicit call may see; that it was read is on
// record before it is returned. The token is nil if there is none; then there
// is no record either. ErrNotFound if there is no such enrollment. That of a
// user channel is its device's.
type Secrets interface {
	BootstrapToken(ctx context.Context, scope Scope, id string, r *AuditRecord) ([]byte, error)
	UnlockToken(ctx context.Context, scope Scope, id string, r *AuditRecord) ([]byte, error)
}
