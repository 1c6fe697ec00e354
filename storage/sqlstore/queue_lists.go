package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var (
	_ storage.Queues   = (*Store)(nil)
	_ storage.Commands = (*Store)(nil)
)

const (
	// commandsCounted bounds the enrollments of a command that a list counts.
	commandsCounted = 10_000
	// countParts bounds the commands that one statement counts.
	countParts = 100
	// commandsRead bounds the commands that one page of a list reads.
	commandsRead = 2000
	// A state is rare if no more than rareRows are in it, of no more than
	// rareCommands.
	rareRows     = 10_000
	rareCommands = 1000
)

// itemColumns are the columns of a QueueItem, of the queue as q.
const itemColumns = `q.id, q.command_uuid, q.state, q.seq, q.priority, q.created_at, q.not_before, q.expires_at, q.finished_at,
q.attempts, q.notnow_count, q.notnow_at, q.supersede_key`

func scanItem(row sqldb.Row, i *storage.QueueItem) error {
	var created int64
	var notBefore, expires, finished, notNow sql.Null[int64]
	var key sql.Null[string]
	if err := row.Scan(&i.Enrollment, &i.CommandUUID, &i.State, &i.Seq, &i.Priority, &created, &notBefore, &expires, &finished,
		&i.Attempts, &i.NotNowCount, &notNow, &key); err != nil {
		return err
	}
	i.CreatedAt, i.NotBefore, i.ExpiresAt = fromMicros(created), fromMicros(notBefore.V), fromMicros(expires.V)
	i.FinishedAt, i.NotNowAt, i.SupersedeKey = fromMicros(finished.V), fromMicros(notNow.V), key.V
	return nil
}

// nameItems sets the request types.
func nameItems(ctx context.Context, t *tx, items []storage.QueueItem) error {
	if len(items) == 0 {
		return nil
	}
	types := make(map[string]string)
	for i := range items {
		types[items[i].CommandUUID] = ""
	}
	place, args := sqldb.InList(slices.Sorted(maps.Keys(types)))
	err := t.Query(ctx, "SELECT command_uuid, request_type FROM nano_commands WHERE command_uuid IN "+place, args...).Each(func(row sqldb.Row) error {
		var uuid, requestType string
		err := row.Scan(&uuid, &requestType)
		types[uuid] = requestType
		return err
	})
	for i := range items {
		items[i].RequestType = types[items[i].CommandUUID]
	}
	return err
}

// scoped is a condition on enrollments e, empty if the scope sees everything.
func scoped(scope storage.Scope) (condition string, args []any) {
	inScope(scope, func(text string, values ...any) { condition, args = " AND "+text, values })
	return condition, args
}

// inSight is a condition on queue rows q: rows from before the enrollment came
// to its APNs topic belong to another tenant.
func inSight(scope storage.Scope) string {
	if len(scope.Topics) == 0 {
		return ""
	}
	return " AND NOT EXISTS (SELECT 1 FROM nano_topic_moves v WHERE v.id = q.id AND v.moved_at >= q.created_at)"
}

// findItem fails with storage.ErrNotFound if the scope does not see the
// enrollment or its queue row.
func findItem(ctx context.Context, t *tx, scope storage.Scope, id, uuid string) error {
	if _, err := findEnrollment(ctx, t, scope, id); err != nil {
		return err
	}
	if !storable(uuid) {
		return storage.ErrNotFound
	}
	if len(scope.Topics) == 0 {
		return nil
	}
	var one int
	return missing(t.QueryRow(ctx, "SELECT 1 FROM nano_enrollment_queue q WHERE q.id = ? AND q.command_uuid = ?"+inSight(scope), id, uuid).Scan(&one))
}

// findEnrollment returns the id of an enrollment's device. It fails with
// storage.ErrNotFound if the scope does not have the enrollment.
func findEnrollment(ctx context.Context, t *tx, scope storage.Scope, id string) (device string, err error) {
	if !storable(id) {
		return "", storage.ErrNotFound
	}
	condition, args := scoped(scope)
	err = t.QueryRow(ctx, "SELECT e.device_id FROM nano_enrollments e WHERE e.id = ?"+condition, append([]any{id}, args...)...).Scan(&device)
	return device, missing(err)
}

