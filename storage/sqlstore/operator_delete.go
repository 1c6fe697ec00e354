package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// deletedRows bounds the queue rows, with their results, that one transaction
// of DeleteEnrollment removes.
const deletedRows = 100

// deletion is an enrollment that is being deleted.
type deletion struct {
	id, device string
	ids        []string // with its user channels, if it is a device
	began      int64    // of the enrollment; another value means that it enrolled again
	next       int      // index in ids: the step has done the ids before it
}

// DeleteEnrollment implements storage.EnrollmentSteering.
func (s *Store) DeleteEnrollment(ctx context.Context, scope storage.Scope, id string, r *storage.AuditRecord) error {
	var d deletion
	err := s.write(ctx, func(ctx context.Context, t *tx) (err error) {
		d, err = markDeleted(ctx, t, scope, id, r)
		return err
	})
	for _, step := range []func(context.Context, *tx, *deletion) (bool, error){removeQueueRows, removeLeftResults, removeEnrollment} {
		d.next = 0
		for more := true; err == nil && more; {
			err = s.write(ctx, func(ctx context.Context, t *tx) (err error) {
				if err := d.checkStillDeleted(ctx, t); err != nil {
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

// markDeleted disables an enrollment and retires its certificates.
func markDeleted(ctx context.Context, t *tx, scope storage.Scope, id string, r *storage.AuditRecord) (deletion, error) {
	device, err := findEnrollment(ctx, t, scope, id)
	if err != nil {
		return deletion{}, err
	}
	if _, err := lock(ctx, t, "nano_devices", []string{device}); err != nil {
		return deletion{}, err
	}
	d := deletion{id: id, device: device}
	if _, d.ids, err = lockChannels(ctx, t, scope, id); err != nil {
		return deletion{}, err
	}
	var list []announcement
	for _, channel := range d.ids {
		list = append(list, announcement{topic: storage.TopicEnrollmentDeleted, enrollment: channel})
	}
	if err := announce(ctx, t, list); err != nil {
		return deletion{}, err
	}
	if id == device {
		if _, err := t.Exec(ctx, `UPDATE nano_cert_auth_associations SET retired_at = ? WHERE id = ? AND retired_at IS NULL`, t.Now, id); err != nil {
			return deletion{}, fmt.Errorf("retiring certificates: %w", err)
		}
		_, err := t.Exec(ctx, `UPDATE nano_devices SET unlock_token = NULL, unlock_token_at = NULL, bootstrap_token = NULL, bootstrap_token_at = NULL,
updated_at = ? WHERE id = ?`, t.Now, id)
		if err != nil {
			return deletion{}, fmt.Errorf("removing tokens: %w", err)
		}
	}
	for chunk := range slices.Chunk(d.ids, enqueueRows) {
		place, args := sqldb.InList(chunk)
		_, err := t.Exec(ctx, `UPDATE nano_enrollments SET enabled = 0, operator_disabled = 1, renewal_until = NULL, token = NULL, token_at = NULL,
updated_at = ? WHERE id IN `+place, append([]any{t.Now}, args...)...)
		if err != nil {
			return deletion{}, fmt.Errorf("disabling enrollments: %w", err)
		}
		if _, err := lock(ctx, t, "nano_enrollment_push", chunk); err != nil {
			return deletion{}, err
		}
		if _, err := t.Exec(ctx, `UPDATE nano_enrollment_push SET paid_seq = owed_seq, push_at = NULL WHERE id IN `+place, args...); err != nil {
			return deletion{}, fmt.Errorf("forgetting pushes owed: %w", err)
		}
	}
	if d.began, err = d.beginning(ctx, t); err != nil {
		return deletion{}, err
	}
	return d, audit(ctx, t, r)
}

// beginning returns when the enrollment began: the device's last Authenticate,
// or the user channel's last TokenUpdate.
func (d *deletion) beginning(ctx context.Context, t *tx) (int64, error) {
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

// checkStillDeleted locks the enrollment and fails with storage.ErrConflict if
// it has enrolled again.
func (d *deletion) checkStillDeleted(ctx context.Context, t *tx) error {
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

// removeQueueRows removes some of the queue rows, with their results, and their
// commands without other rows. It says whether there are more.
func removeQueueRows(ctx context.Context, t *tx, d *deletion) (more bool, err error) {
	for ; d.next < len(d.ids); d.next++ {
		id := d.ids[d.next]
		uuids, err := sqldb.Column[string](t.Query(ctx, "SELECT command_uuid FROM nano_enrollment_queue"+t.Dialect.Index("nano_enrollment_queue_next")+
			" WHERE state IN ("+everyState()+") AND id = ? LIMIT ?", id, deletedRows))
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

// removeLeftResults removes some of the results without queue rows.
func removeLeftResults(ctx context.Context, t *tx, d *deletion) (more bool, err error) {
	for ; d.next < len(d.ids); d.next++ {
		id := d.ids[d.next]
		uuids, err := sqldb.Column[string](t.Query(ctx, "SELECT command_uuid FROM nano_command_results WHERE id = ? ORDER BY command_uuid LIMIT ?", id, deletedRows))
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

// removeEnrollment removes the enrollment itself. Its certificates stay, retired.
func removeEnrollment(ctx context.Context, t *tx, d *deletion) (more bool, err error) {
	tables := []string{"nano_enrollments", "nano_users", "nano_enrollment_push", "nano_enrollment_activity", "nano_topic_moves", "nano_enrollment_refusals", "nano_device_tags", inventoryTable}
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
	others, err := sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_enrollments WHERE device_id = ? LIMIT 1", d.device))
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
