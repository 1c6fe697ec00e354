package sqlstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

var _ storage.Inventory = (*Store)(nil)

// Statistics implements storage.Inventory. Each count is a statement of its
// own, since together they may take long.
func (s *Store) Statistics(ctx context.Context, scope storage.Scope) (*storage.Statistics, error) {
	st := &storage.Statistics{}
	for _, count := range []func(context.Context, *tx, storage.Scope, *storage.Statistics) error{countEnrollments, countQueue, countPushes} {
		err := s.read(ctx, func(ctx context.Context, t *tx) error { return count(ctx, t, scope, st) })
		if err != nil {
			return nil, fmt.Errorf("counting: %w", err)
		}
	}
	return st, nil
}

func countEnrollments(ctx context.Context, t *tx, scope storage.Scope, st *storage.Statistics) error {
	condition, args := scoped(scope)
	rows, err := t.query(ctx, "SELECT e.type, e.enabled, e.operator_disabled, COUNT(*) FROM nano_enrollments e WHERE 1 = 1"+condition+
		" GROUP BY e.type, e.enabled, e.operator_disabled", args...)
	if err != nil {
		return err
	}
	defer rows.Close()
	st.ByType, st.Enabled, st.Disabled, st.NotEnrolled = make(map[mdm.EnrollType]int64), 0, 0, 0
	for rows.Next() {
		var typ string
		var enabled, disabled bool
		var n int64
		if err := rows.Scan(&typ, &enabled, &disabled, &n); err != nil {
			return err
		}
		st.ByType[mdm.EnrollType(typ)] += n
		switch {
		case disabled:
			st.Disabled += n
		case enabled:
			st.Enabled += n
		default:
			st.NotEnrolled += n
		}
	}
	return rows.Err()
}

func countQueue(ctx context.Context, t *tx, scope storage.Scope, st *storage.Statistics) error {
	condition, topics := scoped(scope)
	states, join := storage.States(), ""
	if condition != "" {
		states = waitingStates[:]
		join = " JOIN nano_enrollments e ON e.id = q.id" + condition
	}
	st.Queue = make(map[storage.State]int64)
	oldest := int64(0)
	for _, state := range states {
		since := "0 AS created_at"
		if !state.Terminal() {
			since = "q.created_at"
		}
		var n, first int64
		err := t.queryRow(ctx, "SELECT COUNT(*), COALESCE(MIN(c.created_at), 0) FROM (SELECT "+since+" FROM nano_enrollment_queue q"+join+
			" WHERE q.state = ? LIMIT ?) c", append(slices.Clone(topics), int(state), storage.StatisticsLimit)...).Scan(&n, &first)
		if err != nil {
			return err
		}
		if n > 0 {
			st.Queue[state] = n
		}
		if first > 0 && (oldest == 0 || first < oldest) {
			oldest = first
		}
	}
	st.OldestWaiting = fromMicros(oldest)
	return nil
}

func countPushes(ctx context.Context, t *tx, scope storage.Scope, st *storage.Statistics) error {
	for _, count := range []struct {
		into *int64
		f    storage.EnrollmentFilter
	}{
		{&st.PushesOwed, storage.EnrollmentFilter{Push: storage.PushOwed}},
		{&st.PushesUnanswered, storage.EnrollmentFilter{Push: storage.PushUnanswered}},
	} {
		from, where, args := conditions(scope, count.f)
		err := t.queryRow(ctx, "SELECT COUNT(*) FROM (SELECT e.id FROM "+from+" WHERE 1 = 1"+where+" LIMIT ?) c",
			append(args, storage.StatisticsLimit)...).Scan(count.into)
		if err != nil {
			return err
		}
	}
	return nil
}

// PushCertState implements storage.Inventory.
func (s *Store) PushCertState(ctx context.Context, topic string) (*storage.PushCertInfo, error) {
	var infos []storage.PushCertInfo
	err := s.read(ctx, func(ctx context.Context, t *tx) (err error) {
		infos, err = scanPushCertInfos(t.query(ctx, `SELECT topic, not_after, version, updated_at, last_class, last_at, 0
FROM nano_push_certs WHERE topic = ?`, topic))
		if err == nil && len(infos) == 0 {
			err = storage.ErrNotFound
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading a push certificate's state: %w", err)
	}
	return &infos[0], nil
}