// Queue implements storage.Queues.
func (s *Store) Queue(ctx context.Context, scope storage.Scope, id string, state storage.State, after storage.QueueKey, limit int) (items []storage.QueueItem, err error) {
	q, args := queueQuery(s.db.Dialect(), scope, id, state, after, limit)
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		if _, err := findEnrollment(ctx, t, scope, id); err != nil {
			return err
		}
		if items, err = sqldb.Collect(t.Query(ctx, q, slices.Clone(args)...), scanItem); err != nil {
			return err
		}
		return nameItems(ctx, t, items)
	})
	if err != nil {
		return nil, fmt.Errorf("reading a queue: %w", err)
	}
	return items, nil
}

// queueQuery reads each state's range of the index, in two parts after a place:
// the rest of its priority, and lower ones.
func queueQuery(d *sqldb.Dialect, scope storage.Scope, id string, state storage.State, after storage.QueueKey, limit int) (q string, args []any) {
	states := []storage.State{state}
	if state == 0 {
		states = []storage.State{storage.Queued, storage.NotNow}
	}
	var parts []string
	part := func(state storage.State, condition string, values ...any) {
		parts = append(parts, fmt.Sprintf(`SELECT q.* FROM (SELECT %s FROM nano_enrollment_queue q%s WHERE q.id = ? AND q.state = ?%s
ORDER BY q.priority DESC, q.seq LIMIT ?) q`, itemColumns, d.Index("nano_enrollment_queue_next"), condition+inSight(scope)))
		args = append(append(append(args, id, int(state)), values...), limit)
	}
	for _, state := range states {
		if after == (storage.QueueKey{}) {
			part(state, "")
			continue
		}
		part(state, " AND q.priority = ? AND q.seq > ?", after.Priority, after.Seq)
		part(state, " AND q.priority < ?", after.Priority)
	}
	return "SELECT " + itemColumns + " FROM (" + strings.Join(parts, "\nUNION ALL ") + ") q ORDER BY q.priority DESC, q.seq LIMIT ?", append(args, limit)
}

// QueueItem implements storage.Queues.
func (s *Store) QueueItem(ctx context.Context, scope storage.Scope, id, uuid string) (*storage.QueueItem, error) {
	var items []storage.QueueItem
	err := s.read(ctx, func(ctx context.Context, t *tx) (err error) {
		if err := findItem(ctx, t, scope, id, uuid); err != nil {
			return err
		}
		items, err = sqldb.Collect(t.Query(ctx, "SELECT "+itemColumns+" FROM nano_enrollment_queue q WHERE q.id = ? AND q.command_uuid = ?", id, uuid), scanItem)
		if err != nil {
			return err
		}
		if len(items) == 0 {
			return storage.ErrNotFound
		}
		return nameItems(ctx, t, items)
	})
	if err != nil {
		return nil, fmt.Errorf("reading a command of an enrollment: %w", err)
	}
	return &items[0], nil
}

// CommandResult implements storage.Queues.
func (s *Store) CommandResult(ctx context.Context, scope storage.Scope, id, uuid string) (*storage.CommandResult, error) {
	var r storage.CommandResult
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		if err := findItem(ctx, t, scope, id, uuid); err != nil {
			return err
		}
		var at int64
		err := t.QueryRow(ctx, "SELECT status, late, created_at, result FROM nano_command_results WHERE id = ? AND command_uuid = ?", id, uuid).
			Scan(&r.Status, &r.Late, &at, &r.Raw)
		r.CreatedAt = fromMicros(at)
		return missing(err)
	})
	if err != nil {
		return nil, fmt.Errorf("reading a result: %w", err)
	}
	return &r, nil
}

