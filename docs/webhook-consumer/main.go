// Command webhook-consumer takes NanoMDM's events and prints them:
//
//	WEBHOOK_KEY=... webhook-consumer :8080
package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
)

func main() {
	log.Fatal(http.ListenAndServe(os.Args[1], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<20))
		if err != nil || !genuine(os.Getenv("WEBHOOK_KEY"), r.Header, body) {
			http.Error(w, "not signed with our key", http.StatusUnauthorized)
			return
		}
		// Keep the event, once for each id, before this returns: 200 means that it is yours.
		fmt.Println(r.Header.Get("Webhook-Id"), string(body))
	})))
}

// genuine checks both signatures; one of them is enough for most.
func genuine(key string, h http.Header, body []byte) bool {
	id, timestamp := h.Get("Webhook-Id"), h.Get("Webhook-Timestamp")
	sent, err := strconv.ParseInt(timestamp, 10, 64)
	if err != nil || time.Since(time.Unix(sent, 0)).Abs() > 5*time.Minute {
		return false // perhaps somebody plays an old one again
	}
	secret := []byte(key)
	if encoded, ok := strings.CutPrefix(key, "whsec_"); ok {
		secret, _ = base64.StdEncoding.DecodeString(encoded)
	}
	standard := "v1," + mac(secret, id+"."+timestamp+"."+string(body))
	for _, signature := range strings.Fields(h.Get("Webhook-Signature")) { // one for each key of the server's
		if hmac.Equal([]byte(signature), []byte(standard)) {
			// NanoMDM's own has one key only, so that it may be another one while keys are changed.
			return hmac.Equal([]byte(h.Get("X-Hmac-Signature")), []byte(mac([]byte(key), string(body))))
		}
	}
	return false
}

func mac(key []byte, text string) string {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return base64.StdEncoding.EncodeToString(m.Sum(nil))
}
