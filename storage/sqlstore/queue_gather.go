package sqlstore

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// Calls that queue commands for the same enrollments wait for each other's push
// rows, and each of them waits for its commit. So calls that arrive while others
// run are carried out together, in order of arrival: the push rows are locked and
// written once for all of them. A lone call waits for nobody.

const (
	// gatheredCalls and gatheredRows bound the calls of one transaction, and the
	// enrollments that they name together.
	gatheredCalls = 64
	gatheredRows  = 4000
	// waitingCalls bounds the calls that wait; more are storage.ErrBusy.
	waitingCalls = 4096
)

// enqueueCall is a call for some enrollments in a batch of calls. It needs no
// record of its progress and replaces nothing: see Store.Enqueue.
type enqueueCall struct {
	scope    storage.Scope
	e        *storage.Enqueue
	ids      []string // sorted
	failed   map[string]error
	conflict error
	eligible []string
}

// command is the call's.
func (c *enqueueCall) command() *mdm.Command { return c.e.Command }

// startEnqueues makes the batcher of Enqueue. A second batch in flight would
// wait for the push rows of the first one.
func (s *Store) startEnqueues() {
	cfg := batchConfig{inFlight: 1, rows: gatheredCalls, bytes: gatheredRows, waiting: waitingCalls, hopeless: hopeless}
	s.enqueues = newBatcher(cfg, func(ctx context.Context, calls []*enqueueCall) error {
		return s.write(ctx, func(ctx context.Context, t *tx) error { return enqueueCalls(ctx, t, calls) })
	})
}

// enqueueCalls carries calls out in one transaction. A call whose command
// conflicts with another one fails by itself.
func enqueueCalls(ctx context.Context, t *tx, calls []*enqueueCall) error {
	var ids []string
	for _, c := range calls {
		c.failed, c.conflict, c.eligible = make(map[string]error), nil, nil
		ids = append(ids, c.ids...)
	}
	slices.Sort(ids)
	ids = slices.Compact(ids)
	numbers, err := lockNumbers(ctx, t, ids)
	if err != nil {
		return err
	}
	stored, err := findCommands(ctx, t, calls)
	if err != nil {
		return err
	}
	if err := chooseEligible(ctx, t, calls, ids, numbers, stored); err != nil {
		return err
	}
	if err := insertCalls(ctx, t, calls, numbers); err != nil {
		return err
	}
	if err := putCommands(ctx, t, calls, stored); err != nil {
		return err
	}
	for _, c := range calls {
		if c.conflict == nil && c.e.Audit != nil {
			if err := audit(ctx, t, c.e.Audit); err != nil {
				return fmt.Errorf("appending an audit record: %w", err)
			}
		}
	}
	return nil
}

// findCommands returns the commands of calls that are stored, and keeps them
// until the transaction ends. A call whose command is stored with other bytes
// conflicts. If two calls have one CommandUUID and other bytes, the calls are
// carried out one by one.
func findCommands(ctx context.Context, t *tx, calls []*enqueueCall) (stored map[string]bool, err error) {
	bytesOf, stored := make(map[string][]byte), make(map[string]bool)
	err = keepCommands(ctx, t, calls, func(uuid string, raw []byte) {
		bytesOf[uuid], stored[uuid] = raw, true
	})
	if err != nil {
		return nil, err
	}
	for _, c := range calls {
		uuid := c.command().CommandUUID
		raw, known := bytesOf[uuid]
		switch {
		case !known:
			bytesOf[uuid] = c.command().Raw
		case bytes.Equal(raw, c.command().Raw):
		case stored[uuid]:
			c.conflict = storage.ErrConflict
		default:
			return nil, storage.ErrConflict
		}
	}
	return stored, nil
}

// keepCommands reads those commands of calls that are stored, and locks them
// against removal.
func keepCommands(ctx context.Context, t *tx, calls []*enqueueCall, read func(uuid string, raw []byte)) error {
	uuids := make([]string, len(calls))
	for i, c := range calls {
		uuids[i] = c.command().CommandUUID
	}
	slices.Sort(uuids)
	is, args := t.Among(slices.Compact(uuids))
	q := "SELECT command_uuid, command FROM nano_commands WHERE command_uuid " + is + " ORDER BY command_uuid" + t.Dialect.ForShare()
	err := t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		var uuid string
		var raw []byte
		if err := row.Scan(&uuid, &raw); err != nil {
			return err
		}
		raw, err := t.opened(commandColumn, uuid, raw)
		if err == nil {
			read(uuid, raw)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("reading commands: %w", err)
	}
	return nil
}

