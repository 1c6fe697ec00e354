package sqlstore

import (
	"context"
	"errors"
	"sync"

	"github.com/nanomdm/nanomdm/storage"
)

// batchConfig bounds a batcher. All fields are required.
type batchConfig struct {
	inFlight int // batches that run at once
	rows     int // items of one batch
	bytes    int // their sizes together; one item may be larger
	waiting  int // items that wait for a batch; more are storage.ErrBusy
	// hopeless errors of a batch are errors of each of its items. After other
	// errors the items run one by one, so that a bad one fails alone.
	hopeless func(error) bool
}

// batcher gathers items that arrive while others run, and runs them together:
// natural batching. An item that finds no batch in flight runs at once, alone.
//
// There is no goroutine. The caller of the first item leads a batch: it runs
// the batch for all, then makes the next batch and hands it to the caller of
// its first item.
type batcher[T any] struct {
	cfg batchConfig
	run func(ctx context.Context, items []T) error

	mu      sync.Mutex
	running int
	queue   []*ticket[T] // in order of arrival, with holes where callers left
	waiting int          // tickets in queue that are not holes
}

// ticket is one caller's place.
type ticket[T any] struct {
	ctx    context.Context
	item   T
	size   int
	queued bool // guarded by batcher.mu; false once taken or left
	turn   chan turn[T]
}

// turn ends a caller's wait: with a batch to lead, or with the outcome.
type turn[T any] struct {
	lead []*ticket[T]
	err  error
}

// newBatcher returns a batcher of run. run gets between one and cfg.rows items
// in order of arrival, stores the outcomes in them, and returns an error if all
// of them failed, as in a transaction. It may get an item a second time, alone.
// Its context has the values of the leader's context but does not end with it,
// since the batch belongs to others, too.
func newBatcher[T any](cfg batchConfig, run func(ctx context.Context, items []T) error) *batcher[T] {
	return &batcher[T]{cfg: cfg, run: run}
}

// do runs item in a batch and returns its error. size is its share of the
// batch's bytes. When the context of a caller ends, its item leaves the queue;
// if a batch has taken it, the caller waits for the outcome.
func (b *batcher[T]) do(ctx context.Context, item T, size int) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	me := &ticket[T]{ctx: ctx, item: item, size: size}
	b.mu.Lock()
	if b.running < b.cfg.inFlight && b.waiting == 0 {
		b.running++
		b.mu.Unlock()
		return b.lead([]*ticket[T]{me})
	}
	if b.waiting >= b.cfg.waiting {
		b.mu.Unlock()
		return storage.ErrBusy
	}
	me.queued, me.turn = true, make(chan turn[T], 1)
	b.queue = append(b.queue, me)
	b.waiting++
	b.mu.Unlock()

	var t turn[T]
	select {
	case t = <-me.turn:
	case <-ctx.Done():
		if b.leave(me) {
			return ctx.Err()
		}
		t = <-me.turn
	}
	if t.lead != nil {
		return b.lead(t.lead)
	}
	return t.err
}

// leave takes a ticket out of the queue, unless a batch has it.
func (b *batcher[T]) leave(me *ticket[T]) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !me.queued {
		return false
	}
	me.queued = false
	b.waiting--
	return true
}

// errPanicked is the error of the other callers of a batch that panicked.
var errPanicked = errors.New("the batch's leader panicked")

// lead runs a batch, whose first ticket is the caller's, gives the others their
// outcomes, and hands the next batch over. It returns the caller's own error.
func (b *batcher[T]) lead(batch []*ticket[T]) error {
	errs := make([]error, len(batch))
	for i := range errs {
		errs[i] = errPanicked
	}
	defer func() { // also when run panics: others depend on it
		b.handOver()
		for i, other := range batch[1:] {
			other.turn <- turn[T]{err: errs[i+1]}
		}
	}()
	ctx := context.WithoutCancel(batch[0].ctx)
	items := make([]T, len(batch))
	for i, other := range batch {
		items[i] = other.item
	}
	err := b.run(ctx, items)
	if err == nil || len(batch) == 1 || b.cfg.hopeless(err) {
		for i := range errs {
			errs[i] = err
		}
		return err
	}
	for i := range items {
		errs[i] = b.run(ctx, items[i:i+1:i+1])
	}
	return errs[0]
}

// handOver gives the next batch to its first caller, if there is one.
func (b *batcher[T]) handOver() {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := b.take()
	if next == nil {
		b.running--
		return
	}
	next[0].turn <- turn[T]{lead: next}
}

// take makes the next batch; the caller holds mu.
func (b *batcher[T]) take() []*ticket[T] {
	var batch []*ticket[T]
	bytes, i := 0, 0
	for ; i < len(b.queue) && len(batch) < b.cfg.rows; i++ {
		t := b.queue[i]
		if !t.queued {
			continue
		}
		if len(batch) > 0 && bytes+t.size > b.cfg.bytes {
			break
		}
		t.queued = false
		bytes += t.size
		batch = append(batch, t)
	}
	b.waiting -= len(batch)
	clear(b.queue[:i])
	b.queue = b.queue[i:]
	if b.waiting == 0 {
		b.queue = nil // what is left are holes
	}
	return batch
}
