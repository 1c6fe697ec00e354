package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// firstSilence is how long a device that was offered a command, or has one
// that it refused for now, may stay silent before the sweep wakes it.
const firstSilence = 3 * time.Minute

// silenceSlack is how much earlier the sweep may look at it, so that a visit of
// many messages plans that once, not with each of them. It finds that the device
// was there since, and waits.
const silenceSlack = 30 * time.Second

// pending is one Op on its way through a batch.
type pending struct {
	op     storage.Op
	src    *storage.Source
	device string // the id that certificates are pinned to

	out storage.Outcome
	err error
	// mustWrite: the read path found that there is something to write.
	mustWrite bool
	// seen: the enrollment exists, and note is to be kept of the visit.
	seen bool
	note activity
	// facts are what is known for the events to insert.
	facts facts
}

func newPending(op storage.Op) *pending {
	src := op.Source()
	return &pending{op: op, src: src, device: src.Enroll.DeviceID()}
}

// reset forgets what an attempt that was rolled back has left.
func (p *pending) reset() {
	*p = pending{op: p.op, src: p.src, device: p.device}
}

func (p *pending) id() string { return p.src.Enroll.ID }

func (p *pending) hash() string {
	if p.src.Pin == nil {
		return ""
	}
	return p.src.Pin.Hash
}

// bytes is about how much the operation adds to a statement.
func (p *pending) bytes() int {
	n := 512
	for i := range p.src.Events {
		n += len(p.src.Events[i].Raw)
	}
	if p.src.Pin != nil {
		n += len(p.src.Pin.Certificate)
	}
	switch op := p.op.(type) {
	case *storage.Report:
		n += len(op.Raw)
	case *storage.Authenticate:
		n += len(op.Message.Raw)
	case *storage.TokenUpdate:
		n += len(op.Message.Raw) + len(op.Message.UnlockToken)
	case *storage.UserAuthenticate:
		n += len(op.Message.Raw)
	case *storage.SetBootstrapToken:
		n += len(op.Token)
	}
	return n
}

// readOnly says whether the operation may do without a transaction.
func (p *pending) readOnly() bool {
	for i := range p.src.Events {
		if !p.src.Events[i].Volatile {
			return false
		}
	}
	switch op := p.op.(type) {
	case *storage.Report:
		return op.Status == mdm.StatusIdle
	case *storage.GetBootstrapToken, *storage.Seen:
		return true
	}
	return false
}

// Bounds of the two batchers; how many run at once is the dialect's. Texts of at most batchRows ids keep within every
// engine's limit of arguments, batches of batchBytes within MySQL's packet,
// also where each byte has to be escaped.
const (
	batchRows    = 256
	batchBytes   = 4 << 20
	batchWaiting = 16_384
)

// startBatches makes the batchers that Apply works with. A single connection,
// as SQLite's writer has, gets a single batch, since a second one would only
// wait there instead of growing.
func (s *Store) startBatches() {
	cfg := batchConfig{rows: batchRows, bytes: batchBytes, waiting: batchWaiting, hopeless: hopeless}
	reads, writes, _ := s.db.Parallel()
	cfg.inFlight = reads
	s.polls = newBatcher(cfg, inTime(s.cfg.Polled, s.poll))
	cfg.inFlight = writes
	s.changes = newBatcher(cfg, inTime(s.cfg.Committed, s.change))
}

// hopeless says whether an error is the database's rather than that of one
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
)

// Apply implements storage.Devices. What writes is committed together with
// what others write at the same time, and what only reads shares its
// statements with others' reads.
func (s *Store) Apply(ctx context.Context, op storage.Op) (*storage.Outcome, error) {
	p := newPending(op)
	err := error(nil)
	if p.readOnly() {
		err = s.polls.do(ctx, p, p.bytes())
	}
	if err == nil && (p.mustWrite || !p.readOnly()) {
		p = newPending(op)
		err = s.changes.do(ctx, p, p.bytes())
	}
	if err = cmp.Or(err, p.err); err != nil {
		return nil, fmt.Errorf("applying a device's message: %w", err)
	}
	return &p.out, nil
}

