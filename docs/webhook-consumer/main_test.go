package main

import (
	"fmt"
	"net/http"
	"strconv"
	"time"
)

// The server signs a body with its key; the consumer takes it as it is, and
// neither a changed body nor an old one.
func Example() {
	const key, id, body = "key", "019ca949-0007-7f3c-9a41-6d1c2b8ed889", `{"topic": "mdm.CheckOut"}`
	signed := func(at time.Time) http.Header {
		timestamp := strconv.FormatInt(at.Unix(), 10)
		h := make(http.Header)
		h.Set("X-Hmac-Signature", mac([]byte(key), body))
		h.Set("Webhook-Id", id)
		h.Set("Webhook-Timestamp", timestamp)
		h.Set("Webhook-Signature", "v1,"+mac([]byte(key), id+"."+timestamp+"."+body))
		return h
	}
	fmt.Println(genuine(key, signed(time.Now()), body))
	fmt.Println(genuine(key, signed(time.Now()), body+" "))
	fmt.Println(genuine(key, signed(time.Now().Add(-time.Hour)), body))
	// Output:
	// true
	// false
	// false
}
