package sqlstore

import (
	"context"
	"fmt"

	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// lock locks the rows of a table that exist, in key order, and returns their
// ids. Where writers wait for each other anyway it does nothing.
func lock(ctx context.Context, t *tx, table string, ids []string) (locked []string, err error) {
	if len(ids) == 0 || t.Dialect.ForUpdate() == "" {
		return nil, nil
	}
	locked, err = sqldb.Column[string](t.QueryLocked(ctx, "id", table, ids))
	if err != nil {
		return nil, fmt.Errorf("locking rows of %s: %w", table, err)
	}
	return locked, nil
}

// lockDeferred is lock, at the latest with the next statement that returns
// something. How many rows it locked is known after that.
func lockDeferred(ctx context.Context, t *tx, table string, ids []string) (locked *int, err error) {
	if locked, ok := t.LockDeferred(table, ids); ok {
		return locked, nil
	}
	ids, err = lock(ctx, t, table, ids)
	n := len(ids)
	return &n, err
}
