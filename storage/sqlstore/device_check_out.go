package sqlstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/storage"
)

var checkOutKind = opKind{
	op:    (*storage.CheckOut)(nil),
	needs: skipsUnknown,
	ends:  true, ordered: true,
}

// endEnrollments disables the enrollments of devices and ends their queues,
// pushes owed and bootstrap tokens. A device that renews its identity keeps
// those, and only its own enrollment is disabled, until its next TokenUpdate.
func endEnrollments(ctx context.Context, t *tx, batch []*opRun, rows *enrollments) error {
	var devices, disable, clear []string
	for _, p := range batch {
		own := rows.byID[p.id()]
		if p.kind.begins && own != nil && own.renewing {
			disable = append(disable, own.id)
			continue
		}
		devices = append(devices, p.device)
		for _, e := range rows.byDevice[p.device] {
			disable = append(disable, e.id)
			clear = append(clear, e.id)
		}
	}
	if err := disableEnrollments(ctx, t, disable); err != nil {
		return err
	}
	if len(clear) == 0 {
		return nil // devices that are new, or unknown
	}
	is, args := t.Among(devices)
	_, err := t.Exec(ctx, `UPDATE nano_devices SET bootstrap_token = NULL, bootstrap_token_at = NULL, updated_at = ? WHERE id `+is,
		append([]any{t.Now}, args...)...)
	if err != nil {
		return fmt.Errorf("clearing bootstrap tokens: %w", err)
	}
	return clearQueues(ctx, t, clear)
}

func disableEnrollments(ctx context.Context, t *tx, ids []string) error {
	for chunk := range slices.Chunk(ids, enqueueRows) {
		is, args := t.Among(chunk)
		_, err := t.Exec(ctx, `UPDATE nano_enrollments SET enabled = 0, token_update_tally = 0, updated_at = ? WHERE id `+is,
			append([]any{t.Now}, args...)...)
		if err != nil {
			return fmt.Errorf("disabling enrollments: %w", err)
		}
	}
	return nil
}

// clearQueues cancels waiting commands. A concurrent enqueue locks the push
// row: it comes either before, and its commands are cancelled, or after, and
// finds the enrollment disabled.
func clearQueues(ctx context.Context, t *tx, ids []string) error {
	slices.Sort(ids)
	for chunk := range slices.Chunk(ids, enqueueRows) {
		if _, err := lock(ctx, t, "nano_enrollment_push", chunk); err != nil {
			return err
		}
	}
	for chunk := range slices.Chunk(ids, enqueueRows) {
		is, args := t.Among(chunk)
		_, err := t.Exec(ctx, `UPDATE nano_enrollment_push SET paid_seq = owed_seq, push_at = NULL, attempts = 0 WHERE id `+is, args...)
		if err != nil {
			return fmt.Errorf("forgetting pushes owed: %w", err)
		}
		_, err = t.Exec(ctx, fmt.Sprintf(`UPDATE nano_enrollment_queue%s SET state = %d, finished_at = ?, not_before = NULL WHERE state IN (%d, %d, %d) AND id `,
			t.Dialect.Index("nano_enrollment_queue_next"), storage.Cancelled, storage.Scheduled, storage.Queued, storage.NotNow)+is, append([]any{t.Now}, args...)...)
		if err != nil {
			return fmt.Errorf("cancelling commands: %w", err)
		}
	}
	return nil
}
