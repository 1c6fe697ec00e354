package sqlstore

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.APIKeys = (*Store)(nil)

// allTopics is the stored form of the zero Scope. It is a word, so that a lost
// or damaged value does not become a key for all topics.
const allTopics = "*"

const apiKeyColumns = "SELECT name, role, topics, sha256, created_at, created_by FROM nano_api_keys"

// CreateAPIKey implements storage.APIKeys.
func (s *Store) CreateAPIKey(ctx context.Context, k *storage.APIKey) error {
	topics := []byte(allTopics)
	if len(k.Scope.Topics) > 0 {
		var err error
		if topics, err = json.Marshal(k.Scope.Topics); err != nil {
			return fmt.Errorf("storing an API key: %w", err)
		}
	}
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		k.CreatedAt = fromMicros(t.Now)
		_, err := t.Exec(ctx, `INSERT INTO nano_api_keys (name, role, topics, sha256, created_at, created_by) VALUES (?, ?, ?, ?, ?, ?)`,
			k.Name, k.Role, topics, hex.EncodeToString(k.Hash[:]), t.Now, k.CreatedBy)
		if t.Dialect.Unique(err) {
			return storage.ErrConflict
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("storing API key %s: %w", k.Name, err)
	}
	return nil
}

// FindAPIKey implements storage.APIKeys.
func (s *Store) FindAPIKey(ctx context.Context, hash storage.KeyHash) (*storage.APIKey, error) {
	keys, err := s.apiKeys(ctx, " WHERE sha256 = ?", hex.EncodeToString(hash[:]))
	if err != nil {
		return nil, fmt.Errorf("looking an API key up: %w", err)
	}
	if len(keys) == 0 {
		return nil, storage.ErrNotFound
	}
	return &keys[0], nil
}

// APIKeys implements storage.APIKeys.
func (s *Store) APIKeys(ctx context.Context) ([]storage.APIKey, error) {
	keys, err := s.apiKeys(ctx, " ORDER BY name")
	if err != nil {
		return nil, fmt.Errorf("reading API keys: %w", err)
	}
	return keys, nil
}

func (s *Store) apiKeys(ctx context.Context, where string, args ...any) (keys []storage.APIKey, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		keys, err = sqldb.Collect(t.Query(ctx, apiKeyColumns+where, args...), scanAPIKey)
		return err
	})
	return keys, err
}

func scanAPIKey(row sqldb.Row, k *storage.APIKey) error {
	var topics []byte
	var hash string
	var created int64
	if err := row.Scan(&k.Name, &k.Role, &topics, &hash, &created, &k.CreatedBy); err != nil {
		return err
	}
	k.CreatedAt = fromMicros(created)
	sum, err := hex.DecodeString(hash)
	if err != nil || len(sum) != len(k.Hash) {
		return errors.New("the hash of key " + k.Name + " is broken")
	}
	k.Hash = storage.KeyHash(sum)
	if string(topics) != allTopics {
		if err := json.Unmarshal(topics, &k.Scope.Topics); err != nil || len(k.Scope.Topics) == 0 {
			return errors.New("the topics of key " + k.Name + " are broken")
		}
	}
	return nil
}

// DeleteAPIKey implements storage.APIKeys.
func (s *Store) DeleteAPIKey(ctx context.Context, name string) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		n, err := t.Exec(ctx, `DELETE FROM nano_api_keys WHERE name = ?`, name)
		if err == nil && n == 0 {
			return storage.ErrNotFound
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("deleting an API key: %w", err)
	}
	return nil
}
