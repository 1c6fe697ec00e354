package sqlstore

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
)

// silenceTimeout is the time after which a sweep pushes a device that was
// offered a command, or has refused one by NotNow, and stays silent.
const silenceTimeout = 3 * time.Minute

// silenceSlack is how much earlier the sweep may read the device's row, so that
// a visit of many messages writes that time once. The sweep then finds that the
// device has polled since, and waits.
const silenceSlack = 30 * time.Second

// Bounds of the two batchers; the dialect has the number of batches in flight.
// Statements with at most batchRows ids keep within every engine's limit of
// arguments, batches of batchBytes within MySQL's packet even if each byte has
// to be escaped.
const (
	batchRows    = 256
	batchBytes   = 4 << 20
	batchWaiting = 16_384
)

// startBatches makes the batchers of Apply. A single connection, such as
// SQLite's writer, gets a single batch in flight: a second one would wait for
// the connection instead of growing.
func (s *Store) startBatches() {
	cfg := batchConfig{rows: batchRows, bytes: batchBytes, waiting: batchWaiting, hopeless: hopeless}
	reads, writes, _ := s.db.Parallel()
	cfg.inFlight = reads
	s.polls = newBatcher(cfg, withTimeout(s.cfg.Polled, s.poll))
	cfg.inFlight = writes
	s.changes = newBatcher(cfg, withTimeout(s.cfg.Committed, s.change))
	s.startEnqueues()
}

// withTimeout bounds the time of a batch of device messages, and reports its
// size.
func withTimeout(tell func(messages int), run func(context.Context, []*opRun) error) func(context.Context, []*opRun) error {
	return func(ctx context.Context, batch []*opRun) error {
		if tell != nil {
			tell(len(batch))
		}
		ctx, cancel := context.WithTimeout(ctx, deviceTimeout)
		defer cancel()
		return run(ctx, batch)
	}
}

// hopeless says whether an error is the database's and not that of one
// operation in a batch.
func hopeless(err error) bool {
	for _, is := range [...]error{storage.ErrUnavailable, storage.ErrBusy, storage.ErrClosed, context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, is) {
			return true
		}
	}
	return false
}

var (
	_ storage.Devices           = (*Store)(nil)
	_ storage.PinnedEnrollments = (*Store)(nil)
	_ storage.ActiveEnrollments = (*Store)(nil)
)

// Apply implements storage.Devices. Concurrent operations that write share a
// commit, and operations that only read share statements.
func (s *Store) Apply(ctx context.Context, op storage.Op) (*storage.Outcome, error) {
	op, err := s.attributed(ctx, op)
	if err != nil {
		return nil, err
	}
	p := newOpRun(op)
	if p.kind == nil {
		return nil, fmt.Errorf("applying a device's message: %T is not in the table of operations", op)
	}
	if p.readOnly() {
		err = s.polls.do(ctx, p, p.bytes())
	}
	if err == nil && (p.mustWrite || !p.readOnly()) {
		p, err = s.applyWriting(ctx, op)
	}
	if err = cmp.Or(err, p.err); err != nil {
		return nil, fmt.Errorf("applying a device's message: %w", err)
	}
	return &p.out, nil
}

// applyWriting carries out an operation that writes. While its rows are locked
// by others it is put into a later batch.
func (s *Store) applyWriting(ctx context.Context, op storage.Op) (*opRun, error) {
	began, inventory := time.Now(), newInventoryAnswer(op)
	for attempt := 1; ; attempt++ {
		p := newOpRun(op)
		p.inventory = inventory
		err := s.changes.do(ctx, p, p.bytes())
		if cmp.Or(err, p.err) != errHeld || time.Since(began) > heldPatience {
			return p, err
		}
		if err := backoff.Sleep(ctx, heldPauses.Pause(attempt)); err != nil {
			return p, err
		}
	}
}

// change carries out a batch of operations that write, without those whose rows
// are locked by others.
func (s *Store) change(ctx context.Context, batch []*opRun) error {
	for {
		err := s.changeAll(ctx, batch)
		held := (*heldRows)(nil)
		if !errors.As(err, &held) {
			return err
		}
		rest := slices.DeleteFunc(slices.Clone(batch), func(p *opRun) bool { return held.holds(p.device) })
		if len(rest) == len(batch) {
			return errHeld
		}
		for _, p := range batch {
			if held.holds(p.device) {
				p.err = errHeld
			}
		}
		if len(rest) == 0 {
			return nil
		}
		batch = rest
	}
}

