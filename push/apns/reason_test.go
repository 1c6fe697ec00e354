package apns

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// everyReason has every reason of Apple's "Handling notification responses from APNs".
var everyReason = []struct {
	status int
	reason string
	class  Class
}{
	{200, "", Accepted},
	{400, "BadCollapseId", OurFault},
	{400, "BadDeviceToken", DoNotRetry},
	{400, "BadExpirationDate", OurFault},
	{400, "BadMessageId", OurFault},
	{400, "BadPriority", OurFault},
	{400, "BadTopic", OurFault},
	{400, "DeviceTokenNotForTopic", DoNotRetry},
	{400, "DuplicateHeaders", OurFault},
	{400, "IdleTimeout", RetryLater},
	{400, "InvalidPushType", OurFault},
	{400, "MissingDeviceToken", OurFault},
	{400, "MissingTopic", OurFault},
	{400, "PayloadEmpty", OurFault},
	{400, "TopicDisallowed", OurFault},
	{403, "BadCertificate", CertificateFault},
	{403, "BadCertificateEnvironment", CertificateFault},
	{403, "ExpiredProviderToken", CertificateFault},
	{403, "Forbidden", DoNotRetry},
	{403, "InvalidProviderToken", CertificateFault},
	{403, "MissingProviderToken", CertificateFault},
	{403, "UnrelatedKeyIdInToken", CertificateFault},
	{403, "BadEnvironmentKeyIdInToken", CertificateFault},
	{404, "BadPath", OurFault},
	{405, "MethodNotAllowed", OurFault},
	{410, "ExpiredToken", TokenDead},
	{410, "Unregistered", TokenDead},
	{413, "PayloadTooLarge", DoNotRetry},
	{429, "TooManyProviderTokenUpdates", RetryLater},
	{429, "TooManyRequests", RetryLater},
	{500, "InternalServerError", RetryLater},
	{503, "ServiceUnavailable", RetryLater},
	{503, "Shutdown", RetryLater},
	// Reasons we have never heard of.
	{400, "NewReason", OurFault},
	{403, "NewReason", DoNotRetry},
	{410, "NewReason", TokenDead},
	{413, "NewReason", DoNotRetry},
	{429, "NewReason", RetryLater},
	{502, "", RetryLater},
	{599, "NewReason", RetryLater},
	{401, "NewReason", OurFault},
	// Refusals without a reason, which a middlebox sent.
	{302, "", RetryLater},
	{400, "", RetryLater},
	{403, "", RetryLater},
	{404, "", RetryLater},
	{407, "", RetryLater},
	{410, "", RetryLater},
	{413, "", RetryLater},
}

func TestVerdicts(t *testing.T) {
	for _, tt := range everyReason {
		t.Run(fmt.Sprintf("%d %s", tt.status, tt.reason), func(t *testing.T) {
			body := fmt.Appendf(nil, `{"reason":%q}`, tt.reason)
			o := outcomeOf(tt.status, http.Header{}, body)
			require.Equal(t, tt.class, o.Class, "got %v", o.Class)
			require.Equal(t, tt.reason, o.Reason)
			require.Equal(t, tt.status, o.Status)
		})
	}
}

func TestRetryAfter(t *testing.T) {
	retry := func(status int, header string) time.Duration {
		return outcomeOf(status, http.Header{"Retry-After": {header}}, []byte(`{"reason":"NewReason"}`)).RetryAfter
	}
	require.Equal(t, 15*time.Minute, retry(503, ""))
	require.Equal(t, 15*time.Minute, retry(500, "60"), "Apple's documentation asks for more")
	require.Equal(t, time.Hour, retry(503, "3600"))
	require.Equal(t, 24*time.Hour, retry(429, "4294967295"))
	require.Equal(t, time.Minute, retry(429, "-1"))
	require.Zero(t, retry(400, "60"))
}

