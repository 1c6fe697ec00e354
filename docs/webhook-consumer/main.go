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
	"slices"
	"strconv"
	"strings"
	"time"
)

func main() {
	log.Fatal(http.ListenAndServe(os.Args[1], http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64<<20))
		if err != nil || !genuine(os.Getenv("WEBHOOK_KEY"), r.Header, string(body)) {
			http.Error(w, "not signed with our key", http.StatusUnauthorized)
			return
		}
		// Store the event, once for each id, before this returns: the server forgets it after 200.
		fmt.Println(r.Header.Get("Webhook-Id"), string(body))
	})))
}

// genuine checks both signatures; one of them is enough for most.
func genuine(key string, h http.Header, body string) bool {
	id, timestamp, secret := h.Get("Webhook-Id"), h.Get("Webhook-Timestamp"), []byte(key)
	if encoded, ok := strings.CutPrefix(key, "whsec_"); ok {
		secret, _ = base64.StdEncoding.DecodeString(encoded)
	}
	sent, _ := strconv.ParseInt(timestamp, 10, 64)
	return time.Since(time.Unix(sent, 0)).Abs() < 5*time.Minute && // or an old request is sent again
		equal(h.Get("X-Hmac-Signature"), mac([]byte(key), body)) &&
		slices.ContainsFunc(strings.Fields(h.Get("Webhook-Signature")), func(one string) bool { // of each key of the server's
			return equal(one, "v1,"+mac(secret, id+"."+timestamp+"."+body))
		})
}

func equal(a, b string) bool { return hmac.Equal([]byte(a), []byte(b)) } // in constant time

func mac(key []byte, text string) string {
	m := hmac.New(sha256.New, key)
	m.Write([]byte(text))
	return base64.StdEncoding.EncodeToString(m.Sum(nil))
}
