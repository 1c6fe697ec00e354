package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Sweeps = (*Store)(nil)

// sweepCounters counts the rows that this store's sweeps changed.
type sweepCounters struct {
	promoted, expired       atomic.Int64
	rows, results, commands atomic.Int64
	resultBytes             atomic.Int64
}

func (s *sweepCounters) add(r storage.Removed) {
	s.rows.Add(int64(r.Rows))
	s.results.Add(int64(r.Results))
	s.commands.Add(int64(r.Commands))
	s.resultBytes.Add(r.Bytes)
}

// sweep is write under a lease.
func (s *Store) sweep(ctx context.Context, l storage.Lease, fn func(ctx context.Context, t *tx) error) error {
	return s.write(ctx, func(ctx context.Context, t *tx) error {
		if err := t.checkLease(ctx, l); err != nil {
			return err
		}
		return fn(ctx, t)
	})
}

// waitingStates are the states of rows that have not ended.
var waitingStates = [...]storage.State{storage.Scheduled, storage.Queued, storage.NotNow}

// everyState lists all states, for the index that begins with them.
func everyState() string {
	var list []string
	for _, state := range storage.States() {
		list = append(list, strconv.Itoa(int(state)))
	}
	return strings.Join(list, ", ")
}

// ExpireCommands implements storage.Sweeps.
func (s *Store) ExpireCommands(ctx context.Context, l storage.Lease, limit int) (expired int, err error) {
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		due, err := queueKeys(ctx, t, `SELECT id, command_uuid FROM nano_enrollment_queue
WHERE ends_at <= ? ORDER BY ends_at LIMIT ?`, t.Now, limit)
		if err != nil {
			return fmt.Errorf("looking for commands that expire: %w", err)
		}
		expired, err = expire(ctx, t, due)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("expiring commands: %w", err)
	}
	s.sweepCounters.expired.Add(int64(expired))
	return expired, nil
}

// expire ends rows, unless they have changed since they were read, and
// announces it if a sink names the topic.
func expire(ctx context.Context, t *tx, due []keyPair) (int, error) {
	if len(due) == 0 {
		return 0, nil
	}
	told, err := announced(ctx, t, storage.TopicCommandExpired)
	if err != nil {
		return 0, err
	}
	due, err = lockKeys(ctx, t, due, stillWaits+" AND expires_at <= ?", t.Now)
	if err != nil {
		return 0, fmt.Errorf("locking commands that expire: %w", err)
	}
	if err := moveTo(ctx, t, storage.Expired, due); err != nil {
		return 0, err
	}
	if told {
		if err := announceExpired(ctx, t, due); err != nil {
			return 0, err
		}
	}
	return len(due), nil
}

