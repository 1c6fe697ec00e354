package storage

import (
	"context"
	"time"
)

// CauseUnreadable is the cause of reports that could not be read.
const CauseUnreadable = "unreadable_report"

// CauseForeignCertificate is the cause of requests whose certificate is pinned to
// another enrollment.
const CauseForeignCertificate = "certificate_not_pinned"

// DeviceRefusal is what happened to requests of one kind with one certificate.
type DeviceRefusal struct {
	Certificate string // hash, as in Pin
	Enrollment  string // the id that the messages named; empty if none was read
	Cause       string
	Count       int
	First, Last time.Time
	Detail      string // of the last one, in the words of the log
}

// EnrollmentRefusal is what is known of an enrollment's refused requests.
type EnrollmentRefusal struct {
	Cause string
	Count int64
	// Other is another enrollment that the last one was about: with
	// CauseForeignCertificate the one that the certificate is pinned to, or the
	// one that it was shown for.
	Other       string
	Detail      string
	First, Last time.Time
}

// Refusals keeps which requests of enrollments were refused: one row for each
// enrollment and cause.
type Refusals interface {
	// RecordRefusals counts refusals for the enrollments that the certificates
	// are pinned to, or were, and for those that the messages named. Others that
	// do not exist are left out.
	RecordRefusals(ctx context.Context, refusals []DeviceRefusal) error
	// EnrollmentRefusals lists the refusals of an enrollment, the newest first.
	EnrollmentRefusals(ctx context.Context, id string) ([]EnrollmentRefusal, error)
}
