package push

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

const (
	// bookRows is how many outcomes are written together, bookLimit how many
	// are kept while the database is away. What is dropped is pushed again.
	bookRows  = 1000
	bookLimit = 20_000
	// bookPause is the pause after a failure to write.
	bookPause = time.Second
)

// book stores outcomes in the background: while a batch is written, the next
// one gathers.
type book struct {
	store   Store
	log     *slog.Logger
	stamps  func(topic, class string) bool
	dropped atomic.Int64

	mu      sync.Mutex
	pending []pushRecord
	wake    chan struct{}
	quit    chan struct{}
	done    chan struct{}
}

func startBook(store Store, stamps func(topic, class string) bool, log *slog.Logger) *book {
	b := &book{store: store, log: log, stamps: stamps, wake: make(chan struct{}, 1), quit: make(chan struct{}), done: make(chan struct{})}
	go b.run()
	return b
}

// note remembers an outcome. It never waits for the database.
func (b *book) note(r pushRecord) {
	b.mu.Lock()
	if len(b.pending) < bookLimit {
		b.pending = append(b.pending, r)
	} else {
		b.dropped.Add(1)
	}
	b.mu.Unlock()
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *book) run() {
	defer close(b.done)
	failing := false
	for {
		select {
		case <-b.wake:
		case <-b.quit:
			return
		}
		for {
			n, err := b.write(context.Background())
			if err != nil && !failing { // once for each outage
				b.log.Warn("cannot store the outcomes of pushes", "error", err)
			}
			failing = err != nil
			if n == 0 {
				break
			}
			if err != nil && !b.rest() {
				return
			}
		}
	}
}

// rest waits a little, or reports that the book is to be closed.
func (b *book) rest() bool {
	timer := time.NewTimer(bookPause)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-b.quit:
		return false
	}
}

// write stores the oldest of what is pending and returns how many that were.
// What could not be stored stays.
func (b *book) write(ctx context.Context) (int, error) {
	b.mu.Lock()
	batch := b.pending[:min(len(b.pending), bookRows)]
	b.mu.Unlock()
	if len(batch) == 0 {
		return 0, nil
	}
	records := make([]storage.PushRecord, len(batch))
	last := make(map[string]storage.PushRecord)
	for i, r := range batch {
		records[i] = r.PushRecord
		last[r.topic] = r.PushRecord
	}
	if err := b.store.RecordPushes(ctx, records); err != nil {
		return len(batch), err
	}
	b.mu.Lock()
	b.pending = append([]pushRecord(nil), b.pending[len(batch):]...)
	b.mu.Unlock()
	for topic, r := range last {
		if !b.stamps(topic, r.Class) {
			continue
		}
		if err := b.store.RecordPushCertOutcome(ctx, topic, r.Class, r.At); err != nil {
			return len(batch), err
		}
	}
	return len(batch), nil
}

// close stores what is pending, as long as ctx allows.
func (b *book) close(ctx context.Context) error {
	close(b.quit)
	<-b.done
	for {
		if n, err := b.write(ctx); n == 0 || err != nil {
			return err
		}
	}
}
