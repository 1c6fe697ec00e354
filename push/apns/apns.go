// Package apns sends MDM wake-ups to the Apple Push Notification service.
//
// A [Client] speaks HTTP/2 over TLS 1.2 or later with a client certificate for
// each push topic (device management does not support provider tokens). It
// knows nothing of databases and schedules: it takes a [Notification], sends it,
// and reports an [Outcome]. The caller decides which pushes to send, when to
// retry, and what to do about a refused certificate.
//
// Each topic has a connection pool of its own: as many streams on a connection
// as the server's SETTINGS allow, another connection when all are full, and
// never more than one dial in flight. The client sends a push again on another
// connection when its stream ends with its connection, is refused, or counts as
// unprocessed after a GOAWAY: wake-ups are idempotent, APNs keeps only the last
// one.
//
// Source of headers, payload and reasons: Apple, "Sending notification
// requests to APNs", "Handling notification responses from APNs" and "Sending
// push notifications to devices" (device management).
package apns

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"time"
)

// Errors of an [Outcome], for errors.Is.
var (
	// ErrClosed is reported for pushes handed to a closed [Client].
	ErrClosed = errors.New("apns: client is closed")
	// ErrNoCertificate is returned by a [CertificateSource] that holds no
	// certificate for a topic.
	ErrNoCertificate = errors.New("apns: no push certificate for the topic")
	// ErrTimeout is reported when APNs did not answer within StreamTimeout,
	// or the whole push took longer than PushTimeout.
	ErrTimeout = errors.New("apns: timed out")
	// ErrStalled is reported when the client cancelled an unanswered stream
	// before its deadline, because APNs had answered many younger ones and
	// another push needed its place.
	ErrStalled = errors.New("apns: stream stalled")
)

// Notification is one wake-up for one device or user channel.
type Notification struct {
	// Token is the device token of the enrollment's last TokenUpdate. Apple
	// asks not to assume its length.
	Token []byte
	// Magic is the PushMagic of the same TokenUpdate.
	Magic string
	// Topic is the push topic, com.apple.mgmt. and so on; it selects the
	// certificate.
	Topic string
	// ID is sent as apns-id, a lower-case UUID. One is made if it is empty.
	ID string
}

// Class is the kind of an answer, by what the caller has to do about it.
type Class int

// The classes. The zero Class is none of them.
const (
	// Accepted: APNs took the notification. It may still never reach the
	// device.
	Accepted Class = iota + 1
	// TokenDead: the token is no longer good since Outcome.TokenDeadSince.
	// The enrollment needs a newer TokenUpdate.
	TokenDead
	// DoNotRetry: the same notification will be refused again.
	DoNotRetry
	// OurFault: the request is malformed or misconfigured. Alert a person
	// and do not retry blindly.
	OurFault
	// CertificateFault: the certificate of the whole topic is refused or
	// missing. Stop pushing to the topic and alert a person. The client itself
	// goes on.
	CertificateFault
	// RetryLater: a passing condition. Also every transport failure after the
	// client's own retries, and every refusal without a reason of Apple's: a
	// middlebox sent it.
	RetryLater
)

// String returns a lower-case name, good as a metric label.
func (c Class) String() string {
	switch c {
	case Accepted:
		return "accepted"
	case TokenDead:
		return "token_dead"
	case DoNotRetry:
		return "do_not_retry"
	case OurFault:
		return "our_fault"
	case CertificateFault:
		return "certificate_fault"
	case RetryLater:
		return "retry_later"
	}
	return fmt.Sprintf("class(%d)", int(c))
}

// Outcome is the result of one push.
type Outcome struct {
	// Class tells the caller what to do.
	Class Class
	// Status is the HTTP status of APNs, or 0 if it did not answer.
	Status int
	// Reason is the reason string of APNs, empty on success. It is set without
	// a Status when the client refuses a push that APNs would refuse too, and
	// when it came with a GOAWAY.
	Reason string
	// APNsID is the apns-id of the push.
	APNsID string
	// TokenDeadSince is the time at which APNs confirmed that the token was
	// no longer valid (status 410, UTC, millisecond precision); the zero time
	// if it named none. A TokenUpdate newer than that supersedes it.
	TokenDeadSince time.Time
	// RetryAfter is the least time before a retry, from APNs or from Apple's
	// documentation; 0 leaves it to the caller.
	RetryAfter time.Duration
	// Err is the transport error, if there was no answer. It holds no secret.
	Err error
}

// CertificateSource supplies push certificates by topic.
type CertificateSource interface {
	// PushCertificate returns the certificate and private key to use for
	// topic, with a version that changes whenever the certificate does.
	// It returns an error that wraps [ErrNoCertificate] if there is none. Any
	// other error counts as passing, and the client goes on with the
	// certificate that it holds. The client calls it with the context of one
	// of the pushes that need it, from many goroutines but never twice at once
	// for one topic.
	PushCertificate(ctx context.Context, topic string) (cert tls.Certificate, version string, err error)
}
