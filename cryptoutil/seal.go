package cryptoutil

import (
	"bufio"
	"bytes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/crypto/chacha20poly1305"

	"github.com/nanomdm/nanomdm/textinput"
)

// SealKeySize is the size of a key that seals, in bytes.
const SealKeySize = 32

var (
	// ErrSealKey: the value was sealed with a key that is not there.
	ErrSealKey = errors.New("sealed with a key that is not at hand")
	// ErrSealed: the value was changed, moved to another place, or cut.
	ErrSealed = errors.New("sealed value is not intact")
)

// SealKeys encrypts values that are to be kept, and decrypts them, each with
// its place in the store as associated data, so that a value that was moved
// elsewhere does not open. The cipher is XChaCha20-Poly1305, whose nonces are
// long enough to be random however many values there are. Safe for concurrent
// use.
type SealKeys struct {
	ids  []string // the first one's key seals
	byID map[string]cipher.AEAD
}

// ParseSealKeys reads keys, one in each line: 32 random bytes in base64, as
// "openssl rand -base64 32" makes them. The first one seals, all open. Blank
// lines, and lines that begin with #, are left out. Errors name the line and
// never show it.
func ParseSealKeys(data []byte) (*SealKeys, error) {
	s := &SealKeys{byID: make(map[string]cipher.AEAD)}
	lines := bufio.NewScanner(bytes.NewReader(textinput.Text(data)))
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		key, err := base64.StdEncoding.DecodeString(line)
		if err != nil || len(key) != SealKeySize {
			return nil, fmt.Errorf("line %d is not a key: %d bytes in base64 are wanted, as openssl rand -base64 %[2]d prints", n, SealKeySize)
		}
		id, aead, err := newSealKey(key)
		if err != nil {
			return nil, fmt.Errorf("line %d: %w", n, err)
		}
		if s.byID[id] != nil {
			return nil, fmt.Errorf("line %d repeats a key", n)
		}
		s.ids = append(s.ids, id)
		s.byID[id] = aead
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("reading keys: %w", err)
	}
	if len(s.ids) == 0 {
		return nil, errors.New("no key in it")
	}
	return s, nil
}

// newSealKey derives a key's id and its cipher apart, so that the id, which
// stands beside what is sealed, says nothing of the cipher's key.
func newSealKey(key []byte) (id string, aead cipher.AEAD, err error) {
	name, err := hkdf.Key(sha256.New, key, nil, "nanomdm seal key id", 8)
	if err != nil {
		return "", nil, err
	}
	secret, err := hkdf.Key(sha256.New, key, nil, "nanomdm seal XChaCha20-Poly1305", chacha20poly1305.KeySize)
	if err != nil {
		return "", nil, err
	}
	aead, err = chacha20poly1305.NewX(secret)
	return hex.EncodeToString(name), aead, err
}

// KeyIDs names the keys, 16 hexadecimal digits each, the one that seals
// first.
func (s *SealKeys) KeyIDs() []string { return slices.Clone(s.ids) }

// Seal encrypts plain for a place with the first key.
func (s *SealKeys) Seal(place string, plain []byte) []byte {
	aead := s.byID[s.ids[0]]
	sealed := make([]byte, aead.NonceSize(), aead.NonceSize()+len(plain)+aead.Overhead())
	_, _ = rand.Read(sealed) // it never fails, as its documentation says
	return aead.Seal(sealed, sealed, plain, []byte(place))
}

// Open reverses Seal. The error is [ErrSealKey] or [ErrSealed].
func (s *SealKeys) Open(keyID, place string, sealed []byte) ([]byte, error) {
	aead := s.byID[keyID]
	if aead == nil {
		return nil, ErrSealKey
	}
	if len(sealed) < aead.NonceSize() {
		return nil, ErrSealed
	}
	plain, err := aead.Open(nil, sealed[:aead.NonceSize()], sealed[aead.NonceSize():], []byte(place))
	if err != nil {
		return nil, ErrSealed
	}
	return plain, nil
}
