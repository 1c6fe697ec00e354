package sqlstore

import (
	"bytes"
	"context"
	"fmt"
	"hash/maphash"
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
	// enqueueShares is how many such transactions run beside each other, and
	// sharedFrom how many enrollments a call has that is part of all of them.
	enqueueShares = 2
	sharedFrom    = 64
)

var shareSeed = maphash.MakeSeed()

// enqueueCall is a call for some enrollments in a batch of calls. It needs no
// record of its progress and replaces nothing: see Store.Enqueue.
type enqueueCall struct {
	scope    storage.Scope
	e        *storage.Enqueue
	ids      []string // sorted
	failed   map[string]error
	conflict error
	eligible []*gatheredRow
}

// command is the call's.
func (c *enqueueCall) command() *mdm.Command { return c.e.Command }

// gatheredRow is an enrollment that a batch of calls names.
type gatheredRow struct {
	id       string
	locked   bool  // it has a push row
	last     int64 // number of its queue
	enrolled bool
	topic    string
	taken    numbering // by the calls so far
}

// numbering is what a batch of calls does to a push row.
type numbering struct {
	numbers int  // that they take
	owed    bool // a push is owed for the last one
}

// gather returns the enrollments of calls in key order, and by their ids.
func gather(calls []*enqueueCall) (ids []string, rows map[string]*gatheredRow) {
	rows = make(map[string]*gatheredRow, len(calls[0].ids))
	for _, c := range calls {
		for _, id := range c.ids {
			if rows[id] == nil {
				rows[id] = &gatheredRow{id: id}
				ids = append(ids, id)
			}
		}
	}
	slices.Sort(ids)
	return ids, rows
}

// startEnqueues makes the batchers of Enqueue, one for each share of the
// enrollments: a second batch in flight for the same ones would wait for the push
// rows of the first. With one batch in flight, the database uses one processor.
func (s *Store) startEnqueues() {
	_, _, shares := s.db.Parallel()
	cfg := batchConfig{inFlight: 1, rows: gatheredCalls, bytes: gatheredRows, waiting: waitingCalls, hopeless: hopeless}
	for range min(shares, enqueueShares) {
		s.enqueues = append(s.enqueues, newBatcher(cfg, func(ctx context.Context, calls []*enqueueCall) error {
			return s.write(ctx, func(ctx context.Context, t *tx) error { return enqueueCalls(ctx, t, calls) })
		}))
	}
}

// shares divides sorted ids among the batchers. Few ids are one share.
func (s *Store) shares(ids []string) [][]string {
	shareOf := func(id string) int { return int(maphash.String(shareSeed, id) % uint64(len(s.enqueues))) }
	shares := make([][]string, len(s.enqueues))
	if len(ids) < sharedFrom {
		shares[shareOf(ids[0])] = ids
		return shares
	}
	for _, id := range ids {
		i := shareOf(id)
		shares[i] = append(shares[i], id)
	}
	return shares
}