// changeAll carries out a batch in one transaction.
func (s *Store) changeAll(ctx context.Context, batch []*opRun) error {
	apply := func(ctx context.Context, t *tx) error {
		t.SkipLocked = true
		for _, p := range batch {
			p.reset()
		}
		for _, round := range rounds(batch) {
			if err := changeRound(ctx, t, round); err != nil {
				return err
			}
		}
		return nil
	}
	err := s.write(ctx, apply)
	if len(batch) == 1 && s.db.Dialect().Unique(err) {
		// Another transaction has inserted a row that this one found missing.
		err = s.write(ctx, apply)
	}
	if err != nil {
		return err
	}
	for _, p := range batch {
		s.visited(p)
	}
	return nil
}

// visited notes that the device sent a message.
func (s *Store) visited(p *opRun) {
	if p.err == nil && p.seen {
		s.act.note(p.note)
	}
}

// rounds splits a batch so that no round has two operations of one device or
// with one certificate, which stay in their order of arrival. A round is sorted
// by id.
func rounds(batch []*opRun) [][]*opRun {
	var out [][]*opRun
	devices := make(map[string]int, len(batch))
	hashes := make(map[string]int, len(batch))
	for _, p := range batch {
		n := devices[p.device]
		if h := p.hash(); h != "" {
			n = max(n, hashes[h])
			hashes[h] = n + 1
		}
		devices[p.device] = n + 1
		if n == len(out) {
			out = append(out, nil)
		}
		out[n] = append(out[n], p)
	}
	for _, round := range out {
		slices.SortFunc(round, func(a, b *opRun) int { return strings.Compare(a.id(), b.id()) })
	}
	return out
}

// changeRound carries out operations of different devices in a few statements
// for all of them. Locks are taken in the order devices, enrollments, push
// rows, queue rows, and by key among each.
func changeRound(ctx context.Context, t *tx, round []*opRun) error {
	var single []*opRun // without kinds that do their whole round themselves
	for _, p := range round {
		if p.kind.round == nil {
			single = append(single, p)
		}
	}
	if len(single) > 0 {
		if err := changeEnrollments(ctx, t, single); err != nil {
			return err
		}
	}
	for _, kind := range opKinds {
		if batch := ofKind(round, kind); kind.round != nil && len(batch) > 0 {
			if err := kind.round(ctx, t, batch); err != nil {
				return err
			}
		}
	}
	return insertEvents(ctx, t, outgoing(round))
}

// changeEnrollments carries out operations by the steps that most kinds share:
// devices are locked, certificates checked, enrollments locked and read, and
// then each kind writes.
func changeEnrollments(ctx context.Context, t *tx, batch []*opRun) error {
	certs, err := admit(ctx, t, batch)
	if err != nil {
		return err
	}
	ids, err := concerned(ctx, t, batch, certs)
	if err != nil {
		return err
	}
	rows, err := readEnrollments(ctx, t, ids)
	if err != nil {
		return err
	}
	r := &opRound{certs: certs, rows: rows}
	if err := settleCopies(ctx, t, batch, certs); err != nil {
		return err
	}
	if err := refuseTopics(ctx, t, batch, r); err != nil {
		return err
	}
	if err := refuseManyChannels(ctx, t, batch, r); err != nil {
		return err
	}
	if err := moveTopics(ctx, t, batch, r); err != nil {
		return err
	}
	var ending []*opRun
	for _, p := range batch {
		if p.err == nil {
			p.err = r.missing(p)
		}
		if p.err != nil || p.settled {
			continue
		}
		if p.kind.topic != nil {
			p.facts.topic = r.topicOf(p, p.kind.topic(p.op))
		}
		if p.kind.enables || rows.byID[p.id()] != nil {
			p.visit(t.Now)
		}
		if p.kind.ends {
			ending = append(ending, p)
		}
	}
	for _, kind := range opKinds {
		if some := ofKind(batch, kind); kind.write != nil && len(some) > 0 {
			if err := kind.write(ctx, t, some, r); err != nil {
				return err
			}
		}
	}
	return endEnrollments(ctx, t, ending, rows)
}

// missing returns the error of an operation whose needed row does not exist.
func (r *opRound) missing(p *opRun) error {
	switch {
	case p.kind.needs == needsDevice && !r.certs.devices[p.device],
		p.kind.needs == needsEnrollment && (!r.certs.devices[p.device] || r.rows.byID[p.device] == nil):
		return storage.ErrNotEnrolled
	}
	return nil
}
