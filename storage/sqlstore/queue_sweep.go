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

// swept counts what the sweeps of this store did.
type swept struct {
	promoted, expired       atomic.Int64
	rows, results, commands atomic.Int64
	resultBytes             atomic.Int64
}

func (s *swept) add(r storage.Removed) {
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

// waitingStates are those that a row can leave without the device.
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
	s.swept.expired.Add(int64(expired))
	return expired, nil
}

// expire ends rows, unless they have changed since they were looked up, and
// announces it if somebody asks for that.
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
	rows, err := t.Query(ctx, "SELECT q.id, q.command_uuid, COALESCE(c.request_type, '') FROM (SELECT id, command_uuid FROM nano_enrollment_queue"+t.Dialect.Index("PRIMARY")+" WHERE "+where+
		") q LEFT JOIN nano_commands c ON c.command_uuid = q.command_uuid ORDER BY q.id, q.command_uuid", args...)
	if err != nil {
		return fmt.Errorf("reading commands that expired: %w", err)
	}
	defer rows.Close()
	var list []announcement
	for rows.Next() {
		a := announcement{topic: storage.TopicCommandExpired}
		if err := rows.Scan(&a.enrollment, &a.commandUUID, &a.requestType); err != nil {
			return fmt.Errorf("reading commands that expired: %w", err)
		}
		list = append(list, a)
	}
	if err := rows.Err(); err != nil {
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
func queueKeys(ctx context.Context, t *tx, q string, args ...any) (keys []keyPair, err error) {
	rows, err := t.Query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var k keyPair
		if err := rows.Scan(&k.ID, &k.Item); err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, rows.Err()
}

// stillWaits is a condition for lockKeys: rows that have not ended.
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
		if due, err = foremost(ctx, t, due); err != nil {
			return fmt.Errorf("looking for what was queued first of them: %w", err)
		}
		promoted, err = promote(ctx, t, due)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("promoting scheduled commands: %w", err)
	}
	s.swept.promoted.Add(int64(promoted))
	return promoted, nil
}

// foremost returns as many due rows of each enrollment as there are among due,
// the first ones of its order: which rows of one time come first in the index
// has nothing to do with it.
func foremost(ctx context.Context, t *tx, due []keyPair) ([]keyPair, error) {
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
// pushes owed, unless the rows have changed since they were looked up.
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
	// The order inside an enrollment, read now that it stands still.
	where, args := queueRows.Among(t.Tx, locked)
	ordered, err := queueKeys(ctx, t, "SELECT id, command_uuid FROM nano_enrollment_queue"+t.Dialect.Index("PRIMARY")+" WHERE "+where+" ORDER BY id, not_before, seq", args...)
	if err != nil {
		return 0, fmt.Errorf("reading commands that are due: %w", err)
	}
	// Rows that come nth of their enrollment share a statement, and so do
	// enrollments with as many rows.
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

// oweFor takes n numbers of each queue and makes a push owed at once for the
// last.
func oweFor(ctx context.Context, t *tx, ids []string, n int) error {
	if len(ids) == 0 {
		return nil
	}
	slices.Sort(ids)
	places, args := sqldb.InList(ids)
	// MySQL assigns from left to right, so last_seq must come last.
	_, err := t.Exec(ctx, `UPDATE nano_enrollment_push
SET owed_seq = last_seq + ?, push_at = ?, last_seq = last_seq + ? WHERE id IN `+places, append([]any{n, t.Now, n}, args...)...)
	if err != nil {
		return fmt.Errorf("owing pushes: %w", err)
	}
	return nil
}

// RemoveResults implements storage.Sweeps.
func (s *Store) RemoveResults(ctx context.Context, l storage.Lease, r storage.Removal) (storage.Removed, error) {
	var out storage.Removed
	err := s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		out = storage.Removed{}
		old, err := look(ctx, t, resultsByTime, "", r, &out)
		if err != nil {
			return fmt.Errorf("looking for old results: %w", err)
		}
		return removeResults(ctx, t, old, &out)
	})
	if err != nil {
		return storage.Removed{}, fmt.Errorf("removing results: %w", err)
	}
	s.swept.add(out)
	return out, nil
}

