package webhook

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// boundEvery is the interval of upkeep while events that wait for sinks keep the
// log above Config.MaxLogBytes.
const boundEvery = 5 * time.Second

// bound says which events have to go for the log to have at most
// Config.MaxLogBytes, though a sink is still to get them. The runners make them
// dead letters, which upkeep then removes.
type bound struct {
	through atomic.Int64 // their last number, 0 if the log is small enough
	newest  atomic.Int64 // the time of the newest of them, in microseconds
	trimmed atomic.Int64 // events that were removed
}

// round returns the last number of the events that have to go, and a time after
// them.
func (b *bound) round() (through int64, before time.Time) {
	through = b.through.Load()
	if through == 0 {
		return 0, time.Time{}
	}
	return through, time.UnixMicro(b.newest.Load() + 1)
}

// boundLog removes the oldest events of a log with too many bytes.
func (d *Deliverer) boundLog(ctx context.Context, current func() storage.Lease) {
	if !d.batches(ctx, "trimming the event log", func() (int, error) {
		n, err := d.store.TrimEvents(ctx, current(), d.cfg.MaxLogBytes, removeBatch)
		d.bound.trimmed.Add(int64(n))
		return n, err
	}) {
		return
	}
	through, newest, err := d.store.EventExcess(ctx, d.cfg.MaxLogBytes)
	if err != nil {
		return // the other work of upkeep logs that the store fails
	}
	d.bound.newest.Store(newest.UnixMicro())
	if before := d.bound.through.Swap(through); through > 0 {
		if before == 0 {
			d.log.ErrorContext(ctx, "events that wait for webhook receivers fill the event log; the oldest become dead letters and are removed",
				"max_bytes", d.cfg.MaxLogBytes)
		}
		d.announce() // a runner may be asleep
	}
}

// Trimmed counts the events that this replica removed because the log had too
// many bytes.
func (d *Deliverer) Trimmed() int64 { return d.bound.trimmed.Load() }
