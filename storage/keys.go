package storage

import (
	"context"
	"crypto/sha256"
	"time"
)

// KeyHash is the SHA-256 of an API key. The key itself is not stored. A key has
// 256 random bits, so that nobody can guess it from the hash: the slow hashes
// that passwords need would only slow down each request.
type KeyHash [sha256.Size]byte

// HashKey returns the hash of an API key.
func HashKey(key string) KeyHash { return sha256.Sum256([]byte(key)) }

// APIKey is a named key of the operators' API.
type APIKey struct {
	// Name is unique and does not change. It is the user name of Basic
	// authentication, and audit records have it.
	Name string
	// Role is a word of package httpapi; the store does not read it.
	Role string
	// Scope binds the key to APNs topics; the zero Scope is not bound.
	Scope     Scope
	Hash      KeyHash
	CreatedAt time.Time // set by the store
	CreatedBy string    // name of the key that made it
}

// APIKeys keeps the API keys.
type APIKeys interface {
	// CreateAPIKey stores a new key. ErrConflict if there is one of that name.
	CreateAPIKey(ctx context.Context, k *APIKey) error
	// FindAPIKey returns the key with the hash, or ErrNotFound.
	FindAPIKey(ctx context.Context, hash KeyHash) (*APIKey, error)
	// APIKeys lists all by name.
	APIKeys(ctx context.Context) ([]APIKey, error)
	// DeleteAPIKey removes a key, or fails with ErrNotFound. Callers that cache
	// keys must read them again before long.
	DeleteAPIKey(ctx context.Context, name string) error
}
