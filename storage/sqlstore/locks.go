package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// The transactions of device messages never wait for locks: a replica that was
// stopped inside a transaction would stop every batch of the others. They lock
// with SkipLocked. A batch that could not lock some rows is rolled back and
// carried out without their devices, whose messages go into later batches.

// heldPauses are the pauses between attempts of a message whose rows are locked
// by others; after heldPatience it fails.
var heldPauses = backoff.Policy{First: 10 * time.Millisecond, Max: 250 * time.Millisecond}

const heldPatience = 3 * time.Second

// errHeld is the error of a message whose rows another transaction has locked.
var errHeld = fmt.Errorf("%w: another transaction holds the device's rows", storage.ErrBusy)

// heldRows is the error of a batch that could not lock rows of some devices.
type heldRows struct {
	ids []string // of devices or enrollments
}

// Error implements error.
func (h *heldRows) Error() string {
	return fmt.Sprintf("rows of %d enrollments are locked", len(h.ids))
}

// holds says whether a row of the device or of one of its channels is locked.
func (h *heldRows) holds(device string) bool {
	return slices.ContainsFunc(h.ids, func(id string) bool {
		return id == device || strings.HasPrefix(id, device+":")
	})
}

// lock locks existing rows of a table, in key order, and returns their ids. On
// an engine with a single writer it does nothing. The error is heldRows if the
// transaction does not wait for locks and others hold some.
func lock(ctx context.Context, t *tx, table string, ids []string) (locked []string, err error) {
	if len(ids) == 0 || t.Dialect.ForUpdate() == "" {
		return nil, nil
	}
	locked, err = sqldb.Column[string](t.QueryLocked(ctx, "id", table, ids))
	if err != nil {
		return nil, fmt.Errorf("locking rows of %s: %w", table, err)
	}
	return locked, t.checkSkipped(ctx, table, ids, locked)
}

// checkSkipped fails with heldRows if rows exist that were not locked since
// another transaction holds them.
func (t *tx) checkSkipped(ctx context.Context, table string, wanted, locked []string) error {
	if !t.SkipLocked {
		return nil
	}
	have := make(map[string]bool, len(locked))
	for _, id := range locked {
		have[id] = true
	}
	missed := slices.DeleteFunc(slices.Clone(wanted), func(id string) bool { return have[id] })
	if len(missed) == 0 {
		return nil
	}
	is, args := t.Among(missed)
	return t.anyHeld(ctx, "SELECT id FROM "+table+" WHERE id "+is, args)
}

// checkSkippedRows is checkSkipped for queue rows.
func (t *tx) checkSkippedRows(ctx context.Context, wanted []keyPair, locked map[keyPair]queueRow) error {
	if !t.SkipLocked {
		return nil
	}
	missed := slices.DeleteFunc(slices.Clone(wanted), func(k keyPair) bool {
		_, ok := locked[k]
		return ok
	})
	if len(missed) == 0 {
		return nil
	}
	where, args := queueRows.Among(t.Tx, missed)
	return t.anyHeld(ctx, "SELECT id FROM nano_enrollment_queue"+t.Dialect.Index("PRIMARY")+" WHERE "+where, args)
}

// anyHeld fails with heldRows of the ids that a query returns, if it returns
// any.
func (t *tx) anyHeld(ctx context.Context, q string, args []any) error {
	ids, err := sqldb.Column[string](t.Query(ctx, q, args...))
	if err != nil {
		return fmt.Errorf("looking for locked rows: %w", err)
	}
	if len(ids) > 0 {
		return &heldRows{ids}
	}
	return nil
}

// lockDeferred is lock, but sends the statement with the next one that returns
// rows. The number of locked rows is known after that. It does not check for
// rows that others have locked.
func lockDeferred(ctx context.Context, t *tx, table string, ids []string) (locked *int, err error) {
	if locked, ok := t.LockDeferred(table, ids); ok {
		return locked, nil
	}
	ids, err = lock(ctx, t, table, ids)
	n := len(ids)
	return &n, err
}
