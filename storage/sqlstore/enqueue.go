package sqlstore

import (
	"bytes"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

var _ storage.Enqueuer = (*Store)(nil)

const (
	// enqueueRows is how many enrollments one transaction of Enqueue takes.
	enqueueRows = 500
	// firstPush is how long the replica that enqueued has to push before the
	// sweep does.
	firstPush = 30 * time.Second
)

// Enqueue implements storage.Enqueuer.
func (s *Store) Enqueue(ctx context.Context, scope storage.Scope, e *storage.Enqueue) (map[string]error, error) {
	failed := make(map[string]error)
	ids := storableAmong(e.IDs, failed)
	record, did := e.Audit, false
	for i := 0; i < len(ids); i += enqueueRows {
		chunk := ids[i:min(i+enqueueRows, len(ids))]
		var todo []string
		var missed map[string]error
		queue := func(ctx context.Context, t *tx) error {
			call, err := openCall(ctx, t, e, len(ids))
			if err != nil {
				return err
			}
			if todo = call.left(chunk); len(todo) == 0 {
				missed = call.missed()
				return nil
			}
			if missed, err = enqueue(ctx, t, scope, e, todo); err != nil {
				return err
			}
			if record != nil {
				if err := audit(ctx, t, record); err != nil {
					return fmt.Errorf("appending an audit record: %w", err)
				}
			}
			return call.close(ctx, t, missed, todo[len(todo)-1], i+enqueueRows >= len(ids))
		}
		err := s.write(ctx, queue)
		if s.d.unique(err) { // somebody else was first to store the command
			err = s.write(ctx, queue)
		}
		if err != nil {
			return failed, fmt.Errorf("queueing a command: %w", err)
		}
		if len(todo) > 0 {
			record, did = nil, true
		}
		maps.Copy(failed, missed)
	}
	if e.Once != nil {
		e.Once.Repeated = !did
	}
	return failed, nil
}

// enqueue queues the command for a chunk of sorted ids. Push rows are locked
// first: they keep numbers in order and Authenticate and CheckOut away.
func enqueue(ctx context.Context, t *tx, scope storage.Scope, e *storage.Enqueue, ids []string) (failed map[string]error, err error) {
	numbers, err := lockNumbers(ctx, t, ids)
	if err != nil {
		return nil, err
	}
	enrolled, err := enrolledAmong(ctx, t, scope, ids)
	if err != nil {
		return nil, err
	}
	failed = make(map[string]error)
	var eligible []string
	for _, id := range ids {
		if _, ok := numbers[id]; ok && enrolled[id] {
			eligible = append(eligible, id)
		} else {
			failed[id] = storage.ErrNotEnrolled
		}
	}
	if len(eligible) == 0 {
		return failed, nil
	}
	fresh, err := putCommand(ctx, t, e)
	if err != nil {
		return nil, err
	}
	if !fresh {
		if eligible, err = withoutCommand(ctx, t, e.Command.CommandUUID, eligible); err != nil {
			return nil, err
		}
	}
	if len(eligible) == 0 {
		return failed, nil
	}
	if err := supersede(ctx, t, e.SupersedeKey, eligible); err != nil {
		return nil, err
	}
	return failed, insertRows(ctx, t, e, eligible)
}

// withoutCommand returns those of ids that do not have the command.
func withoutCommand(ctx context.Context, t *tx, uuid string, ids []string) ([]string, error) {
	is, args := t.among(ids)
	had, err := queueKeys(ctx, t, "SELECT id, command_uuid FROM nano_enrollment_queue WHERE command_uuid = ? AND id "+is,
		append([]any{uuid}, args...)...)
	if err != nil {
		return nil, fmt.Errorf("reading queue rows: %w", err)
	}
	if len(had) == 0 {
		return ids, nil
	}
	has := make(map[string]bool, len(had))
	for _, k := range had {
		has[k.id] = true
	}
	return slices.DeleteFunc(ids, func(id string) bool { return has[id] }), nil
}

// lockNumbers locks push rows and reads the last number of each queue.
func lockNumbers(ctx context.Context, t *tx, ids []string) (map[string]int64, error) {
	is, args := t.among(ids)
	rows, err := t.query(ctx, "SELECT id, last_seq FROM nano_enrollment_push"+t.d.by("PRIMARY")+" WHERE id "+is+" ORDER BY id"+t.d.forUpdate, args...)
	if err != nil {
		return nil, fmt.Errorf("locking push rows: %w", err)
	}
	defer rows.Close()
	numbers := make(map[string]int64, len(ids))
	for rows.Next() {
		var id string
		var last int64
		if err := rows.Scan(&id, &last); err != nil {
			return nil, fmt.Errorf("locking push rows: %w", err)
		}
		numbers[id] = last
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("locking push rows: %w", err)
	}
	return numbers, nil
}

// enrolledAmong says which enrollments are there for the scope. Those that an
// operator disabled are. Only the ids choose rows: given the rest, planners
// take the index of enabled enrollments or of a topic's, which is the fleet.
func enrolledAmong(ctx context.Context, t *tx, scope storage.Scope, ids []string) (map[string]bool, error) {
	is, args := t.among(ids)
	rows, err := t.query(ctx, "SELECT id, enabled, topic FROM nano_enrollments"+t.d.by("PRIMARY")+" WHERE id "+is, args...)
	if err != nil {
		return nil, fmt.Errorf("reading enrollments: %w", err)
	}
	defer rows.Close()
	enrolled := make(map[string]bool, len(ids))
	for rows.Next() {
		var id, topic string
		var enabled bool
		if err := rows.Scan(&id, &enabled, &topic); err != nil {
			return nil, fmt.Errorf("reading enrollments: %w", err)
		}
		if enabled && (len(scope.Topics) == 0 || slices.Contains(scope.Topics, topic)) {
			enrolled[id] = true
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("reading enrollments: %w", err)
	}
	return enrolled, nil
}

// putCommand stores the command, or checks that the one that is there has the
// same bytes, and keeps it there until the transaction ends. fresh says that it
// was not there, so that nobody has it. One that another transaction stored in
// between violates the key: see Enqueue.
func putCommand(ctx context.Context, t *tx, e *storage.Enqueue) (fresh bool, err error) {
	q := "SELECT command FROM nano_commands WHERE command_uuid = ?" + t.d.forShare
	var raw []byte
	err = t.queryRow(ctx, q, e.Command.CommandUUID).Scan(&raw)
	if errors.Is(err, sql.ErrNoRows) {
		_, err = t.exec(ctx, "INSERT INTO nano_commands (command_uuid, request_type, command, created_at) VALUES (?, ?, ?, ?)",
			e.Command.CommandUUID, e.Command.RequestType, t.sealedCommand(e.Command.CommandUUID, notNil(e.Command.Raw)), t.now)
		if err != nil {
			return false, fmt.Errorf("storing a command: %w", err)
		}
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading a command: %w", err)
	}
	if raw, err = t.opened(commandColumn, e.Command.CommandUUID, raw); err != nil {
		return false, err
	}
	if !bytes.Equal(raw, e.Command.Raw) {
		return false, storage.ErrConflict
	}
	return false, nil
}

// supersede ends rows that wait with the key.
func supersede(ctx context.Context, t *tx, key string, ids []string) error {
	if key == "" {
		return nil
	}
	is, args := t.among(ids)
	old, err := queueKeys(ctx, t, fmt.Sprintf(`SELECT id, command_uuid FROM nano_enrollment_queue
WHERE supersede_key = ? AND state IN (%d, %d, %d) AND id `, storage.Scheduled, storage.Queued, storage.NotNow)+
		is+" ORDER BY id, command_uuid"+t.d.forUpdate, append([]any{key}, args...)...)
	if err != nil {
		return fmt.Errorf("locking commands that are replaced: %w", err)
	}
	for chunk := range slices.Chunk(old, enqueueRows) {
		if err := moveTo(ctx, t, storage.Superseded, chunk); err != nil {
			return err
		}
	}
	return nil
}

// insertRows inserts queue rows and raises numbers and debts. A scheduled row
// takes a number, too: it tells the order of those that are due at one time.
func insertRows(ctx context.Context, t *tx, e *storage.Enqueue, ids []string) error {
	state, notBefore := storage.Queued, any(nil)
	if micros(e.NotBefore) > t.now {
		state, notBefore = storage.Scheduled, micros(e.NotBefore)
	}
	key := any(nil)
	if e.SupersedeKey != "" {
		key = e.SupersedeKey
	}
	is, idArgs := t.among(ids)
	number := t.d.number
	_, err := t.exec(ctx, `INSERT INTO nano_enrollment_queue (id, command_uuid, seq, priority, state, supersede_key, created_at, not_before, expires_at)
SELECT p.id, ?, p.last_seq + 1, `+number+", "+number+", ?, "+number+", "+number+", "+number+`
FROM nano_enrollment_push p`+t.d.by("PRIMARY")+" WHERE p.id "+is,
		append([]any{e.Command.CommandUUID, e.Priority, int(state), key, t.now, notBefore, null(micros(e.ExpiresAt))}, idArgs...)...)
	if err != nil {
		return fmt.Errorf("storing queue rows: %w", err)
	}
	// MySQL assigns from left to right, so last_seq must come last.
	set, args := "", []any(nil)
	if state == storage.Queued && !e.NoPush {
		// A time that is nearer stays, or a queue that grows all the time
		// would keep the sweep off.
		set = "owed_seq = last_seq + 1, push_at = CASE WHEN push_at < ? THEN push_at ELSE ? END, "
		at := t.now + firstPush.Microseconds()
		args = append(args, at, at)
	}
	if _, err := t.exec(ctx, "UPDATE nano_enrollment_push"+t.d.by("PRIMARY")+" SET "+set+"last_seq = last_seq + 1 WHERE id "+is, append(args, idArgs...)...); err != nil {
		return fmt.Errorf("owing pushes: %w", err)
	}
	return nil
}
