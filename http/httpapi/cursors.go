package httpapi

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
)

// cursors makes the cursors of lists: places in the store, encrypted and
// authenticated, so that they neither show nor name rows that the caller does
// not see. A cursor is good for one list, one scope, and every replica with the
// same main key.
type cursors struct {
	aead cipher.AEAD
	mac  []byte // makes nonces
}

func newCursors(key string) (*cursors, error) {
	secret, err := hkdf.Key(sha256.New, []byte(key), nil, "nanomdm list cursors", 64)
	if err != nil {
		return nil, fmt.Errorf("deriving the keys of cursors: %w", err)
	}
	block, err := aes.NewCipher(secret[:32])
	if err != nil {
		return nil, fmt.Errorf("making the cipher of cursors: %w", err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, fmt.Errorf("making the cipher of cursors: %w", err)
	}
	return &cursors{aead, secret[32:]}, nil
}

// listOf is the list that a cursor belongs to: the path and the caller's scope.
func listOf(r *http.Request) []byte {
	return []byte(strings.Join(append([]string{r.URL.Path}, callerOf(r.Context()).scope.Topics...), "\x00"))
}

// seal makes the cursor of a place. Its nonce depends on place and list, so
// that a place always has the same cursor: callers compare them.
func (c *cursors) seal(r *http.Request, place any) string {
	plain, _ := json.Marshal(place) // places hold texts and numbers only
	list := listOf(r)
	mac := hmac.New(sha256.New, c.mac)
	fmt.Fprintf(mac, "%d:%s%s", len(list), list, plain)
	nonce := mac.Sum(nil)[:c.aead.NonceSize()]
	return base64.RawURLEncoding.EncodeToString(c.aead.Seal(nonce, nonce, plain, list))
}

// open reads a cursor into place and reports whether it is one of the list.
func (c *cursors) open(r *http.Request, text string, place any) bool {
	sealed, err := base64.RawURLEncoding.DecodeString(text)
	if err != nil || len(sealed) < c.aead.NonceSize() {
		return false
	}
	nonce, sealed := sealed[:c.aead.NonceSize()], sealed[c.aead.NonceSize():]
	plain, err := c.aead.Open(nil, nonce, sealed, listOf(r))
	return err == nil && json.Unmarshal(plain, place) == nil
}

// event makes the cursor of an event: its number, which tells how many events
// there are of all topics, is sealed for keys that are bound to some.
func (c *cursors) event(r *http.Request, number int64) string {
	if len(callerOf(r.Context()).scope.Topics) > 0 {
		return c.seal(r, number)
	}
	return strconv.FormatInt(number, 10)
}
