package storage

import (
	"context"
	"errors"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// EnrollmentFilter chooses enrollments; zero fields ask for nothing. What is
// said of a device goes for its user channels, too.
type EnrollmentFilter struct {
	Type mdm.EnrollType
	// Enabled: it can be sent commands, that is, it is enrolled and no
	// operator has disabled it.
	Enabled *bool
	Topic   string // APNs'
	Serial  string
	User    string // short name or user id of a user channel
	Tag     string // of the device
	Model   string // model, model name or product name
	// OSVersion is compared as a whole.
	OSVersion      string
	LastSeenBefore time.Time
	LastSeenAfter  time.Time // or at that time
	// Waiting: commands are scheduled, queued or put off for it.
	Waiting *bool
	Push    PushStatus
	// CertificateExpiresBefore looks at the pinned certificate.
	CertificateExpiresBefore time.Time
}

// PushStatus is how an enrollment stands with pushes: one of these, or the
// class of the last push if it was not accepted (RefusedPushes).
type PushStatus string

// The statuses that are no classes.
const (
	// PushOwed: a push is owed.
	PushOwed PushStatus = "owed"
	// PushUnanswered: APNs took the last push, and the device has not come
	// since although something waits for it.
	PushUnanswered PushStatus = "unanswered"
	// PushRefused: the last push was not accepted.
	PushRefused PushStatus = "refused"
	// PushTokenDead: APNs says that the push token is dead, and no new one
	// has come.
	PushTokenDead PushStatus = "token_dead"
)

// RefusedPushes lists the classes of pushes that APNs did not take.
func RefusedPushes() []string {
	return []string{string(PushTokenDead), "do_not_retry", "our_fault", "certificate_fault", "retry_later"}
}

// EnrollmentKey is a place in the list that a filter makes; it is no good for
// another filter.
type EnrollmentKey struct {
	By  string    // the index that the list is read by
	At  time.Time // for indexes by time
	Key string
	ID  string
}

// ErrPlace: a place belongs to another list.
var ErrPlace = errors.New("place is of another list")

// Enrollment is what is known of an enrollment, for operators.
type Enrollment struct {
	ID       string
	DeviceID string // ID, or that of the device of a user channel
	Type     mdm.EnrollType
	Topic    string // APNs'
	// Enabled: it has sent a TokenUpdate and not checked out since.
	Enabled          bool
	OperatorDisabled bool

	SerialNumber, DeviceName, Model, ModelName, ProductName string
	OSVersion, BuildVersion, IMEI, MEID                     string
	UserID, UserShortName, UserLongName                     string
	Tags                                                    []string // of the device, sorted

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

	// Certificate is the one that acts for the device; nil if there is none.
	Certificate *PinnedCertificate
	Push        PushState
	// Queue counts commands that wait, by state.
	Queue map[State]int64
}

// PinnedCertificate is an identity certificate that acts for a device.
type PinnedCertificate struct {
	Hash     string
	DER      []byte    // nil if it was not kept
	NotAfter time.Time // zero if it is not known
	PinnedAt time.Time
}

// Enrollments lists enrollments. Lists are read by an index, a stretch at a
// time, and never in one transaction: an enrollment whose place in the index
// changes meanwhile may be missed or come twice.
type Enrollments interface {
	// FindEnrollments returns up to limit ids of what the filter chooses, and
	// where to go on, zero at the end. It looks at a bounded number of rows,
	// so that a page may be short, or empty, before the end is reached. A
	// place of another list is ErrPlace.
	FindEnrollments(ctx context.Context, scope Scope, f EnrollmentFilter, after EnrollmentKey, limit int) (ids []string, next EnrollmentKey, err error)
	// Enrollments reads enrollments in the order of ids, at most 1000; unknown
	// ones are left out.
	Enrollments(ctx context.Context, scope Scope, ids []string) ([]Enrollment, error)
	// UserChannels lists up to limit user channels of a device, by id.
	UserChannels(ctx context.Context, scope Scope, device string, limit int) ([]string, error)
}

// Statistics counts what there is, for operators. Counts of queue rows stop at
// StatisticsLimit for each state.
type Statistics struct {
	ByType           map[mdm.EnrollType]int64
	Enabled          int64 // and not disabled by an operator
	Disabled         int64 // by an operator
	NotEnrolled      int64 // checked out, or no TokenUpdate yet
	Queue            map[State]int64
	OldestWaiting    time.Time // when the oldest command that waits was queued; zero: none
	PushesOwed       int64
	PushesUnanswered int64
}

// StatisticsLimit is where counts of rows that may be very many stop.
const StatisticsLimit = 100_000

// Inventory counts, and knows what else a diagnosis needs.
type Inventory interface {
	// Statistics counts. In a Scope only what waits is counted of the queue.
	// Numbers of enrollments may be up to twenty times as old as counting them
	// takes, and never are if that takes less than a tenth of a second.
	Statistics(ctx context.Context, scope Scope) (*Statistics, error)
	// PushCertState is what PushCertInfos says of one topic, without the
	// number of enrollments, or ErrNotFound.
	PushCertState(ctx context.Context, topic string) (*PushCertInfo, error)
}
