package sqlstore

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Refusals = (*Store)(nil)

// refusalRows bounds the refusals of one transaction.
const refusalRows = 100

// RecordRefusals implements storage.Refusals.
func (s *Store) RecordRefusals(ctx context.Context, refusals []storage.DeviceRefusal) error {
	for chunk := range slices.Chunk(refusals, refusalRows) {
		err := s.write(ctx, func(ctx context.Context, t *tx) error { return recordRefusals(ctx, t, chunk) })
		if err != nil {
			return fmt.Errorf("recording refusals: %w", err)
		}
	}
	return nil
}

func recordRefusals(ctx context.Context, t *tx, refusals []storage.DeviceRefusal) error {
	var hashes, named []string
	for _, r := range refusals {
		hashes = append(hashes, r.Certificate)
		if storable(r.Enrollment) {
			named = append(named, r.Enrollment)
		}
	}
	pinned, err := texts(ctx, t, "SELECT sha256, id FROM nano_cert_auth_associations WHERE sha256 ", hashes)
	if err != nil {
		return err
	}
	known := slices.AppendSeq(named, maps.Values(pinned))
	devices, err := texts(ctx, t, "SELECT id, device_id FROM nano_enrollments WHERE id ", known)
	if err != nil {
		return err
	}
	// In key order, since replicas record at the same time.
	rows := make(map[keyPair]storage.EnrollmentRefusal)
	for _, r := range refusals {
		owner, claimed := pinned[r.Certificate], r.Enrollment
		device, exists := devices[claimed]
		switch {
		case !exists:
			addRefusal(rows, owner, claimed, r)
		case device == owner:
			addRefusal(rows, claimed, "", r)
		default:
			addRefusal(rows, claimed, owner, r)
			addRefusal(rows, owner, claimed, r)
		}
	}
	for _, k := range slices.SortedFunc(maps.Keys(rows), keyPair.Compare) {
		if _, ok := devices[k.ID]; !ok {
			continue
		}
		if err := storeRefusal(ctx, t, k, rows[k]); err != nil {
			return err
		}
	}
	return nil
}

// addRefusal adds r to the row of an enrollment; "" is none.
func addRefusal(rows map[keyPair]storage.EnrollmentRefusal, id, other string, r storage.DeviceRefusal) {
	if id == "" {
		return
	}
	k := keyPair{ID: id, Item: r.Cause}
	row, ok := rows[k]
	if !ok || r.First.Before(row.First) {
		row.First = r.First
	}
	if !r.Last.Before(row.Last) {
		row.Last, row.Detail = r.Last, r.Detail
		if row.Other = ""; other != id && storable(other) {
			row.Other = other
		}
	}
	row.Count += int64(r.Count)
	rows[k] = row
}

// storeRefusal adds to a row, or inserts it.
func storeRefusal(ctx context.Context, t *tx, k keyPair, r storage.EnrollmentRefusal) error {
	err := t.Upsert(ctx, "nano_enrollment_refusals", []string{"id", "cause", "count", "first_at", "last_at"},
		[]string{"id", "cause"}, nil, []any{k.ID, k.Item, int64(0), micros(r.First), micros(r.Last)})
	if err != nil {
		return err
	}
	return t.ExecDeferred(ctx, "UPDATE nano_enrollment_refusals SET count = count + ?, other = ?, detail = ?, last_at = ? WHERE id = ? AND cause = ?",
		r.Count, r.Other, clip(r.Detail), micros(r.Last), k.ID, k.Item)
}

// texts reads pairs of texts, by the first, for a list of keys.
func texts(ctx context.Context, t *tx, query string, keys []string) (map[string]string, error) {
	found := make(map[string]string, len(keys))
	if len(keys) == 0 {
		return found, nil
	}
	is, args := t.Among(slices.Compact(slices.Sorted(slices.Values(keys))))
	err := t.Query(ctx, query+is, args...).Each(func(row sqldb.Row) error {
		var key, value string
		err := row.Scan(&key, &value)
		found[key] = value
		return err
	})
	return found, err
}

// EnrollmentRefusals implements storage.Refusals.
func (s *Store) EnrollmentRefusals(ctx context.Context, id string) (list []storage.EnrollmentRefusal, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) (err error) {
		list, err = sqldb.Collect(t.Query(ctx, "SELECT cause, count, other, detail, first_at, last_at FROM nano_enrollment_refusals WHERE id = ?", id),
			func(row sqldb.Row, r *storage.EnrollmentRefusal) error {
				var first, last int64
				err := row.Scan(&r.Cause, &r.Count, &r.Other, &r.Detail, &first, &last)
				r.First, r.Last = fromMicros(first), fromMicros(last)
				return err
			})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading refusals: %w", err)
	}
	slices.SortFunc(list, func(a, b storage.EnrollmentRefusal) int {
		return cmp.Or(b.Last.Compare(a.Last), strings.Compare(a.Cause, b.Cause))
	})
	return list, nil
}
