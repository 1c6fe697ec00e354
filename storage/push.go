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
	// Owed is the number up to which an accepted push pays, Paid the one up to
	// which nothing is owed any more.
	Owed, Paid int64
	// Attempts counts the pushes in a row, since the device last polled, that
	// ended as LastClass says: accepted, or not.
	Attempts  int
	LastClass string // "" if none
}

// PushAccepted is the Class of a push that APNs took.
const PushAccepted = "accepted"

// PushRecord is what became of one push.
type PushRecord struct {
	ID    string
	At    time.Time // when it began
	Class string    // apns.Class in words: "accepted", "token_dead", ...
	// Status and Reason are APNs' own; 0 and an error's text without an answer.
	Status int
	Reason string
	APNsID string
	// Paid raises paid_seq, if the push was accepted; 0 leaves it.
	Paid int64
	// Attempts is the new count.
	Attempts int
	// NextAt is when the sweep looks at the enrollment again; zero is never.
	// A device that polled after the push keeps what its poll said, and so
	// does a debt that an accepted push does not pay.
	NextAt time.Time
	// KeepPlan leaves the time as it stands, in place of NextAt: for a push
	// that ended by its topic's certificate, since a new one may have brought
	// the debt forward before the outcome is stored.
	KeepPlan bool
	// TokenDeadAt is APNs' word that the token is dead since then; zero if it
	// is not. It is ignored if the device sent a token later than that, or
	// later than TokenAt, that of the push. With a dead token nothing is
	// planned, and a push is owed for when a new one comes.
	TokenDeadAt time.Time
	TokenAt     time.Time
}

// PushClaim says which pushes a sweep takes.
type PushClaim struct {
	// Now is when a push has to be due by, Until when a later sweep finds it
	// again if this one comes to nothing.
	Now, Until time.Time
	// Skip are topics that are passed over, with the version of the
	// certificate that was refused, 0 if there was none. What is due for them
	// is put off until SkipUntil; a new certificate brings it back. If there
	// is one already, it is put off until RenewedUntil, by when the sweeper
	// knows of it.
	Skip         map[string]int64
	SkipUntil    time.Time
	RenewedUntil time.Time
	// Limit bounds how many are taken; it must be at least 1.
	Limit int
	// Silence is how long a device that polled and was left with commands may
	// stay silent before it is pushed again; 0 pushes no device again that was
	// pushed since its last debt.
	Silence time.Duration
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
	// ClaimDuePushes returns enrollments whose push time has come and moves
	// that time to Until, so that a sweep that dies with them is made good by
	// a later one. Debts come first, earliest first, but a quarter of the
	// limit is kept for silent devices with commands, of which those that find
	// no room are put off; so neither kind waits for all of the other. more
	// says that it is worth to ask again at once. The lease is checked in the
	// same transaction (ErrLeaseLost).
	ClaimDuePushes(ctx context.Context, l Lease, c PushClaim) (targets []PushTarget, more bool, err error)
	// RecordPushes stores outcomes, in batches and in key order. Of several
	// for one enrollment the last counts.
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
	// StorePushCert stores or replaces the certificate of its topic, and sets
	// Version. Pushes owed to the topic's enrollments that were put off are
	// due again then.
	StorePushCert(ctx context.Context, c *PushCert) error
	// PushCert reads one, or ErrNotFound.
	PushCert(ctx context.Context, topic string) (*PushCert, error)
	// PushCertVersion reads the version alone, or ErrNotFound.
	PushCertVersion(ctx context.Context, topic string) (int64, error)
	// PushCertInfos lists them by topic. Enrollments may be a little old, as
	// in Statistics.
	PushCertInfos(ctx context.Context, scope Scope) ([]PushCertInfo, error)
	// RecordPushCertOutcome notes the topic's last outcome.
	RecordPushCertOutcome(ctx context.Context, topic, class string, at time.Time) error
	// StrandedEnrollments counts enabled enrollments by topics that have no
	// push certificate; they may be a little old, as in Statistics.
	StrandedEnrollments(ctx context.Context) (map[string]int64, error)
}
