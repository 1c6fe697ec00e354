package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var reportKind = opKind{
	op:    (*storage.Report)(nil),
	size:  of(func(o *storage.Report) int { return len(o.Raw) }),
	reads: of(func(o *storage.Report) bool { return o.Status == mdm.StatusIdle }),
	poll:  pollReports,
	round: takeReports,
}

// terminalState returns the state of a row that a terminal status has ended.
func terminalState(s mdm.Status) storage.State {
	switch s {
	case mdm.StatusAcknowledged:
		return storage.Acknowledged
	case mdm.StatusError, mdm.StatusUnreadable:
		return storage.Failed
	}
	return storage.FormatError
}

// takeReports stores the results of a round and answers with the next commands.
func takeReports(ctx context.Context, t *tx, reports []*opRun) error {
	of := make([]keyPair, len(reports))
	var keys []keyPair
	told := false
	for i, p := range reports {
		of[i].ID = p.id()
		if k, ok := reportedKey(p); ok {
			of[i] = k
			keys = append(keys, k)
			told = told || len(p.src.Events) > 0
		}
	}
	refused, err := readRefused(ctx, t, reports)
	if err != nil {
		return err
	}
	keys = append(keys, refused...)
	rows := make(map[keyPair]queueRow, len(keys))
	states := make(map[string]*enrollmentState, len(of))
	ask, err := statesQuery(t, of, states)
	if err != nil {
		return err
	}
	queries := []sqldb.BatchQuery{ask}
	if len(keys) > 0 { // what is read of the others is as of when these are locked
		queries = []sqldb.BatchQuery{lockQuery(t, keys, told, rows), ask}
	}
	if err := t.QueryBatch(ctx, queries...); err != nil {
		return err
	}
	if err := t.checkSkippedRows(ctx, keys, rows); err != nil {
		return err
	}
	if err := admitReports(ctx, t, reports, states); err != nil {
		return err
	}
	admitted := slices.DeleteFunc(slices.Clone(reports), func(p *opRun) bool { return p.err != nil })
	changes, err := planReports(ctx, t, admitted, rows, states)
	if err != nil {
		return err
	}
	changes.reopen(refused)
	if changes.inventory, err = planInventory(ctx, t, changes.ended); err != nil {
		return err
	}
	if err := answer(ctx, t, admitted, states); err != nil {
		return err
	}
	return changes.store(ctx, t) // after all that is read; see later
}

// reportedKey returns the key of the row that a report may change, if it names
// one.
func reportedKey(p *opRun) (keyPair, bool) {
	r := p.op.(*storage.Report)
	if !r.Status.Terminal() && r.Status != mdm.StatusNotNow {
		return keyPair{}, false
	}
	return keyPair{ID: p.id(), Item: r.CommandUUID}, storable(r.CommandUUID)
}

// queueRow is a row that a report may change.
type queueRow struct {
	state       storage.State
	requestType string // read for events alone
}

// lockedRowsText locks and reads queue rows.
func (t *tx) lockedRowsText(keys []keyPair, told bool) (q string, args []any) {
	columns := "id, command_uuid, state, NULL"
	if told {
		columns = "id, command_uuid, state, (SELECT c.request_type FROM nano_commands c WHERE c.command_uuid = q.command_uuid)"
	}
	return queueRows.LockText(t.Tx, columns, keys, "")
}

// lockQueueRows locks rows in key order and reads them. There must be one.
func lockQueueRows(ctx context.Context, t *tx, keys []keyPair) (map[keyPair]queueRow, error) {
	found := make(map[keyPair]queueRow, len(keys))
	return found, t.QueryBatch(ctx, lockQuery(t, keys, false, found))
}

// lockQuery locks rows in key order and reads them, with the columns for events
// if there are any.
func lockQuery(t *tx, keys []keyPair, told bool, into map[keyPair]queueRow) sqldb.BatchQuery {
	read := func(row sqldb.Row) error {
		var k keyPair
		var q queueRow
		var requestType sql.Null[string]
		if err := row.Scan(&k.ID, &k.Item, &q.state, &requestType); err != nil {
			return err
		}
		q.requestType = requestType.V
		into[k] = q
		return nil
	}
	text, args := t.lockedRowsText(keys, told)
	return sqldb.BatchQuery{Action: "locking queue rows", Text: text, Args: args, Read: read}
}

// maxRefused bounds the rows that one round makes eligible again. Rows beyond
// it wait for the next Idle.
const maxRefused = 1000

