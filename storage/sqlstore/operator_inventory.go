package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Enrollments = (*Store)(nil)

const (
	// candidateRows bounds the candidates that one statement reads from an
	// index, candidatesRead those of one page.
	candidateRows  = 1000
	candidatesRead = 10_000
	// scopeBranches bounds the topics that are looked up in the index by topic;
	// with more of them enrollments are read in the order of ids.
	scopeBranches = 32
	// enrollmentRows bounds the enrollments of one call of Enrollments.
	enrollmentRows = 1000
)

// source is an index with the candidates of a filter in order. One field of the
// filter chooses it; all fields are checked afterwards.
type source struct {
	// index is also part of the places of a list.
	index string
	// devices: the keys are those of devices.
	devices bool
	// parts are read together, in the order of at and id.
	parts []part
}

// part is a range of an index: the rows that meet the condition, in the order
// of at, if there is one, and id.
type part struct {
	table, index string
	at           string // column of times; may be empty
	where        string
	args         []any
	order        string // what the index has between the condition and id
}

func oneOf(p part) source { return source{index: p.index, parts: []part{p}} }

// eachOf is a source of parts of one table, by the same column.
func eachOf(devices bool, parts ...part) source {
	return source{index: parts[0].index, devices: devices, parts: parts}
}

func refusedClasses(s storage.PushStatus) []string {
	if s == storage.PushRefused {
		return storage.RefusedPushes()
	}
	return []string{string(s)}
}

// query returns the statement for the next candidates of a source.
func (src source) query(d *sqldb.Dialect, after storage.EnrollmentKey, limit int) (q string, args []any) {
	texts := make([]string, len(src.parts))
	for i, p := range src.parts {
		var more []any
		texts[i], more = p.query(d, src.devices, after, limit)
		args = append(args, more...)
	}
	if len(texts) == 1 {
		return texts[0], args
	}
	for i := range texts {
		texts[i] = fmt.Sprintf("SELECT at, id FROM (%s) part%d", texts[i], i)
	}
	return strings.Join(texts, "\nUNION ALL ") + "\nORDER BY at, id LIMIT ?", append(args, limit)
}

func (p part) query(d *sqldb.Dialect, devices bool, after storage.EnrollmentKey, limit int) (q string, args []any) {
	from := p.table
	if p.index != "" {
		from += d.Index(p.index)
	}
	// A place in a list of devices may be between the channels of one.
	beyond := "id > ?"
	if devices {
		beyond = "id >= ?"
	}
	args = append(args, p.args...)
	at, order := "0", "id"
	if p.at != "" {
		at, order = p.at, p.at+", id"
		beyond = fmt.Sprintf("%s >= ? AND (%s > ? OR %s)", at, at, beyond)
		args = append(args, micros(after.At), micros(after.At))
	}
	if p.order != "" {
		order = p.order + ", " + order
	}
	return fmt.Sprintf("SELECT %s AS at, id FROM %s WHERE %s AND %s ORDER BY %s LIMIT ?", at, from, p.where, beyond, order),
		append(args, after.Key, limit)
}

// FindEnrollments implements storage.Enrollments.
func (s *Store) FindEnrollments(ctx context.Context, scope storage.Scope, f storage.EnrollmentFilter, after storage.EnrollmentKey, limit int) (
	ids []string, next storage.EnrollmentKey, err error) {
	src := sourceOf(scope, f)
	if after.By != "" && after.By != src.index {
		return nil, storage.EnrollmentKey{}, storage.ErrPlace
	}
	next = storage.EnrollmentKey{By: src.index, At: after.At, Key: after.Key, ID: after.ID}
	for looked := 0; looked < candidatesRead; {
		rows := min(max(limit-len(ids), 100), candidateRows)
		var found candidates
		var chosen map[string]bool
		err := s.read(ctx, func(ctx context.Context, t *tx) (err error) {
			if found, err = readCandidates(ctx, t, src, next, rows); err != nil {
				return fmt.Errorf("reading candidates: %w", err)
			}
			chosen, err = choose(ctx, t, scope, f, found.keys)
			return err
		})
		if err != nil {
			return nil, storage.EnrollmentKey{}, fmt.Errorf("looking for enrollments: %w", err)
		}
		looked += found.looked
		for _, key := range found.keys {
			if len(ids) == limit {
				return ids, next, nil
			}
			next = key
			if chosen[key.ID] {
				ids = append(ids, key.ID)
			}
		}
		if found.end {
			return ids, storage.EnrollmentKey{}, nil
		}
		next = found.last
	}
	return ids, next, nil
}

