package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// enrollment is a row of nano_enrollments before a change.
type enrollment struct {
	id, device string
	topic      string // APNs
	tally      int64
	renewing   bool // a renewal window is open
	enrolledAt sql.Null[int64]
}

// enrollments are the locked enrollments of a round's devices.
type enrollments struct {
	byID     map[string]*enrollment
	byDevice map[string][]*enrollment
}

// readEnrollments locks and reads enrollments.
func readEnrollments(ctx context.Context, t *tx, ids []string) (*enrollments, error) {
	all := &enrollments{byID: make(map[string]*enrollment), byDevice: make(map[string][]*enrollment)}
	slices.Sort(ids) // locks are taken in the order of keys
	for chunk := range slices.Chunk(slices.Compact(ids), enqueueRows) {
		err := t.QueryLocked(ctx, "id, device_id, topic, token_update_tally, renewal_until, enrolled_at", "nano_enrollments", chunk).Each(func(row sqldb.Row) error {
			e := new(enrollment)
			var renewal sql.Null[int64]
			if err := row.Scan(&e.id, &e.device, &e.topic, &e.tally, &renewal, &e.enrolledAt); err != nil {
				return err
			}
			e.renewing = renewal.Valid && renewal.V > t.Now
			all.byID[e.id] = e
			all.byDevice[e.device] = append(all.byDevice[e.device], e)
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("locking enrollments: %w", err)
		}
	}
	return all, t.checkSkipped(ctx, "nano_enrollments", ids, slices.Collect(maps.Keys(all.byID)))
}

// concerned returns the ids of the enrollments that operations concern: of
// their channel and its device, and all of a device whose enrollments end. A
// message does not read a device's other channels.
func concerned(ctx context.Context, t *tx, batch []*opRun, certs *certificates) ([]string, error) {
	var ids, ending []string
	for _, p := range batch {
		if p.err != nil || !certs.devices[p.device] {
			continue
		}
		ids = append(ids, p.device)
		if p.id() != p.device {
			ids = append(ids, p.id())
		}
		if p.kind.ends {
			ending = append(ending, p.device)
		}
	}
	if len(ending) == 0 {
		return ids, nil
	}
	is, args := t.Among(ending)
	channels, err := sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_enrollments WHERE device_id "+is, args...))
	if err != nil {
		return nil, fmt.Errorf("looking for channels: %w", err)
	}
	return append(ids, channels...), nil
}

// refuseManyChannels refuses operations that add a user channel to a device
// with the greatest allowed number. Users count from their first
// UserAuthenticate.
func refuseManyChannels(ctx context.Context, t *tx, batch []*opRun, r *opRound) error {
	var adding []*opRun
	var ids, devices []string
	for _, p := range batch {
		if p.err == nil && !p.settled && p.kind.addsUser && p.src.Enroll.IsUserChannel() && r.rows.byID[p.id()] == nil {
			adding, ids, devices = append(adding, p), append(ids, p.id()), append(devices, p.device)
		}
	}
	if len(adding) == 0 {
		return nil
	}
	is, args := t.Among(ids)
	known, err := sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_users WHERE id "+is, args...))
	if err != nil {
		return fmt.Errorf("looking for users: %w", err)
	}
	counts := make(map[string]int)
	is, args = t.Among(devices)
	err = t.Query(ctx, "SELECT device_id, COUNT(*) FROM nano_users WHERE device_id "+is+" GROUP BY device_id", args...).Each(func(row sqldb.Row) error {
		var device string
		var n int
		err := row.Scan(&device, &n)
		counts[device] = n
		return err
	})
	if err != nil {
		return fmt.Errorf("counting users: %w", err)
	}
	for _, p := range adding {
		if counts[p.device] >= t.maxUserChannels && !slices.Contains(known, p.id()) {
			p.err = storage.ErrTooManyChannels
		}
	}
	return nil
}

// updateDevices writes columns of devices that exist and are locked. It is an
// upsert because that is the one statement of all engines that sets other
// values in each row.
func updateDevices(ctx context.Context, t *tx, columns []string, batch []*opRun, row func(*opRun) []any) error {
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