// change carries out a batch of operations that write, in one transaction.
func (s *Store) change(ctx context.Context, batch []*pending) error {
	apply := func(ctx context.Context, t *tx) error {
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
		// Somebody else was first to insert what this one found missing.
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

// visited notes that the device spoke.
func (s *Store) visited(p *pending) {
	if p.err == nil && p.seen {
		s.act.note(p.note)
	}
}

// rounds splits a batch so that no round has two operations of one device or
// with one certificate; theirs stay in the order in which they came. Inside a
// round the order is that of the ids.
func rounds(batch []*pending) [][]*pending {
	var out [][]*pending
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
		slices.SortFunc(round, func(a, b *pending) int { return strings.Compare(a.id(), b.id()) })
	}
	return out
}

// changeRound carries out operations of different devices in a few statements
// for all of them. Locks are taken in the order devices, enrollments, push
// rows, queue rows, and by key among each.
func changeRound(ctx context.Context, t *tx, round []*pending) error {
	var reports, others []*pending
	for _, p := range round {
		if _, ok := p.op.(*storage.Report); ok {
			reports = append(reports, p)
		} else {
			others = append(others, p)
		}
	}
	certs, err := admit(ctx, t, others)
	if err != nil {
		return err
	}
	if err := changeEnrollments(ctx, t, others, certs); err != nil {
		return err
	}
	if err := takeReports(ctx, t, reports); err != nil {
		return err
	}
	return insertEvents(ctx, t, outgoing(round))
}

// subject is what the database knows of the enrollment that speaks.
type subject struct {
	id     string
	topic  string // APNs
	active bool   // may get commands
	pinned string // hash of the device's live certificate
	owed   int64
	paid   int64
	pushAt sql.Null[int64]
	// The heads of the two lists that a device may be offered a command from.
	queued, notnow sql.Null[string]
}

// deviceTexts are the texts that read who speaks and who changes. They are made
// once, as they are long.
type deviceTexts struct{ subjects, senders string }

func newDeviceTexts(d *sqldb.Dialect) deviceTexts {
	return deviceTexts{subjects: subjectsText(d), senders: sendersText(d)}
}

// subjectsText reads subjects of the derived table r, each with the heads of
// its lists. A head is one index seek: it needs all the columns in its order,
// since MySQL would sort what waits otherwise, and to be told the index. Where
// it is not told, a planner that knows how rare a state was when it last looked
// would read all rows in that state by another index. The live certificate is
// not looked for by retired_at, by which an index has that of every device.
func subjectsText(d *sqldb.Dialect) string {
	head := func(state storage.State) string {
		return fmt.Sprintf(`, (SELECT q.command_uuid FROM nano_enrollment_queue q%s
WHERE q.id = e.id AND q.state = %s AND q.command_uuid <> r.command_uuid AND (q.expires_at IS NULL OR q.expires_at > ?)
ORDER BY q.state, q.id, q.priority DESC, q.seq LIMIT 1)`, d.Index("nano_enrollment_queue_next"), d.Opaque(strconv.Itoa(int(state))))
	}
	return `SELECT e.id, e.topic, e.enabled, e.operator_disabled, a.sha256, p.owed_seq, p.paid_seq, p.push_at` +
		head(storage.Queued) + head(storage.NotNow) + `
FROM ` + d.PairTable("id", "command_uuid") +
		d.Lookup(false, "nano_enrollments", "e", "e.id = r.id") +
		d.Lookup(true, "nano_cert_auth_associations", "a", "a.id = e.device_id AND COALESCE(a.retired_at, 0) = 0") +
		d.Lookup(true, "nano_enrollment_push", "p", "p.id = e.id")
}

// subjects reads enrollments, and the next command of each besides that of the
// key, all as of the same moment. Enrollments that do not exist are missing.
func subjects(ctx context.Context, t *tx, keys []keyPair) (map[string]*subject, error) {
	subs := make(map[string]*subject, len(keys))
	q, err := subjectsQuestion(t, keys, subs)
	if err != nil {
		return nil, err
	}
	return subs, t.QueryBatch(ctx, q)
}

// subjectsQuestion is the query of subjects.
func subjectsQuestion(t *tx, keys []keyPair, into map[string]*subject) (sqldb.BatchQuery, error) {
	pairs, err := t.Dialect.PairArgs(keys)
	if err != nil {
		return sqldb.BatchQuery{}, fmt.Errorf("reading enrollments: %w", err)
	}
	read := func(rows sqldb.Rows) error {
		for rows.Next() {
			var s subject
			var enabled, disabled bool
			var pinned sql.Null[string]
			var owed, paid sql.Null[int64]
			err := rows.Scan(&s.id, &s.topic, &enabled, &disabled, &pinned, &owed, &paid, &s.pushAt, &s.queued, &s.notnow)
			if err != nil {
				return err
			}
			s.active = enabled && !disabled
			s.pinned, s.owed, s.paid = pinned.V, owed.V, paid.V
			into[s.id] = &s
		}
		return nil
	}
	return sqldb.BatchQuery{Action: "reading enrollments", Text: t.texts.subjects, Args: append([]any{t.Now, t.Now}, pairs...), Read: read}, nil
}

// certificates is what is known of the certificates of a batch and of the
// devices that they came from.
type certificates struct {
	byHash  map[string]certificate
	live    map[string]bool // devices that have one
	devices map[string]bool // devices that exist
	// enrollments are the ids of those of the devices.
	enrollments []string
	// claims are of devices that other certificates come from.
	claims map[string]claim
}

type certificate struct {
	device  string
	retired bool
}

// sendersText reads, for each device and hash of the derived table r, what
// certificates has. The live certificate is not looked for by retired_at, by
// which an index has that of every device.
func sendersText(d *sqldb.Dialect) string {
	return `SELECT r.id, r.command_uuid, d.id, a.id, a.retired_at, l.id, e.id
FROM ` + d.PairTable("id", "command_uuid") +
		d.Lookup(true, "nano_devices", "d", "d.id = r.id") +
		d.Lookup(true, "nano_cert_auth_associations", "a", "a.sha256 = r.command_uuid") +
		d.Lookup(true, "nano_cert_auth_associations", "l", "l.id = r.id AND COALESCE(l.retired_at, 0) = 0") +
		d.Lookup(true, "nano_enrollments", "e", "e.device_id = r.id")
}

func readCertificates(ctx context.Context, t *tx, batch []*pending) (*certificates, error) {
	keys := make([]keyPair, len(batch))
	for i, p := range batch {
		keys[i] = keyPair{ID: p.device, Item: p.hash()}
	}
	pairs, err := t.Dialect.PairArgs(keys)
	if err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	rows, err := t.Query(ctx, t.texts.senders, pairs...)
	if err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	defer rows.Close()
	c := &certificates{
		byHash:  make(map[string]certificate),
		live:    make(map[string]bool),
		devices: make(map[string]bool),
	}
	for rows.Next() {
		var device, hash string
		var known, owner, live, enrollment sql.Null[string]
		var retired sql.Null[int64]
		if err := rows.Scan(&device, &hash, &known, &owner, &retired, &live, &enrollment); err != nil {
			return nil, fmt.Errorf("reading certificates: %w", err)
		}
		if known.Valid {
			c.devices[device] = true
		}
		if owner.Valid {
			c.byHash[hash] = certificate{device: owner.V, retired: retired.Valid}
		}
		if live.Valid {
			c.live[device] = true
		}
		if enrollment.Valid {
			c.enrollments = append(c.enrollments, enrollment.V)
		}
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	if err := rows.Close(); err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	return c, c.readClaims(ctx, t, batch)
}

// judge says whether a certificate may act for the device, and whether it has
// to be pinned for that.
func (c *certificates) judge(p *pending) (pin bool, err error) {
	if p.src.Pin == nil {
		return false, nil
	}
	if known, ok := c.byHash[p.src.Pin.Hash]; ok && known.device == p.device && !known.retired {
		return false, nil
	} else if ok && known.device != p.device {
		return false, errOthers
	}
	switch p.op.(type) {
	case *storage.CheckOut:
		if !c.devices[p.device] {
			return false, nil
		}
	case *storage.TokenUpdate, *storage.SetBootstrapToken, *storage.UserAuthenticate:
		if !c.devices[p.device] {
			return false, storage.ErrNotEnrolled
		}
	}
	if !c.mayTakeOver(p) {
		return false, c.refusal(p)
	}
	if p.src.Pin.Unconfirmed {
		return false, storage.ErrUnconfirmed
	}
	return true, nil
}

// admit locks the devices that operations come from, checks their
// certificates, and pins those that may be. It sets err of the operations that
// are refused.
func admit(ctx context.Context, t *tx, batch []*pending) (*certificates, error) {
	if len(batch) == 0 {
		return nil, nil
	}
	certs, err := lockDevices(ctx, t, batch)
	if err != nil {
		return nil, err
	}
	var pins []*pending
	var renewed []string
	for _, p := range batch {
		pin, err := certs.judge(p)
		p.err = err
		if !pin {
			continue
		}
		pins = append(pins, p)
		if certs.live[p.device] {
			renewed = append(renewed, p.device)
		}
	}
	if len(renewed) > 0 {
		is, args := t.Among(renewed)
		_, err := t.Exec(ctx, "UPDATE nano_cert_auth_associations SET retired_at = ? WHERE retired_at IS NULL AND id "+is,
			append([]any{t.Now}, args...)...)
		if err != nil {
			return nil, fmt.Errorf("retiring certificates: %w", err)
		}
	}
	return certs, pinCertificates(ctx, t, pins, certs)
}

// pinCertificates pins certificates that nobody has had, and those that the
// device itself had before. One that another transaction pinned in between
// violates the key: see change.
func pinCertificates(ctx context.Context, t *tx, batch []*pending, certs *certificates) error {
	var args []any
	var again []string
	for _, p := range batch {
		pin := p.src.Pin
		if _, had := certs.byHash[pin.Hash]; had {
			again = append(again, pin.Hash)
			continue
		}
		args = append(args, pin.Hash, p.device, pin.Certificate, null(micros(pin.NotAfter)), t.Now)
	}
	if len(again) > 0 {
		is, hashes := t.Among(again)
		if _, err := t.Exec(ctx, "UPDATE nano_cert_auth_associations SET retired_at = NULL WHERE sha256 "+is, hashes...); err != nil {
			return fmt.Errorf("pinning certificates again: %w", err)
		}
	}
	if len(args) == 0 {
		return nil
	}
	err := t.Insert(ctx, "nano_cert_auth_associations", []string{"sha256", "id", "certificate", "not_after", "created_at"}, args)
	if err != nil {
		return fmt.Errorf("pinning certificates: %w", err)
	}
	return nil
}

// lockDevices locks devices and reads their certificates, so that two
// certificates of one device do not both find it without one, or retire the
// same third one. A device that came in after the locks were taken takes
// another look.
func lockDevices(ctx context.Context, t *tx, batch []*pending) (*certificates, error) {
	devices := make([]string, len(batch))
	for i, p := range batch {
		devices[i] = p.device
	}
	for {
		locked, err := lockLater(ctx, t, "nano_devices", devices)
		if err != nil {
			return nil, err
		}
		certs, err := readCertificates(ctx, t, batch)
		if err != nil || t.Dialect.ForUpdate() == "" || len(certs.devices) <= *locked {
			return certs, err
		}
	}
}

// lock locks the rows of a table that exist, in key order, and returns their
// ids. Where writers wait for each other anyway it does nothing.
func lock(ctx context.Context, t *tx, table string, ids []string) (locked []string, err error) {
	if len(ids) == 0 || t.Dialect.ForUpdate() == "" {
		return nil, nil
	}
	rows, err := t.QueryLocked(ctx, "id", table, ids)
	if err != nil {
		return nil, fmt.Errorf("locking rows of %s: %w", table, err)
	}
	defer rows.Close()
	for rows.Next() {
		var id string
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("locking rows of %s: %w", table, err)
		}
		locked = append(locked, id)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("locking rows of %s: %w", table, err)
	}
	return locked, nil
}

// lockLater is lock, at the latest with the next statement that returns
// something. How many rows it locked is known after that.
func lockLater(ctx context.Context, t *tx, table string, ids []string) (locked *int, err error) {
	if locked, ok := t.LockDeferred(table, ids); ok {
		return locked, nil
	}
	ids, err = lock(ctx, t, table, ids)
	n := len(ids)
	return &n, err
}

// storable says whether a name can be a key. Others are of nothing that was
// ever stored, and some engines refuse to look for them.
func storable(name string) bool {
	return name != "" && len(name) <= mdm.MaxIDLen && utf8.ValidString(name) && strings.IndexByte(name, 0) < 0
}

// maxText is the width of the columns for short texts, in characters.
const maxText = 255

// clip makes a text that a device chose fit its column. Such texts are for
// people to read; the message is kept whole beside them.
func clip(s string) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
	if len(s) <= maxText || utf8.RuneCountInString(s) <= maxText {
		return s
	}
	return string([]rune(s)[:maxText])
}
