package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Pushes = (*Store)(nil)

const (
	// pushRows bounds the enrollments of one transaction about pushes.
	pushRows = 500
	// ClaimDuePushes reads claimWindow times its limit of due rows, to find
	// owed pushes among silent devices.
	claimWindow = 4
	// blockedPause is the time after which a sweep reads an enrollment again
	// that is owed a push and must not get it now: an operator disabled it, or
	// it is enrolling again.
	blockedPause = time.Hour
)

// pushRow is an enrollment with the columns that decide about pushes.
type pushRow struct {
	storage.PushTarget
	enabled  bool // and not disabled by an operator
	dead     bool
	pushedAt int64
	seenAt   int64
	waits    bool // commands do; read by dueRows only
}

// pushColumns and pushTables read a pushRow.
const (
	pushColumns = `SELECT e.id, e.topic, e.push_magic, e.token, e.token_at, e.enabled, e.operator_disabled, p.owed_seq, p.paid_seq,
p.attempts, p.last_push_class, p.last_push_at, p.token_dead_at, a.last_seen_at`
	pushTables = `
LEFT JOIN nano_enrollment_activity a ON a.id = e.id WHERE `
)

func scanPushRow(row sqldb.Row, more ...any) (pushRow, error) {
	var (
		r                           pushRow
		enabled, disabled           bool
		class                       sql.Null[string]
		tokenAt, pushed, dead, seen sql.Null[int64]
		owed, paid, attempts        sql.Null[int64]
	)
	err := row.Scan(append([]any{&r.ID, &r.Topic, &r.Magic, &r.Token, &tokenAt, &enabled, &disabled, &owed, &paid,
		&attempts, &class, &pushed, &dead, &seen}, more...)...)
	r.TokenAt, r.Owed, r.Paid = fromMicros(tokenAt.V), owed.V, paid.V
	r.enabled, r.dead, r.pushedAt, r.seenAt = enabled && !disabled, dead.Valid, pushed.V, seen.V
	if r.seenAt <= r.pushedAt { // else it was woken
		r.Attempts, r.LastClass = int(attempts.V), class.V
	}
	return r, err
}

// refusal returns why the enrollment cannot be pushed, or nil.
func (r *pushRow) refusal() error {
	switch {
	case !r.enabled || len(r.Token) == 0:
		return storage.ErrNotEnrolled
	case r.dead:
		return storage.ErrTokenDead
	}
	return nil
}

// storableAmong returns the ids sorted and each once, and adds ids that cannot
// exist to failed.
func storableAmong(ids []string, failed map[string]error) []string {
	ids = slices.Compact(slices.Sorted(slices.Values(ids)))
	return slices.DeleteFunc(ids, func(id string) bool {
		if !storable(id) {
			failed[id] = storage.ErrNotEnrolled
		}
		return !storable(id)
	})
}

// PushTargets implements storage.Pushes.
func (s *Store) PushTargets(ctx context.Context, scope storage.Scope, ids []string) ([]storage.PushTarget, map[string]error, error) {
	failed := make(map[string]error)
	var targets []storage.PushTarget
	for chunk := range slices.Chunk(storableAmong(ids, failed), pushRows) {
		err := s.read(ctx, func(ctx context.Context, t *tx) error {
			found, missed, err := pushTargets(ctx, t, scope, chunk)
			if err == nil {
				targets = append(targets, found...)
				maps.Copy(failed, missed)
			}
			return err
		})
		if err != nil {
			return nil, nil, fmt.Errorf("reading whom to push: %w", err)
		}
	}
	return targets, failed, nil
}

