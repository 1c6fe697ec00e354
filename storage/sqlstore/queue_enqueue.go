package sqlstore

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
	"github.com/nanomdm/nanomdm/supervise"
)

var _ storage.Enqueuer = (*Store)(nil)

const (
	// enqueuedAtOnce bounds the enrollments of all concurrent transactions of
	// an Enqueue, and enqueueRows those of a transaction of other calls for
	// many.
	enqueuedAtOnce = 1000
	enqueueRows    = 500
	// firstPush is the time that the replica that enqueued has for its push,
	// before a sweep pushes.
	firstPush = 30 * time.Second
)

// Enqueue implements storage.Enqueuer. A call for few enrollments is carried out
// together with others, unless it keeps a record of its progress or replaces
// commands. Transactions of a call with an idempotency key follow each other, as
// its row says how far it came; those of other large calls run beside each other
// where the engine has more than one writer.
func (s *Store) Enqueue(ctx context.Context, scope storage.Scope, e *storage.Enqueue) (map[string]error, error) {
	failed := make(map[string]error)
	ids := storableAmong(e.IDs, failed)
	atOnce := 1
	if e.Once == nil {
		_, _, atOnce = s.db.Parallel()
	}
	rows := enqueuedAtOnce / atOnce
	if e.Once == nil && e.SupersedeKey == "" && len(ids) > 0 && len(ids) <= rows {
		return s.enqueueTogether(ctx, scope, e, ids, failed)
	}
	var mu sync.Mutex
	did := false
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(atOnce)
	for i := 0; i < len(ids); i += rows {
		chunk := func() error {
			first := i == 0
			if e.Once != nil { // an earlier call may have done the chunks before
				mu.Lock()
				first = !did
				mu.Unlock()
			}
			some, missed, err := s.enqueueSome(ctx, scope, e, ids, i, min(i+rows, len(ids)), first)
			mu.Lock()
			defer mu.Unlock()
			did = did || some
			maps.Copy(failed, missed)
			return err
		}
		g.Go(func() error { return supervise.Recovered(chunk) })
	}
	if err := wait(g); err != nil {
		return failed, fmt.Errorf("queueing a command: %w", err)
	}
	if e.Once != nil {
		e.Once.Repeated = !did
	}
	return failed, nil
}

// enqueueTogether carries a call out in transactions that it may share, one for
// each share of its enrollments. The first of them appends the audit record.
func (s *Store) enqueueTogether(ctx context.Context, scope storage.Scope, e *storage.Enqueue, ids []string, failed map[string]error) (map[string]error, error) {
	unaudited := *e
	unaudited.Audit = nil
	var calls []*enqueueCall
	var g errgroup.Group
	for i, share := range s.shares(ids) {
		if len(share) == 0 {
			continue
		}
		c := &enqueueCall{scope: scope, e: e, ids: share}
		if len(calls) > 0 {
			c.e = &unaudited
		}
		calls = append(calls, c)
		run := func() error { return cmp.Or(s.enqueues[i].do(ctx, c, len(share)), c.conflict) }
		g.Go(func() error { return supervise.Recovered(run) })
	}
	err := wait(&g)
	for _, c := range calls {
		maps.Copy(failed, c.failed)
	}
	if err != nil {
		return failed, fmt.Errorf("queueing a command: %w", err)
	}
	return failed, nil
}

// wait waits for transactions of a call. A panic of one of them goes on in the
// goroutine of the request.
func wait(g *errgroup.Group) error {
	err := g.Wait()
	if p := (*supervise.Panic)(nil); errors.As(err, &p) {
		panic(p)
	}
	return err
}

