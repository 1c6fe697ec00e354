package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// sinkConfig is the JSON of the config column.
type sinkConfig struct {
	URL    string              `json:"url,omitempty"`
	Keys   []string            `json:"keys,omitempty"`
	Tokens bool                `json:"tokens,omitempty"`
	Filter storage.EventFilter `json:"filter"`
	// OnError is missing in rows of older releases.
	OnError storage.OnError   `json:"on_error,omitempty"`
	Form    storage.EventForm `json:"form,omitempty"`
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
	return sqldb.Collect(t.Query(ctx, `SELECT name, configured, seen_at, config, enabled, reason, down_since, down_error, cursor_seq, created_at, updated_at
FROM nano_event_sinks ORDER BY name`), func(row sqldb.Row, k *storage.EventSink) error {
		var config []byte
		var reason, downError sql.Null[string]
		var down sql.Null[int64]
		var seen, created, updated int64
		if err := row.Scan(&k.Name, &k.Configured, &seen, &config, &k.Enabled, &reason, &down, &downError, &k.Cursor, &created, &updated); err != nil {
			return err
		}
		config, err := t.opened(sinkColumn, k.Name, config)
		if err != nil {
			return err
		}
		var c sinkConfig
		if err := json.Unmarshal(config, &c); err != nil {
			return fmt.Errorf("the configuration of sink %s: %w", k.Name, err)
		}
		k.URL, k.Keys, k.Tokens, k.Filter, k.OnError, k.Form = c.URL, c.Keys, c.Tokens, c.Filter, c.OnError, c.Form
		k.Reason, k.DownSince, k.DownError = reason.V, fromMicros(down.V), downError.V
		k.SeenAt, k.CreatedAt, k.UpdatedAt = fromMicros(seen), fromMicros(created), fromMicros(updated)
		return nil
	})
}

// PutEventSink implements storage.EventSinks.
func (s *Store) PutEventSink(ctx context.Context, k storage.EventSink) error {
	config, err := json.Marshal(sinkConfig{URL: k.URL, Keys: k.Keys, Tokens: k.Tokens, Filter: k.Filter, OnError: k.OnError, Form: k.Form})
	if err != nil {
		return fmt.Errorf("storing event sink %s: %w", k.Name, err)
	}
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		config := t.sealed(sinkColumn, k.Name, config)
		var seen int64
		if k.Configured {
			seen = t.Now
		}
		var configured bool
		err := t.QueryRow(ctx, `SELECT configured FROM nano_event_sinks WHERE name = ?`+t.Dialect.ForUpdate(), k.Name).Scan(&configured)
		switch {
		case errors.Is(err, sql.ErrNoRows):
			last, err := lastNumber(ctx, t, "")
			if err != nil {
				return err
			}
			_, err = t.Exec(ctx, t.Dialect.Upsert("nano_event_sinks",
				[]string{"name", "configured", "seen_at", "config", "enabled", "reason", "cursor_seq", "created_at", "updated_at"},
				[]string{"name"}, []string{"seen_at", "config", "enabled", "reason", "updated_at"}),
				k.Name, k.Configured, seen, config, k.Enabled, k.Reason, last, t.Now, t.Now)
			return err
		case err != nil:
			return err
		case configured != k.Configured:
			return storage.ErrConflict
		}
		_, err = t.Exec(ctx, `UPDATE nano_event_sinks SET seen_at = ?, config = ?, enabled = ?, reason = ?, updated_at = ? WHERE name = ?`,
			seen, config, k.Enabled, k.Reason, t.Now, k.Name)
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
		return deleteSink(ctx, t, name)
	})
	if err != nil {
		return fmt.Errorf("deleting event sink %s: %w", name, err)
	}
	return nil
}

func deleteSink(ctx context.Context, t *tx, name string) error {
	n, err := t.Exec(ctx, `DELETE FROM nano_event_sinks WHERE name = ?`, name)
	if err != nil {
		return err
	}
	if n == 0 {
		return storage.ErrNotFound
	}
	_, err = t.Exec(ctx, `DELETE FROM nano_event_deliveries WHERE sink = ?`, name)
	return err
}

// SeeEventSinks implements storage.EventSinks.
func (s *Store) SeeEventSinks(ctx context.Context, names []string) error {
	if len(names) == 0 {
		return nil
	}
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		place, args := sqldb.InList(slices.Sorted(slices.Values(names)))
		_, err := t.Exec(ctx, `UPDATE nano_event_sinks SET seen_at = ? WHERE configured = 1 AND name IN `+place, append([]any{t.Now}, args...)...)
		return err
	})
	if err != nil {
		return fmt.Errorf("noting that event sinks are configured: %w", err)
	}
	return nil
}

// ForgetEventSinks implements storage.EventUpkeep.
func (s *Store) ForgetEventSinks(ctx context.Context, l storage.Lease, before time.Time) (int, error) {
	sinks, err := s.EventSinks(ctx)
	if err != nil {
		return 0, err
	}
	sinks = slices.DeleteFunc(sinks, func(k storage.EventSink) bool { return !k.Configured || !k.SeenAt.Before(before) })
	if len(sinks) == 0 {
		return 0, nil
	}
	var n int
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		n = 0
		for _, k := range sinks {
			var seen int64
			err := t.QueryRow(ctx, `SELECT seen_at FROM nano_event_sinks WHERE name = ?`+t.Dialect.ForUpdate(), k.Name).Scan(&seen)
			if errors.Is(err, sql.ErrNoRows) || err == nil && seen >= micros(before) {
				continue
			}
			if err == nil {
				err = deleteSink(ctx, t, k.Name)
			}
			if err != nil {
				return err
			}
			n++
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("forgetting event sinks: %w", err)
	}
	return n, nil
}

// lockSink locks a sink's row, or fails with storage.ErrNotFound if the sink
// was deleted since it was read.
func lockSink(ctx context.Context, t *tx, k *storage.EventSink) error {
	var created int64
	err := t.QueryRow(ctx, `SELECT created_at FROM nano_event_sinks WHERE name = ?`+t.Dialect.ForUpdate(), k.Name).Scan(&created)
	if errors.Is(err, sql.ErrNoRows) || err == nil && created != micros(k.CreatedAt) {
		return storage.ErrNotFound
	}
	return err
}

// TurnOffEventSink implements storage.Outbox.
func (s *Store) TurnOffEventSink(ctx context.Context, l storage.Lease, k *storage.EventSink, reason string) error {
	err := s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		if err := lockSink(ctx, t, k); err != nil {
			return err
		}
		sinks, err := readSinks(ctx, t)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(sinks, func(now storage.EventSink) bool { return now.Name == k.Name && now.URL == k.URL }) {
			return nil
		}
		_, err = t.Exec(ctx, `UPDATE nano_event_sinks SET enabled = 0, reason = ?, updated_at = ? WHERE name = ?`, reason, t.Now, k.Name)
		return err
	})
	if err != nil && !errors.Is(err, storage.ErrNotFound) {
		return fmt.Errorf("turning event sink %s off: %w", k.Name, err)
	}
	return nil
}
