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

// DeviceRefusal counts refused requests of one cause with one certificate.
type DeviceRefusal struct {
	Certificate string // hash, as in Pin
	Enrollment  string // the id in the messages; empty if none was read
	Cause       string
	Count       int
	First, Last time.Time
	Detail      string // of the last one, as in the log
}

// EnrollmentRefusal describes the refused requests of an enrollment by cause.
type EnrollmentRefusal struct {
	Cause string
	Count int64
	// Other is the other enrollment of the last request: with
	// CauseForeignCertificate the one that the certificate is pinned to, or the
	// one that the message named.
	Other       string
	Detail      string
	First, Last time.Time
}

// Refusals keeps the refused requests of enrollments: one row for each
// enrollment and cause.
type Refusals interface {
	// RecordRefusals counts refusals for the enrollments that the certificates
	// are or were pinned to, and for those that the messages named. It leaves
	// out unknown enrollments.
	RecordRefusals(ctx context.Context, refusals []DeviceRefusal) error
	// EnrollmentRefusals lists the refusals of an enrollment, the newest first.
	EnrollmentRefusals(ctx context.Context, id string) ([]EnrollmentRefusal, error)
}