func pushTargets(ctx context.Context, t *tx, scope storage.Scope, ids []string) ([]storage.PushTarget, map[string]error, error) {
	place, args := sqldb.InList(ids)
	q := pushColumns + " FROM nano_enrollments e LEFT JOIN nano_enrollment_push p ON p.id = e.id" + pushTables + "e.id IN " + place
	if len(scope.Topics) > 0 {
		topics, more := sqldb.InList(scope.Topics)
		q += " AND e.topic IN " + topics
		args = append(args, more...)
	}
	failed := make(map[string]error)
	for _, id := range ids {
		failed[id] = storage.ErrNotEnrolled
	}
	targets := make([]storage.PushTarget, 0, len(ids))
	err := t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		r, err := scanPushRow(row)
		if err != nil {
			return err
		}
		if why := r.refusal(); why != nil {
			failed[r.ID] = why
			return nil
		}
		delete(failed, r.ID)
		targets = append(targets, r.PushTarget)
		return nil
	})
	return targets, failed, err
}

// OwePush implements storage.Pushes.
func (s *Store) OwePush(ctx context.Context, scope storage.Scope, ids []string, at time.Time) (map[string]error, error) {
	failed := make(map[string]error)
	for chunk := range slices.Chunk(storableAmong(ids, failed), pushRows) {
		var missed map[string]error
		err := s.write(ctx, func(ctx context.Context, t *tx) error {
			if _, err := lock(ctx, t, "nano_enrollment_push", chunk); err != nil {
				return err
			}
			targets, not, err := pushTargets(ctx, t, scope, chunk)
			missed = not
			if err != nil || len(targets) == 0 {
				return err
			}
			ids := make([]string, len(targets))
			for i := range targets {
				ids[i] = targets[i].ID
			}
			place, args := sqldb.InList(ids)
			_, err = t.Exec(ctx, "UPDATE nano_enrollment_push SET "+owePushBy+" WHERE id IN "+place,
				append([]any{micros(at), micros(at)}, args...)...)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("owing pushes: %w", err)
		}
		maps.Copy(failed, missed)
	}
	return failed, nil
}

// ClaimDuePushes implements storage.Pushes.
func (s *Store) ClaimDuePushes(ctx context.Context, l storage.Lease, c storage.PushClaim) (targets []storage.PushTarget, more bool, err error) {
	window := claimWindow * c.Limit
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		due, err := dueRows(ctx, t, micros(c.Now), window)
		if err != nil {
			return fmt.Errorf("looking for pushes that are due: %w", err)
		}
		if due, err = stillDue(ctx, t, micros(c.Now), due); err != nil {
			return err
		}
		more = len(due) == window
		skip, err := skipped(ctx, t, c)
		if err != nil {
			return fmt.Errorf("reading push certificates: %w", err)
		}
		plan := planPushes(due, c, skip)
		targets = plan.targets
		for at, ids := range plan.moves {
			slices.Sort(ids)
			for chunk := range slices.Chunk(ids, pushRows) {
				place, args := sqldb.InList(chunk)
				_, err := t.Exec(ctx, "UPDATE nano_enrollment_push SET push_at = ? WHERE id IN "+place, append([]any{null(at)}, args...)...)
				if err != nil {
					return fmt.Errorf("moving pushes: %w", err)
				}
			}
		}
		more = more && len(plan.moves) > 0 || plan.left
		return nil
	})
	if err != nil {
		return nil, false, fmt.Errorf("claiming pushes: %w", err)
	}
	return targets, more, nil
}

// dueRows reads the earliest due rows.
func dueRows(ctx context.Context, t *tx, now int64, limit int) ([]pushRow, error) {
	waits := fmt.Sprintf(`, EXISTS (SELECT 1 FROM nano_enrollment_queue q WHERE q.id = e.id AND q.state IN (%d, %d) AND (q.expires_at IS NULL OR q.expires_at > ?))`,
		storage.Queued, storage.NotNow)
	return sqldb.Collect(t.Query(ctx, pushColumns+waits+` FROM (SELECT id, owed_seq, paid_seq, attempts, last_push_class, last_push_at, token_dead_at, push_at
FROM nano_enrollment_push WHERE push_at <= ? ORDER BY push_at LIMIT ?) p JOIN nano_enrollments e ON e.id = p.id`+pushTables+"1 = 1 ORDER BY p.push_at",
		t.Now, now, limit), func(row sqldb.Row, r *pushRow) (err error) {
		var waits bool
		*r, err = scanPushRow(row, &waits)
		r.waits = waits
		return err
	})
}

