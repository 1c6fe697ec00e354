package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.PushCerts = (*Store)(nil)

// StorePushCert implements storage.PushCerts. The first version of a topic is the
// time, so that no replica takes a certificate that it remembers for one that was
// uploaded after that was deleted.
func (s *Store) StorePushCert(ctx context.Context, c *storage.PushCert) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		_, err := t.Exec(ctx, t.Dialect.Upsert("nano_push_certs",
			[]string{"topic", "cert_pem", "key_pem", "not_after", "version", "last_class", "last_at", "created_at", "updated_at"}, []string{"topic"},
			[]string{"cert_pem", "key_pem", "not_after", "version = nano_push_certs.version + 1", "last_class", "last_at", "updated_at"}),
			c.Topic, notNil(c.CertPEM), notNil(t.sealed(pushKeyColumn, c.Topic, c.KeyPEM)), micros(c.NotAfter), t.Now, nil, nil, t.Now, t.Now)
		if err != nil {
			return err
		}
		return t.QueryRow(ctx, "SELECT version FROM nano_push_certs WHERE topic = ?", c.Topic).Scan(&c.Version)
	})
	if err != nil {
		return fmt.Errorf("storing a push certificate: %w", err)
	}
	if err := s.makePushesDue(ctx, c.Topic); err != nil {
		return fmt.Errorf("planning pushes for a push certificate: %w", err)
	}
	return nil
}

// DeletePushCert implements storage.PushCerts.
func (s *Store) DeletePushCert(ctx context.Context, topic string) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		n, err := t.Exec(ctx, "DELETE FROM nano_push_certs WHERE topic = ?", topic)
		if err == nil && n == 0 {
			return storage.ErrNotFound
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("deleting a push certificate: %w", err)
	}
	return nil
}

// makePushesDue makes the pushes owed to a topic's enrollments due now.
func (s *Store) makePushesDue(ctx context.Context, topic string) error {
	for after := ""; ; {
		var ids []string
		err := s.write(ctx, func(ctx context.Context, t *tx) error {
			var err error
			if ids, err = enrollmentsOfTopic(ctx, t, topic, after); err != nil || len(ids) == 0 {
				return err
			}
			if _, err := lock(ctx, t, "nano_enrollment_push", ids); err != nil {
				return err
			}
			place, args := sqldb.InList(ids)
			_, err = t.Exec(ctx, "UPDATE nano_enrollment_push SET push_at = ? WHERE push_at > ? AND "+pushOwed+" AND id IN "+place,
				append([]any{t.Now, t.Now}, args...)...)
			return err
		})
		if err != nil || len(ids) < pushRows {
			return err
		}
		after = ids[len(ids)-1]
	}
}

func enrollmentsOfTopic(ctx context.Context, t *tx, topic, after string) ([]string, error) {
	var ids []string
	err := t.Query(ctx, "SELECT id FROM nano_enrollments WHERE topic = ? AND id > ? ORDER BY id LIMIT ?", topic, after, pushRows).Each(func(row sqldb.Row) error {
		var id string
		if err := row.Scan(&id); err != nil {
			return err
		}
		ids = append(ids, id)
		return nil
	})
	return ids, err
}

// PushCert implements storage.PushCerts.
func (s *Store) PushCert(ctx context.Context, topic string) (*storage.PushCert, error) {
	c := storage.PushCert{Topic: topic}
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		var notAfter int64
		err := t.QueryRow(ctx, "SELECT cert_pem, key_pem, not_after, version FROM nano_push_certs WHERE topic = ?", topic).
			Scan(&c.CertPEM, &c.KeyPEM, &notAfter, &c.Version)
		if err != nil {
			return err
		}
		c.NotAfter = fromMicros(notAfter)
		c.KeyPEM, err = t.opened(pushKeyColumn, topic, c.KeyPEM)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading a push certificate: %w", missing(err))
	}
	return &c, nil
}

// PushCertVersion implements storage.PushCerts.
func (s *Store) PushCertVersion(ctx context.Context, topic string) (version int64, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.QueryRow(ctx, "SELECT version FROM nano_push_certs WHERE topic = ?", topic).Scan(&version)
	})
	if err != nil {
		return 0, fmt.Errorf("reading a push certificate's version: %w", missing(err))
	}
	return version, nil
}

// missing translates the absence of a row to storage.ErrNotFound.
func missing(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return storage.ErrNotFound
	}
	return err
}

// PushCertInfos implements storage.PushCerts.
func (s *Store) PushCertInfos(ctx context.Context, scope storage.Scope) (infos []storage.PushCertInfo, err error) {
	where, args := "", []any(nil)
	if len(scope.Topics) > 0 {
		where, args = sqldb.InList(scope.Topics)
		where = " WHERE topic IN " + where
	}
	enabled, err := s.enabledByTopic(ctx)
	if err != nil {
		return nil, fmt.Errorf("counting the enrollments of push certificates: %w", err)
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		infos, err = sqldb.Collect(t.Query(ctx, "SELECT topic, not_after, version, updated_at, last_class, last_at FROM nano_push_certs"+
			where+" ORDER BY topic", slices.Clone(args)...), scanPushCertInfo)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading push certificates: %w", err)
	}
	for i := range infos {
		infos[i].Enrollments = enabled[infos[i].Topic]
	}
	return infos, nil
}

func scanPushCertInfo(row sqldb.Row, i *storage.PushCertInfo) error {
	var notAfter, updatedAt int64
	var class sql.Null[string]
	var lastAt sql.Null[int64]
	if err := row.Scan(&i.Topic, &notAfter, &i.Version, &updatedAt, &class, &lastAt); err != nil {
		return err
	}
	i.NotAfter, i.UpdatedAt, i.LastClass, i.LastAt = fromMicros(notAfter), fromMicros(updatedAt), class.V, fromMicros(lastAt.V)
	return nil
}

// RecordPushCertOutcome implements storage.PushCerts.
func (s *Store) RecordPushCertOutcome(ctx context.Context, topic, class string, at time.Time) error {
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		_, err := t.Exec(ctx, "UPDATE nano_push_certs SET last_class = ?, last_at = ? WHERE topic = ?", clip(class), micros(at), topic)
		return err
	})
	if err != nil {
		return fmt.Errorf("recording a push certificate's outcome: %w", err)
	}
	return nil
}

// StrandedEnrollments implements storage.PushCerts.
func (s *Store) StrandedEnrollments(ctx context.Context) (map[string]int64, error) {
	counts, err := s.enabledByTopic(ctx)
	if err != nil {
		return nil, fmt.Errorf("counting enrollments without a push certificate: %w", err)
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		topics, err := sqldb.Column[string](t.Query(ctx, "SELECT topic FROM nano_push_certs"))
		for _, topic := range topics {
			delete(counts, topic)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading the topics of push certificates: %w", err)
	}
	return counts, nil
}
