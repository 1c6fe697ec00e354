package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// enrollment is a row of nano_enrollments as a change finds it.
type enrollment struct {
	id, device string
	topic      string // APNs
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
	err := t.QueryLocked(ctx, "id, device_id, topic, token_update_tally, renewal_until, enrolled_at", "nano_enrollments", ids).Each(func(row sqldb.Row) error {
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
	return all, nil
}

// updateDevices writes columns of devices that exist and are locked. It is an
// upsert only since that is the statement with other values for each row that
// all engines have.
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
