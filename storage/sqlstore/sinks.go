package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
)

// sinkConfig is what the config column holds.
type sinkConfig struct {
	URL    string              `json:"url,omitempty"`
	Keys   []string            `json:"keys,omitempty"`
	Tokens bool                `json:"tokens,omitempty"`
	Filter storage.EventFilter `json:"filter"`
}

// EventSinks implements storage.EventSinks.
func (s *Store) EventSinks(ctx context.Context) ([]storage.EventSink, error) {
	var sinks []storage.EventSink
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		var err error
		sinks, err = readSinks(ctx, t)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading event sinks: %w", err)
	}
	return sinks, nil
}

func readSinks(ctx context.Context, t *tx) ([]storage.EventSink, error) {
	rows, err := t.query(ctx, `SELECT name, configured, config, enabled, reason, cursor_seq, created_at, updated_at FROM nano_event_sinks ORDER BY name`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var sinks []storage.EventSink
	for rows.Next() {
		var k storage.EventSink
		var config []byte
		var reason sql.Null[string]
		var created, updated int64
		if err := rows.Scan(&k.Name, &k.Configured, &config, &k.Enabled, &reason, &k.Cursor, &created, &updated); err != nil {
			return nil, err
		}
		if config, err = t.opened(sinkColumn, k.Name, config); err != nil {
			return nil, err
		}
		var c sinkConfig
		if err := json.Unmarshal(config, &c); err != nil {
			return nil, fmt.Errorf("the configuration of sink %s: %w", k.Name, err)
		}
		k.URL, k.Keys, k.Tokens, k.Filter = c.URL, c.Keys, c.Tokens, c.Filter
		k.Reason = reason.V
		k.CreatedAt, k.UpdatedAt = fromMicros(created), fromMicros(updated)
		sinks = append(sinks, k)
	}
	return sinks, rows.Err()
}

// PutEventSink implements storage.EventSinks.
func (s *Store) PutEventSink(ctx context.Context, k storage.EventSink) error {
	c := sinkConfig{URL: k.URL, Keys: k.Keys, Tokens: k.Tokens, Filter: k.Filter}
	if k.Configured {
		c.Keys = nil
	}
	config, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("storing event sink %s: %w", k.Name, err)
	}
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		config := t.sealed(sinkColumn, k.Name, config)
		var configured bool
		err := t.queryRow(ctx, `SELECT configured FROM nano_event_sinks WHERE name = ?`+t.d.forUpdate, k.Name).Scan(&configured)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			last, err := lastNumber(ctx, t, "")
			if err != nil {
				return err
			}
			_, err = t.exec(ctx, t.d.upsert("nano_event_sinks",
				[]string{"name", "configured", "config", "enabled", "reason", "cursor_seq", "created_at", "updated_at"},
				[]string{"name"}, []string{"config", "enabled", "reason", "updated_at"}),
				k.Name, k.Configured, config, k.Enabled, k.Reason, last, t.now, t.now)
			return err
		case err != nil:
			return err
		case configured != k.Configured:
			return storage.ErrConflict
		}
		_, err = t.exec(ctx, `UPDATE nano_event_sinks SET config = ?, enabled = ?, reason = ?, updated_at = ? WHERE name = ?`,
			config, k.Enabled, k.Reason, t.now, k.Name)
		return err
	})
	if err != nil {
		return fmt.Errorf("storing event sink %s: %w", k.Name, err)
	}
	return nil
}

// DeleteEventSink implements storage.EventSinks.
func (s *Store) DeleteEventSink(ctx context.Context, name string) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		n, err := t.exec(ctx, `DELETE FROM nano_event_sinks WHERE name = ?`, name)
		if err != nil {
			return err
		}
		if n == 0 {
			return storage.ErrNotFound
		}
		_, err = t.exec(ctx, `DELETE FROM nano_event_deliveries WHERE sink = ?`, name)
		return err
	})
	if err != nil {
		return fmt.Errorf("deleting event sink %s: %w", name, err)
	}
	return nil
}

// TurnOffEventSink implements storage.Outbox.
func (s *Store) TurnOffEventSink(ctx context.Context, l storage.Lease, name, reason string) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		if err := t.checkLease(ctx, l); err != nil {
			return err
		}
		_, err := t.exec(ctx, `UPDATE nano_event_sinks SET enabled = 0, reason = ?, updated_at = ? WHERE name = ?`, reason, t.now, name)
		return err
	})
	if err != nil {
		return fmt.Errorf("turning event sink %s off: %w", name, err)
	}
	return nil
}
