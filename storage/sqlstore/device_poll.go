package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// EnrollmentByCertificate implements storage.PinnedEnrollments.
func (s *Store) EnrollmentByCertificate(ctx context.Context, hash string) (string, error) {
	var id string
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.QueryRow(ctx, "SELECT id FROM nano_cert_auth_associations WHERE sha256 = ? AND retired_at IS NULL", hash).Scan(&id)
	})
	if errors.Is(err, sql.ErrNoRows) {
		return "", storage.ErrNotFound
	}
	if err != nil {
		return "", fmt.Errorf("looking a certificate up: %w", err)
	}
	return id, nil
}

// poll answers a batch of operations that only read: one statement when no
// command waits for any of them, two when some does. Their events report no
// change and are written with the activity.
func (s *Store) poll(ctx context.Context, batch []*pending) error {
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
			s.act.tell(outgoing([]*pending{p}))
		}
	}
	return nil
}

func pollBatch(ctx context.Context, t *tx, batch []*pending) error {
	of := make([]keyPair, len(batch))
	for i, p := range batch {
		of[i].ID = p.id()
	}
	subs, err := subjects(ctx, t, of)
	if err != nil {
		return err
	}
	if err := judgePolls(ctx, t, batch, subs); err != nil {
		return err
	}
	var reports, tokens []*pending
	for _, p := range batch {
		if p.err != nil || p.mustWrite {
			continue
		}
		switch p.op.(type) {
		case *storage.Report:
			reports = append(reports, p)
		case *storage.GetBootstrapToken:
			tokens = append(tokens, p)
		}
		if sub := subs[p.id()]; sub != nil {
			p.seen, p.note = true, activity{id: sub.id, seen: t.Now}
		}
	}
	if err := offer(ctx, t, reports, subs); err != nil {
		return err
	}
	return readBootstrapTokens(ctx, t, tokens)
}

// judgePolls checks the certificates of polls. Most are settled by what was
// read with the enrollment.
func judgePolls(ctx context.Context, t *tx, batch []*pending, subs map[string]*subject) error {
	odd := unsettled(batch, subs)
	if len(odd) == 0 {
		return nil
	}
	certs, err := readCertificates(ctx, t, odd)
	if err != nil {
		return err
	}
	for _, p := range odd {
		p.mustWrite, p.err = certs.judge(p)
	}
	return nil
}

// unsettled returns the operations whose certificate is not the live one of
// an enrollment that was read.
func unsettled(batch []*pending, subs map[string]*subject) []*pending {
	var odd []*pending
	for _, p := range batch {
		sub := subs[p.id()]
		if h := p.hash(); p.src.Pin != nil && (sub == nil || h == "" || h != sub.pinned) {
			odd = append(odd, p)
		}
	}
	return odd
}

// offer gives each report the command that is due for it and plans when the
// device is to be woken if it falls silent.
func offer(ctx context.Context, t *tx, reports []*pending, subs map[string]*subject) error {
	var both []keyPair
	for _, p := range reports {
		sub := subs[p.id()]
		if sub == nil || !sub.active {
			continue
		}
		p.note.settle(t.Now, sub)
		if idle(p) && sub.queued.Valid && sub.notnow.Valid {
			both = append(both, keyPair{ID: sub.id, Item: sub.queued.V}, keyPair{ID: sub.id, Item: sub.notnow.V})
		}
	}
	places, err := readPlaces(ctx, t, both)
	if err != nil {
		return err
	}
	due := make(map[*pending]string)
	for _, p := range reports {
		sub := subs[p.id()]
		if sub == nil || !sub.active {
			continue
		}
		switch {
		case idle(p) && sub.notnow.Valid && (!sub.queued.Valid ||
			places[keyPair{ID: sub.id, Item: sub.notnow.V}].before(places[keyPair{ID: sub.id, Item: sub.queued.V}])):
			due[p] = sub.notnow.V
		case sub.queued.Valid:
			due[p] = sub.queued.V
		}
		if uuid, ok := due[p]; ok {
			p.note.offered, p.note.offers, p.note.offeredAt = uuid, 1, t.Now
		}
	}
	return readCommands(ctx, t, due)
}

