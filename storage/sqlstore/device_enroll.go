package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// enrollment is a row of nano_enrollments as a change finds it.
type enrollment struct {
	id, device string
	tally      int64
	renewing   bool // a renewal window is open
	enrolledAt sql.Null[int64]
}

// enrollments are those of the devices of a round, locked.
type enrollments struct {
	byID     map[string]*enrollment
	byDevice map[string][]*enrollment
}

// readEnrollments locks and reads enrollments.
func readEnrollments(ctx context.Context, t *tx, ids []string) (*enrollments, error) {
	all := &enrollments{byID: make(map[string]*enrollment), byDevice: make(map[string][]*enrollment)}
	if len(ids) == 0 {
		return all, nil
	}
	rows, err := t.QueryLocked(ctx, "id, device_id, token_update_tally, renewal_until, enrolled_at", "nano_enrollments", ids)
	if err != nil {
		return nil, fmt.Errorf("locking enrollments: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		e := new(enrollment)
		var renewal sql.Null[int64]
		if err := rows.Scan(&e.id, &e.device, &e.tally, &renewal, &e.enrolledAt); err != nil {
			return nil, fmt.Errorf("locking enrollments: %w", err)
		}
		e.renewing = renewal.Valid && renewal.V > t.Now
		all.byID[e.id] = e
		all.byDevice[e.device] = append(all.byDevice[e.device], e)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("locking enrollments: %w", err)
	}
	return all, nil
}

// changeEnrollments carries out what is no report and was admitted.
func changeEnrollments(ctx context.Context, t *tx, batch []*pending, certs *certificates) error {
	if len(batch) == 0 {
		return nil
	}
	all, err := readEnrollments(ctx, t, certs.enrollments)
	if err != nil {
		return err
	}
	var authenticates, updates, checkOuts, bootstraps, users, reads []*pending
	for _, p := range batch {
		if p.err != nil {
			continue
		}
		switch p.op.(type) {
		case *storage.TokenUpdate, *storage.SetBootstrapToken, *storage.UserAuthenticate:
			if !certs.devices[p.device] {
				p.err = storage.ErrNotEnrolled
				continue
			}
		}
		if all.byID[p.id()] != nil {
			p.seen, p.note = true, activity{id: p.id(), seen: t.Now}
		}
		switch op := p.op.(type) {
		case *storage.Authenticate:
			p.facts.topic = op.Message.Topic
			p.seen, p.note = true, activity{id: p.id(), seen: t.Now}
			authenticates = append(authenticates, p)
		case *storage.TokenUpdate:
			if all.byID[p.device] == nil {
				p.err = storage.ErrNotEnrolled
				continue
			}
			p.facts.topic = op.Message.Topic
			p.seen, p.note = true, activity{id: p.id(), seen: t.Now}
			updates = append(updates, p)
		case *storage.CheckOut:
			checkOuts = append(checkOuts, p)
		case *storage.SetBootstrapToken:
			bootstraps = append(bootstraps, p)
		case *storage.UserAuthenticate:
			users = append(users, p)
		case *storage.GetBootstrapToken:
			reads = append(reads, p)
		}
	}
	for _, step := range []func() error{
		func() error { return authenticate(ctx, t, authenticates, certs, all) },
		func() error { return end(ctx, t, authenticates, checkOuts, all) },
		func() error { return updateTokens(ctx, t, updates, all) },
		func() error { return setBootstrapTokens(ctx, t, bootstraps) },
		func() error { return putUsers(ctx, t, users) },
		func() error { return readBootstrapTokens(ctx, t, reads) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

var (
	authenticateColumns = [...]string{"id", "serial_number", "model", "model_name", "device_name", "os_version", "build_version",
		"product_name", "imei", "meid", "authenticate", "authenticate_at", "created_at", "updated_at"}
	// All but the key and created_at.
	authenticateSets = [...]string{"serial_number", "model", "model_name", "device_name", "os_version", "build_version",
		"product_name", "imei", "meid", "authenticate", "authenticate_at", "updated_at"}
)

// authenticate writes devices and the beginnings of their enrollments. A
// device that was not there is inserted without regard for one that may have
// come in between: see change.
func authenticate(ctx context.Context, t *tx, batch []*pending, certs *certificates, all *enrollments) error {
	var known, fresh []any
	var begun []any
	for _, p := range batch {
		m := p.op.(*storage.Authenticate).Message
		args := []any{p.id(), clip(m.SerialNumber), clip(m.Model), clip(m.ModelName), clip(m.DeviceName), clip(m.OSVersion),
			clip(m.BuildVersion), clip(m.ProductName), clip(m.IMEI), clip(m.MEID), t.sealed(authenticateColumn, p.id(), notNil(m.Raw)), t.Now, t.Now, t.Now}
		if certs.devices[p.id()] {
			known = append(known, args...)
		} else {
			fresh = append(fresh, args...)
		}
		if all.byID[p.id()] == nil {
			begun = append(begun, p.id(), p.id(), string(p.src.Enroll.Type), clip(m.Topic), t.Now, t.Now)
		}
	}
	if len(fresh) > 0 {
		if err := t.Insert(ctx, "nano_devices", authenticateColumns[:], fresh); err != nil {
			return fmt.Errorf("storing devices: %w", err)
		}
	}
	if len(known) > 0 {
		if err := t.Upsert(ctx, "nano_devices", authenticateColumns[:], []string{"id"}, authenticateSets[:], known); err != nil {
			return fmt.Errorf("storing devices: %w", err)
		}
	}
	if len(begun) > 0 {
		err := t.Insert(ctx, "nano_enrollments", []string{"id", "device_id", "type", "topic", "created_at", "updated_at"}, begun)
		if err != nil {
			return fmt.Errorf("storing enrollments: %w", err)
		}
	}
	return nil
}

// end disables enrollments and takes from them what must not outlive them:
// the queue, pushes owed and the bootstrap token. What a device that renews
// its identity has is left to it, but for its own enrollment, which the
// TokenUpdate to come enables again.
func end(ctx context.Context, t *tx, authenticates, checkOuts []*pending, all *enrollments) error {
	var devices, disable, clear []string
	for _, p := range slices.Concat(authenticates, checkOuts) {
		_, begins := p.op.(*storage.Authenticate)
		own := all.byID[p.id()]
		if begins && own != nil && own.renewing {
			disable = append(disable, own.id)
			continue
		}
		devices = append(devices, p.device)
		for _, e := range all.byDevice[p.device] {
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
	if len(ids) == 0 {
		return nil
	}
	is, args := t.Among(ids)
	_, err := t.Exec(ctx, `UPDATE nano_enrollments SET enabled = 0, token_update_tally = 0, updated_at = ? WHERE id `+is,
		append([]any{t.Now}, args...)...)
	if err != nil {
		return fmt.Errorf("disabling enrollments: %w", err)
	}
	return nil
}

// clearQueues cancels what waits. Whoever queues at the same time holds the
// push row: either it was there before, and its commands are cancelled, or it
// finds the enrollment disabled.
func clearQueues(ctx context.Context, t *tx, ids []string) error {
	slices.Sort(ids)
	if _, err := lock(ctx, t, "nano_enrollment_push", ids); err != nil {
		return err
	}
	is, args := t.Among(ids)
	_, err := t.Exec(ctx, `UPDATE nano_enrollment_push SET paid_seq = owed_seq, push_at = NULL, attempts = 0 WHERE id `+is, args...)
	if err != nil {
		return fmt.Errorf("forgetting pushes owed: %w", err)
	}
	_, err = t.Exec(ctx, fmt.Sprintf(`UPDATE nano_enrollment_queue%s SET state = %d, finished_at = ?, not_before = NULL WHERE state IN (%d, %d, %d) AND id `,
		t.Dialect.Index("nano_enrollment_queue_next"), storage.Cancelled, storage.Scheduled, storage.Queued, storage.NotNow)+is, append([]any{t.Now}, args...)...)
	if err != nil {
		return fmt.Errorf("cancelling commands: %w", err)
	}
	return nil
}

// updateTokens writes TokenUpdates.
func updateTokens(ctx context.Context, t *tx, batch []*pending, all *enrollments) error {
	if len(batch) == 0 {
		return nil
	}
	var plain, unlocking, users []*pending
	var args []any
	var ids, repeating []string
	for _, p := range batch {
		m := p.op.(*storage.TokenUpdate).Message
		tally, enrolledAt := int64(1), t.Now
		if e := all.byID[p.id()]; e != nil {
			tally = e.tally + 1
			if e.tally > 0 && e.enrolledAt.Valid {
				enrolledAt = e.enrolledAt.V
			}
			if e.enrolledAt.Valid { // it may have been owed a push
				repeating = append(repeating, p.id())
			}
		}
		p.out.Tally = int(tally)
		p.facts.tally = p.out.Tally
		args = append(args, p.id(), p.device, string(p.src.Enroll.Type), clip(m.Topic), clip(m.PushMagic), notNil(m.Token), t.Now,
			true, tally, m.AwaitingConfiguration, enrolledAt, t.Now, t.Now)
		ids = append(ids, p.id())
		switch {
		case p.src.Enroll.IsUserChannel():
			users = append(users, p)
		case len(m.UnlockToken) > 0:
			unlocking = append(unlocking, p)
		default:
			plain = append(plain, p)
		}
	}
	if err := updateDevices(ctx, t, []string{"token_update", "token_update_at"}, plain, func(p *pending) []any {
		return []any{t.sealed(tokenUpdateColumn, p.device, notNil(p.op.(*storage.TokenUpdate).Message.Raw)), t.Now}
	}); err != nil {
		return err
	}
	if err := updateDevices(ctx, t, []string{"token_update", "token_update_at", "unlock_token", "unlock_token_at"}, unlocking, func(p *pending) []any {
		m := p.op.(*storage.TokenUpdate).Message
		return []any{t.sealed(tokenUpdateColumn, p.device, notNil(m.Raw)), t.Now, t.sealed(unlockTokenColumn, p.device, m.UnlockToken), t.Now}
	}); err != nil {
		return err
	}
	if err := putUsers(ctx, t, users); err != nil {
		return err
	}
	err := t.Upsert(ctx, "nano_enrollments",
		[]string{"id", "device_id", "type", "topic", "push_magic", "token", "token_at", "enabled", "token_update_tally",
			"awaiting_configuration", "enrolled_at", "created_at", "updated_at"},
		[]string{"id"},
		[]string{"device_id", "type", "topic", "push_magic", "token", "token_at", "enabled", "token_update_tally",
			"awaiting_configuration", "enrolled_at", "updated_at"}, args)
	if err != nil {
		return fmt.Errorf("storing enrollments: %w", err)
	}
	return revive(ctx, t, ids, repeating)
}

// revive makes enrollments with a new token pushable, and has what is owed to
// those that had one before pushed at once.
func revive(ctx context.Context, t *tx, ids, repeating []string) error {
	args := make([]any, 0, len(ids))
	for _, id := range ids {
		args = append(args, id)
	}
	err := t.Upsert(ctx, "nano_enrollment_push", []string{"id"}, []string{"id"}, []string{"token_dead_at = NULL", "attempts = 0"}, args)
	if err != nil {
		return fmt.Errorf("storing push rows: %w", err)
	}
	if len(repeating) == 0 {
		return nil
	}
	is, args := t.Among(repeating)
	_, err = t.Exec(ctx, `UPDATE nano_enrollment_push SET push_at = ? WHERE owed_seq > paid_seq AND id `+is, append([]any{t.Now}, args...)...)
	if err != nil {
		return fmt.Errorf("planning pushes: %w", err)
	}
	return nil
}

// updateDevices writes columns of devices that exist and are locked. It is an
// upsert only since that is the statement with other values for each row that
// all engines have.
func updateDevices(ctx context.Context, t *tx, columns []string, batch []*pending, row func(*pending) []any) error {
	if len(batch) == 0 {
		return nil
	}
	required := []string{"id", "authenticate", "authenticate_at", "created_at", "updated_at"}
	var args []any
	for _, p := range batch {
		args = append(args, p.device, []byte{}, 0, t.Now, t.Now)
		args = append(args, row(p)...)
	}
	err := t.Upsert(ctx, "nano_devices", slices.Concat(required, columns), []string{"id"}, append(columns, "updated_at"), args)
	if err != nil {
		return fmt.Errorf("storing devices: %w", err)
	}
	return nil
}

func setBootstrapTokens(ctx context.Context, t *tx, batch []*pending) error {
	return updateDevices(ctx, t, []string{"bootstrap_token", "bootstrap_token_at"}, batch, func(p *pending) []any {
		token := p.op.(*storage.SetBootstrapToken).Token
		if len(token) == 0 {
			return []any{nil, nil}
		}
		return []any{t.sealed(bootstrapTokenColumn, p.device, token), t.Now}
	})
}

// putUsers writes the users of TokenUpdates or those of UserAuthenticates.
func putUsers(ctx context.Context, t *tx, batch []*pending) error {
	if len(batch) == 0 {
		return nil
	}
	message, column := "user_authenticate", userAuthenticateColumn
	var args []any
	for _, p := range batch {
		var who *mdm.Enrollment
		var raw []byte
		switch op := p.op.(type) {
		case *storage.TokenUpdate:
			message, column = "token_update", userTokenUpdateColumn
			who, raw = op.Message.Identity(), op.Message.Raw
		case *storage.UserAuthenticate:
			who, raw = op.Message.Identity(), op.Message.Raw
		}
		args = append(args, p.id(), p.device, clip(cmp.Or(who.UserID, who.EnrollmentUserID)), clip(who.UserShortName),
			clip(who.UserLongName), t.sealed(column, p.id(), notNil(raw)), t.Now, t.Now, t.Now)
	}
	err := t.Upsert(ctx, "nano_users",
		[]string{"id", "device_id", "user_id", "user_short_name", "user_long_name", message, message + "_at", "created_at", "updated_at"},
		[]string{"id"},
		[]string{"device_id", "user_id", "user_short_name", "user_long_name", message, message + "_at", "updated_at"}, args)
	if err != nil {
		return fmt.Errorf("storing users: %w", err)
	}
	return nil
}