// RemoveFinished implements storage.Sweeps.
func (s *Store) RemoveFinished(ctx context.Context, l storage.Lease, state storage.State, r storage.Removal) (storage.Removed, error) {
	if !state.Terminal() {
		return storage.Removed{}, fmt.Errorf("removing finished commands: %s rows are not finished", state)
	}
	var out storage.Removed
	err := s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		out = storage.Removed{}
		old, err := look(ctx, t, queueByTime, fmt.Sprintf("h.state = %d AND ", state), r, &out)
		if err != nil {
			return fmt.Errorf("looking for old queue rows: %w", err)
		}
		return removeFinished(ctx, t, state, micros(r.Before), old, &out)
	})
	if err != nil {
		return storage.Removed{}, fmt.Errorf("removing finished commands: %w", err)
	}
	s.swept.add(out)
	return out, nil
}

// history is a table whose rows have a time. Its index by time is called after
// both, and key is the order of the rows of one time in it.
type history struct {
	table, at string
	key       [2]string
}

var (
	resultsByTime = history{"nano_command_results", "created_at", [...]string{"id", "command_uuid"}}
	queueByTime   = history{"nano_enrollment_queue", "finished_at", [...]string{"command_uuid", "id"}}
)

// look reads the next stretch of a history in the order of its index, notes in
// out how far that went, and returns the keys of the type that is looked for.
func look(ctx context.Context, t *tx, h history, condition string, r storage.Removal, out *storage.Removed) ([]keyPair, error) {
	at, major, minor := "h."+h.at, "h."+h.key[0], "h."+h.key[1]
	value := map[string]string{"id": r.After.ID, "command_uuid": r.After.CommandUUID}
	after, afterMajor, afterMinor := micros(r.After.At), value[h.key[0]], value[h.key[1]]
	rows, err := t.Query(ctx, "SELECT "+at+", h.id, h.command_uuid, COALESCE(c.request_type, '') FROM "+h.table+" h"+t.Dialect.Index(h.table+"_"+h.at)+`
LEFT JOIN nano_commands c ON c.command_uuid = h.command_uuid
WHERE `+condition+at+" >= ? AND "+at+" < ? AND ("+at+" > ? OR "+major+" > ? OR ("+major+" = ? AND "+minor+` > ?))
ORDER BY `+at+", "+major+", "+minor+" LIMIT ?",
		after, micros(r.Before), after, afterMajor, afterMajor, afterMinor, r.Limit)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	out.Next = r.After
	var keys []keyPair
	for rows.Next() {
		var k keyPair
		var at int64
		var requestType string
		if err := rows.Scan(&at, &k.ID, &k.Item, &requestType); err != nil {
			return nil, err
		}
		out.Looked++
		out.Next = storage.HistoryKey{At: fromMicros(at), ID: k.ID, CommandUUID: k.Item}
		if r.Type == requestType || r.Type == "" && !slices.Contains(r.Except, requestType) {
			keys = append(keys, k)
		}
	}
	out.Done = out.Looked < r.Limit
	slices.SortFunc(keys, keyPair.Compare)
	return keys, rows.Err()
}

// removeResults removes the results that are there of keys.
func removeResults(ctx context.Context, t *tx, keys []keyPair, out *storage.Removed) error {
	if len(keys) == 0 {
		return nil
	}
	where, args := queueRows.Among(t.Tx, keys)
	var bytes int64
	err := t.QueryRow(ctx, "SELECT COALESCE(SUM(LENGTH(result)), 0) FROM nano_command_results"+t.Dialect.Index("PRIMARY")+" WHERE "+where, args...).Scan(&bytes)
	if err != nil {
		return fmt.Errorf("measuring results: %w", err)
	}
	n, err := t.Exec(ctx, "DELETE FROM nano_command_results WHERE "+where, args...)
	if err != nil {
		return fmt.Errorf("removing results: %w", err)
	}
	out.Results, out.Bytes = int(n), bytes
	return nil
}

