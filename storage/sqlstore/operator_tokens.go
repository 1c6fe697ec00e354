package sqlstore

import (
	"context"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
)

// BootstrapToken implements storage.Secrets.
func (s *Store) BootstrapToken(ctx context.Context, scope storage.Scope, id string, r *storage.AuditRecord) ([]byte, error) {
	return s.secret(ctx, scope, id, "bootstrap_token", bootstrapTokenColumn, r)
}

// UnlockToken implements storage.Secrets.
func (s *Store) UnlockToken(ctx context.Context, scope storage.Scope, id string, r *storage.AuditRecord) ([]byte, error) {
	return s.secret(ctx, scope, id, "unlock_token", unlockTokenColumn, r)
}

func (s *Store) secret(ctx context.Context, scope storage.Scope, id, column, place string, r *storage.AuditRecord) (token []byte, err error) {
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		device, err := findEnrollment(ctx, t, scope, id)
		if err == nil {
			_, err = findEnrollment(ctx, t, scope, device) // a token is the device's
		}
		if err != nil {
			return err
		}
		var value []byte
		if err := t.QueryRow(ctx, "SELECT "+column+" FROM nano_devices WHERE id = ?", device).Scan(&value); err != nil {
			return missing(err)
		}
		token = nil
		if len(value) == 0 {
			return nil
		}
		if token, err = t.opened(place, device, value); err != nil {
			return err
		}
		return audit(ctx, t, r)
	})
	if err != nil {
		return nil, fmt.Errorf("reading a token: %w", err)
	}
	return token, nil
}
