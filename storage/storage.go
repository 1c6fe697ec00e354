// Package storage defines the records that the daemon keeps, the interfaces to
// them with their contracts, and their errors. Package sqlstore implements the
// interfaces and package storagetest tests the contracts.
//
// Unless a method says otherwise, every method may be called by any number of
// goroutines and replicas at once, returns only after its change is committed
// durably, and repeats transactions that the database calls retryable.
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
	// ErrTopicCA: the CA that issued the certificate may not enroll devices to
	// the APNs topic of the message.
	ErrTopicCA = errors.New("another CA enrolls devices to this APNs topic")
	// ErrOwnWord: the message is a copy from another server, and the device
	// itself has since sent messages to this one.
	ErrOwnWord = errors.New("the device has spoken to this server itself since, and its own messages count; delete the enrollment to begin anew")
	// ErrUnconfirmed: the certificate may be pinned once Pin.Unconfirmed is
	// settled.
	ErrUnconfirmed = errors.New("certificate is not confirmed yet")
	// ErrTokenDead: APNs said that the push token is no longer valid; the
	// device has to send a new one.
	ErrTokenDead = errors.New("push token is dead")
	// ErrConflict: a record of that name exists with other contents.
	ErrConflict = errors.New("exists with other contents")
	// ErrKeyUsed: an earlier call with that idempotency key had other contents
	// or another CommandUUID.
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
	// NotAfter is when it expires. An expired certificate acts for the device that
	// it is pinned to, if the caller allows it, and is never pinned.
	NotAfter time.Time
	// Retro allows to pin this certificate to an existing enrollment without
	// one.
	Retro bool
	// Reenroll and Renewal say whether it may replace the pinned certificate of
	// an enrollment.
	Reenroll Reenroll
	Renewal  Renewal
	// Unconfirmed: another server has to agree before it is pinned. An operation
	// that would pin it fails with ErrUnconfirmed.
	Unconfirmed bool
	// EnrollsTo says whether the CA that issued the certificate enrolls devices
	// to an APNs topic; nil: to all. Where it does not, an Authenticate with that
	// topic fails with ErrTopicCA, and so does an operation that would pin the
	// certificate to an enrollment of that topic or set that topic. Audit records
	// say so, one for each device in an hour and 100 in all.
	EnrollsTo func(topic string) bool
}

