package sqlstore

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

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
	s.sweepCounters.add(out)
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
	s.sweepCounters.add(out)
	return out, nil
}

// history is a table whose rows have a time. The names of both make the name of
// its index by time, in which key orders rows of one time.
type history struct {
	table, at string
	key       [2]string
}

var (
	resultsByTime = history{"nano_command_results", "created_at", [...]string{"id", "command_uuid"}}
	queueByTime   = history{"nano_enrollment_queue", "finished_at", [...]string{"command_uuid", "id"}}
)

// look reads the next rows of a history in the order of its index, sets in out
// where they end, and returns the keys of the request type.
func look(ctx context.Context, t *tx, h history, condition string, r storage.Removal, out *storage.Removed) ([]keyPair, error) {
	at, major, minor := "h."+h.at, "h."+h.key[0], "h."+h.key[1]
	value := map[string]string{"id": r.After.ID, "command_uuid": r.After.CommandUUID}
	after, afterMajor, afterMinor := micros(r.After.At), value[h.key[0]], value[h.key[1]]
	out.Next = r.After
	var keys []keyPair
	err := t.Query(ctx, "SELECT "+at+", h.id, h.command_uuid, COALESCE(c.request_type, '') FROM "+h.table+" h"+t.Dialect.Index(h.table+"_"+h.at)+`
LEFT JOIN nano_commands c ON c.command_uuid = h.command_uuid
WHERE `+condition+at+" >= ? AND "+at+" < ? AND ("+at+" > ? OR "+major+" > ? OR ("+major+" = ? AND "+minor+` > ?))
ORDER BY `+at+", "+major+", "+minor+" LIMIT ?",
		after, micros(r.Before), after, afterMajor, afterMajor, afterMinor, r.Limit).Each(func(row sqldb.Row) error {
		var k keyPair
		var at int64
		var requestType string
		if err := row.Scan(&at, &k.ID, &k.Item, &requestType); err != nil {
			return err
		}
		out.Looked++
		out.Next = storage.HistoryKey{At: fromMicros(at), ID: k.ID, CommandUUID: k.Item}
		if r.Type == requestType || r.Type == "" && !slices.Contains(r.Except, requestType) {
			keys = append(keys, k)
		}
		return nil
	})
	out.Done = out.Looked < r.Limit
	slices.SortFunc(keys, keyPair.Compare)
	return keys, err
}

// removeResults removes the existing results of keys.
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

// removeFinished removes queue rows with their results and commands, unless the
// rows have changed since they were read. It locks commands first, so that it
// does not remove one that is queued again at the same time.
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
	_, err := sqldb.Column[string](t.Query(ctx, "SELECT command_uuid FROM nano_commands WHERE command_uuid IN "+places+" ORDER BY command_uuid"+t.Dialect.ForUpdate(), args...))
	if err != nil {
		return fmt.Errorf("locking commands: %w", err)
	}
	return nil
}

// removeCommands removes locked commands without queue rows.
func removeCommands(ctx context.Context, t *tx, uuids []string, out *storage.Removed) error {
	places, args := sqldb.InList(uuids)
	unused, err := sqldb.Column[string](t.Query(ctx, `SELECT c.command_uuid FROM nano_commands c WHERE c.command_uuid IN `+places+`
AND NOT EXISTS (SELECT 1 FROM nano_enrollment_queue q WHERE q.command_uuid = c.command_uuid)`, args...))
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