// readRefused returns the rows that the idle enrollments of a round refused in
// earlier conversations. Idle begins a conversation, in which they are eligible
// again, in their old places.
func readRefused(ctx context.Context, t *tx, reports []*opRun) ([]keyPair, error) {
	var ids []string
	for _, p := range reports {
		if idle(p) {
			ids = append(ids, p.id())
		}
	}
	if len(ids) == 0 {
		return nil, nil
	}
	is, args := t.Among(ids)
	keys, err := sqldb.Collect(t.Query(ctx, fmt.Sprintf("SELECT id, command_uuid FROM nano_enrollment_queue%s WHERE state = %d AND id %s LIMIT %d",
		t.Dialect.Index("nano_enrollment_queue_next"), storage.NotNow, is, maxRefused), args...), func(row sqldb.Row, k *keyPair) error {
		return row.Scan(&k.ID, &k.Item)
	})
	if err != nil {
		return nil, fmt.Errorf("reading refused queue rows: %w", err)
	}
	return keys, nil
}

// pollReports answers polls. An enrollment that has refused rows begins a
// conversation with a write.
func pollReports(ctx context.Context, t *tx, reports []*opRun, states map[string]*enrollmentState) error {
	for _, p := range reports {
		if state := states[p.id()]; state != nil && state.active && state.notnow.Valid && p.err == nil {
			p.mustWrite = true
		}
	}
	return offer(ctx, t, slices.DeleteFunc(slices.Clone(reports), func(p *opRun) bool { return p.mustWrite }), states)
}

// admitReports checks the certificates of reports. For most the columns that
// were read with the enrollment suffice.
func admitReports(ctx context.Context, t *tx, reports []*opRun, states map[string]*enrollmentState) error {
	_, err := admit(ctx, t, unsettled(reports, states))
	return err
}

// reported are the changes of reports.
type reported struct {
	rows    map[keyPair]queueRow // as they were
	results []*opRun
	moves   map[storage.State][]keyPair
	// ended are the reports that end their rows.
	ended     []*opRun
	inventory *inventoryPlan
}

// planReports returns the changes of reports: results are stored and end their
// rows, NotNow puts rows off. A repeated or late report changes no state.
func planReports(ctx context.Context, t *tx, reports []*opRun, rows map[keyPair]queueRow, states map[string]*enrollmentState) (*reported, error) {
	moves := make(map[storage.State][]keyPair)
	var results, ended, late []*opRun
	for _, p := range reports {
		r := p.op.(*storage.Report)
		if state := states[p.id()]; state != nil {
			p.facts.topic = state.topic
		}
		k, ok := reportedKey(p)
		row, found := rows[k]
		if !ok || !found {
			continue
		}
		state := row.state
		p.facts.requestType = row.requestType
		switch {
		case r.Status == mdm.StatusNotNow:
			if state == storage.Queued || state == storage.NotNow {
				moves[storage.NotNow] = append(moves[storage.NotNow], k)
				if state := states[k.ID]; state != nil && !state.notnow.Valid { // it was read without this one
					state.notnow = sql.Null[string]{V: k.Item, Valid: true}
				}
			}
		case !state.Terminal():
			to := terminalState(r.Status)
			moves[to] = append(moves[to], k)
			results, ended = append(results, p), append(ended, p)
		case state == storage.Cancelled || state == storage.Expired || state == storage.Superseded:
			late = append(late, p)
		default:
			p.facts.repeated = state == terminalState(r.Status)
		}
	}
	stored, err := storedResults(ctx, t, late)
	if err != nil {
		return nil, err
	}
	for _, p := range late {
		r := p.op.(*storage.Report)
		if status, ok := stored[keyPair{ID: p.id(), Item: r.CommandUUID}]; ok {
			p.facts.repeated = status == string(r.Status)
		} else {
			results = append(results, p)
		}
	}
	for _, p := range results {
		p.facts.result = true
	}
	return &reported{rows: rows, results: results, moves: moves, ended: ended}, nil
}

// reopen makes refused rows eligible again, except rows that this round refuses
// or ends.
func (r *reported) reopen(refused []keyPair) {
	for _, k := range refused {
		if r.rows[k].state == storage.NotNow && !r.moved(k) {
			r.moves[storage.Queued] = append(r.moves[storage.Queued], k)
		}
	}
}

func (r *reported) moved(k keyPair) bool {
	for _, keys := range r.moves {
		if slices.Contains(keys, k) {
			return true
		}
	}
	return false
}

