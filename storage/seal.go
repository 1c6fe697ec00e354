package storage

import "context"

// Sealer encrypts values before they are stored. It has several keys, so that
// an operator can rotate them. It is safe for concurrent use.
type Sealer interface {
	// KeyIDs names the keys, 16 hexadecimal digits each. The first one seals.
	KeyIDs() []string
	// Seal encrypts with the first key. The value opens only with the same
	// place.
	Seal(place string, plain []byte) []byte
	// Open decrypts a sealed value with the key of that id.
	Open(keyID, place string, sealed []byte) ([]byte, error)
}

// Resealed is the outcome of one step of a Resealer.
type Resealed struct {
	Table     string // that was read
	Looked    int    // rows
	Rewritten int    // values
	// Unreadable counts values that no key opens. They are not changed.
	Unreadable int
	// Next is the place to continue at; empty at the end.
	Next string
}

// Resealer seals values that are not sealed, or are sealed with an older key,
// with the current key.
type Resealer interface {
	// Reseal takes one small step of up to limit rows, and begins at a place (a
	// Next, or empty). It may run beside everything else. After the last step of
	// a run without unreadable values a start no longer needs the older keys;
	// every replica must seal with the new key before the run begins.
	// ErrNotSealing without a Sealer.
	Reseal(ctx context.Context, after string, limit int) (Resealed, error)
}
