package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Overview = (*Store)(nil)

// Counts of all enrollments that take at least keptIfTook are kept for
// keptTimes as long, so that a client that polls them costs the database no
// more than a twentieth of its time.
const (
	keptIfTook = 100 * time.Millisecond
	keptTimes  = 20
)

// enrollmentCounts are the numbers of enrollments of each kind.
type enrollmentCounts struct {
	turn  chan struct{} // a lock of one place: its holder may use the other fields
	kept  []enrollmentCount
	until time.Time
}

// enrollmentCount is the number of enrollments of one kind.
type enrollmentCount struct {
	topic             string
	typ               mdm.EnrollType
	enabled, disabled bool // disabled by an operator
	n                 int64
}

// enrollmentCounts counts all enrollments, or returns the counts that were
// kept.
func (s *Store) enrollmentCounts(ctx context.Context) ([]enrollmentCount, error) {
	c := &s.counted
	select {
	case c.turn <- struct{}{}:
		defer func() { <-c.turn }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	began := s.now()
	if began.Before(c.until) {
		return c.kept, nil
	}
	var all []enrollmentCount
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		all = nil
		err := t.Query(ctx, `SELECT topic, type, enabled, operator_disabled, COUNT(*) FROM nano_enrollments
GROUP BY topic, type, enabled, operator_disabled`).Each(func(row sqldb.Row) error {
			var h enrollmentCount
			if err := row.Scan(&h.topic, &h.typ, &h.enabled, &h.disabled, &h.n); err != nil {
				return err
			}
			all = append(all, h)
			return nil
		})
		return err
	})
	if err != nil {
		return nil, err
	}
	if took := s.now().Sub(began); took >= keptIfTook {
		c.kept, c.until = all, began.Add(keptTimes*took)
	}
	return all, nil
}

// enabledByTopic counts enabled enrollments.
func (s *Store) enabledByTopic(ctx context.Context) (map[string]int64, error) {
	all, err := s.enrollmentCounts(ctx)
	counts := make(map[string]int64)
	for _, h := range all {
		if h.enabled {
			counts[h.topic] += h.n
		}
	}
	return counts, err
}

// Statistics implements storage.Overview. Each count is a statement of its
// own, since together they may take long.
func (s *Store) Statistics(ctx context.Context, scope storage.Scope) (*storage.Statistics, error) {
	st := &storage.Statistics{ByType: make(map[mdm.EnrollType]int64)}
	all, err := s.enrollmentCounts(ctx)
	if err != nil {
		return nil, fmt.Errorf("counting enrollments: %w", err)
	}
	for _, h := range all {
		if len(scope.Topics) > 0 && !slices.Contains(scope.Topics, h.topic) {
			continue
		}
		st.ByType[h.typ] += h.n
		switch {
		case h.disabled:
			st.Disabled += h.n
		case h.enabled:
			st.Enabled += h.n
		default:
			st.NotEnrolled += h.n
		}
	}
	for _, count := range []func(context.Context, *tx, storage.Scope, *storage.Statistics) error{countQueue, countPushes} {
		err := s.read(ctx, func(ctx context.Context, t *tx) error { return count(ctx, t, scope, st) })
		if err != nil {
			return nil, fmt.Errorf("counting: %w", err)
		}
	}
	return st, nil
}

func countQueue(ctx context.Context, t *tx, scope storage.Scope, st *storage.Statistics) error {
	condition, topics := scoped(scope)
	states := storage.States()
	if condition != "" {
		states = waitingStates[:]
	}
	st.Queue = make(map[storage.State]int64)
	oldest := int64(0)
	for _, state := range states {
		since := "0 AS created_at"
		if !state.Terminal() {
			since = "q.created_at"
		}
		rows := rowsInState(t.Dialect, since, state)
		if condition != "" {
			rows = fmt.Sprintf("SELECT %s FROM nano_enrollment_queue q JOIN nano_enrollments e ON e.id = q.id%s WHERE q.state = %d LIMIT ?", since, condition, state)
		}
		var n, first int64
		err := t.QueryRow(ctx, "SELECT COUNT(*), COALESCE(MIN(c.created_at), 0) FROM ("+rows+") c",
			append(slices.Clone(topics), storage.StatisticsLimit)...).Scan(&n, &first)
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
		b := conditions(scope, count.f)
		err := t.QueryRow(ctx, "SELECT COUNT(*) FROM (SELECT e.id FROM "+b.from+" WHERE 1 = 1"+b.where.String()+" LIMIT ?) c",
			append(b.args, storage.StatisticsLimit)...).Scan(count.into)
		if err != nil {
			return err
		}
	}
	return nil
}

// PushCertState implements storage.Overview.
func (s *Store) PushCertState(ctx context.Context, topic string) (*storage.PushCertInfo, error) {
	var infos []storage.PushCertInfo
	err := s.read(ctx, func(ctx context.Context, t *tx) (err error) {
		infos, err = sqldb.Collect(t.Query(ctx, `SELECT topic, not_after, version, updated_at, last_class, last_at
FROM nano_push_certs WHERE topic = ?`, topic), scanPushCertInfo)
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
