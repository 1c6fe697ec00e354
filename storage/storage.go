// Package storage says what the daemon needs to have kept, and under which
// contracts. It holds records, role interfaces and errors; package sqlstore
// keeps the promise and package storagetest checks it.
//
// Unless a method says otherwise, every method may be called by any number of
// goroutines and replicas at once, returns only after its change is committed
// durably, and retries by itself what the database calls retryable.
package storage

import (
	"context"
	"errors"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrNotFound: the record asked for does not exist (or not in the Scope).
	ErrNotFound = errors.New("not found")
	// ErrNotEnrolled: no such enrollment, or it has checked out, or it has
	// not sent its first TokenUpdate.
	ErrNotEnrolled = errors.New("not enrolled")
	// ErrTooManyChannels: the device has as many users as it may.
	ErrTooManyChannels = errors.New("the device has too many user channels")
	// ErrIdentity: the certificate may not act for this enrollment. It is
	// pinned to another one, was retired by a re-enrollment, or is not pinned
	// and may not be.
	ErrIdentity = errors.New("certificate does not belong to this enrollment")
	// ErrTopic: a TokenUpdate has another APNs topic than the Authenticate that
	// began the enrollment.
	ErrTopic = errors.New("APNs topic is not that of the enrollment")
	// ErrOwnWord: the message is a copy from another server, and the device has
	// spoken here itself.
	ErrOwnWord = errors.New("the device has spoken to this server itself since, and its own messages count; delete the enrollment to begin anew")
	// ErrUnconfirmed: the certificate may be pinned once Pin.Unconfirmed is
	// settled.
	ErrUnconfirmed = errors.New("certificate is not confirmed yet")
	// ErrTokenDead: APNs said that the push token is no longer valid; the
	// device has to send a new one.
	ErrTokenDead = errors.New("push token is dead")
	// ErrConflict: a record of that name exists with other contents.
	ErrConflict = errors.New("exists with other contents")
	// ErrKeyUsed: a call with that idempotency key was made before, with other
	// contents or another CommandUUID.
	ErrKeyUsed = errors.New("idempotency key was used for another call")
	// ErrBusy: a bounded queue in front of the database is full; the caller
	// should ask its client to come again later.
	ErrBusy = errors.New("too busy")
	// ErrGivenUp: the client of a device's message may have given it up, and it
	// was not carried out; see Source.GivenUp.
	ErrGivenUp = errors.New("client may have given the message up")
	// ErrUnavailable: the database is out of reach, or did not answer in time.
	// Whether the change was made is not known; repeating it is safe.
	ErrUnavailable = errors.New("database unavailable")
	// ErrLeaseLost: another holder has taken over; the write was not made.
	ErrLeaseLost = errors.New("lease lost")
	// ErrNotSealing: no key to seal values with was given.
	ErrNotSealing = errors.New("no seal key was given")
	// ErrClosed: the store is closed.
	ErrClosed = errors.New("store is closed")
)

// Scope restricts an operator's call to enrollments, commands and
// certificates of some APNs topics. The zero Scope sees everything.
type Scope struct {
	Topics []string
}

// Pin is the certificate that a device message came with, verified to chain
// to the configured CA.
type Pin struct {
	Hash        string // cryptoutil.CertificateHash: lower-case hex SHA-256 of the DER
	Certificate []byte // DER
	// NotAfter is when it expires. One that has expired acts for the device that
	// it is pinned to, if the caller lets it come so far, and is never pinned.
	NotAfter time.Time
	// Retro allows to pin this certificate to an enrollment that exists and
	// has none.
	Retro bool
	// Reenroll and Renewal say whether it may take over one that has another.
	Reenroll Reenroll
	Renewal  Renewal
	// Unconfirmed: somebody else has to agree before it is pinned. Where it
	// would be, the operation fails with ErrUnconfirmed.
	Unconfirmed bool
}

// Source says which channel speaks, with which certificate, and what is to be
// told to the outside once the change is made.
type Source struct {
	Enroll mdm.EnrollID
	Pin    *Pin // nil: identity is not checked (migration)
	// Copy marks a message that another server kept. It takes nothing back: an
	// Authenticate that the store has already, byte for byte, has no effect,
	// and once the device has a live certificate here every copy that differs
	// from what the store has is ErrOwnWord.
	Copy   bool
	Events []Event
	// GivenUp says whether the client may have given the message up, so that the
	// device may have said other things since. It is asked inside the
	// transaction, once the device is locked, of messages whose order matters:
	// Authenticate, TokenUpdate, CheckOut and SetBootstrapToken. They then fail
	// with ErrGivenUp. Nil is never.
	GivenUp func() bool
}

// Op is one device message as one store operation: in a single transaction it
// checks or pins the certificate, makes the change and inserts the events.
// The concrete types are those of this package.
type Op interface {
	Source() *Source
	op()
}

