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
	// candidateRows is how many candidates one statement takes from an index,
	// candidatesLooked how many rows one page looks at.
	candidateRows    = 1000
	candidatesLooked = 10_000
	// scopeBranches is how many topics are looked up in the index by topic;
	// with more of them enrollments are read in the order of ids.
	scopeBranches = 32
	// enrollmentRows bounds what one call of Enrollments reads.
	enrollmentRows = 1000
)

// source is an index that has the candidates of a filter in order. One filter
// chooses it; all of them are looked at afterwards.
type source struct {
	// index goes into places, too.
	index string
	// devices: the keys are those of devices.
	devices bool
	// parts are read together, in the order of at and id.
	parts []part
}

// part is a stretch of an index: the rows for which the condition holds, in
// the order of at, if there is one, and id.
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

// sourceOf chooses the index for a filter, the most selective first as far as
// that can be told without looking.
func sourceOf(scope storage.Scope, f storage.EnrollmentFilter) source {
	equal := func(table, column, value string) part {
		return part{table: table, index: table + "_" + column, where: column + " = ?", args: []any{value}}
	}
	switch {
	case f.Serial != "":
		return eachOf(true, equal("nano_devices", "serial_number", f.Serial))
	case f.User != "":
		return eachOf(false, equal("nano_users", "user_short_name", f.User), equal("nano_users", "user_id", f.User))
	case f.Push == storage.PushOwed, f.Push == storage.PushUnanswered:
		const table = "nano_enrollment_push"
		return oneOf(part{table: table, index: table + "_push_at", at: "push_at", where: "push_at IS NOT NULL"})
	case f.Push != "":
		var parts []part
		for _, class := range refusedClasses(f.Push) {
			p := equal("nano_enrollment_push", "last_push_class", class)
			p.where += " AND last_push_class <> 'accepted'" // as the index has it
			parts = append(parts, p)
		}
		return eachOf(false, parts...)
	case f.Waiting != nil && *f.Waiting:
		var parts []part
		for _, state := range waitingStates {
			parts = append(parts, part{table: "nano_enrollment_queue", index: "nano_enrollment_queue_next",
				where: "state = ?", args: []any{int(state)}})
		}
		return eachOf(false, parts...)
	case !f.CertificateExpiresBefore.IsZero():
		const table = "nano_cert_auth_associations"
		return eachOf(true, part{table: table, index: table + "_not_after", at: "not_after",
			where: "retired_at IS NULL AND not_after < ?", args: []any{micros(f.CertificateExpiresBefore)}, order: "retired_at"})
	case !f.LastSeenBefore.IsZero(), !f.LastSeenAfter.IsZero():
		const table = "nano_enrollment_activity"
		p := part{table: table, index: table + "_last_seen_at", at: "last_seen_at", where: "last_seen_at >= ?", args: []any{micros(f.LastSeenAfter)}}
		if !f.LastSeenBefore.IsZero() {
			p.where += " AND last_seen_at < ?"
			p.args = append(p.args, micros(f.LastSeenBefore))
		}
		return oneOf(p)
	case f.Model != "":
		return eachOf(true, equal("nano_devices", "model", f.Model), equal("nano_devices", "model_name", f.Model), equal("nano_devices", "product_name", f.Model))
	case f.OSVersion != "":
		return eachOf(true, equal("nano_devices", "os_version", f.OSVersion))
	case f.Topic != "":
		return oneOf(equal("nano_enrollments", "topic", f.Topic))
	case len(scope.Topics) > 0 && len(scope.Topics) <= scopeBranches:
		var parts []part
		for _, topic := range scope.Topics {
			parts = append(parts, equal("nano_enrollments", "topic", topic))
		}
		return eachOf(false, parts...)
	case f.Type != "", f.Enabled != nil:
		types := mdm.EnrollTypes()
		if f.Type != "" {
			types = []mdm.EnrollType{f.Type}
		}
		var parts []part
		for _, typ := range types {
			for _, flags := range [][2]int{{1, 0}, {0, 0}, {0, 1}, {1, 1}} {
				if f.Enabled == nil || (flags == [2]int{1, 0}) == *f.Enabled {
					parts = append(parts, part{table: "nano_enrollments", index: "nano_enrollments_type",
						where: "type = ? AND enabled = ? AND operator_disabled = ?", args: []any{string(typ), flags[0], flags[1]}})
				}
			}
		}
		return eachOf(false, parts...)
	}
	return source{index: "id", parts: []part{{table: "nano_enrollments", where: "1 = 1"}}}
}

