package sqlstore

import (
	"context"
	"reflect"

	"github.com/nanomdm/nanomdm/storage"
)

// opKind is a row of the table of operations: the locks, reads and writes of
// one kind of device message. No other code depends on the kind.
type opKind struct {
	op storage.Op // a nil pointer of the kind
	// needs is the row that has to exist for the device.
	needs need
	// begins: the operation begins an enrollment, so its certificate may be the
	// first of a device.
	begins bool
	// enables: the enrollment exists afterwards, even if it did not before.
	enables bool
	// addsUser: the operation may be the first of a user of the device.
	addsUser bool
	// ends: the device's enrollments end, with their queues, the pushes they
	// are owed and the bootstrap token.
	ends bool
	// ordered: carried out late, the operation would undo later messages of the
	// device. It is refused once its client has given it up.
	ordered bool
	// size estimates the bytes that the message adds to a statement; nil is
	// few.
	size func(storage.Op) int
	// topic is the APNs topic in the message; nil if it has none.
	topic func(storage.Op) string
	// reads says whether the operation may do without a transaction; nil is no.
	reads func(storage.Op) bool
	// poll answers the operations that only read, outside a transaction; may be
	// nil.
	poll func(ctx context.Context, t *tx, batch []*opRun, states map[string]*enrollmentState) error
	// write carries out the operations of a round, after devices and
	// enrollments are locked and certificates checked; may be nil.
	write func(ctx context.Context, t *tx, batch []*opRun, r *opRound) error
	// round does everything for the operations of a round, locks and
	// certificates included, instead of write.
	round func(ctx context.Context, t *tx, batch []*opRun) error
}

// need is the row that an operation needs.
type need int

const (
	_ need = iota // nothing
	// needsDevice: without the device it fails with storage.ErrNotEnrolled.
	needsDevice
	// needsEnrollment: without the device's own enrollment it fails so, too.
	needsEnrollment
	// skipsUnknown: for an unknown device it does nothing, and pins nothing.
	skipsUnknown
)

// opRound is the locked state of the devices of a round.
type opRound struct {
	certs *certificates
	rows  *enrollments
}

// opKinds is the table of operations, in the order in which a round writes
// them.
var opKinds = [...]*opKind{
	&authenticateKind,
	&checkOutKind,
	&tokenUpdateKind,
	&setBootstrapTokenKind,
	&userAuthenticateKind,
	&getBootstrapTokenKind,
	{op: (*storage.Seen)(nil), reads: func(storage.Op) bool { return true }},
	&reportKind,
}

// kindOf returns the row of an operation, or nil.
func kindOf(op storage.Op) *opKind {
	for _, k := range opKinds {
		if reflect.TypeOf(k.op) == reflect.TypeOf(op) {
			return k
		}
	}
	return nil
}

// of adapts a function of one kind of operation to a field of opKind.
func of[O storage.Op, R any](fn func(O) R) func(storage.Op) R {
	return func(op storage.Op) R { return fn(op.(O)) }
}

// opRun is one operation on its way through a batch.
type opRun struct {
	op     storage.Op
	kind   *opKind
	src    *storage.Source
	device string // the id that certificates are pinned to

	out storage.Outcome
	err error
	// settled: there is nothing to do.
	settled bool
	// mustWrite: the read path found that there is something to write.
	mustWrite bool
	// seen: the enrollment exists, and activity is to be noted.
	seen bool
	note activity
	// facts go into the events.
	facts facts
	// inventory is what a report says about its device; nil if nothing.
	inventory *inventoryAnswer
}

func newOpRun(op storage.Op) *opRun {
	src := op.Source()
	return &opRun{op: op, kind: kindOf(op), src: src, device: src.Enroll.DeviceID()}
}

// reset forgets the results of an attempt that was rolled back.
func (p *opRun) reset() {
	*p = opRun{op: p.op, kind: p.kind, src: p.src, device: p.device, inventory: p.inventory}
}

func (p *opRun) id() string { return p.src.Enroll.ID }

// hash returns the hash of the certificate; empty if it is not checked.
func (p *opRun) hash() string {
	if p.src.Pin == nil {
		return ""
	}
	return p.src.Pin.Hash
}

// givenUp returns the error of an operation that its client has given up.
func (p *opRun) givenUp() error {
	if p.kind.ordered && p.src.GivenUp != nil && p.src.GivenUp() {
		return storage.ErrGivenUp
	}
	return nil
}

// visit notes that the channel sent a message.
func (p *opRun) visit(now int64) {
	p.seen, p.note = true, activity{id: p.id(), seen: now}
}

// bytes estimates the bytes that the operation adds to a statement.
func (p *opRun) bytes() int {
	n := 512
	for i := range p.src.Events {
		n += len(p.src.Events[i].Raw)
	}
	if p.src.Pin != nil {
		n += len(p.src.Pin.Certificate)
	}
	if p.kind.size != nil {
		n += p.kind.size(p.op)
	}
	return n + p.inventory.bytes()
}

// readOnly says whether the operation may do without a transaction.
func (p *opRun) readOnly() bool {
	for i := range p.src.Events {
		if !p.src.Events[i].Volatile {
			return false
		}
	}
	return p.kind.reads != nil && p.kind.reads(p.op)
}

// ofKind returns the operations of a kind that were neither refused nor settled.
func ofKind(batch []*opRun, kind *opKind) []*opRun {
	var some []*opRun
	for _, p := range batch {
		if p.kind == kind && p.err == nil && !p.settled {
			some = append(some, p)
		}
	}
	return some
}
