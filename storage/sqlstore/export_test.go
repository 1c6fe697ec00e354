package sqlstore

import "context"

// WriteForTest runs fn in a transaction as the package's own writes do.
func (s *Store) WriteForTest(ctx context.Context, fn func(exec func(q string, args ...any) (int64, error)) error) error {
	return s.write(ctx, func(ctx context.Context, t *tx) error {
		return fn(func(q string, args ...any) (int64, error) { return t.exec(ctx, q, args...) })
	})
}

// SettingForTest reads one value on a connection of the pool.
func (s *Store) SettingForTest(ctx context.Context, q string) (value string, err error) {
	err = s.db.QueryRowContext(ctx, q).Scan(&value)
	return value, err
}
