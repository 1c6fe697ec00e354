package httpapi

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"net/http"
	"regexp"
	"slices"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/storage"
)

// A named key is keyPrefix, which lets people and scanners of leaked secrets
// recognise it, and 256 random bits in base64url.
const (
	keyPrefix = "nmk_"
	keyLen    = len(keyPrefix) + 43
)

// keyLife is the age to which a replica uses its copy of a key. A key that
// another replica revoked is accepted for as long at most.
const keyLife = 5 * time.Second

// maxCachedKeys bounds the copies.
const maxCachedKeys = 4096

// keyring finds named keys and caches them for keyLife. It caches keys that
// exist only, so that wrong ones take no memory. Safe for concurrent use.
type keyring struct {
	store storage.APIKeys
	now   func() time.Time

	mu      sync.Mutex
	copies  map[storage.KeyHash]copied
	revoked int // calls of forget
}

type copied struct {
	key   *storage.APIKey
	until time.Time
}

func newKeyring(store storage.APIKeys, now func() time.Time) *keyring {
	return &keyring{store: store, now: now, copies: make(map[storage.KeyHash]copied)}
}

// find returns a key, which must not be changed, or storage.ErrNotFound.
func (k *keyring) find(ctx context.Context, hash storage.KeyHash) (*storage.APIKey, error) {
	began := k.now()
	k.mu.Lock()
	c, ok := k.copies[hash]
	revoked := k.revoked
	k.mu.Unlock()
	if ok && began.Before(c.until) {
		return c.key, nil
	}
	key, err := k.store.FindAPIKey(ctx, hash)
	k.mu.Lock()
	defer k.mu.Unlock()
	switch {
	case errors.Is(err, storage.ErrNotFound):
		delete(k.copies, hash)
	case err == nil && revoked == k.revoked: // else it may be the one that was revoked meanwhile
		if len(k.copies) >= maxCachedKeys {
			clear(k.copies)
		}
		k.copies[hash] = copied{key, began.Add(keyLife)}
	}
	return key, err
}

// forget drops all copies after a key was revoked here.
func (k *keyring) forget() {
	k.mu.Lock()
	defer k.mu.Unlock()
	clear(k.copies)
	k.revoked++
}

// keyID identifies a key among all that ever had its name.
func keyID(hash storage.KeyHash) string { return keyPrefix + hex.EncodeToString(hash[:16]) }

// keyInfo is a key as JSON.
type keyInfo struct {
	Name      string    `json:"name"`
	Role      string    `json:"role"`
	Topics    []string  `json:"topics,omitempty"`
	CreatedAt time.Time `json:"created_at"`
	CreatedBy string    `json:"created_by,omitempty"`
	// Key is the key itself; only the answer to its creation has it.
	Key string `json:"key,omitempty"`
}

func infoOf(k *storage.APIKey) keyInfo {
	return keyInfo{Name: k.Name, Role: k.Role, Topics: k.Scope.Topics, CreatedAt: k.CreatedAt, CreatedBy: k.CreatedBy}
}

var keyNames = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$`)

// maxKeyTopics bounds the topics that a key may be bound to.
const maxKeyTopics = 256

func (a *API) createKey(ctx context.Context, r *http.Request) (int, any, error) {
	var body struct {
		Name   string    `json:"name"`
		Role   string    `json:"role"`
		Topics *[]string `json:"topics"`
	}
	if err := readJSON(r, &body); err != nil {
		return 0, nil, err
	}
	k := &storage.APIKey{Name: body.Name, Role: body.Role, CreatedBy: callerOf(ctx).name}
	switch {
	case !keyNames.MatchString(k.Name):
		return 0, nil, badRequest("name: 1 to 64 letters, digits or ._@- are wanted, the first a letter or digit")
	case k.Name == User:
		return 0, nil, badRequest("name: %s is the main key's", User)
	case parseRole(k.Role) == roleNone:
		return 0, nil, badRequest("role: use read, push, enqueue or admin")
	}
	if body.Topics != nil {
		var err error
		if k.Scope.Topics, err = keyTopics(*body.Topics); err != nil {
			return 0, nil, err
		}
	}
	key := newKey()
	k.Hash = storage.HashKey(key)
	if err := a.store.CreateAPIKey(ctx, k); errors.Is(err, storage.ErrConflict) {
		return 0, nil, &problem{http.StatusConflict, "a key of that name exists; delete it first, or take another name"}
	} else if err != nil {
		return 0, nil, err
	}
	a.cfg.Logger.InfoContext(ctx, "API key made", "request_id", requestlog.ID(ctx),
		"name", k.Name, "role", k.Role, "topics", k.Scope.Topics, "by", k.CreatedBy)
	a.audit(ctx, actMakeKey, k.Name, "role "+k.Role+topicsDetail(k.Scope.Topics), nil)
	info := infoOf(k)
	info.Key = key
	return http.StatusCreated, info, nil
}

func topicsDetail(topics []string) string {
	if len(topics) == 0 {
		return ""
	}
	return ", topics " + someOf(topics)
}

// keyTopics checks the topics of a new key. It refuses an empty list, which
// would make an unbound key by mistake.
func keyTopics(topics []string) ([]string, error) {
	if len(topics) == 0 {
		return nil, badRequest("topics: the list is empty; leave topics out for a key that is not bound")
	}
	if len(topics) > maxKeyTopics {
		return nil, badRequest("topics: more than %d", maxKeyTopics)
	}
	for _, topic := range topics {
		if topic == "" || len(topic) > 255 {
			return nil, badRequest("topics: one is empty or longer than 255 bytes")
		}
	}
	sorted := slices.Sorted(slices.Values(topics))
	return slices.Compact(sorted), nil
}

func newKey() string {
	var secret [32]byte
	_, _ = rand.Read(secret[:]) // it never fails, as its documentation says
	return keyPrefix + base64.RawURLEncoding.EncodeToString(secret[:])
}

func (a *API) listKeys(ctx context.Context, _ *http.Request) (int, any, error) {
	keys, err := a.store.APIKeys(ctx)
	if err != nil {
		return 0, nil, err
	}
	list := struct {
		Keys []keyInfo `json:"keys"`
	}{make([]keyInfo, len(keys))}
	for i := range keys {
		list.Keys[i] = infoOf(&keys[i])
	}
	return http.StatusOK, list, nil
}

func (a *API) deleteKey(ctx context.Context, r *http.Request) (int, any, error) {
	name := r.PathValue("name")
	if !keyNames.MatchString(name) {
		return 0, nil, storage.ErrNotFound
	}
	err := a.store.DeleteAPIKey(ctx, name)
	if errors.Is(err, storage.ErrNotFound) {
		return a.gone(ctx, actDeleteKey, name, &problem{http.StatusNotFound, "no key of that name"})
	}
	if err != nil {
		return 0, nil, err
	}
	a.keys.forget()
	a.cfg.Logger.InfoContext(ctx, "API key revoked", "request_id", requestlog.ID(ctx), "name", name, "by", callerOf(ctx).name)
	a.audit(ctx, actDeleteKey, name, "", nil)
	return http.StatusOK, struct {
		Name string `json:"name"`
	}{name}, nil
}
