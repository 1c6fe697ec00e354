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

var (
	_ storage.Steering           = (*Store)(nil)
	_ storage.EnrollmentSteering = (*Store)(nil)
	_ storage.Secrets            = (*Store)(nil)
)

// deletedRows is how many queue rows, with their results, one transaction of
// DeleteEnrollment removes.
const deletedRows = 100

// cancel ends those of some rows that still wait, and returns how many. A
// report of a device that is under way has the row's lock, or waits for it.
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
		if _, err := findEnrollment(ctx, t, scope, id); err != nil {
			return err
		}
		if !storable(uuid) {
			return storage.ErrNotFound
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
				ids, err := textColumn(ctx, t, q, slices.Clone(args)...)
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
		if _, err := findEnrollment(ctx, t, scope, id); err != nil {
			return err
		}
		enrolled, err := enrolledAmong(ctx, t, scope, []string{id}, "")
		if err != nil {
			return err
		}
		// Nobody removes the command meanwhile.
		found, err := commandUUIDs(ctx, t, "SELECT command_uuid FROM nano_commands WHERE command_uuid = ?"+t.Dialect.ForShare(), uuid)
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
	_, err = t.Exec(ctx, `UPDATE nano_enrollment_push SET owed_seq = last_seq + 1, push_at = CASE WHEN push_at < ? THEN push_at ELSE ? END,
last_seq = last_seq + 1 WHERE id = ?`, at, at, k.ID) // MySQL assigns from left to right
	if err != nil {
		return fmt.Errorf("owing a push: %w", err)
	}
	return audit(ctx, t, r)
}

