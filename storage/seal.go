package storage

import "context"

// Sealer encrypts values before they are stored. It has several keys, so that
// they can be rotated. Safe for concurrent use.
type Sealer interface {
	// KeyIDs names the keys, 16 hexadecimal digits each. The first one seals.
	KeyIDs() []string
	// Seal encrypts with the first key. A value opens only with the place
	// that it was sealed for.
	Seal(place string, plain []byte) []byte
	// Open decrypts what Seal returned, with the key of that id.
	Open(keyID, place string, sealed []byte) ([]byte, error)
}

// Resealed is what one step of a Resealer did.
type Resealed struct {
	Table     string // that was looked at
	Looked    int    // rows
	Rewritten int    // values
	// Unreadable counts values that no key opens; they stay as they are.
	Unreadable int
	// Next is where to go on; empty when all is done.
	Next string
}

// Resealer rewrites what was stored unsealed, or was sealed with an older
// key, with the key that seals now.
type Resealer interface {
	// Reseal takes one small step, of up to limit rows, and begins where after
	// (a Next, or empty) says. It may run beside everything else. After the
	// last step of a run without unreadable values the older keys are no
	// longer asked for at start; for this every replica must seal with the
	// new key before the run begins. ErrNotSealing without a Sealer.
	Reseal(ctx context.Context, after string, limit int) (Resealed, error)
}
