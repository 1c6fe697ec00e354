package webhook

import (
	"maps"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// storeEvery gathers outcomes of deliveries for one transaction.
const storeEvery = 500 * time.Millisecond

// outcomes is what became of events and is not in the database yet. It
// belongs to one goroutine.
type outcomes struct {
	cursor       int64 // pages were read and settled up to here
	storedCursor int64
	storedAt     time.Time
	// rows are by the event's number; nil: delivered, its row is to be
	// removed.
	rows map[int64]*storage.Delivery
	// receiver is the receiver's new state; nil: as it is stored.
	receiver *storage.ReceiverState
}

func newOutcomes(cursor int64) *outcomes {
	return &outcomes{cursor: cursor, storedCursor: cursor, rows: make(map[int64]*storage.Delivery)}
}

func (o *outcomes) put(d storage.Delivery) { o.rows[d.Seq] = &d }

// wait stores an event that was not tried behind the enrollment's others.
func (o *outcomes) wait(e *storage.Event) { o.put(rowOf(e, storage.DeliveryWaiting)) }

// delivered removes the row of an event.
func (o *outcomes) delivered(seq int64) { o.rows[seq] = nil }

// pending reports whether there is anything to store.
func (o *outcomes) pending() bool {
	return o.cursor > o.storedCursor || len(o.rows) > 0 || o.receiver != nil
}

// due reports whether it is time to store what is pending.
func (o *outcomes) due(now time.Time) bool {
	return o.pending() && (now.Sub(o.storedAt) >= storeEvery || len(o.rows) >= pageRows)
}

func (o *outcomes) settlement() (s storage.Settlement) {
	s.Receiver = o.receiver
	if o.cursor > o.storedCursor {
		s.Cursor = o.cursor
	}
	for _, seq := range slices.Sorted(maps.Keys(o.rows)) {
		if d := o.rows[seq]; d != nil {
			s.Put = append(s.Put, *d)
		} else {
			s.Done = append(s.Done, seq)
		}
	}
	return s
}

// stored notes that everything pending is in the database.
func (o *outcomes) stored(now time.Time) {
	o.storedCursor, o.storedAt, o.receiver = o.cursor, now, nil
	clear(o.rows)
}

// rowOf is the row of an event in a state.
func rowOf(e *storage.Event, state storage.DeliveryState) storage.Delivery {
	return storage.Delivery{Seq: e.Seq, Enrollment: e.Enroll.ID, CreatedAt: e.CreatedAt, State: state}
}
