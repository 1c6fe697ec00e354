package storage

import (
	"context"
	"time"
)

// States lists all states of queue rows.
func States() []State {
	return []State{Scheduled, Queued, NotNow, Acknowledged, Failed, FormatError, Cancelled, Expired, Superseded}
}

// QueueItem is a command in the queue of an enrollment, and its state.
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
	// Attempts counts the offers that the device did not answer within five
	// seconds. It may lag as last-seen times do.
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
	// in a state, or with 0 those that the device can be offered now, in the
	// order of the offers. ErrNotFound if there is no such enrollment.
	Queue(ctx context.Context, scope Scope, id string, state State, after QueueKey, limit int) ([]QueueItem, error)
	// QueueItem reads one, or fails with ErrNotFound.
	QueueItem(ctx context.Context, scope Scope, id, commandUUID string) (*QueueItem, error)
	// CommandResult reads the result of one, or fails with ErrNotFound.
	CommandResult(ctx context.Context, scope Scope, id, commandUUID string) (*CommandResult, error)
}

// CommandResult is a device's report about a command.
type CommandResult struct {
	Status string // as the device reported it
	// Late: the command had been cancelled, had expired or been superseded.
	Late      bool
	CreatedAt time.Time
	Raw       []byte // the property list
}

// CommandFilter chooses commands; zero fields choose all.
type CommandFilter struct {
	RequestType string
	// State is the state of the command in some enrollment's queue.
	State         State
	CreatedAfter  time.Time // or at that time
	CreatedBefore time.Time
}

// CommandKey is a place in the list of commands.
type CommandKey struct {
	At   time.Time
	UUID string
}

// CommandInfo is a command, with the number of its queue rows in each state.
type CommandInfo struct {
	UUID        string
	RequestType string
	CreatedAt   time.Time
	States      map[State]int64
	// Counted is the number of rows that were counted if there are more.
	Counted int64
}

// Commands reads commands. A Scope has the commands that are queued for one of
// its enrollments, and only rows of its enrollments count.
type Commands interface {
	// FindCommands returns up to limit commands after a place, newest first,
	// and the place to continue at, zero at the end. It reads a bounded number
	// of commands, so that a page may be short, or empty, before the end, and
	// counts a bounded number of rows of each.
	FindCommands(ctx context.Context, scope Scope, f CommandFilter, after CommandKey, limit int) (list []CommandInfo, next CommandKey, err error)
	// Command reads one and counts all of its rows, or fails with ErrNotFound.
	Command(ctx context.Context, scope Scope, uuid string) (*CommandInfo, error)
	// CommandItems lists up to limit queue rows of a command after an
	// enrollment, by its id: all, or those in a state.
	CommandItems(ctx context.Context, scope Scope, uuid string, state State, after string, limit int) ([]QueueItem, error)
	// CommandPayloads reads the property lists of commands as they were queued,
	// by CommandUUID, and leaves out unknown ones. It takes no Scope: the
	// caller has the commands from a list that took one.
	CommandPayloads(ctx context.Context, uuids []string) (map[string][]byte, error)
	// CommandWaits says whether the command waits for an enrollment.
	CommandWaits(ctx context.Context, scope Scope, uuid string) (bool, error)
}

// Steering changes queues for an operator. A concurrent report of the device
// comes before or after the change: a row ends once. The audit record, if not
// nil, is appended with the change.
type Steering interface {
	// CancelItem cancels a waiting command of an enrollment, and returns its
	// former state; if that is terminal nothing has changed. ErrNotFound if
	// there is none.
	CancelItem(ctx context.Context, scope Scope, id, commandUUID string, r *AuditRecord) (was State, err error)
	// CancelCommand cancels the waiting rows of a command, in chunks of one
	// transaction each, and returns how many it cancelled, and how many had
	// ended before. Repeating the call is safe. ErrNotFound as Command.
	CancelCommand(ctx context.Context, scope Scope, uuid string) (cancelled, finished int64, err error)
	// ClearQueue cancels the waiting commands of an enrollment, in chunks, and
	// returns how many. ErrNotFound if there is no such enrollment.
	ClearQueue(ctx context.Context, scope Scope, id string) (cancelled int64, err error)
	// Requeue queues a Requeueable command again, after the waiting ones, makes
	// a push owed for it, and removes its result, since a new one will come. It
	// returns the row's former state; a row that is not Requeueable stays as it
	// is. An expiry that has passed is cleared.
	// ErrNotFound if there is no such row or its command is gone,
	// ErrNotEnrolled as Enqueue.
	Requeue(ctx context.Context, scope Scope, id, commandUUID string, r *AuditRecord) (was State, err error)
}

// Requeueable says whether a row in this state can be queued again.
func (s State) Requeueable() bool {
	return s == Failed || s == FormatError || s == Cancelled || s == Expired
}

// EnrollmentSteering changes enrollments for an operator.
type EnrollmentSteering interface {
	// SetDisabled sets or clears an enrollment's flag of operators, and those of
	// a device's user channels, and returns the changed ids. While the flag is
	// set, commands stay queued, and are neither offered nor pushed; pushes owed
	// are due at once when it is cleared. ErrNotFound.
	SetDisabled(ctx context.Context, scope Scope, id string, disabled bool, r *AuditRecord) (ids []string, err error)
	// DeleteEnrollment removes an enrollment, with its queue, results, tokens
	// and activity, and those of a device's user channels. Events keep its id.
	// The first transaction appends the record, writes TopicEnrollmentDeleted
	// and ends the enrollment; small ones remove the rest, and repeating the
	// call finishes an interrupted one. The certificates of a device stay
	// retired: it can only enroll again with another one. ErrNotFound;
	// ErrConflict if the device enrolled again meanwhile.
	DeleteEnrollment(ctx context.Context, scope Scope, id string, r *AuditRecord) error
	// SetRenewal opens the renewal windows of devices until a time, or closes
	// them (zero), in chunks, and returns the changed ids. Unknown ids and user
	// channels are left out.
	SetRenewal(ctx context.Context, scope Scope, ids []string, until time.Time) (changed []string, err error)
}

// Secrets reads tokens that no list shows. The audit record is committed before
// a token is returned. The token is nil if there is none; then no record is
// appended. A user channel has its device's token. ErrNotFound if there is no
// such enrollment.
type Secrets interface {
	BootstrapToken(ctx context.Context, scope Scope, id string, r *AuditRecord) ([]byte, error)
	UnlockToken(ctx context.Context, scope Scope, id string, r *AuditRecord) ([]byte, error)
}