// enqueueSome is one transaction of Enqueue, for a chunk of the sorted ids. It
// says whether any of them was left to do; the first such chunk appends the
// audit record.
func (s *Store) enqueueSome(ctx context.Context, scope storage.Scope, e *storage.Enqueue, ids []string, begin, end int, first bool) (
	did bool, missed map[string]error, err error) {
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		call, err := openCall(ctx, t, e, len(ids))
		if err != nil {
			return err
		}
		before := call.missed()
		todo := call.left(ids[begin:end])
		if did = len(todo) > 0; !did {
			missed = before
			return nil
		}
		if missed, err = enqueue(ctx, t, scope, e, todo); err != nil {
			return err
		}
		if first && e.Audit != nil {
			if err := audit(ctx, t, e.Audit); err != nil {
				return fmt.Errorf("appending an audit record: %w", err)
			}
		}
		if err := call.close(ctx, t, missed, todo[len(todo)-1], end == len(ids)); err != nil {
			return err
		}
		maps.Copy(missed, before)
		return nil
	})
	if err != nil {
		return false, nil, err
	}
	return did, missed, nil
}

// enqueue queues the command for a chunk of sorted ids. Push rows are locked
// first: they keep numbers in order and Authenticate and CheckOut away. A new
// command comes last, as its key keeps others who store it waiting.
func enqueue(ctx context.Context, t *tx, scope storage.Scope, e *storage.Enqueue, ids []string) (failed map[string]error, err error) {
	numbers, err := lockNumbers(ctx, t, ids)
	if err != nil {
		return nil, err
	}
	found, err := findCommand(ctx, t, e.Command)
	if err != nil && !errors.Is(err, storage.ErrConflict) {
		return nil, err
	}
	conflict, uuid := err, ""
	if found {
		uuid = e.Command.CommandUUID
	}
	enrolled, err := enrolledAmong(ctx, t, scope, ids, uuid)
	if err != nil {
		return nil, err
	}
	failed = make(map[string]error)
	var eligible []string
	for _, id := range ids {
		_, ok := numbers[id]
		switch has, is := enrolled[id]; {
		case !ok || !is:
			failed[id] = storage.ErrNotEnrolled
		case !has:
			eligible = append(eligible, id)
		}
	}
	if len(failed) == len(ids) {
		return failed, nil
	}
	if conflict != nil {
		return nil, conflict
	}
	if len(eligible) == 0 {
		return failed, nil
	}
	if err := supersede(ctx, t, e.SupersedeKey, eligible); err != nil {
		return nil, err
	}
	if err := insertItems(ctx, t, e, eligible, numbers); err != nil {
		return nil, err
	}
	if !found {
		return failed, putCommand(ctx, t, e.Command)
	}
	return failed, nil
}

// lockNumbers locks push rows and reads the last number of each queue.
func lockNumbers(ctx context.Context, t *tx, ids []string) (map[string]int64, error) {
	numbers := make(map[string]int64, len(ids))
	err := t.QueryLocked(ctx, "id, last_seq", "nano_enrollment_push", ids).Each(func(row sqldb.Row) error {
		var id string
		var last int64
		if err := row.Scan(&id, &last); err != nil {
			return err
		}
		numbers[id] = last
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("locking push rows: %w", err)
	}
	return numbers, nil
}

// enrolledAmong returns the enrollments of the scope, including those that an
// operator disabled, and which of them have the command; none if uuid is empty.
// The statement chooses rows by id only: with more conditions planners take the
// index of enabled enrollments or of a topic, which has the whole fleet.
func enrolledAmong(ctx context.Context, t *tx, scope storage.Scope, ids []string, uuid string) (has map[string]bool, err error) {
	q, args := t.enrolledText(ids, uuid)
	has = make(map[string]bool, len(ids))
	err = t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		var id, topic string
		var enabled bool
		var item sql.Null[string]
		if err := row.Scan(&id, &enabled, &topic, &item); err != nil {
			return err
		}
		if enabled && (len(scope.Topics) == 0 || slices.Contains(scope.Topics, topic)) {
			has[id] = item.Valid
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading enrollments: %w", err)
	}
	return has, nil
}

// enrolledText reads enrollments, each with its row of the command if there is one.
func (t *tx) enrolledText(ids []string, uuid string) (q string, args []any) {
	is, args := t.Among(ids)
	column, join := "NULL", ""
	var of []any
	if uuid != "" {
		column, join = "q.id", t.Dialect.Lookup(true, "nano_enrollment_queue", "q", "q.id = e.id AND q.command_uuid = ?")
		of = []any{uuid}
	}
	q = "SELECT e.id, e.enabled, e.topic, " + column + " FROM "
	if t.Dialect.HasArrays() { // each separately; see locked
		return q + t.Dialect.ArrayTable("key") + t.Dialect.Lookup(false, "nano_enrollments", "e", "e.id = r.key") + join, append(args, of...)
	}
	return q + "nano_enrollments e" + t.Dialect.Index("PRIMARY") + join + " WHERE e.id " + is, append(of, args...)
}

// findCommand says whether a command exists, and locks it until the transaction
// ends. It fails with storage.ErrConflict if it has other bytes.
func findCommand(ctx context.Context, t *tx, c *mdm.Command) (found bool, err error) {
	var raw []byte
	err = t.QueryRow(ctx, "SELECT command FROM nano_commands WHERE command_uuid = ?"+t.Dialect.ForShare(), c.CommandUUID).Scan(&raw)
	if errors.Is(err, sql.ErrNoRows) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("reading a command: %w", err)
	}
	if raw, err = t.opened(commandColumn, c.CommandUUID, raw); err != nil {
		return false, err
	}
	if !bytes.Equal(raw, c.Raw) {
		return true, storage.ErrConflict
	}
	return true, nil
}