// Authenticate begins an enrollment, or begins it anew. It pins the
// certificate to the device and retires the former one, disables the
// device's enrollment and its user channels until their next TokenUpdate,
// sets their tallies to zero, cancels what waits in their queues and clears
// the bootstrap token. While a renewal window is open queue, tokens and
// user channels stay. A certificate that is pinned to another device, was
// retired, or may not take over (Pin.Reenroll), is ErrIdentity.
type Authenticate struct {
	Src     Source
	Message *mdm.Authenticate
}

// An Authenticate sets the APNs topic of the device. Another topic than before
// moves the device: a renewal window does not count, the unlock token is
// cleared, the user channels have no topic until their next TokenUpdate, and a
// Scope of topics sees no queue rows and results from before.
//
// TokenUpdate stores how to wake a channel and enables it. The unlock token
// is kept if the message has none. The device must have sent Authenticate
// once, and for a user channel the device's enrollment must exist; else
// ErrNotEnrolled. A device's topic must be that of its Authenticate, if that
// had one; else ErrTopic, with an audit record each hour at most. A user
// channel gets its device's topic, whatever the message has. A flag that an operator set to disable it stays.
type TokenUpdate struct {
	Src     Source
	Message *mdm.TokenUpdate
}

// CheckOut disables the device's enrollment and its user channels, cancels
// what waits for them and clears the bootstrap token. An unknown device is no
// error.
type CheckOut struct {
	Src Source
}

// SetBootstrapToken replaces the device's bootstrap token; empty deletes it.
type SetBootstrapToken struct {
	Src   Source
	Token []byte
}

// GetBootstrapToken reads it (Outcome.BootstrapToken, empty if none).
type GetBootstrapToken struct {
	Src Source
}

// UserAuthenticate keeps the raw message of a user that is about to log in.
type UserAuthenticate struct {
	Src     Source
	Message *mdm.UserAuthenticate
}

// Seen checks the certificate and notes that the channel spoke.
type Seen struct {
	Src Source
}

// Report takes a device's report and answers with its next command.
//
// A terminal status (Acknowledged, Error, CommandFormatError) stores the
// result and ends the queue row once; NotNow moves the row to notnow, if it
// is still waiting. A repeated, late or unknown report changes no state and
// is no error; the result of a row that an operator cancelled, or that
// expired or was superseded, is stored as late. CommandUUID may be empty. A
// report that cannot be read (mdm.StatusUnreadable) fails the row that it names,
// or, if it names none, the one that the device was offered and has not answered.
//
// Idle begins a conversation: rows that were refused in an earlier one are
// queued again, in their old places, and Idle is answered from all of them in
// order. A row that is refused in a conversation is not offered again in it,
// whichever connection or replica asks. A non-NotNow report that is answered
// empty while notnow rows wait makes a push owed. A disabled or unknown enrollment with
// an acceptable certificate gets no command.
type Report struct {
	Src         Source
	Status      mdm.Status
	CommandUUID string
	Raw         []byte
}

// Source implements Op.
func (o *Authenticate) Source() *Source      { return &o.Src }
func (o *TokenUpdate) Source() *Source       { return &o.Src }
func (o *CheckOut) Source() *Source          { return &o.Src }
func (o *SetBootstrapToken) Source() *Source { return &o.Src }
func (o *GetBootstrapToken) Source() *Source { return &o.Src }
func (o *UserAuthenticate) Source() *Source  { return &o.Src }
func (o *Seen) Source() *Source              { return &o.Src }
func (o *Report) Source() *Source            { return &o.Src }

func (*Authenticate) op()      {}
func (*TokenUpdate) op()       {}
func (*CheckOut) op()          {}
func (*SetBootstrapToken) op() {}
func (*GetBootstrapToken) op() {}
func (*UserAuthenticate) op()  {}
func (*Seen) op()              {}
func (*Report) op()            {}

// Outcome is what an Op gives back; which fields are set depends on the Op.
type Outcome struct {
	Command        *mdm.Command // Report: the next one, nil if none
	Tally          int          // TokenUpdate: how many since the last Authenticate
	BootstrapToken []byte       // GetBootstrapToken
}

// Devices is the device side of the store.
type Devices interface {
	// Apply carries out one Op. It fails with ErrIdentity, ErrNotEnrolled
	// (TokenUpdate, SetBootstrapToken and UserAuthenticate of an unknown
	// device), ErrBusy, or the database's error. One Op that fails leaves
	// others that were committed together with it alone.
	Apply(ctx context.Context, op Op) (*Outcome, error)
}

// PinnedEnrollments finds the device that a certificate acts for.
type PinnedEnrollments interface {
	// EnrollmentByCertificate returns the device id that the live
	// certificate with this hash is pinned to, or ErrNotFound.
	EnrollmentByCertificate(ctx context.Context, hash string) (id string, err error)
}

// ActiveEnrollments finds the device that a certificate acts for now.
type ActiveEnrollments interface {
	// ActiveEnrollmentByCertificate is EnrollmentByCertificate for devices that
	// are enrolled: the error is ErrNotEnrolled, with the id, if the device has
	// not finished its enrollment, checked out, or was disabled.
	ActiveEnrollmentByCertificate(ctx context.Context, hash string) (id string, err error)
}