// idle says whether commands that were refused for now are offered again.
func idle(p *pending) bool {
	return p.op.(*storage.Report).Status == mdm.StatusIdle
}

// settle notes that a poll pays for the pushes owed so far, and plans the
// next one: none if nothing waits, else for when the device falls silent.
func (a *activity) settle(now int64, sub *subject) {
	switch {
	case sub.queued.Valid || sub.notnow.Valid:
		a.setPushAt, a.pushAt = true, now+firstSilence.Microseconds()
		early := a.pushAt - sub.pushAt.V
		a.planned = sub.paid >= sub.owed && 0 <= early && early <= silenceSlack.Microseconds()
	case sub.pushAt.Valid:
		a.setPushAt, a.pushAt = true, 0
	}
	if a.setPushAt || sub.paid < sub.owed {
		a.paid = sub.owed
	}
}

// place is where a row stands in its enrollment's queue.
type place struct{ priority, seq int64 }

func (p place) before(q place) bool {
	return p.priority > q.priority || p.priority == q.priority && p.seq < q.seq
}

func readPlaces(ctx context.Context, t *tx, keys []keyPair) (map[keyPair]place, error) {
	if len(keys) == 0 {
		return nil, nil
	}
	where, args := queueRows.Among(t.Tx, keys)
	rows, err := t.Query(ctx, "SELECT id, command_uuid, priority, seq FROM nano_enrollment_queue"+t.Dialect.Index("PRIMARY")+" WHERE "+where, args...)
	if err != nil {
		return nil, fmt.Errorf("reading queue rows: %w", err)
	}
	defer rows.Close()
	places := make(map[keyPair]place, len(keys))
	for rows.Next() {
		var k keyPair
		var at place
		if err := rows.Scan(&k.ID, &k.Item, &at.priority, &at.seq); err != nil {
			return nil, fmt.Errorf("reading queue rows: %w", err)
		}
		places[k] = at
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("reading queue rows: %w", err)
	}
	return places, nil
}

// readCommands reads the commands that are due, each once.
func readCommands(ctx context.Context, t *tx, due map[*pending]string) error {
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
	rows, err := t.Query(ctx, "SELECT command_uuid, request_type, command FROM nano_commands WHERE command_uuid "+is, args...)
	if err != nil {
		return fmt.Errorf("reading commands: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		c := new(mdm.Command)
		if err := rows.Scan(&c.CommandUUID, &c.RequestType, &c.Raw); err != nil {
			return fmt.Errorf("reading commands: %w", err)
		}
		if c.Raw, err = t.opened(commandColumn, c.CommandUUID, c.Raw); err != nil {
			unreadable[c.CommandUUID] = err
		}
		commands[c.CommandUUID] = c
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("reading commands: %w", err)
	}
	for p, uuid := range due {
		p.out.Command, p.err = commands[uuid], unreadable[uuid]
	}
	return nil
}

func readBootstrapTokens(ctx context.Context, t *tx, batch []*pending) error {
	if len(batch) == 0 {
		return nil
	}
	devices := make([]string, len(batch))
	for i, p := range batch {
		devices[i] = p.device
	}
	is, args := t.Among(devices)
	rows, err := t.Query(ctx, "SELECT id, bootstrap_token FROM nano_devices WHERE id "+is, args...)
	if err != nil {
		return fmt.Errorf("reading bootstrap tokens: %w", err)
	}
	defer rows.Close()
	tokens := make(map[string][]byte, len(batch))
	unreadable := make(map[string]error)
	for rows.Next() {
		var id string
		var token []byte
		if err := rows.Scan(&id, &token); err != nil {
			return fmt.Errorf("reading bootstrap tokens: %w", err)
		}
		if tokens[id], err = t.opened(bootstrapTokenColumn, id, token); err != nil {
			unreadable[id] = err
		}
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("reading bootstrap tokens: %w", err)
	}
	for _, p := range batch {
		p.out.BootstrapToken, p.err = tokens[p.device], unreadable[p.device]
	}
	return nil
}