func refusedClasses(s storage.PushStatus) []string {
	if s == storage.PushRefused {
		return storage.RefusedPushes()
	}
	return []string{string(s)}
}

// query is the statement for the next candidates of a source.
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
	// A place among devices may be inside of one.
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
	for looked := 0; looked < candidatesLooked; {
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

// candidates are the next of a source. Each key's ID is the enrollment's.
type candidates struct {
	keys   []storage.EnrollmentKey
	looked int
	last   storage.EnrollmentKey // where the source goes on
	end    bool
}

func readCandidates(ctx context.Context, t *tx, src source, after storage.EnrollmentKey, limit int) (candidates, error) {
	q, args := src.query(t.Dialect, after, limit)
	rows, err := t.Query(ctx, q, args...)
	if err != nil {
		return candidates{}, err
	}
	defer rows.Close()
	c := candidates{last: after}
	var keys []storage.EnrollmentKey
	for rows.Next() {
		var at int64
		key := storage.EnrollmentKey{By: src.index}
		if err := rows.Scan(&at, &key.Key); err != nil {
			return candidates{}, err
		}
		c.looked++
		key.At = fromMicros(at)
		if n := len(keys); n == 0 || keys[n-1].Key != key.Key {
			keys = append(keys, key)
		}
	}
	if err := rows.Err(); err != nil {
		return candidates{}, err
	}
	rows.Close()
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
	rows, err := t.Query(ctx, "SELECT device_id, id FROM nano_enrollments WHERE device_id IN "+place+" ORDER BY device_id, id", args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	channels := make(map[string][]string, len(devices))
	for rows.Next() {
		var device, id string
		if err := rows.Scan(&device, &id); err != nil {
			return nil, err
		}
		channels[device] = append(channels[device], id)
	}
	return channels, rows.Err()
}

// choose says which candidates the whole filter lets through.
func choose(ctx context.Context, t *tx, scope storage.Scope, f storage.EnrollmentFilter, keys []storage.EnrollmentKey) (map[string]bool, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	from, where, args := conditions(scope, f)
	chosen := make(map[string]bool, len(keys))
	for chunk := range slices.Chunk(keys, candidateRows) {
		ids := make([]string, len(chunk))
		for i, k := range chunk {
			ids[i] = k.ID
		}
		place, more := sqldb.InList(ids)
		found, err := textColumn(ctx, t, "SELECT e.id FROM "+from+" WHERE e.id IN "+place+where, append(more, args...)...)
		if err != nil {
			return nil, err
		}
		for _, id := range found {
			chosen[id] = true
		}
	}
	return chosen, nil
}

// conditions is the whole filter, and the tables that it needs.
func conditions(scope storage.Scope, f storage.EnrollmentFilter) (from, where string, args []any) {
	from = "nano_enrollments e"
	var b strings.Builder
	joined := make(map[string]bool)
	join := func(table, alias, key string) {
		if !joined[alias] {
			from += " JOIN " + table + " " + alias + " ON " + alias + ".id = e." + key
		}
		joined[alias] = true
	}
	add := func(condition string, values ...any) {
		b.WriteString(" AND " + condition)
		args = append(args, values...)
	}
	device := func(condition string, values ...any) {
		join("nano_devices", "d", "device_id")
		add(condition, values...)
	}
	inScope(scope, add)
	if f.Type != "" {
		add("e.type = ?", string(f.Type))
	}
	if f.Enabled != nil {
		add(map[bool]string{
			true:  "e.enabled = 1 AND e.operator_disabled = 0",
			false: "(e.enabled = 0 OR e.operator_disabled = 1)",
		}[*f.Enabled])
	}
	if f.Topic != "" {
		add("e.topic = ?", f.Topic)
	}
	if f.Serial != "" {
		device("d.serial_number = ?", f.Serial)
	}
	if f.Model != "" {
		device("(d.model = ? OR d.model_name = ? OR d.product_name = ?)", f.Model, f.Model, f.Model)
	}
	if f.OSVersion != "" {
		device("d.os_version = ?", f.OSVersion)
	}
	if f.User != "" {
		join("nano_users", "u", "id")
		add("(u.user_short_name = ? OR u.user_id = ?)", f.User, f.User)
	}
	if !f.LastSeenBefore.IsZero() {
		join("nano_enrollment_activity", "a", "id")
		add("a.last_seen_at < ?", micros(f.LastSeenBefore))
	}
	if !f.LastSeenAfter.IsZero() {
		join("nano_enrollment_activity", "a", "id")
		add("a.last_seen_at >= ?", micros(f.LastSeenAfter))
	}
	if f.Waiting != nil {
		add(map[bool]string{true: "EXISTS ", false: "NOT EXISTS "}[*f.Waiting] +
			fmt.Sprintf("(SELECT 1 FROM nano_enrollment_queue q WHERE q.id = e.id AND q.state IN (%d, %d, %d))",
				storage.Scheduled, storage.Queued, storage.NotNow))
	}
	if f.Push != "" {
		join("nano_enrollment_push", "p", "id")
		pushCondition(f.Push, add)
	}
	if !f.CertificateExpiresBefore.IsZero() {
		add(`EXISTS (SELECT 1 FROM nano_cert_auth_associations c WHERE c.id = e.device_id AND c.retired_at IS NULL AND c.not_after < ?)`,
			micros(f.CertificateExpiresBefore))
	}
	return from, b.String(), args
}

func pushCondition(status storage.PushStatus, add func(string, ...any)) {
	switch status {
	case storage.PushOwed:
		add("p.push_at IS NOT NULL AND p.paid_seq < p.owed_seq")
	case storage.PushUnanswered:
		add(`p.push_at IS NOT NULL AND p.last_push_class = 'accepted'
AND NOT EXISTS (SELECT 1 FROM nano_enrollment_activity w WHERE w.id = e.id AND w.last_seen_at > p.last_push_at)`)
	case storage.PushTokenDead:
		add("p.token_dead_at IS NOT NULL")
	case storage.PushRefused:
		add("p.last_push_class <> 'accepted'")
	default:
		add("p.last_push_class = ?", string(status))
	}
}

// inScope adds the condition of a scope on the enrollments e.
func inScope(scope storage.Scope, add func(string, ...any)) {
	if len(scope.Topics) > 0 {
		place, args := sqldb.InList(scope.Topics)
		add("e.topic IN "+place, args...)
	}
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
p.owed_seq, p.paid_seq, p.attempts, p.push_at, p.last_push_at, p.last_push_class, p.last_push_status, p.last_push_reason, p.last_apns_id, p.token_dead_at
FROM nano_enrollments e
JOIN nano_devices d ON d.id = e.device_id
LEFT JOIN nano_users u ON u.id = e.id
LEFT JOIN nano_enrollment_activity a ON a.id = e.id
LEFT JOIN nano_enrollment_push p ON p.id = e.id
LEFT JOIN nano_cert_auth_associations c ON c.id = e.device_id AND c.retired_at IS NULL
WHERE e.id IN ` + place
	inScope(scope, func(condition string, more ...any) {
		q += " AND " + condition
		args = append(args, more...)
	})
	rows, err := t.Query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	byID := make(map[string]*storage.Enrollment, len(ids))
	for rows.Next() {
		e, err := scanEnrollment(rows)
		if err != nil {
			return nil, err
		}
		byID[e.ID] = e
	}
	return byID, rows.Err()
}

func scanEnrollment(rows *sql.Rows) (*storage.Enrollment, error) {
	e := &storage.Enrollment{Queue: make(map[storage.State]int64)}
	var (
		begun, created                            int64
		enrolled, renewal, seen, notAfter, pinned sql.Null[int64]
		userID, shortName, longName, hash         sql.Null[string]
		class, reason, apnsID                     sql.Null[string]
		owed, paid, attempts, status              sql.Null[int64]
		nextAt, pushedAt, deadAt                  sql.Null[int64]
		der                                       []byte
		typ                                       string
	)
	err := rows.Scan(&e.ID, &e.DeviceID, &typ, &e.Topic, &e.Enabled, &e.OperatorDisabled, &e.Tally, &e.AwaitingConfiguration,
		&begun, &enrolled, &created, &renewal, &seen,
		&e.SerialNumber, &e.DeviceName, &e.Model, &e.ModelName, &e.ProductName, &e.OSVersion, &e.BuildVersion, &e.IMEI, &e.MEID,
		&e.HasBootstrapToken, &e.HasUnlockToken,
		&userID, &shortName, &longName,
		&hash, &der, &notAfter, &pinned,
		&owed, &paid, &attempts, &nextAt, &pushedAt, &class, &status, &reason, &apnsID, &deadAt)
	if err != nil {
		return nil, err
	}
	e.Type = mdm.EnrollType(typ)
	e.BegunAt = fromMicros(begun)
	e.EnrolledAt, e.CreatedAt, e.RenewalUntil, e.LastSeenAt = fromMicros(enrolled.V), fromMicros(created), fromMicros(renewal.V), fromMicros(seen.V)
	e.UserID, e.UserShortName, e.UserLongName = userID.V, shortName.V, longName.V
	if hash.Valid {
		e.Certificate = &storage.PinnedCertificate{Hash: hash.V, DER: der, NotAfter: fromMicros(notAfter.V), PinnedAt: fromMicros(pinned.V)}
	}
	e.Push = storage.PushState{
		Owed: paid.V < owed.V, Attempts: int(attempts.V), LastAt: fromMicros(pushedAt.V), LastClass: class.V, LastStatus: int(status.V),
		LastReason: reason.V, LastAPNsID: apnsID.V, NextAt: fromMicros(nextAt.V), TokenDeadAt: fromMicros(deadAt.V),
	}
	if seen.V > pushedAt.V { // it has come since
		e.Push.Attempts = 0
	}
	return e, nil
}

// countWaiting counts what waits for each.
func countWaiting(ctx context.Context, t *tx, byID map[string]*storage.Enrollment) error {
	ids := make([]string, 0, len(byID))
	for id := range byID {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	place, args := sqldb.InList(ids)
	rows, err := t.Query(ctx, "SELECT id, state, COUNT(*) FROM nano_enrollment_queue"+t.Dialect.Index("nano_enrollment_queue_next")+
		fmt.Sprintf(" WHERE state IN (%d, %d, %d) AND id IN ", storage.Scheduled, storage.Queued, storage.NotNow)+place+" GROUP BY id, state", args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		var state storage.State
		var n int64
		if err := rows.Scan(&id, &state, &n); err != nil {
			return err
		}
		byID[id].Queue[state] = n
	}
	return rows.Err()
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
		ids, err = textColumn(ctx, t, q+" ORDER BY e.id LIMIT ?", append(slices.Clone(args), limit)...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading user channels: %w", err)
	}
	return ids, nil
}