// putCommand stores a command. Another transaction may have inserted it
// meanwhile, and a third one removed it.
func putCommand(ctx context.Context, t *tx, c *mdm.Command) error {
	for {
		err := t.Upsert(ctx, "nano_commands", []string{"command_uuid", "request_type", "command", "created_at"}, []string{"command_uuid"}, nil,
			[]any{c.CommandUUID, c.RequestType, t.sealedCommand(c.CommandUUID, notNil(c.Raw)), t.Now})
		if err != nil {
			return fmt.Errorf("storing a command: %w", err)
		}
		if found, err := findCommand(ctx, t, c); found || err != nil {
			return err
		}
	}
}

// supersede ends waiting rows with the key.
func supersede(ctx context.Context, t *tx, key string, ids []string) error {
	if key == "" {
		return nil
	}
	is, args := t.Among(ids)
	old, err := queueKeys(ctx, t, fmt.Sprintf(`SELECT id, command_uuid FROM nano_enrollment_queue%s
WHERE supersede_key = ? AND state IN (%d, %d, %d) AND id `, t.Dialect.Index("nano_enrollment_queue_next"), storage.Scheduled, storage.Queued, storage.NotNow)+
		is+" ORDER BY command_uuid, id"+t.Dialect.ForUpdate(), append([]any{key}, args...)...)
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

// insertItems inserts queue rows after the last numbers and raises numbers and
// pushes owed. A scheduled row takes a number, too: it orders rows with the
// same not-before time.
func insertItems(ctx context.Context, t *tx, e *storage.Enqueue, ids []string, last map[string]int64) error {
	cols := []string{"id", "seq", "command_uuid", "priority", "state", "created_at"}
	same := []any{e.Command.CommandUUID, e.Priority, int(storage.Queued), t.Now}
	scheduled := micros(e.NotBefore) > t.Now
	if scheduled {
		same[2] = int(storage.Scheduled)
		cols, same = append(cols, "not_before"), append(same, micros(e.NotBefore))
	}
	if !e.ExpiresAt.IsZero() {
		cols, same = append(cols, "expires_at"), append(same, micros(e.ExpiresAt))
	}
	if e.SupersedeKey != "" {
		cols, same = append(cols, "supersede_key"), append(same, e.SupersedeKey)
	}
	items := make([]any, 0, len(cols)*len(ids))
	for _, id := range ids {
		items = append(append(items, id, last[id]+1), same...)
	}
	if err := t.Insert(ctx, "nano_enrollment_queue", cols, items); err != nil {
		return fmt.Errorf("storing queue rows: %w", err)
	}
	set, args := takeNumber, []any(nil)
	if !scheduled && !e.NoPush {
		set = owePushBy
		at := t.Now + firstPush.Microseconds()
		args = append(args, at, at)
	}
	q, idArgs := t.UpdateLockedText("nano_enrollment_push", set, ids)
	if _, err := t.Exec(ctx, q, append(args, idArgs...)...); err != nil {
		return fmt.Errorf("owing pushes: %w", err)
	}
	return nil
}
