package sqlstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// poll answers a batch of operations that only read: with one statement if no
// commands wait for them, else with two. Their events report no change and are
// written with the activity.
func (s *Store) poll(ctx context.Context, batch []*opRun) error {
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		for _, p := range batch {
			p.reset()
		}
		return pollBatch(ctx, t, batch)
	})
	if err != nil {
		return err
	}
	for _, p := range batch {
		if !p.mustWrite {
			s.visited(p)
			s.act.addEvents(outgoing([]*opRun{p}))
		}
	}
	return nil
}

func pollBatch(ctx context.Context, t *tx, batch []*opRun) error {
	of := make([]keyPair, len(batch))
	for i, p := range batch {
		of[i].ID = p.id()
	}
	states, err := readStates(ctx, t, of)
	if err != nil {
		return err
	}
	if err := checkPolls(ctx, t, batch, states); err != nil {
		return err
	}
	for _, p := range batch {
		if p.err == nil && !p.mustWrite && states[p.id()] != nil {
			p.visit(t.Now)
		}
	}
	for _, kind := range opKinds {
		some := slices.DeleteFunc(ofKind(batch, kind), func(p *opRun) bool { return p.mustWrite })
		if kind.poll != nil && len(some) > 0 {
			if err := kind.poll(ctx, t, some, states); err != nil {
				return err
			}
		}
	}
	return nil
}

// checkPolls checks the certificates of polls. For most the columns that were
// read with the enrollment suffice.
func checkPolls(ctx context.Context, t *tx, batch []*opRun, states map[string]*enrollmentState) error {
	odd := unsettled(batch, states)
	if len(odd) == 0 {
		return nil
	}
	certs, err := readCertificates(ctx, t, odd)
	if err != nil {
		return err
	}
	for _, p := range odd {
		p.mustWrite, p.err = certs.checkCertificate(p, t.Now)
	}
	return nil
}

// unsettled returns the operations whose certificate is not the live one of
// their enrollment.
func unsettled(batch []*opRun, states map[string]*enrollmentState) []*opRun {
	var odd []*opRun
	for _, p := range batch {
		state := states[p.id()]
		if h := p.hash(); p.src.Pin != nil && (state == nil || h == "" || h != state.pinned) {
			odd = append(odd, p)
		}
	}
	return odd
}

// offer gives each report its next command and plans the next push in case the
// device falls silent.
func offer(ctx context.Context, t *tx, reports []*opRun, states map[string]*enrollmentState) error {
	var both []keyPair
	for _, p := range reports {
		state := states[p.id()]
		if state == nil || !state.active {
			continue
		}
		p.note.settle(t.Now, state)
		if idle(p) && state.queued.Valid && state.notnow.Valid {
			both = append(both, keyPair{ID: state.id, Item: state.queued.V}, keyPair{ID: state.id, Item: state.notnow.V})
		}
	}
	places, err := readPlaces(ctx, t, both)
	if err != nil {
		return err
	}
	due := make(map[*opRun]string)
	for _, p := range reports {
		state := states[p.id()]
		if state == nil || !state.active {
			continue
		}
		switch {
		case idle(p) && state.notnow.Valid && (!state.queued.Valid ||
			places[keyPair{ID: state.id, Item: state.notnow.V}].before(places[keyPair{ID: state.id, Item: state.queued.V}])):
			due[p] = state.notnow.V
		case state.queued.Valid:
			due[p] = state.queued.V
		}
		if uuid, ok := due[p]; ok {
			p.note.offered, p.note.offers, p.note.offeredAt = uuid, 1, t.Now
		}
	}
	return readCommands(ctx, t, due)
}

// idle says whether the operation begins a conversation, which offers refused
// commands again.
func idle(p *opRun) bool {
	return p.op.(*storage.Report).Status == mdm.StatusIdle
}

// settle notes that a poll pays the pushes owed so far, and plans the next
// push: none if no command waits, else one in case the device falls silent.
func (a *activity) settle(now int64, state *enrollmentState) {
	switch {
	case state.queued.Valid || state.notnow.Valid:
		a.setPushAt, a.pushAt = true, now+silenceTimeout.Microseconds()
		early := a.pushAt - state.pushAt.V
		a.planned = state.paid >= state.owed && 0 <= early && early <= silenceSlack.Microseconds()
	case state.pushAt.Valid:
		a.setPushAt, a.pushAt = true, 0
	}
	if a.setPushAt || state.paid < state.owed {
		a.paid = state.owed
	}
}

// place is the place of a row in its enrollment's queue.
type place struct{ priority, seq int64 }

func (p place) before(q place) bool {
	return p.priority > q.priority || p.priority == q.priority && p.seq < q.seq
}

func readPlaces(ctx context.Context, t *tx, keys []keyPair) (map[keyPair]place, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	where, args := queueRows.Among(t.Tx, keys)
	places := make(map[keyPair]place, len(keys))
	err := t.Query(ctx, "SELECT id, command_uuid, priority, seq FROM nano_enrollment_queue"+t.Dialect.Index("PRIMARY")+" WHERE "+where, args...).Each(func(row sqldb.Row) error {
		var k keyPair
		var at place
		if err := row.Scan(&k.ID, &k.Item, &at.priority, &at.seq); err != nil {
			return err
		}
		places[k] = at
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading queue rows: %w", err)
	}
	return places, nil
}

// readCommands reads the commands that are due, each once.
func readCommands(ctx context.Context, t *tx, due map[*opRun]string) error {
	if len(due) == 0 {
		return nil
	}
	commands := make(map[string]*mdm.Command, len(due))
	unreadable := make(map[string]error)
	var uuids []string
	for _, uuid := range due {
		if _, ok := commands[uuid]; !ok {
			commands[uuid] = nil
			uuids = append(uuids, uuid)
		}
	}
	is, args := t.Among(uuids)
	err := t.Query(ctx, "SELECT command_uuid, request_type, command FROM nano_commands WHERE command_uuid "+is, args...).Each(func(row sqldb.Row) error {
		c := new(mdm.Command)
		if err := row.Scan(&c.CommandUUID, &c.RequestType, &c.Raw); err != nil {
			return err
		}
		var err error
		if c.Raw, err = t.opened(commandColumn, c.CommandUUID, c.Raw); err != nil {
			unreadable[c.CommandUUID] = err
		}
		commands[c.CommandUUID] = c
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading commands: %w", err)
	}
	for p, uuid := range due {
		p.out.Command, p.err = commands[uuid], unreadable[uuid]
	}
	return nil
}
