package storage

import (
	"context"
	"errors"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// EnrollmentFilter chooses enrollments; zero fields choose all. A condition on
// a device also chooses its user channels.
type EnrollmentFilter struct {
	Type mdm.EnrollType
	// Enabled: it can get commands, since it is enrolled and no operator has
	// disabled it.
	Enabled *bool
	Topic   string // APNs topic
	Serial  string
	User    string // short name or user id of a user channel
	Tag     string // of the device
	Model   string // model, model name or product name
	// OSVersion is compared as a whole, the others by the numbers in it.
	OSVersion      string
	OSVersionBelow string
	OSVersionFrom  string // or newer
	// Supervised and FileVault look at the device's last answers.
	Supervised     *bool
	FileVault      *bool
	LastSeenBefore time.Time
	LastSeenAfter  time.Time // or at that time
	// Waiting: it has commands that are scheduled, queued or refused by NotNow.
	Waiting *bool
	Push    PushStatus
	// CertificateExpiresBefore is a condition on the pinned certificate.
	CertificateExpiresBefore time.Time
}

// PushStatus is one of these, or the class of an enrollment's last push if it
// was not accepted (RefusedPushes).
type PushStatus string

// The statuses that are not classes.
const (
	// PushOwed: a push is owed.
	PushOwed PushStatus = "owed"
	// PushUnanswered: APNs accepted the last push, and the device has not polled
	// since, although commands wait for it.
	PushUnanswered PushStatus = "unanswered"
	// PushRefused: the last push was not accepted.
	PushRefused PushStatus = "refused"
	// PushTokenDead: APNs has called the push token dead, and the device has
	// sent no new one.
	PushTokenDead PushStatus = "token_dead"
)

// RefusedPushes lists the classes of pushes that APNs did not accept.
func RefusedPushes() []string {
	return []string{string(PushTokenDead), "do_not_retry", "our_fault", "certificate_fault", "retry_later"}
}

// EnrollmentKey is a place in the list of one filter, and no place in that of
// another.
type EnrollmentKey struct {
	By  string    // the index of the list
	At  time.Time // for indexes by time
	Key string
	ID  string
}

// ErrPlace: the place is one of another filter's list.
var ErrPlace = errors.New("place is of another list")

// Enrollment describes an enrollment, for operators.
type Enrollment struct {
	ID       string
	DeviceID string // ID, or that of the device of a user channel
	Type     mdm.EnrollType
	Topic    string // APNs topic
	// Enabled: it has sent a TokenUpdate and not checked out since.
	Enabled          bool
	OperatorDisabled bool

	SerialNumber, DeviceName, Model, ModelName, ProductName string
	OSVersion, BuildVersion, IMEI, MEID                     string
	UserID, UserShortName, UserLongName                     string
	// Supervised and FileVault are of the device's last answers; nil if they
	// are not known.
	Supervised, FileVault *bool
	Tags                  []string // of the device, sorted

	Tally                 int // TokenUpdates since the last Authenticate
	AwaitingConfiguration bool
	HasBootstrapToken     bool
	HasUnlockToken        bool

	// Zero times: never.
	BegunAt      time.Time // the device's last Authenticate
	EnrolledAt   time.Time // first TokenUpdate since the last Authenticate
	CreatedAt    time.Time
	LastSeenAt   time.Time
	RenewalUntil time.Time

	// Certificate acts for the device; nil if there is none.
	Certificate *PinnedCertificate
	Push        PushState
	// Queue counts waiting commands by state.
	Queue map[State]int64
}

// PinnedCertificate is an identity certificate that acts for a device.
type PinnedCertificate struct {
	Hash     string
	DER      []byte    // nil if it was not kept
	NotAfter time.Time // zero if unknown
	PinnedAt time.Time
}

// Enrollments lists enrollments. A list is read by an index, in several
// transactions: an enrollment whose place in the index changes meanwhile may be
// missed or come twice.
type Enrollments interface {
	// FindEnrollments returns up to limit ids that the filter chooses, and the
	// place to continue at, zero at the end. It reads a bounded number of rows,
	// so that a page may be short, or empty, before the end. A place of another
	// list fails with ErrPlace.
	FindEnrollments(ctx context.Context, scope Scope, f EnrollmentFilter, after EnrollmentKey, limit int) (ids []string, next EnrollmentKey, err error)
	// Enrollments reads at most 1000 enrollments, sorted by id, and leaves out
	// unknown ones.
	Enrollments(ctx context.Context, scope Scope, ids []string) ([]Enrollment, error)
	// UserChannels lists up to limit user channels of a device, by id.
	UserChannels(ctx context.Context, scope Scope, device string, limit int) ([]string, error)
}

// DeviceInventory is what a device answered last. A part is nil, and its time
// zero, if there is no answer.
type DeviceInventory struct {
	// Information has the newest value of each answer to DeviceInformation.
	Information    *mdm.DeviceInformation
	InformationAt  time.Time
	Security       *mdm.SecurityInfo
	SecurityAt     time.Time
	Applications   *mdm.Applications
	ApplicationsAt time.Time
}

// Inventories reads what devices answered.
type Inventories interface {
	// DeviceInventory reads the answers of a device, or of that of a user
	// channel. ErrNotFound if there is no such enrollment. Callers with a scope
	// do not see answers from before the device came to its topic.
	DeviceInventory(ctx context.Context, scope Scope, id string) (*DeviceInventory, error)
}

// Statistics are counts, for operators. Counts of queue rows stop at
// StatisticsLimit for each state.
type Statistics struct {
	ByType           map[mdm.EnrollType]int64
	Enabled          int64 // and not disabled by an operator
	Disabled         int64 // by an operator
	NotEnrolled      int64 // checked out, or no TokenUpdate yet
	Queue            map[State]int64
	OldestWaiting    time.Time // when the oldest waiting command was queued; zero: none
	PushesOwed       int64
	PushesUnanswered int64
}

// StatisticsLimit is the number at which counts of queue rows stop.
const StatisticsLimit = 100_000

// Overview counts rows, and reads the state of push certificates.
type Overview interface {
	// Statistics counts. In a Scope it counts only waiting queue rows. Counts
	// of enrollments may be up to twenty times as old as counting takes; they
	// are never old if counting takes less than a tenth of a second.
	Statistics(ctx context.Context, scope Scope) (*Statistics, error)
	// PushCertState is PushCertInfos for one topic, without the number of
	// enrollments, or ErrNotFound.
	PushCertState(ctx context.Context, topic string) (*PushCertInfo, error)
}