// candidates reads the next candidates of a source. The ID of each key is the
// enrollment's.
type candidates struct {
	keys   []storage.EnrollmentKey
	looked int
	last   storage.EnrollmentKey // where the source continues
	end    bool
}

func readCandidates(ctx context.Context, t *tx, src source, after storage.EnrollmentKey, limit int) (candidates, error) {
	q, args := src.query(t.Dialect, after, limit)
	c := candidates{last: after}
	var keys []storage.EnrollmentKey
	err := t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		var at int64
		key := storage.EnrollmentKey{By: src.index}
		if err := row.Scan(&at, &key.Key); err != nil {
			return err
		}
		c.looked++
		key.At = fromMicros(at)
		if n := len(keys); n == 0 || keys[n-1].Key != key.Key {
			keys = append(keys, key)
		}
		return nil
	})
	if err != nil {
		return candidates{}, err
	}
	c.end = c.looked < limit
	if len(keys) == 0 {
		return c, nil
	}
	if !src.devices {
		for i := range keys {
			keys[i].ID = keys[i].Key
		}
		c.keys, c.last = keys, keys[len(keys)-1]
		return c, nil
	}
	channels, err := channelsOf(ctx, t, keys)
	if err != nil {
		return candidates{}, err
	}
	for _, key := range keys {
		for _, id := range channels[key.Key] {
			if key.Key == after.Key && id <= after.ID {
				continue
			}
			key.ID = id
			c.keys = append(c.keys, key)
		}
	}
	c.last = keys[len(keys)-1]
	if all := channels[c.last.Key]; len(all) > 0 {
		c.last.ID = all[len(all)-1]
	}
	return c, nil
}

// channelsOf reads the enrollments of devices, in the order of ids.
func channelsOf(ctx context.Context, t *tx, devices []storage.EnrollmentKey) (map[string][]string, error) {
	ids := make([]string, len(devices))
	for i, d := range devices {
		ids[i] = d.Key
	}
	place, args := sqldb.InList(ids)
	channels := make(map[string][]string, len(devices))
	err := t.Query(ctx, "SELECT device_id, id FROM nano_enrollments WHERE device_id IN "+place+" ORDER BY device_id, id", args...).Each(func(row sqldb.Row) error {
		var device, id string
		if err := row.Scan(&device, &id); err != nil {
			return err
		}
		channels[device] = append(channels[device], id)
		return nil
	})
	return channels, err
}