// FindCommands implements storage.Commands.
func (s *Store) FindCommands(ctx context.Context, scope storage.Scope, f storage.CommandFilter, after storage.CommandKey, limit int) (
	list []storage.CommandInfo, next storage.CommandKey, err error) {
	rare, err := s.rareCommands(ctx, f.State)
	if err != nil {
		return nil, storage.CommandKey{}, fmt.Errorf("looking for commands in a state: %w", err)
	}
	if rare != nil && len(rare) == 0 {
		return nil, storage.CommandKey{}, nil
	}
	next = after
	for read := 0; read < commandsRead; {
		n := min(max(limit-len(list), 100), candidateRows)
		q, args := commandsQuery(s.db.Dialect(), f, rare, next, n)
		found, chosen, err := s.candidateCommands(ctx, scope, f.State, q, args)
		if err != nil {
			return nil, storage.CommandKey{}, fmt.Errorf("looking for commands: %w", err)
		}
		read += len(found)
		full := false
		for i := range found {
			if full = len(list) == limit; full {
				break
			}
			next = storage.CommandKey{At: found[i].CreatedAt, UUID: found[i].UUID}
			if chosen == nil || chosen[found[i].UUID] {
				list = append(list, found[i])
			}
		}
		if !full && len(found) < n {
			next = storage.CommandKey{}
			break
		}
		if full || len(list) == limit {
			break
		}
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		for chunk := range slices.Chunk(list, countParts) {
			if err := countSome(ctx, t, scope, chunk); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, storage.CommandKey{}, fmt.Errorf("counting the enrollments of commands: %w", err)
	}
	return list, next, nil
}

// candidateCommands reads commands, and which of them are in the scope and have a
// row in the state; nil is all.
func (s *Store) candidateCommands(ctx context.Context, scope storage.Scope, state storage.State, query string, args []any) (
	found []storage.CommandInfo, chosen map[string]bool, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) (err error) {
		if found, err = sqldb.Collect(t.Query(ctx, query, slices.Clone(args)...), scanCommand); err != nil {
			return err
		}
		chosen, err = chooseCommands(ctx, t, scope, state, found)
		return err
	})
	return found, chosen, err
}

// rareCommands lists the commands with a row in a rare state, since searching
// all commands for a few takes long; nil if the state is not rare.
func (s *Store) rareCommands(ctx context.Context, state storage.State) (uuids []string, err error) {
	if state == 0 {
		return nil, nil
	}
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		uuids = []string{}
		var total int64
		err := t.Query(ctx, rareQuery(s.db.Dialect(), state), rareRows+1, rareCommands+1).Each(func(row sqldb.Row) error {
			var uuid string
			var n int64
			if err := row.Scan(&uuid, &n); err != nil {
				return err
			}
			uuids = append(uuids, uuid)
			total += n
			return nil
		})
		if total > rareRows || len(uuids) > rareCommands {
			uuids = nil
		}
		return err
	})
	return uuids, err
}

func rareQuery(d *sqldb.Dialect, state storage.State) string {
	// The state is in the text, as in itemsQuery.
	return fmt.Sprintf(`SELECT r.command_uuid, COUNT(*) FROM (SELECT command_uuid FROM nano_enrollment_queue%s WHERE state = %d LIMIT ?) r
GROUP BY r.command_uuid LIMIT ?`, d.Index("nano_enrollment_queue_command_uuid"), state)
}

// commandsQuery reads commands from the index of the filter, or by key if
// rareCommands found them.
func commandsQuery(d *sqldb.Dialect, f storage.CommandFilter, rare []string, after storage.CommandKey, limit int) (q string, args []any) {
	index, where := "nano_commands_created_at", "1 = 1"
	add := func(condition string, values ...any) {
		where += " AND " + condition
		args = append(args, values...)
	}
	if f.RequestType != "" {
		index = "nano_commands_request_type"
		add("request_type = ?", f.RequestType)
	}
	if rare != nil {
		index = "PRIMARY"
		place, uuids := sqldb.InList(rare)
		add("command_uuid IN "+place, uuids...)
	}
	if !f.CreatedAfter.IsZero() {
		add("created_at >= ?", micros(f.CreatedAfter))
	}
	if !f.CreatedBefore.IsZero() {
		add("created_at < ?", micros(f.CreatedBefore))
	}
	if after != (storage.CommandKey{}) {
		at := micros(after.At)
		add("created_at <= ? AND (created_at < ? OR command_uuid < ?)", at, at, after.UUID)
	}
	return "SELECT command_uuid, request_type, created_at FROM nano_commands" + d.Index(index) + " WHERE " + where +
		" ORDER BY created_at DESC, command_uuid DESC LIMIT ?", append(args, limit)
}

func scanCommand(row sqldb.Row, c *storage.CommandInfo) error {
	*c = storage.CommandInfo{States: make(map[storage.State]int64)}
	var at int64
	if err := row.Scan(&c.UUID, &c.RequestType, &at); err != nil {
		return err
	}
	c.CreatedAt = fromMicros(at)
	return nil
}