// stillDue locks the rows in key order and drops those that are no longer due.
func stillDue(ctx context.Context, t *tx, now int64, due []pushRow) ([]pushRow, error) {
	if len(due) == 0 || t.Dialect.ForUpdate() == "" {
		return due, nil
	}
	ids := make([]string, len(due))
	for i := range due {
		ids[i] = due[i].ID
	}
	slices.Sort(ids)
	still := make(map[string]bool, len(ids))
	for chunk := range slices.Chunk(ids, pushRows) {
		place, args := sqldb.InList(chunk)
		locked, err := sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_enrollment_push WHERE id IN "+place+" AND push_at <= ? ORDER BY id"+t.Dialect.ForUpdate(), append(args, now)...))
		if err != nil {
			return nil, fmt.Errorf("locking pushes that are due: %w", err)
		}
		for _, id := range locked {
			still[id] = true
		}
	}
	return slices.DeleteFunc(due, func(r pushRow) bool { return !still[r.ID] }), nil
}

// pushPlan is the decision about due rows: the enrollments to push, and the new
// times, of which 0 is never.
type pushPlan struct {
	targets []storage.PushTarget
	moves   map[int64][]string
	left    bool // an owed push found no room
}

func (p *pushPlan) move(r *pushRow, to int64) { p.moves[to] = append(p.moves[to], r.ID) }

// skipped returns the times until which topics are put off that cannot be
// pushed. A certificate that is stored later makes their pushes due.
func skipped(ctx context.Context, t *tx, c storage.PushClaim) (map[string]int64, error) {
	if len(c.Skip) == 0 {
		return nil, nil
	}
	until := make(map[string]int64, len(c.Skip))
	for topic := range c.Skip {
		until[topic] = micros(c.SkipUntil)
	}
	place, args := sqldb.InList(slices.Sorted(maps.Keys(c.Skip)))
	err := t.Query(ctx, "SELECT topic, version FROM nano_push_certs WHERE topic IN "+place, args...).Each(func(row sqldb.Row) error {
		var topic string
		var version int64
		if err := row.Scan(&topic, &version); err != nil {
			return err
		}
		if version != c.Skip[topic] {
			until[topic] = micros(c.RenewedUntil)
		}
		return nil
	})
	return until, err
}

func planPushes(due []pushRow, c storage.PushClaim, skip map[string]int64) pushPlan {
	plan := pushPlan{moves: make(map[int64][]string)}
	now, until := micros(c.Now), micros(c.Until)
	var owed, silent []*pushRow
	for i := range due {
		r := &due[i]
		debt := r.Paid < r.Owed
		switch quiet := r.seenAt + c.Silence.Microseconds(); {
		case !debt && !r.waits, r.dead:
			plan.move(r, 0)
		case r.refusal() != nil:
			plan.move(r, now+blockedPause.Microseconds())
		case !debt && c.Silence <= 0:
			plan.move(r, 0)
		case skip[r.Topic] > 0:
			plan.move(r, skip[r.Topic])
		case debt:
			owed = append(owed, r)
		case r.seenAt > r.pushedAt && quiet > now:
			plan.move(r, quiet)
		default:
			silent = append(silent, r)
		}
	}
	kept := min(len(silent), max(c.Limit/4, c.Limit-len(owed)))
	taken := min(len(owed), c.Limit-kept)
	for _, r := range slices.Concat(owed[:taken], silent[:kept]) {
		plan.targets = append(plan.targets, r.PushTarget)
		plan.move(r, until)
	}
	for _, r := range silent[kept:] {
		plan.move(r, until)
	}
	plan.left = taken < len(owed)
	return plan
}

