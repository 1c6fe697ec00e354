package sqlstore

import (
	"cmp"
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

var _ storage.EnqueueUpkeep = (*Store)(nil)

// maxFailedKept bounds the failed ids that the row of a call keeps.
const maxFailedKept = 10_000

// call is a call with an idempotency key. Its row is locked while a chunk is
// done. A call without a key is nil, and all of its chunks are left to do.
type call struct {
	storage.Enqueued
	caller, key string
	through     string
}

const callColumns = "SELECT command_uuid, digest, ids, through, finished, failed FROM nano_enqueue_calls WHERE caller = ? AND name = ?"

// openCall locks the row of a call, or inserts it.
func openCall(ctx context.Context, t *tx, e *storage.Enqueue, ids int) (*call, error) {
	o := e.Once
	if o == nil {
		return nil, nil
	}
	c, err := readCall(ctx, t, o.Caller, o.Key, t.Dialect.ForUpdate())
	if errors.Is(err, sql.ErrNoRows) {
		_, err = t.Exec(ctx, t.Dialect.Upsert("nano_enqueue_calls", []string{"caller", "name", "digest", "command_uuid", "ids", "created_at"},
			[]string{"caller", "name"}, nil), o.Caller, o.Key, o.Digest, e.Command.CommandUUID, ids, t.Now)
		if err != nil {
			return nil, fmt.Errorf("storing a call: %w", err)
		}
		// Another transaction may have inserted it.
		c, err = readCall(ctx, t, o.Caller, o.Key, t.Dialect.ForUpdate())
	}
	switch {
	case err != nil:
		return nil, fmt.Errorf("reading a call: %w", err)
	case c.Digest != o.Digest || c.CommandUUID != e.Command.CommandUUID:
		return nil, storage.ErrKeyUsed
	}
	return c, nil
}

func readCall(ctx context.Context, t *tx, caller, key, lock string) (*call, error) {
	c := &call{caller: caller, key: key}
	var failed []byte
	err := t.QueryRow(ctx, callColumns+lock, caller, key).Scan(&c.CommandUUID, &c.Digest, &c.Count, &c.through, &c.Done, &failed)
	if err != nil {
		return nil, err
	}
	if len(failed) > 0 {
		if err := json.Unmarshal(failed, &c.Failed); err != nil {
			return nil, fmt.Errorf("reading the ids that failed: %w", err)
		}
	}
	return c, nil
}

// left returns the sorted ids that are left to do.
func (c *call) left(ids []string) []string {
	switch {
	case c == nil:
		return ids
	case c.Done:
		return nil
	}
	i, found := slices.BinarySearch(ids, c.through)
	if found {
		i++
	}
	return ids[i:]
}

// missed returns the errors of the ids that were done before.
func (c *call) missed() map[string]error {
	if c == nil {
		return nil
	}
	missed := make(map[string]error, len(c.Failed))
	for _, id := range c.Failed {
		missed[id] = storage.ErrNotEnrolled
	}
	return missed
}

// close notes that ids up to through are done.
func (c *call) close(ctx context.Context, t *tx, missed map[string]error, through string, finished bool) error {
	if c == nil {
		return nil
	}
	for id := range missed {
		if len(c.Failed) < maxFailedKept {
			c.Failed = append(c.Failed, id)
		}
	}
	var failed []byte
	if len(c.Failed) > 0 {
		slices.Sort(c.Failed)
		var err error
		if failed, err = json.Marshal(c.Failed); err != nil {
			return fmt.Errorf("writing the ids that failed: %w", err)
		}
	}
	end := 0
	if finished {
		end = 1
	}
	_, err := t.Exec(ctx, "UPDATE nano_enqueue_calls SET through = ?, finished = ?, failed = ? WHERE caller = ? AND name = ?",
		through, end, failed, c.caller, c.key)
	if err != nil {
		return fmt.Errorf("noting how far a call came: %w", err)
	}
	return nil
}

// FindEnqueued implements storage.Enqueuer. The answer to a repeated call rests
// on what it reads, which another transaction may have committed without its
// standby: so it locks the row, and its own commit waits for the standby.
func (s *Store) FindEnqueued(ctx context.Context, caller, key string) (*storage.Enqueued, error) {
	var c *call
	err := s.write(ctx, func(ctx context.Context, t *tx) (err error) {
		c, err = readCall(ctx, t, caller, key, t.Dialect.ForUpdate())
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading a call: %w", missing(err))
	}
	return &c.Enqueued, nil
}

// ForgetEnqueued implements storage.EnqueueUpkeep.
func (s *Store) ForgetEnqueued(ctx context.Context, l storage.Lease, before time.Time, limit int) (removed int, err error) {
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		removed = 0
		old, err := oldCalls(ctx, t, micros(before), limit)
		if err != nil {
			return err
		}
		for _, c := range old {
			n, err := t.Exec(ctx, "DELETE FROM nano_enqueue_calls WHERE caller = ? AND name = ? AND created_at < ?", c.caller, c.key, micros(before))
			if err != nil {
				return err
			}
			removed += int(n)
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("forgetting calls: %w", err)
	}
	return removed, nil
}

func oldCalls(ctx context.Context, t *tx, before int64, limit int) (old []call, err error) {
	old, err = sqldb.Collect(t.Query(ctx, "SELECT caller, name FROM nano_enqueue_calls WHERE created_at < ? ORDER BY created_at LIMIT ?", before, limit),
		func(row sqldb.Row, c *call) error { return row.Scan(&c.caller, &c.key) })
	// In key order, as everywhere.
	slices.SortFunc(old, func(a, b call) int { return cmp.Or(cmp.Compare(a.caller, b.caller), cmp.Compare(a.key, b.key)) })
	return old, err
}