// chooseCommands returns which commands have a row of an enrollment in the
// scope, in a state if one is given; nil is all.
func chooseCommands(ctx context.Context, t *tx, scope storage.Scope, state storage.State, list []storage.CommandInfo) (map[string]bool, error) {
	condition, topics := scoped(scope)
	if condition == "" && state == 0 || len(list) == 0 {
		return nil, nil
	}
	uuids := make([]string, len(list))
	for i := range list {
		uuids[i] = list[i].UUID
	}
	place, args := sqldb.InList(uuids)
	q := chooseAll(t.Dialect, state)
	if condition != "" {
		q = chooseScoped(condition, inSight(scope), state)
	}
	found, err := sqldb.Column[string](t.Query(ctx, "SELECT c.command_uuid FROM nano_commands c WHERE "+q+" AND c.command_uuid IN "+place, append(topics, args...)...))
	if err != nil {
		return nil, err
	}
	chosen := make(map[string]bool, len(found))
	for _, uuid := range found {
		chosen[uuid] = true
	}
	return chosen, nil
}

// chooseAll is the condition that a command c has a row in a state. It selects
// a value, since planners turn EXISTS into a join that may begin with all rows
// in the state, which may be very many.
func chooseAll(d *sqldb.Dialect, state storage.State) string {
	return fmt.Sprintf("(SELECT q.state FROM nano_enrollment_queue q%s WHERE q.command_uuid = c.command_uuid AND q.state = %d LIMIT 1) IS NOT NULL",
		d.Index("nano_enrollment_queue_command_uuid"), state)
}

// chooseScoped is the condition that a command c has a row in sight, of an
// enrollment in a scope, in a state unless that is 0.
func chooseScoped(condition, sight string, state storage.State) string {
	q := "EXISTS (SELECT 1 FROM nano_enrollment_queue q JOIN nano_enrollments e ON e.id = q.id" + condition + " WHERE q.command_uuid = c.command_uuid" + sight
	if state != 0 {
		q += fmt.Sprintf(" AND q.state = %d", state)
	}
	return q + ")"
}

// countSome counts a bounded number of enrollments of each command.
func countSome(ctx context.Context, t *tx, scope storage.Scope, list []storage.CommandInfo) error {
	condition, topics := scoped(scope)
	join := ""
	if condition != "" {
		join = " JOIN nano_enrollments e ON e.id = q.id" + condition
	}
	var parts []string
	var args []any
	for i := range list {
		parts = append(parts, fmt.Sprintf(`SELECT %d AS n, c.state, COUNT(*) AS rows_counted FROM (SELECT q.state FROM nano_enrollment_queue q%s
WHERE q.command_uuid = ?%s LIMIT %d) c GROUP BY c.state`, i, join, inSight(scope), commandsCounted+1))
		args = append(append(args, topics...), list[i].UUID)
	}
	for i := range list {
		list[i].States, list[i].Counted = make(map[storage.State]int64), 0
	}
	counted := make([]int64, len(list))
	return t.Query(ctx, strings.Join(parts, "\nUNION ALL "), args...).Each(func(row sqldb.Row) error {
		var i int
		var state storage.State
		var n int64
		if err := row.Scan(&i, &state, &n); err != nil {
			return err
		}
		list[i].States[state] = n
		if counted[i] += n; counted[i] > commandsCounted {
			list[i].Counted = counted[i]
		}
		return nil
	})
}

// Command implements storage.Commands.
func (s *Store) Command(ctx context.Context, scope storage.Scope, uuid string) (*storage.CommandInfo, error) {
	var c *storage.CommandInfo
	err := s.read(ctx, func(ctx context.Context, t *tx) (err error) {
		c, err = readCommand(ctx, t, scope, uuid)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading a command: %w", err)
	}
	return c, nil
}

func readCommand(ctx context.Context, t *tx, scope storage.Scope, uuid string) (*storage.CommandInfo, error) {
	if !storable(uuid) {
		return nil, storage.ErrNotFound
	}
	list, err := sqldb.Collect(t.Query(ctx, "SELECT command_uuid, request_type, created_at FROM nano_commands WHERE command_uuid = ?", uuid), scanCommand)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, storage.ErrNotFound
	}
	from, args := commandRows(t.Dialect, scope, uuid)
	err = t.Query(ctx, "SELECT q.state, COUNT(*) FROM "+from+" AND q.state IN ("+everyState()+") GROUP BY q.state", args...).Each(func(row sqldb.Row) error {
		var state storage.State
		var n int64
		if err := row.Scan(&state, &n); err != nil {
			return err
		}
		list[0].States[state] = n
		return nil
	})
	if err != nil {
		return nil, err
	}
	if len(list[0].States) == 0 && len(scope.Topics) > 0 {
		return nil, storage.ErrNotFound
	}
	return &list[0], nil
}

