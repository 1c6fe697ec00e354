package apns

import (
	"encoding/json"
	"math"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// The reasons of APNs that the client itself uses.
const (
	reasonBadDeviceToken     = "BadDeviceToken"
	reasonBadMessageID       = "BadMessageId"
	reasonIdleTimeout        = "IdleTimeout"
	reasonMissingDeviceToken = "MissingDeviceToken"
	reasonMissingTopic       = "MissingTopic"
	reasonBadTopic           = "BadTopic"
	reasonPayloadTooLarge    = "PayloadTooLarge"
	reasonShutdown           = "Shutdown"
)

// serverPause is how long Apple asks to wait after an error of the server.
const serverPause = 15 * time.Minute

type statusReason struct {
	status int
	reason string
}

type verdict struct {
	class      Class
	retryAfter time.Duration
}

// verdictOf is the one table from status and reason to class.
//
// Source: Apple, "Handling notification responses from APNs".
func verdictOf(status int, reason string) verdict {
	switch (statusReason{status, reason}) {
	case statusReason{410, "Unregistered"},
		statusReason{410, "ExpiredToken"}:
		return verdict{class: TokenDead}

	case statusReason{400, reasonBadDeviceToken},
		statusReason{400, "DeviceTokenNotForTopic"},
		statusReason{403, "Forbidden"},
		statusReason{413, reasonPayloadTooLarge}:
		return verdict{class: DoNotRetry}

	case statusReason{400, "BadCollapseId"},
		statusReason{400, "BadExpirationDate"},
		statusReason{400, reasonBadMessageID},
		statusReason{400, "BadPriority"},
		statusReason{400, reasonBadTopic},
		statusReason{400, "DuplicateHeaders"},
		statusReason{400, "InvalidPushType"},
		statusReason{400, reasonMissingDeviceToken},
		statusReason{400, reasonMissingTopic},
		statusReason{400, "PayloadEmpty"},
		statusReason{400, "TopicDisallowed"},
		statusReason{404, "BadPath"},
		statusReason{405, "MethodNotAllowed"}:
		return verdict{class: OurFault}

	case statusReason{403, "BadCertificate"},
		statusReason{403, "BadCertificateEnvironment"},
		// With a certificate none of these can be about one push.
		statusReason{403, "ExpiredProviderToken"},
		statusReason{403, "InvalidProviderToken"},
		statusReason{403, "MissingProviderToken"},
		statusReason{403, "UnrelatedKeyIdInToken"},
		statusReason{403, "BadEnvironmentKeyIdInToken"}:
		return verdict{class: CertificateFault}

	case statusReason{400, reasonIdleTimeout}:
		return verdict{class: RetryLater}
	case statusReason{429, "TooManyRequests"},
		statusReason{429, "TooManyProviderTokenUpdates"}:
		return verdict{class: RetryLater, retryAfter: time.Minute}
	case statusReason{500, "InternalServerError"},
		statusReason{503, "ServiceUnavailable"},
		statusReason{503, reasonShutdown}:
		return verdict{class: RetryLater, retryAfter: serverPause}
	}
	return verdictOfStatus(status, reason)
}

// verdictOfStatus is the verdict on a reason that the table does not have.
func verdictOfStatus(status int, reason string) verdict {
	switch {
	case status == http.StatusOK:
		return verdict{class: Accepted}
	case status == http.StatusTooManyRequests:
		return verdict{class: RetryLater, retryAfter: time.Minute}
	case status >= 500:
		return verdict{class: RetryLater, retryAfter: serverPause}
	case reason == "":
		// APNs names a reason with every refusal: a middlebox sent this one.
		return verdict{class: RetryLater}
	// The class of a reason newer than this table follows from the status.
	case status == http.StatusGone:
		return verdict{class: TokenDead}
	case status == http.StatusForbidden, status == http.StatusRequestEntityTooLarge:
		return verdict{class: DoNotRetry}
	}
	return verdict{class: OurFault}
}

// answerBody is the JSON that comes with every status but 200, and with some
// GOAWAY frames.
type answerBody struct {
	Reason string `json:"reason"`
	// Timestamp is milliseconds since 1970, with status 410 only.
	Timestamp json.Number `json:"timestamp"`
}

// maxReason bounds the length of a server's reason; Apple's longest has 27 bytes.
const maxReason = 64

// parseAnswer decodes an error body. It returns the fields that it can read of a
// body that Apple does not document.
func parseAnswer(body []byte) (reason string, since time.Time) {
	var a answerBody
	// A field of the wrong type leaves the other one set.
	_ = json.Unmarshal(body, &a)
	reason = a.Reason
	if len(reason) > maxReason {
		reason = strings.ToValidUTF8(reason[:maxReason], "")
	}
	if ms, err := strconv.ParseInt(a.Timestamp.String(), 10, 64); err == nil && ms > 0 && ms < math.MaxInt64/int64(time.Millisecond) {
		since = time.UnixMilli(ms).UTC()
	}
	return reason, since
}

// parseRetryAfter returns the delay of a Retry-After header in seconds, 0 if
// there is none. Delays beyond a day are cut to a day.
func parseRetryAfter(v string) time.Duration {
	n, err := strconv.ParseUint(v, 10, 32)
	if err != nil {
		return 0
	}
	return min(time.Duration(n)*time.Second, 24*time.Hour)
}

// outcomeOf classifies an answer.
func outcomeOf(status int, header http.Header, body []byte) Outcome {
	o := Outcome{Status: status}
	if status != http.StatusOK {
		o.Reason, o.TokenDeadSince = parseAnswer(body)
	}
	v := verdictOf(status, o.Reason)
	o.Class, o.RetryAfter = v.class, v.retryAfter
	if o.Class != TokenDead {
		o.TokenDeadSince = time.Time{}
	}
	if o.Class == RetryLater {
		o.RetryAfter = max(o.RetryAfter, parseRetryAfter(header.Get("Retry-After")))
	}
	return o
}