// enqueueCalls carries calls out in one transaction. A call whose command
// conflicts with another one fails by itself.
func enqueueCalls(ctx context.Context, t *tx, calls []*enqueueCall) error {
	for _, c := range calls {
		c.failed, c.conflict, c.eligible = make(map[string]error), nil, nil
	}
	ids, rows := gather(calls)
	if err := lockRows(ctx, t, ids, rows); err != nil {
		return err
	}
	stored, err := findCommands(ctx, t, calls)
	if err != nil {
		return err
	}
	if err := readEnrolled(ctx, t, ids, rows); err != nil {
		return err
	}
	if err := chooseEligible(ctx, t, calls, rows, stored); err != nil {
		return err
	}
	if err := insertCalls(ctx, t, calls); err != nil {
		return err
	}
	if err := raiseNumbers(ctx, t, ids, rows); err != nil {
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

// lockRows locks push rows and reads the last number of each queue.
func lockRows(ctx context.Context, t *tx, ids []string, rows map[string]*gatheredRow) error {
	err := t.QueryLocked(ctx, "id, last_seq", "nano_enrollment_push", ids).Each(func(row sqldb.Row) error {
		var id string
		var last int64
		if err := row.Scan(&id, &last); err != nil {
			return err
		}
		rows[id].locked, rows[id].last = true, last
		return nil
	})
	if err != nil {
		return fmt.Errorf("locking push rows: %w", err)
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

// readEnrolled reads which enrollments are enabled, with their topics.
func readEnrolled(ctx context.Context, t *tx, ids []string, rows map[string]*gatheredRow) error {
	q, args := t.enrolledText(ids, "")
	err := t.Query(ctx, q, args...).Each(func(row sqldb.Row) error {
		var id, topic string
		var enabled bool
		var none any
		if err := row.Scan(&id, &enabled, &topic, &none); err != nil {
			return err
		}
		rows[id].enrolled, rows[id].topic = enabled, topic
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading enrollments: %w", err)
	}
	return nil
}

// chooseEligible says which enrollments of each call get its command: those that
// are enrolled, that the caller may see, and that do not have it.
func chooseEligible(ctx context.Context, t *tx, calls []*enqueueCall, rows map[string]*gatheredRow, stored map[string]bool) error {
	uses := make(map[string]int, len(calls))
	for _, c := range calls {
		uses[c.command().CommandUUID]++
	}
	given := make(map[keyPair]bool) // by the calls before, of commands that several calls have
	for _, c := range calls {
		uuid := c.command().CommandUUID
		var has map[string]bool
		if stored[uuid] {
			var err error
			if has, err = enrolledAmong(ctx, t, c.scope, c.ids, uuid); err != nil {
				return err
			}
		}
		for _, id := range c.ids {
			row, pair := rows[id], keyPair{ID: id, Item: uuid}
			switch {
			case !row.locked || !row.enrolled || len(c.scope.Topics) > 0 && !slices.Contains(c.scope.Topics, row.topic):
				c.failed[id] = storage.ErrNotEnrolled
			case c.conflict == nil && !has[id] && (uses[uuid] == 1 || !given[pair]):
				c.eligible = append(c.eligible, row)
				if uses[uuid] > 1 {
					given[pair] = true
				}
			}
		}
		if len(c.failed) == len(c.ids) {
			c.conflict = nil // nobody would have got it
		}
	}
	return nil
}

// insertCalls inserts the queue rows of calls behind the last numbers, in order of
// the calls. Columns that have their default in all rows are left out.
func insertCalls(ctx context.Context, t *tx, calls []*enqueueCall) error {
	cols := []string{"id", "seq", "command_uuid", "state", "created_at"}
	some := func(has func(e *storage.Enqueue) bool) bool {
		return slices.ContainsFunc(calls, func(c *enqueueCall) bool { return has(c.e) })
	}
	priorities := some(func(e *storage.Enqueue) bool { return e.Priority != 0 })
	times := some(func(e *storage.Enqueue) bool { return micros(e.NotBefore) > t.Now || !e.ExpiresAt.IsZero() })
	if priorities {
		cols = append(cols, "priority")
	}
	if times {
		cols = append(cols, "not_before", "expires_at")
	}
	var items []any
	for _, c := range calls {
		state, notBefore, expires := int(storage.Queued), any(nil), any(nil)
		if at := micros(c.e.NotBefore); at > t.Now {
			state, notBefore = int(storage.Scheduled), at
		}
		if !c.e.ExpiresAt.IsZero() {
			expires = micros(c.e.ExpiresAt)
		}
		same := []any{c.command().CommandUUID, state, t.Now}
		if priorities {
			same = append(same, c.e.Priority)
		}
		if times {
			same = append(same, notBefore, expires)
		}
		for _, row := range c.eligible {
			row.taken.numbers++
			row.taken.owed = row.taken.owed || state == int(storage.Queued) && !c.e.NoPush
			items = append(append(items, row.id, row.last+int64(row.taken.numbers)), same...)
		}
	}
	if len(items) == 0 {
		return nil
	}
	if err := t.Insert(ctx, "nano_enrollment_queue", cols, items); err != nil {
		return fmt.Errorf("storing queue rows: %w", err)
	}
	return nil
}

// raiseNumbers raises the numbers that calls took, and the pushes owed.
func raiseNumbers(ctx context.Context, t *tx, ids []string, rows map[string]*gatheredRow) error {
	alike := make(map[numbering][]string)
	for _, id := range ids {
		if taken := rows[id].taken; taken.numbers > 0 {
			alike[taken] = append(alike[taken], id)
		}
	}
	for taken, ids := range alike {
		set, args := takeNumbers, []any{taken.numbers}
		if taken.owed {
			at := t.Now + firstPush.Microseconds()
			set, args = oweNumbersBy, []any{taken.numbers, at, at, taken.numbers}
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