func announceExpired(ctx context.Context, t *tx, expired []keyPair) error {
	if len(expired) == 0 {
		return nil
	}
	where, args := queueRows.Among(t.Tx, expired)
	var list []announcement
	err := t.Query(ctx, "SELECT q.id, q.command_uuid, COALESCE(c.request_type, '') FROM (SELECT id, command_uuid FROM nano_enrollment_queue"+t.Dialect.Index("PRIMARY")+" WHERE "+where+
		") q LEFT JOIN nano_commands c ON c.command_uuid = q.command_uuid ORDER BY q.id, q.command_uuid", args...).Each(func(row sqldb.Row) error {
		a := announcement{topic: storage.TopicCommandExpired}
		if err := row.Scan(&a.enrollment, &a.commandUUID, &a.requestType); err != nil {
			return err
		}
		list = append(list, a)
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading commands that expired: %w", err)
	}
	return announce(ctx, t, list)
}

// enrollmentsOf returns the ids of rows, sorted and each once.
func enrollmentsOf(keys []keyPair) []string {
	ids := make([]string, len(keys))
	for i, k := range keys {
		ids[i] = k.ID
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// queueKeys runs a query for the keys of queue rows.
func queueKeys(ctx context.Context, t *tx, q string, args ...any) ([]keyPair, error) {
	return sqldb.Collect(t.Query(ctx, q, args...), func(row sqldb.Row, k *keyPair) error { return row.Scan(&k.ID, &k.Item) })
}

// stillWaits is the condition of lockKeys for rows that have not ended.
var stillWaits = fmt.Sprintf(" AND state + 0 < %d", storage.Acknowledged)

// lockKeys locks the queue rows of keys that meet a condition, in key order.
// Conditions have + 0 behind columns that indexes begin with. Without it,
// PostgreSQL looks each row up among all that wait if it believes that nothing
// does.
func lockKeys(ctx context.Context, t *tx, keys []keyPair, and string, args ...any) ([]keyPair, error) {
	q, keyArgs := queueRows.LockText(t.Tx, "id, command_uuid", keys, and)
	return queueKeys(ctx, t, q, append(keyArgs, args...)...)
}

// PromoteCommands implements storage.Sweeps.
func (s *Store) PromoteCommands(ctx context.Context, l storage.Lease, limit int) (promoted int, err error) {
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		due, err := queueKeys(ctx, t, fmt.Sprintf(`SELECT id, command_uuid FROM nano_enrollment_queue
WHERE state = %d AND not_before <= ? ORDER BY not_before LIMIT ?`, storage.Scheduled), t.Now, limit)
		if err != nil {
			return fmt.Errorf("looking for commands that are due: %w", err)
		}
		if due, err = dueInOrder(ctx, t, due); err != nil {
			return fmt.Errorf("looking for what was queued first of them: %w", err)
		}
		promoted, err = promote(ctx, t, due)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("promoting scheduled commands: %w", err)
	}
	s.sweepCounters.promoted.Add(int64(promoted))
	return promoted, nil
}

// dueInOrder replaces the due rows of each enrollment by as many of its due
// rows that come first in its own order: the index has rows of one time in
// another order.
func dueInOrder(ctx context.Context, t *tx, due []keyPair) ([]keyPair, error) {
	if len(due) == 0 {
		return nil, nil
	}
	left := make(map[string]int)
	for _, k := range due {
		left[k.ID]++
	}
	is, args := t.Among(enrollmentsOf(due))
	all, err := queueKeys(ctx, t, fmt.Sprintf(`SELECT id, command_uuid FROM nano_enrollment_queue%s
WHERE state = %d AND not_before <= ? AND id %s ORDER BY id, not_before, seq`, t.Dialect.Index("nano_enrollment_queue_next"), storage.Scheduled, is),
		append([]any{t.Now}, args...)...)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(k keyPair) bool {
		left[k.ID]--
		return left[k.ID] < 0
	}), nil
}

// promote gives rows the next numbers of their enrollments' queues and makes
// pushes owed, unless the rows have changed since they were read.
func promote(ctx context.Context, t *tx, due []keyPair) (int, error) {
	if len(due) == 0 {
		return 0, nil
	}
	if _, err := lock(ctx, t, "nano_enrollment_push", enrollmentsOf(due)); err != nil {
		return 0, err
	}
	locked, err := lockKeys(ctx, t, due, fmt.Sprintf(" AND state + 0 = %d AND not_before + 0 <= ?", storage.Scheduled), t.Now)
	if err != nil {
		return 0, fmt.Errorf("locking commands that are due: %w", err)
	}
	if len(locked) == 0 {
		return 0, nil
	}
	// The order inside an enrollment, which the locks now keep.
	where, args := queueRows.Among(t.Tx, locked)
	ordered, err := queueKeys(ctx, t, "SELECT id, command_uuid FROM nano_enrollment_queue"+t.Dialect.Index("PRIMARY")+" WHERE "+where+" ORDER BY id, not_before, seq", args...)
	if err != nil {
		return 0, fmt.Errorf("reading commands that are due: %w", err)
	}
	// The nth rows of all enrollments share a statement, and so do enrollments
	// with the same number of rows.
	var nth [][]keyPair
	count := make(map[string]int)
	for _, k := range ordered {
		n := count[k.ID]
		count[k.ID]++
		if n == len(nth) {
			nth = append(nth, nil)
		}
		nth[n] = append(nth[n], k)
	}
	for n, keys := range nth {
		where, args := queueRows.Among(t.Tx, keys)
		_, err := t.Exec(ctx, fmt.Sprintf(`UPDATE nano_enrollment_queue SET state = %d, not_before = NULL,
seq = (SELECT p.last_seq FROM nano_enrollment_push p WHERE p.id = nano_enrollment_queue.id) + ? WHERE `, storage.Queued)+where,
			append([]any{n + 1}, args...)...)
		if err != nil {
			return 0, fmt.Errorf("queueing commands that are due: %w", err)
		}
	}
	bySize := make([][]string, len(nth)+1)
	for id, n := range count {
		bySize[n] = append(bySize[n], id)
	}
	for n, ids := range bySize {
		if err := oweFor(ctx, t, ids, n); err != nil {
			return 0, err
		}
	}
	return len(ordered), nil
}

// oweFor takes n numbers of each queue and makes a push owed for the last, due
// at once.
func oweFor(ctx context.Context, t *tx, ids []string, n int) error {
	if len(ids) == 0 {
		return nil
	}
	slices.Sort(ids)
	places, args := sqldb.InList(ids)
	_, err := t.Exec(ctx, "UPDATE nano_enrollment_push SET "+oweNumbersAt+" WHERE id IN "+places, append([]any{n, t.Now, n}, args...)...)
	if err != nil {
		return fmt.Errorf("owing pushes: %w", err)
	}
	return nil
}
