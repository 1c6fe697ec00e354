package storage

import (
	"context"
	"time"
)

// PushTarget is an enrollment that can be woken.
type PushTarget struct {
	ID    string
	Topic string
	Magic string
	Token []byte
	// TokenAt is when the device last sent the token.
	TokenAt time.Time
	// Owed is the number up to which an accepted push pays.
	Owed int64
	// Attempts counts the pushes since the device last polled.
	Attempts int
}

// PushRecord is what became of one push.
type PushRecord struct {
	ID    string
	At    time.Time
	Class string // apns.Class in words: "accepted", "token_dead", ...
	// Status and Reason are APNs' own; 0 and an error's text without an answer.
	Status int
	Reason string
	APNsID string
	// Paid raises paid_seq, if the push was accepted; 0 leaves it.
	Paid int64
	// Attempts is the new count.
	Attempts int
	// NextAt is when the sweep looks at the enrollment again; zero is never.
	// A device that polled after the push keeps what its poll said.
	NextAt time.Time
	// TokenDeadAt is APNs' word that the token is dead since then; zero if it
	// is not. It is ignored if the device sent its token later than that.
	TokenDeadAt time.Time
}

// PushState is what is known of an enrollment's pushes, for operators.
type PushState struct {
	Owed        bool
	Attempts    int
	LastAt      time.Time // zero: never pushed
	LastClass   string
	LastStatus  int
	LastReason  string
	LastAPNsID  string
	NextAt      time.Time // zero: nothing planned
	TokenDeadAt time.Time // zero: alive, as far as APNs said
}

// Pushes keeps what is owed and what was sent.
type Pushes interface {
	// PushTargets looks ids up. Those that are unknown, disabled, checked out
	// or have a dead token are in failed (ErrNotEnrolled, ErrTokenDead).
	PushTargets(ctx context.Context, scope Scope, ids []string) (targets []PushTarget, failed map[string]error, err error)
	// OwePush makes a push owed, as enqueueing does, to pushable ids and plans
	// it for at. Others are in failed as PushTargets has it.
	OwePush(ctx context.Context, scope Scope, ids []string, at time.Time) (failed map[string]error, err error)
	// ClaimDuePushes returns up to limit enrollments whose push time has come,
	// earliest first, and moves their time to until, so that a sweep that dies
	// with them is made good by a later one. Topics in skip are passed over.
	// The lease is checked in the same transaction (ErrLeaseLost).
	ClaimDuePushes(ctx context.Context, l Lease, now, until time.Time, skip []string, limit int) ([]PushTarget, error)
	// RecordPushes stores outcomes, in batches and in key order.
	RecordPushes(ctx context.Context, records []PushRecord) error
	// PushStates reads what is known of ids; unknown ones are left out.
	PushStates(ctx context.Context, scope Scope, ids []string) (map[string]PushState, error)
	// CountOwedPushes counts enrollments that are owed a push now.
	CountOwedPushes(ctx context.Context) (int64, error)
}

// PushCert is an APNs push certificate with its private key.
type PushCert struct {
	Topic    string
	CertPEM  []byte
	KeyPEM   []byte // unencrypted; the store seals it
	NotAfter time.Time
	// Version grows with each upload of the topic.
	Version int64
}

// PushCertInfo is what may be listed of a push certificate.
type PushCertInfo struct {
	Topic       string
	NotAfter    time.Time
	Version     int64
	UpdatedAt   time.Time
	Enrollments int64  // enabled ones of this topic
	LastClass   string // of the topic's last push; "" if none
	LastAt      time.Time
}

// PushCerts keeps the push certificates.
type PushCerts interface {
	// StorePushCert stores or replaces the certificate of its topic.
	StorePushCert(ctx context.Context, c *PushCert) error
	// PushCert reads one, or ErrNotFound.
	PushCert(ctx context.Context, topic string) (*PushCert, error)
	// PushCertVersion reads the version alone, or ErrNotFound.
	PushCertVersion(ctx context.Context, topic string) (int64, error)
	// PushCertInfos lists them by topic.
	PushCertInfos(ctx context.Context, scope Scope) ([]PushCertInfo, error)
	// RecordPushCertOutcome notes the topic's last outcome.
	RecordPushCertOutcome(ctx context.Context, topic, class string, at time.Time) error
	// StrandedEnrollments counts enabled enrollments by topics that have no
	// push certificate.
	StrandedEnrollments(ctx context.Context) (map[string]int64, error)
}