// lockChannels locks an enrollment, and if it is a device its user channels,
// and returns their ids; storage.ErrNotFound if it is not there.
func lockChannels(ctx context.Context, t *tx, scope storage.Scope, id string) (device string, ids []string, err error) {
	if device, err = findEnrollment(ctx, t, scope, id); err != nil {
		return "", nil, err
	}
	column := "id"
	if device == id {
		column = "device_id"
	}
	ids, err = textColumn(ctx, t, "SELECT id FROM nano_enrollments WHERE "+column+" = ? ORDER BY id"+t.Dialect.ForUpdate(), id)
	if err != nil {
		return "", nil, fmt.Errorf("locking enrollments: %w", err)
	}
	if len(ids) == 0 { // it has gone in between
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
			_, err = t.Exec(ctx, "UPDATE nano_enrollment_push SET push_at = ? WHERE owed_seq > paid_seq AND token_dead_at IS NULL AND id IN "+place,
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
			some, err = textColumn(ctx, t, "SELECT e.id FROM nano_enrollments e WHERE e.id IN "+place+" AND e.device_id = e.id"+condition+
				" ORDER BY e.id"+t.Dialect.ForUpdate(), append(args, topics...)...)
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

// doomed is an enrollment that is being deleted.
type doomed struct {
	id, device string
	ids        []string // with its user channels, if it is a device
	began      int64    // of the enrollment: another value says that it enrolled anew
}

// DeleteEnrollment implements storage.EnrollmentSteering.
func (s *Store) DeleteEnrollment(ctx context.Context, scope storage.Scope, id string, r *storage.AuditRecord) error {
	var d doomed
	err := s.write(ctx, func(ctx context.Context, t *tx) (err error) {
		d, err = kill(ctx, t, scope, id, r)
		return err
	})
	for _, step := range []func(context.Context, *tx, *doomed) (bool, error){removeQueueRows, removeLeftResults, bury} {
		for more := true; err == nil && more; {
			err = s.write(ctx, func(ctx context.Context, t *tx) (err error) {
				if err := d.stillDead(ctx, t); err != nil {
					return err
				}
				more, err = step(ctx, t, &d)
				return err
			})
		}
	}
	if err != nil {
		return fmt.Errorf("deleting an enrollment: %w", err)
	}
	return nil
}

// kill makes an enrollment one that nobody acts for and that gets nothing.
func kill(ctx context.Context, t *tx, scope storage.Scope, id string, r *storage.AuditRecord) (doomed, error) {
	device, err := findEnrollment(ctx, t, scope, id)
	if err != nil {
		return doomed{}, err
	}
	if _, err := lock(ctx, t, "nano_devices", []string{device}); err != nil {
		return doomed{}, err
	}
	d := doomed{id: id, device: device}
	if _, d.ids, err = lockChannels(ctx, t, scope, id); err != nil {
		return doomed{}, err
	}
	var list []announcement
	for _, channel := range d.ids {
		list = append(list, announcement{topic: storage.TopicEnrollmentDeleted, enrollment: channel})
	}
	if err := announce(ctx, t, list); err != nil {
		return doomed{}, err
	}
	if id == device {
		if _, err := t.Exec(ctx, `UPDATE nano_cert_auth_associations SET retired_at = ? WHERE id = ? AND retired_at IS NULL`, t.Now, id); err != nil {
			return doomed{}, fmt.Errorf("retiring certificates: %w", err)
		}
		_, err := t.Exec(ctx, `UPDATE nano_devices SET unlock_token = NULL, unlock_token_at = NULL, bootstrap_token = NULL, bootstrap_token_at = NULL,
updated_at = ? WHERE id = ?`, t.Now, id)
		if err != nil {
			return doomed{}, fmt.Errorf("removing tokens: %w", err)
		}
	}
	for chunk := range slices.Chunk(d.ids, enqueueRows) {
		place, args := sqldb.InList(chunk)
		_, err := t.Exec(ctx, `UPDATE nano_enrollments SET enabled = 0, operator_disabled = 1, renewal_until = NULL, token = NULL, token_at = NULL,
updated_at = ? WHERE id IN `+place, append([]any{t.Now}, args...)...)
		if err != nil {
			return doomed{}, fmt.Errorf("disabling enrollments: %w", err)
		}
		if _, err := lock(ctx, t, "nano_enrollment_push", chunk); err != nil {
			return doomed{}, err
		}
		if _, err := t.Exec(ctx, `UPDATE nano_enrollment_push SET paid_seq = owed_seq, push_at = NULL WHERE id IN `+place, args...); err != nil {
			return doomed{}, fmt.Errorf("forgetting pushes owed: %w", err)
		}
	}
	if d.began, err = d.beginning(ctx, t); err != nil {
		return doomed{}, err
	}
	return d, audit(ctx, t, r)
}

// beginning is when the enrollment began: the device's last Authenticate, or
// the user channel's last TokenUpdate.
func (d *doomed) beginning(ctx context.Context, t *tx) (int64, error) {
	q := "SELECT token_at FROM nano_enrollments WHERE id = ?"
	if d.id == d.device {
		q = "SELECT authenticate_at FROM nano_devices WHERE id = ?"
	}
	var at sql.Null[int64]
	err := t.QueryRow(ctx, q+t.Dialect.ForUpdate(), d.id).Scan(&at)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, storage.ErrNotFound
	}
	return at.V, err
}

// stillDead locks the enrollment and fails with storage.ErrConflict if it has
// enrolled anew.
func (d *doomed) stillDead(ctx context.Context, t *tx) error {
	if _, err := lock(ctx, t, "nano_devices", []string{d.device}); err != nil {
		return err
	}
	began, err := d.beginning(ctx, t)
	if err != nil {
		return err
	}
	var enabled bool
	if err := t.QueryRow(ctx, "SELECT enabled FROM nano_enrollments WHERE id = ?", d.id).Scan(&enabled); err != nil {
		return missing(err)
	}
	live := 0
	if d.id == d.device {
		err = t.QueryRow(ctx, "SELECT COUNT(*) FROM nano_cert_auth_associations WHERE id = ? AND retired_at IS NULL", d.id).Scan(&live)
	}
	if err == nil && (enabled || live > 0 || began != d.began) {
		err = storage.ErrConflict
	}
	return err
}

// removeQueueRows removes some of the queue rows, with their results, and the
// commands that nobody else has. It says whether there are more.
func removeQueueRows(ctx context.Context, t *tx, d *doomed) (more bool, err error) {
	for _, id := range d.ids {
		uuids, err := commandUUIDs(ctx, t, "SELECT command_uuid FROM nano_enrollment_queue"+t.Dialect.Index("nano_enrollment_queue_next")+
			" WHERE state IN ("+everyState()+") AND id = ? LIMIT ?", id, deletedRows)
		if err != nil {
			return false, fmt.Errorf("looking for queue rows: %w", err)
		}
		if len(uuids) == 0 {
			continue
		}
		if err := lockCommands(ctx, t, uuids); err != nil {
			return false, err
		}
		keys := make([]keyPair, len(uuids))
		for i, uuid := range uuids {
			keys[i] = keyPair{ID: id, Item: uuid}
		}
		var out storage.Removed
		if _, err := lockQueueRows(ctx, t, keys); err != nil {
			return false, err
		}
		if err := removeResults(ctx, t, keys, &out); err != nil {
			return false, err
		}
		where, args := queueRows.Among(t.Tx, keys)
		if _, err := t.Exec(ctx, "DELETE FROM nano_enrollment_queue WHERE "+where, args...); err != nil {
			return false, fmt.Errorf("removing queue rows: %w", err)
		}
		return true, removeCommands(ctx, t, uuids, &out)
	}
	return false, nil
}

// removeLeftResults removes some of the results whose queue rows are gone.
func removeLeftResults(ctx context.Context, t *tx, d *doomed) (more bool, err error) {
	for _, id := range d.ids {
		uuids, err := commandUUIDs(ctx, t, "SELECT command_uuid FROM nano_command_results WHERE id = ? ORDER BY command_uuid LIMIT ?", id, deletedRows)
		if err != nil {
			return false, fmt.Errorf("looking for results: %w", err)
		}
		if len(uuids) > 0 {
			keys := make([]keyPair, len(uuids))
			for i, uuid := range uuids {
				keys[i] = keyPair{ID: id, Item: uuid}
			}
			return true, removeResults(ctx, t, keys, new(storage.Removed))
		}
	}
	return false, nil
}

// bury removes the enrollment itself. Its certificates stay, retired.
func bury(ctx context.Context, t *tx, d *doomed) (more bool, err error) {
	tables := []string{"nano_enrollments", "nano_users", "nano_enrollment_push", "nano_enrollment_activity"}
	for chunk := range slices.Chunk(d.ids, enqueueRows) {
		place, args := sqldb.InList(chunk)
		for _, table := range tables {
			if _, err := t.Exec(ctx, "DELETE FROM "+table+" WHERE id IN "+place, args...); err != nil {
				return false, fmt.Errorf("removing rows of %s: %w", table, err)
			}
		}
	}
	if d.id != d.device {
		return false, nil
	}
	others, err := textColumn(ctx, t, "SELECT id FROM nano_enrollments WHERE device_id = ? LIMIT 1", d.device)
	if err != nil {
		return false, fmt.Errorf("looking for other channels: %w", err)
	}
	if len(others) > 0 {
		return false, storage.ErrConflict
	}
	// Users who never sent a token have no enrollment.
	for _, q := range []string{"DELETE FROM nano_users WHERE device_id = ?", "DELETE FROM nano_devices WHERE id = ?"} {
		if _, err := t.Exec(ctx, q, d.device); err != nil {
			return false, fmt.Errorf("removing a device: %w", err)
		}
	}
	return false, nil
}

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
