package storage

import (
	"context"
	"crypto/sha256"
	"time"
)

// KeyHash is the SHA-256 of an API key, all that is stored of it. A key is
// random and has 256 bits, so there is nothing to guess from its hash, and
// none of the slow functions that passwords need is needed: those would only
// make each request dear.
type KeyHash [sha256.Size]byte

// HashKey returns the hash of an API key.
func HashKey(key string) KeyHash { return sha256.Sum256([]byte(key)) }

// APIKey is a named key of the operators' API.
type APIKey struct {
	// Name is unique and does not change; it is the user of Basic
	// authentication, and what the audit table shows.
	Name string
	// Role is a word of package httpapi; the store does not read it.
	Role string
	// Scope binds the key to APNs topics; the zero Scope is not bound.
	Scope     Scope
	Hash      KeyHash
	CreatedAt time.Time // set by the store
	CreatedBy string    // name of the key that made it
}

// APIKeys keeps the named keys.
type APIKeys interface {
	// CreateAPIKey stores a new key. ErrConflict if the name is taken.
	CreateAPIKey(ctx context.Context, k *APIKey) error
	// FindAPIKey returns the key with the hash, or ErrNotFound.
	FindAPIKey(ctx context.Context, hash KeyHash) (*APIKey, error)
	// APIKeys lists all by name.
	APIKeys(ctx context.Context) ([]APIKey, error)
	// DeleteAPIKey removes a key, or fails with ErrNotFound. Whoever holds a
	// copy of it must look again before long.
	DeleteAPIKey(ctx context.Context, name string) error
}