func TestParseAnswer(t *testing.T) {
	for _, tt := range []struct {
		name, body string
		reason     string
		since      time.Time
	}{
		{"both", `{"reason":"Unregistered","timestamp":1700000000123}`, "Unregistered", time.UnixMilli(1700000000123).UTC()},
		{"no timestamp", `{"reason":"BadTopic"}`, "BadTopic", time.Time{}},
		{"string timestamp", `{"reason":"Unregistered","timestamp":"1700000000123"}`, "Unregistered", time.UnixMilli(1700000000123).UTC()},
		{"odd timestamp", `{"timestamp":true,"reason":"Unregistered"}`, "Unregistered", time.Time{}},
		{"negative timestamp", `{"reason":"Unregistered","timestamp":-5}`, "Unregistered", time.Time{}},
		{"huge timestamp", `{"reason":"Unregistered","timestamp":9223372036854775807}`, "Unregistered", time.Time{}},
		{"empty", ``, "", time.Time{}},
		{"html", `<html>busy</html>`, "", time.Time{}},
		{"long reason", `{"reason":"` + strings.Repeat("x", 500) + `"}`, strings.Repeat("x", maxReason), time.Time{}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reason, since := parseAnswer([]byte(tt.body))
			require.Equal(t, tt.reason, reason)
			require.Equal(t, tt.since, since)
		})
	}
}

func FuzzOutcomeOf(f *testing.F) {
	f.Add(410, "60", []byte(`{"reason":"Unregistered","timestamp":1700000000123}`))
	f.Add(503, "x", []byte(`{"reason":5}`))
	f.Add(200, "", []byte(nil))
	f.Fuzz(func(t *testing.T, status int, retryAfter string, body []byte) {
		o := outcomeOf(status, http.Header{"Retry-After": {retryAfter}}, body)
		require.NotZero(t, o.Class)
		require.LessOrEqual(t, len(o.Reason), maxReason)
		require.GreaterOrEqual(t, o.RetryAfter, time.Duration(0))
		if o.Class != TokenDead {
			require.Zero(t, o.TokenDeadSince)
		}
		if status != 200 {
			require.NotEqual(t, Accepted, o.Class)
		}
	})
}

func TestConfig(t *testing.T) {
	cfg, root, err := Config{}.withDefaults()
	require.NoError(t, err)
	require.Equal(t, DefaultURL, root.String())
	require.Equal(t, "api.push.apple.com:443", hostPort(root, "443"))
	require.Equal(t, 1000, cfg.Workers)
	require.Equal(t, 7*24*time.Hour, cfg.Expiration)
	require.Greater(t, cfg.StreamTimeout, cfg.PingInterval+cfg.PingTimeout)

	for field, cfg := range map[string]Config{
		"URL":              {URL: "http://api.push.apple.com"},
		"URL: no host":     {URL: "https://"},
		"URL: only scheme": {URL: "https://host/3/device"},
		"URL: not a URL":   {URL: "https://user:secret@host:port"},
		"Workers":          {Workers: -1},
		"MaxConnsPerTopic": {MaxConnsPerTopic: -1},
		"Expiration":       {Expiration: time.Millisecond},
		"DialTimeout":      {DialTimeout: -1},
		"StreamTimeout":    {StreamTimeout: -1},
		"PushTimeout":      {PushTimeout: time.Second},
		"PingInterval":     {PingInterval: -1},
		"PingTimeout":      {PingTimeout: -1},
		"CertificateTTL":   {CertificateTTL: -1},
	} {
		_, _, err := cfg.withDefaults()
		require.ErrorContains(t, err, "Config."+field)
		require.NotContains(t, err.Error(), "secret")
	}
	_, err = New(nil, Config{})
	require.Error(t, err)
}

func TestClassString(t *testing.T) {
	require.Equal(t, "accepted", Accepted.String())
	require.Equal(t, "class(0)", Class(0).String())
}
