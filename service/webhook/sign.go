package webhook

import (
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/service/callout"
)

// Headers of the Standard Webhooks specification,
// https://www.standardwebhooks.com.
const (
	headerID        = "Webhook-Id"
	headerTimestamp = "Webhook-Timestamp"
	headerSignature = "Webhook-Signature"
	// headerAttempt is not of the specification: it numbers the tries of an
	// event, from the second one on.
	headerAttempt = "Webhook-Attempt"
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
	callout.Sign(h, []byte(keys[0]), body)
	signatures := make([]string, len(keys))
	for i, key := range keys {
		mac := callout.MAC(keyBytes(key), []byte(id), []byte("."), []byte(timestamp), []byte("."), body)
		signatures[i] = "v1," + base64.StdEncoding.EncodeToString(mac)
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
