package sqlstore

import (
	"context"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Replicas = (*Store)(nil)

// AnnounceReplica implements storage.Replicas.
func (s *Store) AnnounceReplica(ctx context.Context, r *storage.Replica) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		_, err := t.Exec(ctx, t.Dialect.Upsert("nano_replicas", []string{"id", "name", "version", "listen", "started_at", "seen_at"},
			[]string{"id"}, []string{"seen_at"}), r.ID, r.Name, r.Version, r.Listen, micros(r.StartedAt), t.Now)
		if err != nil {
			return err
		}
		_, err = t.Exec(ctx, "DELETE FROM nano_replicas WHERE seen_at < ?", t.Now-storage.ReplicaForgotten.Microseconds())
		return err
	})
	if err != nil {
		return fmt.Errorf("announcing a replica: %w", err)
	}
	return nil
}

// RetireReplica implements storage.Replicas.
func (s *Store) RetireReplica(ctx context.Context, id string) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		_, err := t.Exec(ctx, "DELETE FROM nano_replicas WHERE id = ?", id)
		return err
	})
	if err != nil {
		return fmt.Errorf("retiring a replica: %w", err)
	}
	return nil
}

// Replicas implements storage.Replicas.
func (s *Store) Replicas(ctx context.Context) (list []storage.Replica, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		list, err = sqldb.Collect(t.Query(ctx, "SELECT id, name, version, listen, started_at, seen_at FROM nano_replicas ORDER BY name, started_at, id"),
			func(row sqldb.Row, r *storage.Replica) error {
				var started, seen int64
				err := row.Scan(&r.ID, &r.Name, &r.Version, &r.Listen, &started, &seen)
				r.StartedAt, r.SeenAt = fromMicros(started), fromMicros(seen)
				return err
			})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listing replicas: %w", err)
	}
	return list, nil
}