// commandRows returns the rows of a command in a scope.
func commandRows(d *sqldb.Dialect, scope storage.Scope, uuid string) (from string, args []any) {
	condition, topics := scoped(scope)
	from = "nano_enrollment_queue q" + d.Index("nano_enrollment_queue_command_uuid")
	if condition != "" {
		from += " JOIN nano_enrollments e ON e.id = q.id" + condition
	}
	return from + " WHERE q.command_uuid = ?" + inSight(scope), append(topics, uuid)
}

// CommandItems implements storage.Commands.
func (s *Store) CommandItems(ctx context.Context, scope storage.Scope, uuid string, state storage.State, after string, limit int) (items []storage.QueueItem, err error) {
	if !storable(uuid) {
		return nil, nil
	}
	q, args := itemsQuery(s.db.Dialect(), scope, uuid, state, after, limit)
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		items = nil
		ids, err := sqldb.Column[string](t.Query(ctx, q, slices.Clone(args)...))
		if err != nil || len(ids) == 0 {
			return err
		}
		ids = slices.Compact(ids) // a row may have changed its state meanwhile
		keys := make([]keyPair, len(ids))
		for i, id := range ids {
			keys[i] = keyPair{ID: id, Item: uuid}
		}
		where, args := queueRows.Among(t.Tx, keys)
		items, err = sqldb.Collect(t.Query(ctx, "SELECT "+itemColumns+" FROM nano_enrollment_queue q"+t.Dialect.Index("PRIMARY")+" WHERE "+where+" ORDER BY q.id", args...), scanItem)
		if err != nil {
			return err
		}
		return nameItems(ctx, t, items)
	})
	if err != nil {
		return nil, fmt.Errorf("reading a command's enrollments: %w", err)
	}
	return items, nil
}

// itemsQuery reads each state's range of the index by command.
func itemsQuery(d *sqldb.Dialect, scope storage.Scope, uuid string, state storage.State, after string, limit int) (q string, args []any) {
	states := storage.States()
	if state != 0 {
		states = []storage.State{state}
	}
	var parts []string
	for i, state := range states {
		from, more := commandRows(d, scope, uuid)
		// The state is in the text: with an argument PostgreSQL takes each
		// state for a common one, and reads the primary key until it finds
		// some.
		parts = append(parts, fmt.Sprintf("SELECT id FROM (SELECT q.id FROM %s AND q.state = %d AND q.id > ? ORDER BY q.id LIMIT ?) part%d", from, state, i))
		args = append(append(args, more...), after, limit)
	}
	return strings.Join(parts, "\nUNION ALL ") + "\nORDER BY id LIMIT ?", append(args, limit)
}

// CommandPayloads implements storage.Commands.
func (s *Store) CommandPayloads(ctx context.Context, uuids []string) (payloads map[string][]byte, err error) {
	if len(uuids) == 0 {
		return nil, nil
	}
	place, args := sqldb.InList(uuids)
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		payloads = make(map[string][]byte, len(uuids))
		return t.Query(ctx, "SELECT command_uuid, command FROM nano_commands WHERE command_uuid IN "+place, args...).Each(func(row sqldb.Row) error {
			var uuid string
			var raw []byte
			if err := row.Scan(&uuid, &raw); err != nil {
				return err
			}
			payloads[uuid], err = t.opened(commandColumn, uuid, raw)
			return err
		})
	})
	if err != nil {
		return nil, fmt.Errorf("reading commands: %w", err)
	}
	return payloads, nil
}

// CommandWaits implements storage.Commands.
func (s *Store) CommandWaits(ctx context.Context, scope storage.Scope, uuid string) (waits bool, err error) {
	if !storable(uuid) {
		return false, nil
	}
	from, args := commandRows(s.db.Dialect(), scope, uuid)
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		var one int
		err := t.QueryRow(ctx, "SELECT 1 FROM "+from+fmt.Sprintf(" AND q.state IN (%d, %d, %d) LIMIT 1",
			storage.Scheduled, storage.Queued, storage.NotNow), slices.Clone(args)...).Scan(&one)
		waits = err == nil
		if errors.Is(err, sql.ErrNoRows) {
			err = nil
		}
		return err
	})
	if err != nil {
		return false, fmt.Errorf("looking whether a command waits: %w", err)
	}
	return waits, nil
}