// RecordPushes implements storage.Pushes.
func (s *Store) RecordPushes(ctx context.Context, records []storage.PushRecord) error {
	last := make(map[string]*storage.PushRecord, len(records))
	for i := range records {
		last[records[i].ID] = &records[i]
	}
	ids := slices.Sorted(maps.Keys(last))
	for chunk := range slices.Chunk(ids, pushRows) {
		err := s.write(ctx, func(ctx context.Context, t *tx) error { return recordPushes(ctx, t, chunk, last) })
		if err != nil {
			return fmt.Errorf("recording pushes: %w", err)
		}
	}
	return nil
}

// pushedRow is a push row before a record changes it.
type pushedRow struct {
	id                  string
	last, owed, paid    int64
	pushAt, deadAt      sql.Null[int64]
	tokenAt, lastSeenAt int64
}

func recordPushes(ctx context.Context, t *tx, ids []string, records map[string]*storage.PushRecord) error {
	dead := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return records[id].TokenDeadAt.IsZero() })
	told := false
	if len(dead) > 0 {
		var err error
		if told, err = announced(ctx, t, storage.TopicPushFailed); err != nil {
			return err
		}
	}
	standing, err := lockPushed(ctx, t, ids)
	if err != nil {
		return fmt.Errorf("locking push rows: %w", err)
	}
	var failed []announcement
	for i := range standing {
		r, rec := &standing[i], records[standing[i].id]
		alive := !r.deadAt.Valid
		if r.apply(rec); told && alive && r.deadAt.Valid {
			failed = append(failed, announcement{topic: storage.TopicPushFailed, enrollment: r.id, detail: map[string]string{
				"class": rec.Class, "status": strconv.Itoa(rec.Status), "reason": rec.Reason, "apns_id": rec.APNsID,
			}})
		}
	}
	if err := announce(ctx, t, failed); err != nil {
		return err
	}
	columns := []string{"last_seq", "owed_seq", "paid_seq", "push_at", "attempts", "last_push_at", "last_push_class",
		"last_push_status", "last_push_reason", "last_apns_id", "token_dead_at"}
	// Sizes that are powers of two keep the number of texts small.
	for len(standing) > 0 {
		n := 1
		for n*2 <= len(standing) {
			n *= 2
		}
		var args []any
		for _, r := range standing[:n] {
			rec := records[r.id]
			args = append(args, r.id, r.last, r.owed, r.paid, r.pushAt, rec.Attempts, micros(rec.At), clip(rec.Class), rec.Status,
				clip(rec.Reason), clip(rec.APNsID), r.deadAt)
		}
		err := t.Upsert(ctx, "nano_enrollment_push", append([]string{"id"}, columns...), []string{"id"}, columns, args)
		if err != nil {
			return fmt.Errorf("storing push rows: %w", err)
		}
		standing = standing[n:]
	}
	return nil
}

// lockPushed locks push rows and reads the other columns that a record depends
// on. It leaves out deleted enrollments.
func lockPushed(ctx context.Context, t *tx, ids []string) ([]pushedRow, error) {
	place, args := sqldb.InList(ids)
	var standing []pushedRow
	at := make(map[string]int)
	err := t.Query(ctx, "SELECT id, last_seq, owed_seq, paid_seq, push_at, token_dead_at FROM nano_enrollment_push WHERE id IN "+
		place+" ORDER BY id"+t.Dialect.ForUpdate(), args...).Each(func(row sqldb.Row) error {
		var r pushedRow
		if err := row.Scan(&r.id, &r.last, &r.owed, &r.paid, &r.pushAt, &r.deadAt); err != nil {
			return err
		}
		at[r.id] = len(standing)
		standing = append(standing, r)
		return nil
	})
	if err != nil {
		return nil, err
	}
	err = t.Query(ctx, `SELECT e.id, COALESCE(e.token_at, 0), COALESCE(a.last_seen_at, 0) FROM nano_enrollments e
LEFT JOIN nano_enrollment_activity a ON a.id = e.id WHERE e.id IN `+place, args...).Each(func(row sqldb.Row) error {
		var id string
		var tokenAt, seenAt int64
		if err := row.Scan(&id, &tokenAt, &seenAt); err != nil {
			return err
		}
		if i, ok := at[id]; ok {
			standing[i].tokenAt, standing[i].lastSeenAt = tokenAt, seenAt
		}
		return nil
	})
	return standing, err
}

