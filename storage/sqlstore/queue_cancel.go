package sqlstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var (
	_ storage.Steering           = (*Store)(nil)
	_ storage.EnrollmentSteering = (*Store)(nil)
	_ storage.Secrets            = (*Store)(nil)
)

// cancel cancels the waiting rows among some, and returns how many. A
// concurrent report has the row's lock, or waits for it.
func cancel(ctx context.Context, t *tx, keys []keyPair) (int, error) {
	if len(keys) == 0 {
		return 0, nil
	}
	waiting, err := lockKeys(ctx, t, keys, stillWaits)
	if err != nil {
		return 0, fmt.Errorf("locking commands to cancel: %w", err)
	}
	return len(waiting), moveTo(ctx, t, storage.Cancelled, waiting)
}

// stateOf locks a row and reads its state, or fails with storage.ErrNotFound.
func stateOf(ctx context.Context, t *tx, k keyPair) (storage.State, error) {
	rows, err := lockQueueRows(ctx, t, []keyPair{k})
	if err != nil {
		return 0, err
	}
	row, ok := rows[k]
	if !ok {
		return 0, storage.ErrNotFound
	}
	return row.state, nil
}

// CancelItem implements storage.Steering.
func (s *Store) CancelItem(ctx context.Context, scope storage.Scope, id, uuid string, r *storage.AuditRecord) (was storage.State, err error) {
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		if err := findItem(ctx, t, scope, id, uuid); err != nil {
			return err
		}
		if was, err = stateOf(ctx, t, keyPair{ID: id, Item: uuid}); err != nil || was.Terminal() {
			return err
		}
		if err := moveTo(ctx, t, storage.Cancelled, []keyPair{{ID: id, Item: uuid}}); err != nil {
			return err
		}
		return audit(ctx, t, r)
	})
	if err != nil {
		return 0, fmt.Errorf("cancelling a command of an enrollment: %w", err)
	}
	return was, nil
}

// CancelCommand implements storage.Steering. Rows move from state to state in
// the order in which it goes through the states.
func (s *Store) CancelCommand(ctx context.Context, scope storage.Scope, uuid string) (cancelled, finished int64, err error) {
	if _, err := s.Command(ctx, scope, uuid); err != nil {
		return 0, 0, fmt.Errorf("cancelling a command: %w", err)
	}
	for _, state := range waitingStates {
		for after, more := "", true; more; {
			q, args := itemsQuery(s.db.Dialect(), scope, uuid, state, after, enqueueRows)
			n := 0
			err := s.write(ctx, func(ctx context.Context, t *tx) error {
				ids, err := sqldb.Column[string](t.Query(ctx, q, slices.Clone(args)...))
				if err != nil {
					return fmt.Errorf("looking for commands to cancel: %w", err)
				}
				keys := make([]keyPair, len(ids))
				for i, id := range ids {
					keys[i] = keyPair{ID: id, Item: uuid}
				}
				if more = len(ids) == enqueueRows; more {
					after = ids[len(ids)-1]
				}
				n, err = cancel(ctx, t, keys)
				return err
			})
			if err != nil {
				return cancelled, 0, fmt.Errorf("cancelling a command: %w", err)
			}
			cancelled += int64(n)
		}
	}
	c, err := s.Command(ctx, scope, uuid)
	if err != nil {
		return cancelled, 0, fmt.Errorf("cancelling a command: %w", err)
	}
	for state, n := range c.States {
		if state.Terminal() {
			finished += n
		}
	}
	return cancelled, max(finished-cancelled, 0), nil
}

// ClearQueue implements storage.Steering.
func (s *Store) ClearQueue(ctx context.Context, scope storage.Scope, id string) (cancelled int64, err error) {
	until := micros(s.now())
	for _, state := range waitingStates {
		for more := true; more; {
			n := 0
			err := s.write(ctx, func(ctx context.Context, t *tx) error {
				if _, err := findEnrollment(ctx, t, scope, id); err != nil {
					return err
				}
				keys, err := queueKeys(ctx, t, "SELECT id, command_uuid FROM nano_enrollment_queue"+t.Dialect.Index("nano_enrollment_queue_next")+
					" WHERE id = ? AND state = ? AND created_at <= ? ORDER BY priority DESC, seq LIMIT ?", id, int(state), until, enqueueRows)
				if err != nil {
					return fmt.Errorf("looking for commands to cancel: %w", err)
				}
				more = len(keys) == enqueueRows
				n, err = cancel(ctx, t, keys)
				return err
			})
			if err != nil {
				return cancelled, fmt.Errorf("clearing a queue: %w", err)
			}
			cancelled += int64(n)
		}
	}
	return cancelled, nil
}

// Requeue implements storage.Steering.
func (s *Store) Requeue(ctx context.Context, scope storage.Scope, id, uuid string, r *storage.AuditRecord) (was storage.State, err error) {
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		if !storable(id) || !storable(uuid) {
			return storage.ErrNotFound
		}
		numbers, err := lockNumbers(ctx, t, []string{id})
		if err != nil {
			return err
		}
		if err := findItem(ctx, t, scope, id, uuid); err != nil {
			return err
		}
		enrolled, err := enrolledAmong(ctx, t, scope, []string{id}, "")
		if err != nil {
			return err
		}
		// The lock keeps the command from being removed.
		found, err := sqldb.Column[string](t.Query(ctx, "SELECT command_uuid FROM nano_commands WHERE command_uuid = ?"+t.Dialect.ForShare(), uuid))
		if err != nil {
			return fmt.Errorf("reading a command: %w", err)
		}
		if was, err = stateOf(ctx, t, keyPair{ID: id, Item: uuid}); err != nil || !was.Requeueable() {
			return err
		}
		last, numbered := numbers[id]
		_, is := enrolled[id]
		switch {
		case len(found) == 0:
			return storage.ErrNotFound
		case !is || !numbered:
			return storage.ErrNotEnrolled
		}
		return requeue(ctx, t, keyPair{ID: id, Item: uuid}, last, r)
	})
	if err != nil {
		return 0, fmt.Errorf("queueing a command again: %w", err)
	}
	return was, nil
}

func requeue(ctx context.Context, t *tx, k keyPair, last int64, r *storage.AuditRecord) error {
	if _, err := t.Exec(ctx, "DELETE FROM nano_command_results WHERE id = ? AND command_uuid = ?", k.ID, k.Item); err != nil {
		return fmt.Errorf("removing a result: %w", err)
	}
	_, err := t.Exec(ctx, fmt.Sprintf(`UPDATE nano_enrollment_queue SET state = %d, seq = ?, finished_at = NULL, attempts = 0, notnow_count = 0,
notnow_at = NULL, expires_at = CASE WHEN expires_at > ? THEN expires_at ELSE NULL END WHERE id = ? AND command_uuid = ?`, storage.Queued),
		last+1, t.Now, k.ID, k.Item)
	if err != nil {
		return fmt.Errorf("moving a queue row: %w", err)
	}
	at := t.Now + firstPush.Microseconds()
	_, err = t.Exec(ctx, "UPDATE nano_enrollment_push SET "+owePushBy+" WHERE id = ?", at, at, k.ID)
	if err != nil {
		return fmt.Errorf("owing a push: %w", err)
	}
	return audit(ctx, t, r)
}