// chooseEligible says which enrollments of each call get its command: those that
// are enrolled, that the caller may see, and that do not have it.
func chooseEligible(ctx context.Context, t *tx, calls []*enqueueCall, ids []string, numbers map[string]int64, stored map[string]bool) error {
	topics, err := enrolledTopics(ctx, t, ids)
	if err != nil {
		return err
	}
	given := make(map[keyPair]bool) // by the calls before
	for _, c := range calls {
		uuid := c.command().CommandUUID
		var has map[string]bool
		if stored[uuid] {
			if has, err = enrolledAmong(ctx, t, c.scope, c.ids, uuid); err != nil {
				return err
			}
		}
		for _, id := range c.ids {
			_, known := numbers[id]
			topic, enrolled := topics[id]
			switch {
			case !known || !enrolled || len(c.scope.Topics) > 0 && !slices.Contains(c.scope.Topics, topic):
				c.failed[id] = storage.ErrNotEnrolled
			case c.conflict == nil && !has[id] && !given[keyPair{ID: id, Item: uuid}]:
				given[keyPair{ID: id, Item: uuid}] = true
				c.eligible = append(c.eligible, id)
			}
		}
		if len(c.failed) == len(c.ids) {
			c.conflict = nil // nobody would have got it
		}
	}
	return nil
}

// enrolledTopics returns the enabled enrollments among ids, with their topics.
func enrolledTopics(ctx context.Context, t *tx, ids []string) (map[string]string, error) {
	q, args := t.enrolledText(ids, "")
	topics := make(map[string]string, len(ids))
	err := t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		var id, topic string
		var enabled bool
		var none any
		if err := row.Scan(&id, &enabled, &topic, &none); err != nil {
			return err
		}
		if enabled {
			topics[id] = topic
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading enrollments: %w", err)
	}
	return topics, nil
}

// numbering is what calls do to a push row together.
type numbering struct {
	numbers int  // that they take
	owed    bool // a push is owed for the last one
}

// insertCalls inserts the queue rows of calls behind the last numbers, in order of
// the calls, and raises numbers and pushes owed.
func insertCalls(ctx context.Context, t *tx, calls []*enqueueCall, last map[string]int64) error {
	cols := []string{"id", "seq", "command_uuid", "priority", "state", "created_at", "not_before", "expires_at"}
	var items []any
	taken := make(map[string]numbering)
	for _, c := range calls {
		state, notBefore, expires := int(storage.Queued), any(nil), any(nil)
		if at := micros(c.e.NotBefore); at > t.Now {
			state, notBefore = int(storage.Scheduled), at
		}
		if !c.e.ExpiresAt.IsZero() {
			expires = micros(c.e.ExpiresAt)
		}
		for _, id := range c.eligible {
			n := taken[id]
			n.numbers++
			n.owed = n.owed || state == int(storage.Queued) && !c.e.NoPush
			taken[id] = n
			items = append(items, id, last[id]+int64(n.numbers), c.command().CommandUUID, c.e.Priority, state, t.Now, notBefore, expires)
		}
	}
	if len(items) == 0 {
		return nil
	}
	if err := t.Insert(ctx, "nano_enrollment_queue", cols, items); err != nil {
		return fmt.Errorf("storing queue rows: %w", err)
	}
	alike := make(map[numbering][]string)
	for _, id := range slices.Sorted(maps.Keys(taken)) {
		alike[taken[id]] = append(alike[taken[id]], id)
	}
	for n, ids := range alike {
		set, args := takeNumbers, []any{n.numbers}
		if n.owed {
			at := t.Now + firstPush.Microseconds()
			set, args = oweNumbersBy, []any{n.numbers, at, at, n.numbers}
		}
		q, idArgs := t.UpdateLockedText("nano_enrollment_push", set, ids)
		if _, err := t.Exec(ctx, q, append(args, idArgs...)...); err != nil {
			return fmt.Errorf("owing pushes: %w", err)
		}
	}
	return nil
}

// putCommands stores the commands of calls that queued something and found none.
// Another transaction may have stored one meanwhile, or removed that again; if
// its bytes are others, the calls are carried out one by one.
func putCommands(ctx context.Context, t *tx, calls []*enqueueCall, stored map[string]bool) error {
	missing := make(map[string]*enqueueCall)
	for _, c := range calls {
		if uuid := c.command().CommandUUID; len(c.eligible) > 0 && !stored[uuid] && missing[uuid] == nil {
			missing[uuid] = c
		}
	}
	for len(missing) > 0 {
		var args []any
		var put []*enqueueCall
		for _, uuid := range slices.Sorted(maps.Keys(missing)) {
			c := missing[uuid]
			put = append(put, c)
			args = append(args, uuid, c.command().RequestType, t.sealedCommand(uuid, notNil(c.command().Raw)), t.Now)
		}
		err := t.Upsert(ctx, "nano_commands", []string{"command_uuid", "request_type", "command", "created_at"}, []string{"command_uuid"}, nil, args)
		if err != nil {
			return fmt.Errorf("storing commands: %w", err)
		}
		var conflict error
		err = keepCommands(ctx, t, put, func(uuid string, raw []byte) {
			if !bytes.Equal(raw, missing[uuid].command().Raw) {
				conflict = storage.ErrConflict
			}
			delete(missing, uuid)
		})
		if err != nil {
			return err
		}
		if conflict != nil {
			return conflict
		}
	}
	return nil
}
