package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// lockChannels locks an enrollment, and the user channels of a device, and
// returns their ids; storage.ErrNotFound if there is no such enrollment.
func lockChannels(ctx context.Context, t *tx, scope storage.Scope, id string) (device string, ids []string, err error) {
	if device, err = findEnrollment(ctx, t, scope, id); err != nil {
		return "", nil, err
	}
	column := "id"
	if device == id {
		column = "device_id"
	}
	ids, err = sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_enrollments WHERE "+column+" = ? ORDER BY id"+t.Dialect.ForUpdate(), id))
	if err != nil {
		return "", nil, fmt.Errorf("locking enrollments: %w", err)
	}
	if len(ids) == 0 { // it was deleted meanwhile
		return "", nil, storage.ErrNotFound
	}
	return device, ids, nil
}

// SetDisabled implements storage.EnrollmentSteering.
func (s *Store) SetDisabled(ctx context.Context, scope storage.Scope, id string, disabled bool, r *storage.AuditRecord) (ids []string, err error) {
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		if _, ids, err = lockChannels(ctx, t, scope, id); err != nil {
			return err
		}
		for chunk := range slices.Chunk(ids, enqueueRows) {
			place, args := sqldb.InList(chunk)
			_, err := t.Exec(ctx, "UPDATE nano_enrollments SET operator_disabled = ?, updated_at = ? WHERE id IN "+place,
				append([]any{disabled, t.Now}, args...)...)
			if err != nil {
				return fmt.Errorf("marking enrollments: %w", err)
			}
			if disabled {
				continue
			}
			if _, err := lock(ctx, t, "nano_enrollment_push", chunk); err != nil {
				return err
			}
			_, err = t.Exec(ctx, "UPDATE nano_enrollment_push SET push_at = ? WHERE "+pushOwed+" AND token_dead_at IS NULL AND id IN "+place,
				append([]any{t.Now}, args...)...)
			if err != nil {
				return fmt.Errorf("planning pushes: %w", err)
			}
		}
		return audit(ctx, t, r)
	})
	if err != nil {
		return nil, fmt.Errorf("disabling or enabling an enrollment: %w", err)
	}
	return ids, nil
}

// SetRenewal implements storage.EnrollmentSteering.
func (s *Store) SetRenewal(ctx context.Context, scope storage.Scope, ids []string, until time.Time) (changed []string, err error) {
	condition, topics := scoped(scope)
	for chunk := range slices.Chunk(storableAmong(ids, make(map[string]error)), enqueueRows) {
		var some []string
		err := s.write(ctx, func(ctx context.Context, t *tx) (err error) {
			place, args := sqldb.InList(chunk)
			some, err = sqldb.Column[string](t.Query(ctx, "SELECT e.id FROM nano_enrollments e WHERE e.id IN "+place+" AND e.device_id = e.id"+condition+
				" ORDER BY e.id"+t.Dialect.ForUpdate(), append(args, topics...)...))
			if err != nil || len(some) == 0 {
				return err
			}
			place, args = sqldb.InList(some)
			_, err = t.Exec(ctx, "UPDATE nano_enrollments SET renewal_until = ?, updated_at = ? WHERE id IN "+place,
				append([]any{null(micros(until)), t.Now}, args...)...)
			return err
		})
		if err != nil {
			return changed, fmt.Errorf("setting renewal windows: %w", err)
		}
		changed = append(changed, some...)
	}
	return changed, nil
}