// Source is the channel that sent a message, its certificate, and the events to
// store with the change.
type Source struct {
	Enroll mdm.EnrollID
	Pin    *Pin // nil: identity is not checked (migration)
	// Copy marks a message that another server kept. A copy undoes nothing: an
	// Authenticate that the store has already, byte for byte, has no effect,
	// and once the device has a live certificate here, a copy that differs from
	// the stored message fails with ErrOwnWord.
	Copy   bool
	Events []Event
	// GivenUp says whether the client may have given the message up, so that the
	// device may have sent others since. The store calls it inside the
	// transaction, once the device is locked, for messages whose order matters:
	// Authenticate, TokenUpdate, CheckOut and SetBootstrapToken, which then fail
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
// sets their tallies to zero, cancels their waiting commands and clears the
// bootstrap token. While a renewal window is open, queue, tokens and user
// channels stay. It fails with ErrIdentity if the certificate is pinned to
// another device, was retired, or may not replace the pinned one (Pin.Reenroll).
//
// Authenticate sets the APNs topic of the device. Another topic than before
// moves the device to another tenant: a renewal window does not count, the
// unlock token is cleared, the user channels have no topic until their next
// TokenUpdate, and a Scope of topics sees no older queue rows and results.
type Authenticate struct {
	Src     Source
	Message *mdm.Authenticate
}

// TokenUpdate stores the push token of a channel and enables the channel. The
// unlock token is kept if the message has none. The device must have sent Authenticate
// once, and for a user channel the device's enrollment must exist; else
// ErrNotEnrolled. A device's topic must be that of its Authenticate, if that
// had one; else ErrTopic, with an audit record each hour at most. A user
// channel gets its device's topic, whatever the message has. An enrollment that
// an operator disabled stays disabled.
type TokenUpdate struct {
	Src     Source
	Message *mdm.TokenUpdate
}

// CheckOut disables the device's enrollment and its user channels, cancels their
// waiting commands and clears the bootstrap token. An unknown device is no
// error.
type CheckOut struct {
	Src Source
}

// SetBootstrapToken replaces the device's bootstrap token; empty deletes it.
type SetBootstrapToken struct {
	Src   Source
	Token []byte
}

// GetBootstrapToken reads the bootstrap token (Outcome.BootstrapToken, empty if
// there is none).
type GetBootstrapToken struct {
	Src Source
}

// UserAuthenticate keeps the raw message of a user that is about to log in.
type UserAuthenticate struct {
	Src     Source
	Message *mdm.UserAuthenticate
}

// Seen checks the certificate and notes that the channel sent a message.
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
// order. A row that is refused in a conversation is not offered again in it, on
// any connection or replica. A report other than NotNow that is answered empty
// while notnow rows wait makes a push owed. A disabled or unknown enrollment
// with an acceptable certificate gets no command.
type Report struct {
	Src         Source
	Status      mdm.Status
	CommandUUID string
	Raw         []byte
	// Inventory is what the report says about the device; nil if nothing. It
	// becomes the newest of its kind (Inventories) if the report ends a row of
	// the device channel. A list of applications does if the command asks for
	// all. Names, model and OS of the device are updated by it, too.
	Inventory *mdm.Inventory
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

// Outcome is the result of an Op, which sets the fields that are its own.
type Outcome struct {
	Command        *mdm.Command // Report: the next one, nil if none
	Tally          int          // TokenUpdate: how many since the last Authenticate
	BootstrapToken []byte       // GetBootstrapToken
}

// Devices is the device side of the store.
type Devices interface {
	// Apply carries out one Op. It fails with ErrIdentity, ErrNotEnrolled
	// (TokenUpdate, SetBootstrapToken and UserAuthenticate of an unknown
	// device), ErrBusy, or the database's error. An Op that fails does not
	// change others of the same group commit.
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

// State is the state of a queue row. The numbers are stored.
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

// String returns the API's word.
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

// Enqueue is one command to queue for many enrollments.
type Enqueue struct {
	Command *mdm.Command
	IDs     []string // enrollment ids; repeated ones count once
	// NoPush makes no push owed.
	NoPush bool
	// Priority: higher goes first; 0 is usual.
	Priority int
	// NotBefore keeps the rows scheduled until then; zero is at once.
	NotBefore time.Time
	// ExpiresAt ends rows that are still waiting then; zero is never.
	ExpiresAt time.Time
	// SupersedeKey replaces waiting rows of the same enrollment and key; empty
	// replaces none.
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
	Caller string // name of the API key
	Key    string
	Digest string // of all contents of the call
	// Repeated is set by Enqueue: an earlier call had done everything.
	Repeated bool
}

// Enqueued is the record of a call with an idempotency key.
type Enqueued struct {
	CommandUUID string
	Digest      string
	Count       int // of the call's different ids
	Done        bool
	// Failed are ids that failed, up to 10,000 of them.
	Failed []string
}

// Enqueuer queues commands.
type Enqueuer interface {
	// Enqueue queues the command for each id in chunks of one transaction
	// each, makes a push owed for it, and returns an error for each id that
	// failed (ErrNotEnrolled). If the CommandUUID exists with the same bytes,
	// the call has no effect on the ids that have it, and queues the command for
	// the others; with other bytes the call fails with ErrConflict. An error of
	// the call itself means that the ids after some chunk were not queued;
	// repeating the call is safe.
	//
	// With Once a chunk is done once, also if its rows have changed since: a
	// repeated call does the chunks that are left, usually none, and concurrent
	// calls share them. The first call sets Digest and CommandUUID; calls with
	// others fail with ErrKeyUsed.
	Enqueue(ctx context.Context, scope Scope, e *Enqueue) (failed map[string]error, err error)
	// FindEnqueued reads the record of a call, or fails with ErrNotFound. The
	// record is as durable as a write when it returns.
	FindEnqueued(ctx context.Context, caller, key string) (*Enqueued, error)
}

// EnqueueUpkeep bounds the records of calls.
type EnqueueUpkeep interface {
	// ForgetEnqueued removes up to limit of the oldest records from before a
	// time and returns how many, under a lease (ErrLeaseLost).
	ForgetEnqueued(ctx context.Context, l Lease, before time.Time, limit int) (int, error)
}

// Lease is the right of one replica to do a periodic job.
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
	// PeekLease reads a lease; one that no replica ever had is zero but for the
	// name.
	PeekLease(ctx context.Context, name string) (Lease, error)
	// TakeLease makes holder the holder and raises Fence and Beat if the lease
	// is still as seen; else it fails with ErrLeaseLost. The caller must have seen
	// it unchanged for the whole time to live on its own monotonic clock, or
	// seen it free (Holder empty).
	TakeLease(ctx context.Context, seen Lease, holder string) (Lease, error)
	// RenewLease raises Beat if Holder and Fence are unchanged; else it fails
	// with ErrLeaseLost.
	RenewLease(ctx context.Context, l Lease) (Lease, error)
	// ReleaseLease frees the lease if Holder and Fence are unchanged. It is no
	// error if they are not.
	ReleaseLease(ctx context.Context, l Lease) error
}

// Health says whether the store can serve.
type Health interface {
	// Ping reaches the database and checks that its schema is one that this
	// program serves.
	Ping(ctx context.Context) error
}