// apply changes the row by a record.
func (r *pushedRow) apply(rec *storage.PushRecord) {
	r.paid = max(r.paid, rec.Paid)
	dead := !rec.TokenDeadAt.IsZero() && r.tokenAt <= micros(rec.TokenDeadAt) && r.tokenAt <= micros(rec.TokenAt)
	switch {
	case dead:
		r.deadAt = sql.Null[int64]{V: micros(rec.TokenDeadAt), Valid: true}
		r.pushAt = sql.Null[int64]{}
		if r.paid >= r.owed {
			r.last++
			r.owed = r.last
		}
	case rec.KeepPlan, r.lastSeenAt > micros(rec.At), rec.Class == storage.PushAccepted && r.paid < r.owed:
	default:
		r.pushAt = sql.Null[int64]{V: micros(rec.NextAt), Valid: !rec.NextAt.IsZero()}
	}
}

// PushStates implements storage.Pushes.
func (s *Store) PushStates(ctx context.Context, scope storage.Scope, ids []string) (map[string]storage.PushState, error) {
	states := make(map[string]storage.PushState, len(ids))
	for chunk := range slices.Chunk(storableAmong(ids, make(map[string]error)), pushRows) {
		err := s.read(ctx, func(ctx context.Context, t *tx) error { return pushStates(ctx, t, scope, chunk, states) })
		if err != nil {
			return nil, fmt.Errorf("reading push states: %w", err)
		}
	}
	return states, nil
}

func pushStates(ctx context.Context, t *tx, scope storage.Scope, ids []string, states map[string]storage.PushState) error {
	place, args := sqldb.InList(ids)
	var where strings.Builder
	where.WriteString("p.id IN " + place)
	if len(scope.Topics) > 0 {
		topics, more := sqldb.InList(scope.Topics)
		where.WriteString(" AND e.topic IN " + topics)
		args = append(args, more...)
	}
	err := t.Query(ctx, `SELECT p.id, p.owed_seq, p.paid_seq, p.attempts, p.push_at, p.last_push_at, p.last_push_class, p.last_push_status,
p.last_push_reason, p.last_apns_id, p.token_dead_at, a.last_seen_at
FROM nano_enrollment_push p JOIN nano_enrollments e ON e.id = p.id
LEFT JOIN nano_enrollment_activity a ON a.id = p.id WHERE `+where.String(), args...).Each(func(row sqldb.Row) error {
		var id string
		var owed, paid, attempts int64
		var next, last, status, dead, seen sql.Null[int64]
		var class, reason, apnsID sql.Null[string]
		if err := row.Scan(&id, &owed, &paid, &attempts, &next, &last, &class, &status, &reason, &apnsID, &dead, &seen); err != nil {
			return err
		}
		if seen.V > last.V {
			attempts = 0
		}
		states[id] = storage.PushState{
			Owed: paid < owed, Attempts: int(attempts), LastAt: fromMicros(last.V), LastClass: class.V, LastStatus: int(status.V),
			LastReason: reason.V, LastAPNsID: apnsID.V, NextAt: fromMicros(next.V), TokenDeadAt: fromMicros(dead.V),
		}
		return nil
	})
	return err
}

// CountOwedPushes implements storage.Pushes.
func (s *Store) CountOwedPushes(ctx context.Context) (n int64, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.QueryRow(ctx, "SELECT COUNT(*) FROM nano_enrollment_push WHERE "+pushOwedIndexed).Scan(&n)
	})
	if err != nil {
		return 0, fmt.Errorf("counting pushes owed: %w", err)
	}
	return n, nil
}