// State is where a queue row stands. The numbers are stored.
type State int

// The states; those from Acknowledged on are terminal.
const (
	Scheduled    State = 1 // waits for its not-before time
	Queued       State = 2
	NotNow       State = 3 // refused in this conversation; Idle queues it again
	Acknowledged State = 10
	Failed       State = 11 // the device reported Error
	FormatError  State = 12
	Cancelled    State = 13
	Expired      State = 14
	Superseded   State = 15
)

// Terminal says whether the row has ended.
func (s State) Terminal() bool { return s >= Acknowledged }

// String gives the word the API uses.
func (s State) String() string {
	switch s {
	case Scheduled:
		return "scheduled"
	case Queued:
		return "queued"
	case NotNow:
		return "notnow"
	case Acknowledged:
		return "acknowledged"
	case Failed:
		return "error"
	case FormatError:
		return "format_error"
	case Cancelled:
		return "cancelled"
	case Expired:
		return "expired"
	case Superseded:
		return "superseded"
	}
	return "unknown"
}

// Enqueue asks for one command to be queued for many enrollments.
type Enqueue struct {
	Command *mdm.Command
	IDs     []string // enrollment ids; repeated ones count once
	// NoPush leaves the enrollments unowed a push.
	NoPush bool
	// Priority: higher goes first; 0 is usual.
	Priority int
	// NotBefore keeps the rows scheduled until then; zero is at once.
	NotBefore time.Time
	// ExpiresAt ends rows that still wait then; zero is never.
	ExpiresAt time.Time
	// SupersedeKey replaces rows of the same key that wait for the same
	// enrollment; empty replaces none.
	SupersedeKey string
	// Once, if not nil, makes the call take effect once, however often it is
	// repeated.
	Once *Once
	// Audit, if not nil, is appended together with the first rows. A repeated
	// call appends none.
	Audit *AuditRecord
}

// Once is the idempotency key of a call.
type Once struct {
	Caller string // whose key it is
	Key    string
	Digest string // of everything that the caller asked for
	// Repeated is set by Enqueue: all had been done before.
	Repeated bool
}

// Enqueued is what is remembered of a call with an idempotency key.
type Enqueued struct {
	CommandUUID string
	Digest      string
	Count       int // of the ids that were asked for, each once
	Done        bool
	// Failed are ids that failed, up to 10,000 of them.
	Failed []string
}

// Enqueuer takes commands in.
type Enqueuer interface {
	// Enqueue queues the command for each id in chunks of one transaction
	// each, together with the push that is owed for it, and returns an error
	// for each id that failed (ErrNotEnrolled). A CommandUUID that exists
	// with the same bytes is taken again without effect for the ids that have
	// it, and queued for those that have not; with other bytes the call fails
	// with ErrConflict. An error of the call itself means that the ids after
	// some chunk were not queued; repeating the call is safe.
	//
	// With Once a chunk that was done stays done, whatever became of its rows
	// since: a repeated call does what is left, which is usually nothing, and
	// several at once do each chunk once. The first of them decides about
	// Digest and CommandUUID; others are ErrKeyUsed.
	Enqueue(ctx context.Context, scope Scope, e *Enqueue) (failed map[string]error, err error)
	// FindEnqueued reads what is remembered of a call, or ErrNotFound. What it
	// read is as durable as a write when it returns.
	FindEnqueued(ctx context.Context, caller, key string) (*Enqueued, error)
}

// EnqueueUpkeep bounds what is remembered of calls.
type EnqueueUpkeep interface {
	// ForgetEnqueued forgets up to limit of the oldest calls from before a
	// time and returns how many, under a lease (ErrLeaseLost).
	ForgetEnqueued(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
}

// Lease is the right to do one piece of periodic work, held by one replica.
type Lease struct {
	Name   string
	Holder string
	// Fence grows by one each time the lease changes hands. A write under
	// the lease checks it.
	Fence int64
	// Beat grows with each renewal.
	Beat int64
}

// Leases is the primitive under periodic work. Package storage/lease loops
// over it; nothing here looks at a clock, since wall clocks skew.
type Leases interface {
	// PeekLease reads a lease; the zero Lease with the name if nobody ever
	// had it.
	PeekLease(ctx context.Context, name string) (Lease, error)
	// TakeLease makes holder the holder if the lease still stands as seen,
	// raising Fence and Beat; else ErrLeaseLost. The caller must have seen
	// it unchanged for the whole time to live on its own monotonic clock, or
	// seen it free (Holder empty).
	TakeLease(ctx context.Context, seen Lease, holder string) (Lease, error)
	// RenewLease raises Beat if Holder and Fence still stand; else
	// ErrLeaseLost.
	RenewLease(ctx context.Context, l Lease) (Lease, error)
	// ReleaseLease frees it if Holder and Fence still stand. It is no error
	// if they do not.
	ReleaseLease(ctx context.Context, l Lease) error
}

// Health says whether the store can serve.
type Health interface {
	// Ping reaches the database and checks that the schema is the one this
	// binary knows.
	Ping(ctx context.Context) error
}
