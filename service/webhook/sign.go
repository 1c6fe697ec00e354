package webhook

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Headers of a delivery. Those that begin with Webhook are those of the Standard Webhooks
// specification, https://www.standardwebhooks.com.
const (
	headerHMAC      = "X-Hmac-Signature"
	headerID        = "Webhook-Id"
	headerTimestamp = "Webhook-Timestamp"
	headerSignature = "Webhook-Signature"
	// headerTraceParent is that of the device's request (W3C Trace Context).
	headerTraceParent = "Traceparent"
)

// secretPrefix marks a key as Standard Webhooks write them, in Base64.
const secretPrefix = "whsec_"

// sign sets the headers of one try. The first key signs as NanoMDM does, each
// key as Standard Webhooks do.
func sign(h http.Header, keys []string, id string, at time.Time, body []byte) {
	timestamp := strconv.FormatInt(at.Unix(), 10)
	h.Set(headerID, id)
	h.Set(headerTimestamp, timestamp)
	if len(keys) == 0 {
		return
	}
	h.Set(headerHMAC, mac([]byte(keys[0]), body))
	signatures := make([]string, len(keys))
	for i, key := range keys {
		signatures[i] = "v1," + mac(keyBytes(key), []byte(id), []byte("."), []byte(timestamp), []byte("."), body)
	}
	h.Set(headerSignature, strings.Join(signatures, " "))
}

// keyBytes decodes a key that is written in Base64; any other is its text.
func keyBytes(key string) []byte {
	if encoded, ok := strings.CutPrefix(key, secretPrefix); ok {
		if raw, err := base64.StdEncoding.DecodeString(encoded); err == nil {
			return raw
		}
	}
	return []byte(key)
}

// mac is the Base64 of an HMAC-SHA256.
func mac(key []byte, parts ...[]byte) string {
	m := hmac.New(sha256.New, key)
	for _, p := range parts {
		m.Write(p)
	}
	return base64.StdEncoding.EncodeToString(m.Sum(nil))
}
