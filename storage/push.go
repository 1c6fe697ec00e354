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
	// Owed is owed_seq: an accepted push raises paid_seq to it. Paid is paid_seq.
	Owed, Paid int64
	// Attempts counts the latest pushes since the device last polled that all
	// were accepted, or all were not, as LastClass says.
	Attempts  int
	LastClass string // "" if none
}

// PushAccepted is the Class of a push that APNs took.
const PushAccepted = "accepted"

// PushRecord is the outcome of one push.
type PushRecord struct {
	ID    string
	At    time.Time // when it began
	Class string    // text of apns.Class: "accepted", "token_dead", ...
	// Status and Reason are APNs' answer; without one, 0 and the text of the error.
	Status int
	Reason string
	APNsID string
	// Paid raises paid_seq, if the push was accepted; 0 leaves it.
	Paid int64
	// Attempts is the new count.
	Attempts int
	// NextAt is the time of the enrollment's next push; zero is never. It does
	// not replace the time that a poll after the push has set, or the time of an
	// owed push that an accepted one does not pay.
	NextAt time.Time
	// KeepPlan leaves the time of the next push as it is, instead of NextAt: for
	// a push that failed by its topic's certificate, since a new certificate may
	// have made the push due before the outcome is stored.
	KeepPlan bool
	// TokenDeadAt is the time since when the token is dead, by APNs; zero if it
	// is not. It is ignored if the device sent a token later than that, or
	// later than TokenAt, the token of the push. A dead token has no next push;
	// a push owed is due when a new token comes.
	TokenDeadAt time.Time
	TokenAt     time.Time
}

// PushClaim chooses the pushes that a sweep claims.
type PushClaim struct {
	// Now is the time at which a claimed push is due. Until is the time at which
	// a later sweep claims it again if this one has no outcome.
	Now, Until time.Time
	// Skip are topics that cannot be pushed, with the version of the refused
	// certificate, 0 if there was none. Their due pushes are put off until
	// SkipUntil, or until a new certificate is stored. If there is a newer one
	// already, they are put off until RenewedUntil, by when the sweeper knows
	// it.
	Skip         map[string]int64
	SkipUntil    time.Time
	RenewedUntil time.Time
	// Limit bounds the claimed pushes; it must be at least 1.
	Limit int
	// Silence is the time after which a device that has polled, and still has
	// waiting commands, is pushed again; with 0 only owed pushes are claimed.
	Silence time.Duration
}

// PushState describes an enrollment's pushes, for operators.
type PushState struct {
	Owed        bool
	Attempts    int
	LastAt      time.Time // zero: never pushed
	LastClass   string
	LastStatus  int
	LastReason  string
	LastAPNsID  string
	NextAt      time.Time // zero: nothing planned
	TokenDeadAt time.Time // zero: APNs has not called it dead
}

// Pushes keeps the pushes owed and the outcomes of pushes.
type Pushes interface {
	// PushTargets looks ids up. Enrollments that are unknown, disabled, checked
	// out or have a dead token are in failed (ErrNotEnrolled, ErrTokenDead).
	PushTargets(ctx context.Context, scope Scope, ids []string) (targets []PushTarget, failed map[string]error, err error)
	// OwePush makes a push owed to pushable ids, as enqueueing does, due at a
	// time. The others are in failed, as for PushTargets.
	OwePush(ctx context.Context, scope Scope, ids []string, at time.Time) (failed map[string]error, err error)
	// ClaimDuePushes returns enrollments whose next push is due and moves its
	// time to Until, so that a later sweep repeats the work of one that died.
	// Owed pushes come first, earliest first, but a quarter of the limit is
	// reserved for silent devices with commands, of which the rest is put off:
	// neither kind waits for all of the other. more says that there may be more
	// due pushes. The transaction checks the lease (ErrLeaseLost).
	ClaimDuePushes(ctx context.Context, l Lease, c PushClaim) (targets []PushTarget, more bool, err error)
	// RecordPushes stores outcomes, in batches and in key order. The last one of
	// an enrollment counts.
	RecordPushes(ctx context.Context, records []PushRecord) error
	// PushStates reads the states of ids, and leaves out unknown ones.
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
	// Version grows with each upload of the topic, also after it was deleted.
	Version int64
}

// PushCertInfo is a push certificate without its secrets.
type PushCertInfo struct {
	Topic       string
	NotAfter    time.Time
	Version     int64
	UpdatedAt   time.Time
	Enrollments int64  // enabled ones of the topic
	LastClass   string // of the topic's last push; "" if none
	LastAt      time.Time
}

// PushCerts keeps the push certificates.
type PushCerts interface {
	// StorePushCert stores or replaces the certificate of its topic, and sets
	// Version. Owed pushes of the topic that were put off are then due.
	StorePushCert(ctx context.Context, c *PushCert) error
	// DeletePushCert removes one, or fails with ErrNotFound. Pushes of the topic
	// stay owed.
	DeletePushCert(ctx context.Context, topic string) error
	// PushCert reads one, or ErrNotFound.
	PushCert(ctx context.Context, topic string) (*PushCert, error)
	// PushCertVersion reads the version alone, or ErrNotFound.
	PushCertVersion(ctx context.Context, topic string) (int64, error)
	// PushCertInfos lists the certificates by topic. Counts of enrollments may
	// be a little old, as in Statistics.
	PushCertInfos(ctx context.Context, scope Scope) ([]PushCertInfo, error)
	// RecordPushCertOutcome notes the topic's last outcome.
	RecordPushCertOutcome(ctx context.Context, topic, class string, at time.Time) error
	// StrandedEnrollments counts the enabled enrollments of topics without a
	// push certificate. Counts may be a little old, as in Statistics.
	StrandedEnrollments(ctx context.Context) (map[string]int64, error)
}