// choose returns the candidates that the whole filter lets through.
func choose(ctx context.Context, t *tx, scope storage.Scope, f storage.EnrollmentFilter, keys []storage.EnrollmentKey) (map[string]bool, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	b := conditions(scope, f)
	columns := "e.id"
	for _, c := range b.checks {
		columns += ", " + c.column
	}
	chosen := make(map[string]bool, len(keys))
	for chunk := range slices.Chunk(keys, candidateRows) {
		ids := make([]string, len(chunk))
		for i, k := range chunk {
			ids[i] = k.ID
		}
		place, more := sqldb.InList(ids)
		err := t.Query(ctx, "SELECT "+columns+" FROM "+b.from+" WHERE e.id IN "+place+b.where.String(), append(more, b.args...)...).Each(func(row sqldb.Row) error {
			values := make([]string, 1+len(b.checks))
			into := make([]any, len(values))
			for i := range values {
				into[i] = &values[i]
			}
			if err := row.Scan(into...); err != nil {
				return err
			}
			holds := true
			for i, c := range b.checks {
				holds = holds && c.holds(values[1+i])
			}
			if holds {
				chosen[values[0]] = true
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return chosen, nil
}

// Enrollments implements storage.Enrollments.
func (s *Store) Enrollments(ctx context.Context, scope storage.Scope, ids []string) (list []storage.Enrollment, err error) {
	if len(ids) > enrollmentRows {
		return nil, fmt.Errorf("reading enrollments: %d ids are more than %d", len(ids), enrollmentRows)
	}
	ids = slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return !storable(id) })
	if len(ids) == 0 {
		return nil, nil
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		list = nil
		byID, err := readInventory(ctx, t, scope, ids)
		if err != nil || len(byID) == 0 {
			return err
		}
		if err := countWaiting(ctx, t, byID); err != nil {
			return fmt.Errorf("counting commands: %w", err)
		}
		if err := addTags(ctx, t, scope, byID); err != nil {
			return err
		}
		for _, id := range ids {
			if e := byID[id]; e != nil {
				list = append(list, *e)
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading enrollments: %w", err)
	}
	return list, nil
}

func readInventory(ctx context.Context, t *tx, scope storage.Scope, ids []string) (map[string]*storage.Enrollment, error) {
	place, args := sqldb.InList(ids)
	q := `SELECT e.id, e.device_id, e.type, e.topic, e.enabled, e.operator_disabled, e.token_update_tally, e.awaiting_configuration,
d.authenticate_at, e.enrolled_at, e.created_at, e.renewal_until, a.last_seen_at,
d.serial_number, d.device_name, d.model, d.model_name, d.product_name, d.os_version, d.build_version, d.imei, d.meid,
CASE WHEN d.bootstrap_token IS NULL THEN 0 ELSE 1 END, CASE WHEN d.unlock_token IS NULL THEN 0 ELSE 1 END,
u.user_id, u.user_short_name, u.user_long_name,
c.sha256, c.certificate, c.not_after, c.created_at,
p.owed_seq, p.paid_seq, p.attempts, p.push_at, p.last_push_at, p.last_push_class, p.last_push_status, p.last_push_reason, p.last_apns_id, p.token_dead_at,
i.supervised, i.information_at, i.filevault, i.security_at, v.moved_at
FROM nano_enrollments e
JOIN nano_devices d ON d.id = e.device_id
LEFT JOIN nano_users u ON u.id = e.id
LEFT JOIN nano_enrollment_activity a ON a.id = e.id
LEFT JOIN nano_enrollment_push p ON p.id = e.id
LEFT JOIN nano_device_inventory i ON i.id = e.device_id
LEFT JOIN nano_topic_moves v ON v.id = e.device_id
LEFT JOIN nano_cert_auth_associations c ON c.id = e.device_id AND c.retired_at IS NULL
WHERE e.id IN ` + place
	inScope(scope, func(condition string, more ...any) {
		q += " AND " + condition
		args = append(args, more...)
	})
	byID := make(map[string]*storage.Enrollment, len(ids))
	err := t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		e, err := scanEnrollment(row, scope)
		if err != nil {
			return err
		}
		byID[e.ID] = e
		return nil
	})
	return byID, err
}

func scanEnrollment(row sqldb.Row, scope storage.Scope) (*storage.Enrollment, error) {
	e := &storage.Enrollment{Queue: make(map[storage.State]int64)}
	var (
		begun, created                            int64
		enrolled, renewal, seen, notAfter, pinned sql.Null[int64]
		userID, shortName, longName, hash         sql.Null[string]
		class, reason, apnsID                     sql.Null[string]
		owed, paid, attempts, status              sql.Null[int64]
		nextAt, pushedAt, deadAt                  sql.Null[int64]
		supervised, filevault                     sql.Null[bool]
		informedAt, securedAt, movedAt            sql.Null[int64]
		der                                       []byte
		typ                                       string
	)
	err := row.Scan(&e.ID, &e.DeviceID, &typ, &e.Topic, &e.Enabled, &e.OperatorDisabled, &e.Tally, &e.AwaitingConfiguration,
		&begun, &enrolled, &created, &renewal, &seen,
		&e.SerialNumber, &e.DeviceName, &e.Model, &e.ModelName, &e.ProductName, &e.OSVersion, &e.BuildVersion, &e.IMEI, &e.MEID,
		&e.HasBootstrapToken, &e.HasUnlockToken,
		&userID, &shortName, &longName,
		&hash, &der, &notAfter, &pinned,
		&owed, &paid, &attempts, &nextAt, &pushedAt, &class, &status, &reason, &apnsID, &deadAt,
		&supervised, &informedAt, &filevault, &securedAt, &movedAt)
	if err != nil {
		return nil, err
	}
	e.Type = mdm.EnrollType(typ)
	e.BegunAt = fromMicros(begun)
	e.EnrolledAt, e.CreatedAt, e.RenewalUntil, e.LastSeenAt = fromMicros(enrolled.V), fromMicros(created), fromMicros(renewal.V), fromMicros(seen.V)
	e.UserID, e.UserShortName, e.UserLongName = userID.V, shortName.V, longName.V
	if supervised.Valid && !answeredElsewhere(scope, informedAt, movedAt) {
		e.Supervised = &supervised.V
	}
	if filevault.Valid && !answeredElsewhere(scope, securedAt, movedAt) {
		e.FileVault = &filevault.V
	}
	if hash.Valid {
		e.Certificate = &storage.PinnedCertificate{Hash: hash.V, DER: der, NotAfter: fromMicros(notAfter.V), PinnedAt: fromMicros(pinned.V)}
	}
	e.Push = storage.PushState{
		Owed: paid.V < owed.V, Attempts: int(attempts.V), LastAt: fromMicros(pushedAt.V), LastClass: class.V, LastStatus: int(status.V),
		LastReason: reason.V, LastAPNsID: apnsID.V, NextAt: fromMicros(nextAt.V), TokenDeadAt: fromMicros(deadAt.V),
	}
	if seen.V > pushedAt.V { // it has polled since
		e.Push.Attempts = 0
	}
	return e, nil
}

// addTags reads the tags of the enrollments' devices.
func addTags(ctx context.Context, t *tx, scope storage.Scope, byID map[string]*storage.Enrollment) error {
	var devices []string
	for _, e := range byID {
		devices = append(devices, e.DeviceID)
	}
	slices.Sort(devices)
	tags, err := readTags(ctx, t, scope, slices.Compact(devices))
	for _, e := range byID {
		e.Tags = tags[e.DeviceID]
	}
	return err
}

// countWaiting counts the waiting commands of each.
func countWaiting(ctx context.Context, t *tx, byID map[string]*storage.Enrollment) error {
	ids := make([]string, 0, len(byID))
	for id := range byID {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	place, args := sqldb.InList(ids)
	err := t.Query(ctx, "SELECT id, state, COUNT(*) FROM nano_enrollment_queue"+t.Dialect.Index("nano_enrollment_queue_next")+
		fmt.Sprintf(" WHERE state IN (%d, %d, %d) AND id IN ", storage.Scheduled, storage.Queued, storage.NotNow)+place+" GROUP BY id, state", args...).Each(func(row sqldb.Row) error {
		var id string
		var state storage.State
		var n int64
		if err := row.Scan(&id, &state, &n); err != nil {
			return err
		}
		byID[id].Queue[state] = n
		return nil
	})
	return err
}

// UserChannels implements storage.Enrollments.
func (s *Store) UserChannels(ctx context.Context, scope storage.Scope, device string, limit int) (ids []string, err error) {
	if !storable(device) {
		return nil, nil
	}
	q, args := "SELECT e.id FROM nano_enrollments e WHERE e.device_id = ? AND e.id <> ?", []any{device, device}
	inScope(scope, func(condition string, more ...any) {
		q += " AND " + condition
		args = append(args, more...)
	})
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		ids, err = sqldb.Column[string](t.Query(ctx, q+" ORDER BY e.id LIMIT ?", append(slices.Clone(args), limit)...))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading user channels: %w", err)
	}
	return ids, nil
}