// removeFinished removes queue rows with what belongs to them, unless they
// have changed since they were looked up. Commands are locked first: whoever
// queues one of them again waits, or is waited for.
func removeFinished(ctx context.Context, t *tx, state storage.State, before int64, old []keyPair, out *storage.Removed) error {
	if len(old) == 0 {
		return nil
	}
	uuids := make([]string, len(old))
	for i, k := range old {
		uuids[i] = k.Item
	}
	slices.Sort(uuids)
	uuids = slices.Compact(uuids)
	if err := lockCommands(ctx, t, uuids); err != nil {
		return err
	}
	old, err := lockKeys(ctx, t, old, " AND state + 0 = ? AND finished_at < ?", int(state), before)
	if err != nil {
		return fmt.Errorf("locking old queue rows: %w", err)
	}
	if err := removeResults(ctx, t, old, out); err != nil {
		return err
	}
	if len(old) > 0 {
		where, args := queueRows.Among(t.Tx, old)
		n, err := t.Exec(ctx, "DELETE FROM nano_enrollment_queue WHERE "+where, args...)
		if err != nil {
			return fmt.Errorf("removing queue rows: %w", err)
		}
		out.Rows = int(n)
	}
	return removeCommands(ctx, t, uuids, out)
}

// lockCommands locks commands in key order.
func lockCommands(ctx context.Context, t *tx, uuids []string) error {
	if t.Dialect.ForUpdate() == "" {
		return nil
	}
	places, args := sqldb.InList(uuids)
	_, err := commandUUIDs(ctx, t, "SELECT command_uuid FROM nano_commands WHERE command_uuid IN "+places+" ORDER BY command_uuid"+t.Dialect.ForUpdate(), args...)
	if err != nil {
		return fmt.Errorf("locking commands: %w", err)
	}
	return nil
}

// removeCommands removes those of some locked commands that no queue row
// refers to.
func removeCommands(ctx context.Context, t *tx, uuids []string, out *storage.Removed) error {
	places, args := sqldb.InList(uuids)
	unused, err := commandUUIDs(ctx, t, `SELECT c.command_uuid FROM nano_commands c WHERE c.command_uuid IN `+places+`
AND NOT EXISTS (SELECT 1 FROM nano_enrollment_queue q WHERE q.command_uuid = c.command_uuid)`, args...)
	if err != nil {
		return fmt.Errorf("looking for unused commands: %w", err)
	}
	if len(unused) == 0 {
		return nil
	}
	places, args = sqldb.InList(unused)
	n, err := t.Exec(ctx, "DELETE FROM nano_commands WHERE command_uuid IN "+places, args...)
	if err != nil {
		return fmt.Errorf("removing commands: %w", err)
	}
	out.Commands = int(n)
	return nil
}

// commandUUIDs runs a query for one column of them.
func commandUUIDs(ctx context.Context, t *tx, q string, args ...any) (uuids []string, err error) {
	rows, err := t.Query(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var uuid string
		if err := rows.Scan(&uuid); err != nil {
			return nil, err
		}
		uuids = append(uuids, uuid)
	}
	return uuids, rows.Err()
}

// HistorySize implements storage.Sweeps.
func (s *Store) HistorySize(ctx context.Context) (storage.HistorySize, error) {
	var h storage.HistorySize
	waiting := make([]string, len(waitingStates))
	for i, state := range waitingStates {
		waiting[i] = fmt.Sprint(int(state))
	}
	// One statement each, since together they may take long.
	for _, count := range []struct {
		into *int64
		from string
	}{
		{&h.Waiting, "nano_enrollment_queue WHERE state IN (" + strings.Join(waiting, ", ") + ")"},
		{&h.Finished, fmt.Sprintf("nano_enrollment_queue WHERE state >= %d", storage.Acknowledged)},
		{&h.Results, "nano_command_results"},
		{&h.Commands, "nano_commands"},
	} {
		err := s.read(ctx, func(ctx context.Context, t *tx) error {
			return t.QueryRow(ctx, "SELECT COUNT(*) FROM "+count.from).Scan(count.into)
		})
		if err != nil {
			return storage.HistorySize{}, fmt.Errorf("counting history: %w", err)
		}
	}
	return h, nil
}
