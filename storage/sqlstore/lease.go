package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

var _ storage.Leases = (*Store)(nil)

// PeekLease implements storage.Leases.
func (s *Store) PeekLease(ctx context.Context, name string) (storage.Lease, error) {
	var l storage.Lease
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		l = storage.Lease{Name: name}
		err := t.QueryRow(ctx, `SELECT holder, fence, beat FROM nano_leases WHERE name = ?`, name).
			Scan(&l.Holder, &l.Fence, &l.Beat)
		if errors.Is(err, sql.ErrNoRows) {
			return nil
		}
		return err
	})
	if err != nil {
		return storage.Lease{}, fmt.Errorf("reading lease %s: %w", name, err)
	}
	return l, nil
}

// TakeLease implements storage.Leases.
func (s *Store) TakeLease(ctx context.Context, seen storage.Lease, holder string) (storage.Lease, error) {
	asked := s.uptime()
	next := storage.Lease{Name: seen.Name, Holder: holder, Fence: seen.Fence + 1, Beat: seen.Beat + 1}
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		if seen.Fence == 0 && seen.Beat == 0 { // there was no row
			_, err := t.Exec(ctx, `INSERT INTO nano_leases (name, holder, fence, beat) VALUES (?, ?, ?, ?)`,
				next.Name, next.Holder, next.Fence, next.Beat)
			if t.Dialect.Unique(err) {
				return storage.ErrLeaseLost
			}
			return err
		}
		return changeLease(ctx, t, `UPDATE nano_leases SET holder = ?, fence = ?, beat = ?
			WHERE name = ? AND holder = ? AND fence = ? AND beat = ?`,
			next.Holder, next.Fence, next.Beat, seen.Name, seen.Holder, seen.Fence, seen.Beat)
	})
	if err != nil {
		return storage.Lease{}, fmt.Errorf("taking lease %s: %w", seen.Name, err)
	}
	s.held.Store(next.Name, asked)
	return next, nil
}

// RenewLease implements storage.Leases.
func (s *Store) RenewLease(ctx context.Context, l storage.Lease) (storage.Lease, error) {
	asked := s.uptime()
	next := l
	next.Beat++
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		return changeLease(ctx, t, `UPDATE nano_leases SET beat = ? WHERE name = ? AND holder = ? AND fence = ?`,
			next.Beat, l.Name, l.Holder, l.Fence)
	})
	if errors.Is(err, storage.ErrLeaseLost) {
		s.held.Delete(l.Name)
	}
	if err != nil {
		return storage.Lease{}, fmt.Errorf("renewing lease %s: %w", l.Name, err)
	}
	s.held.Store(l.Name, asked)
	return next, nil
}

// ReleaseLease implements storage.Leases.
func (s *Store) ReleaseLease(ctx context.Context, l storage.Lease) error {
	s.held.Delete(l.Name)
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		_, err := t.Exec(ctx, `UPDATE nano_leases SET holder = '', beat = beat + 1
			WHERE name = ? AND holder = ? AND fence = ?`, l.Name, l.Holder, l.Fence)
		return err
	})
	if err != nil {
		return fmt.Errorf("releasing lease %s: %w", l.Name, err)
	}
	return nil
}

func changeLease(ctx context.Context, t *tx, q string, args ...any) error {
	n, err := t.Exec(ctx, q, args...)
	if err != nil {
		return err
	}
	if n == 0 {
		return storage.ErrLeaseLost
	}
	return nil
}

// checkLease fails with storage.ErrLeaseLost if l has changed hands, and locks
// it until the transaction ends. Every write under a lease begins with this
// call.
func (t *tx) checkLease(ctx context.Context, l storage.Lease) error {
	var one int
	err := t.QueryRow(ctx, `SELECT 1 FROM nano_leases WHERE name = ? AND holder = ? AND fence = ?`+t.Dialect.ForShare(),
		l.Name, l.Holder, l.Fence).Scan(&one)
	if errors.Is(err, sql.ErrNoRows) {
		return storage.ErrLeaseLost
	}
	return err
}

// surelyHeld is the time for which a lease counts as held after it was taken or
// renewed: the longest time to live in use. A replica that was stopped for
// longer may have lost it and not know yet.
const surelyHeld = 15 * time.Second

// leasesHeld lists the leases that this store took or renewed a short time ago,
// and has neither lost nor released.
func (s *Store) leasesHeld() []string {
	var names []string
	now := s.uptime()
	s.held.Range(func(name, asked any) bool {
		if now-asked.(time.Duration) < surelyHeld {
			names = append(names, name.(string))
		}
		return true
	})
	slices.Sort(names)
	return names
}