func (r *reported) store(ctx context.Context, t *tx) error {
	if err := insertResults(ctx, t, r.results, r.rows); err != nil {
		return err
	}
	for _, to := range []storage.State{storage.Queued, storage.NotNow, storage.Acknowledged, storage.Failed, storage.FormatError} {
		if err := moveTo(ctx, t, to, r.moves[to]); err != nil {
			return err
		}
	}
	return r.inventory.store(ctx, t)
}

// moveTo moves rows that the transaction has locked.
func moveTo(ctx context.Context, t *tx, to storage.State, keys []keyPair) error {
	if len(keys) == 0 {
		return nil
	}
	set, values := "state = ?, finished_at = ?, not_before = NULL", []any{int(to), t.Now}
	switch to {
	case storage.Queued:
		set, values = "state = ?", []any{int(to)}
	case storage.NotNow:
		set = "state = ?, notnow_at = ?, notnow_count = notnow_count + 1"
	}
	q, args := queueRows.UpdateLockedText(t.Tx, set, keys)
	if err := t.ExecDeferred(ctx, q, append(values, args...)...); err != nil {
		return fmt.Errorf("moving queue rows to %s: %w", to, err)
	}
	return nil
}

// storedResults reads the statuses of the existing results.
func storedResults(ctx context.Context, t *tx, reports []*opRun) (map[keyPair]string, error) {
	if len(reports) == 0 {
		return nil, nil
	}
	keys := make([]keyPair, len(reports))
	for i, p := range reports {
		keys[i], _ = reportedKey(p)
	}
	where, args := queueRows.Among(t.Tx, keys)
	stored := make(map[keyPair]string)
	err := t.Query(ctx, "SELECT id, command_uuid, status FROM nano_command_results"+t.Dialect.Index("PRIMARY")+" WHERE "+where, args...).Each(func(row sqldb.Row) error {
		var k keyPair
		var status string
		if err := row.Scan(&k.ID, &k.Item, &status); err != nil {
			return err
		}
		stored[k] = status
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading results: %w", err)
	}
	return stored, nil
}

func insertResults(ctx context.Context, t *tx, reports []*opRun, rows map[keyPair]queueRow) error {
	if len(reports) == 0 {
		return nil
	}
	args := make([]any, 0, 6*len(reports))
	for _, p := range reports {
		r := p.op.(*storage.Report)
		late := rows[keyPair{ID: p.id(), Item: r.CommandUUID}].state.Terminal()
		args = append(args, p.id(), r.CommandUUID, string(r.Status), notNil(r.Raw), late, t.Now)
	}
	err := t.Upsert(ctx, "nano_command_results",
		[]string{"id", "command_uuid", "status", "result", "late", "created_at"},
		[]string{"id", "command_uuid"}, nil, args)
	if err != nil {
		return fmt.Errorf("storing results: %w", err)
	}
	return nil
}

// answer gives the reports their next commands, other than the reported ones.
// It makes a push owed to devices that would not come back for the commands
// that they refused.
func answer(ctx context.Context, t *tx, reports []*opRun, states map[string]*enrollmentState) error {
	var owed []string
	for _, p := range reports {
		state := states[p.id()]
		if state == nil {
			continue
		}
		p.seen, p.note = true, activity{id: state.id, seen: t.Now}
		if !state.active || state.queued.Valid || !state.notnow.Valid {
			continue
		}
		// A device polls again by itself only if its last report was NotNow.
		if r := p.op.(*storage.Report); r.Status != mdm.StatusNotNow && r.Status != mdm.StatusIdle {
			owed = append(owed, state.id)
		}
	}
	if err := offer(ctx, t, reports, states); err != nil {
		return err
	}
	for _, p := range reports {
		if slices.Contains(owed, p.id()) {
			p.note.setPushAt = false
		}
	}
	return owePushes(ctx, t, owed)
}

// owePushes makes a push owed at once.
func owePushes(ctx context.Context, t *tx, ids []string) error {
	if len(ids) == 0 {
		return nil
	}
	if _, err := lock(ctx, t, "nano_enrollment_push", ids); err != nil {
		return err
	}
	is, args := t.Among(ids)
	err := t.ExecDeferred(ctx, "UPDATE nano_enrollment_push SET "+owePushAt+" WHERE id "+is, append([]any{t.Now}, args...)...)
	if err != nil {
		return fmt.Errorf("owing pushes: %w", err)
	}
	return nil
}
