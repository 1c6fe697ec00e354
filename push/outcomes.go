package push

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/supervise"
)

const (
	// outcomeBatch is how many outcomes one transaction stores. outcomeLimit is
	// how many are kept while the database is away; pushes whose outcome is
	// dropped are sent again.
	outcomeBatch = 1000
	outcomeLimit = 20_000
	// outcomePause is the pause after a failure to store.
	outcomePause = time.Second
)

// outcomeWriter stores outcomes in the background: the next batch gathers while
// one is stored.
type outcomeWriter struct {
	store    Store
	log      *slog.Logger
	storeDue func(topic, class string) bool // whether the topic's last outcome is to be stored
	dropped  atomic.Int64

	mu      sync.Mutex
	pending []topicRecord
	wake    chan struct{}
	ctx     context.Context // ends when close begins
	quit    context.CancelFunc
	done    chan struct{}
}

// topicRecord is the record of a push with its topic.
type topicRecord struct {
	storage.PushRecord
	topic string
}

func startOutcomeWriter(store Store, storeDue func(topic, class string) bool, log *slog.Logger, supervisor *supervise.Supervisor) *outcomeWriter {
	w := &outcomeWriter{store: store, log: log, storeDue: storeDue, wake: make(chan struct{}, 1), done: make(chan struct{})}
	w.ctx, w.quit = context.WithCancel(context.Background())
	go func() {
		defer close(w.done)
		_ = supervisor.Run(w.ctx, "push outcomes", w.run) // close began
	}()
	return w
}

// add queues an outcome. It never waits for the database.
func (w *outcomeWriter) add(r topicRecord) {
	w.mu.Lock()
	if len(w.pending) < outcomeLimit {
		w.pending = append(w.pending, r)
	} else {
		w.dropped.Add(1)
	}
	w.mu.Unlock()
	select {
	case w.wake <- struct{}{}:
	default:
	}
}

func (w *outcomeWriter) run(ctx context.Context) error {
	failing := false
	for {
		select {
		case <-w.wake:
		case <-ctx.Done():
			return ctx.Err()
		}
		for {
			n, err := w.write(context.Background())
			if err != nil && !failing { // once for each outage
				w.log.Warn("cannot store the outcomes of pushes", "error", err)
			}
			failing = err != nil
			if n == 0 {
				break
			}
			if err != nil && backoff.Sleep(ctx, outcomePause) != nil {
				return ctx.Err()
			}
		}
	}
}

// write stores the oldest outcomes and returns their number. Outcomes that
// could not be stored stay pending.
func (w *outcomeWriter) write(ctx context.Context) (int, error) {
	w.mu.Lock()
	batch := w.pending[:min(len(w.pending), outcomeBatch)]
	w.mu.Unlock()
	if len(batch) == 0 {
		return 0, nil
	}
	records := make([]storage.PushRecord, len(batch))
	last := make(map[string]storage.PushRecord)
	for i, r := range batch {
		records[i] = r.PushRecord
		last[r.topic] = r.PushRecord
	}
	if err := w.store.RecordPushes(ctx, records); err != nil {
		return len(batch), err
	}
	w.mu.Lock()
	w.pending = append([]topicRecord(nil), w.pending[len(batch):]...)
	w.mu.Unlock()
	for topic, r := range last {
		if !w.storeDue(topic, r.Class) {
			continue
		}
		if err := w.store.RecordPushCertOutcome(ctx, topic, r.Class, r.At); err != nil {
			return len(batch), err
		}
	}
	return len(batch), nil
}

// close stores the pending outcomes, as long as ctx allows.
func (w *outcomeWriter) close(ctx context.Context) error {
	w.quit()
	<-w.done
	for {
		if n, err := w.write(ctx); n == 0 || err != nil {
			return err
		}
	}
}
