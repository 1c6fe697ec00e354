package upkeep

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// historyEvery is the interval between two scans of the history.
	historyEvery = time.Hour
	// ackedEvery is the interval between two removals of acknowledged commands
	// with DeleteAcked, ackedAge the age at which they are removed: by then the
	// device has had the time to repeat its report.
	ackedEvery = 5 * time.Second
	ackedAge   = 10 * time.Second
	// minPause is the least pause between two removals. The pause is as long as
	// the removal, if that is longer, so that others have half of the time.
	minPause = 20 * time.Millisecond
	// overlap is how far before the end of the last scan the next one begins: a
	// transaction may commit later than its time says.
	overlap = 15 * time.Minute
)

// History removes records that are older than the operator wants to keep.
// Store, Log and Now are required; a zero age keeps for ever.
type History struct {
	Store Store
	Log   *slog.Logger
	Now   func() time.Time

	Commands, Results storage.Retention
	Audit             time.Duration
	Users             time.Duration // without an enrollment
	DeleteAcked       bool          // remove acknowledged commands at once

	// scanned is where the next scan of each rule begins. Each call of Work
	// begins anew.
	scanned map[string]time.Time
}

// Idle reports whether everything is kept for ever, so that there is no work.
func (h *History) Idle() bool {
	return !h.DeleteAcked && h.Audit == 0 && h.Users == 0 && len(rules(h.Commands)) == 0 && len(rules(h.Results)) == 0
}

// Work runs until ctx ends, under the lease that current returns.
func (h *History) Work(ctx context.Context, current func() storage.Lease) error {
	h.scanned = make(map[string]time.Time)
	every := historyEvery
	if h.DeleteAcked {
		every = ackedEvery
	}
	var last time.Time
	return repeat(ctx, every, h.Log, "cannot remove history", func() error {
		if h.DeleteAcked {
			if _, err := h.removeFinished(ctx, current, "delete", storage.Acknowledged, rule{age: ackedAge}); err != nil {
				return err
			}
		}
		if now := h.Now(); last.IsZero() || now.Sub(last) >= historyEvery {
			if err := h.removeOld(ctx, current); err != nil {
				return err
			}
			last = now
		}
		return nil
	})
}

// finishedStates are the states in which a queue row ends.
var finishedStates = [...]storage.State{
	storage.Acknowledged, storage.Failed, storage.FormatError, storage.Cancelled, storage.Expired, storage.Superseded,
}

// removeOld scans the history once.
func (h *History) removeOld(ctx context.Context, current func() storage.Lease) error {
	if err := h.removeByAge(ctx, current, "audit records", h.Audit, h.Store.RemoveAudit); err != nil {
		return err
	}
	if err := h.removeByAge(ctx, current, "users without an enrollment", h.Users, h.Store.RemoveUsers); err != nil {
		return err
	}
	var total storage.Removed
	for _, r := range rules(h.Results) {
		removed, err := h.scan(ctx, current, "results "+r.requestType, r, h.Store.RemoveResults)
		add(&total, removed)
		if err != nil {
			return err
		}
	}
	for _, r := range rules(h.Commands) {
		for _, state := range finishedStates {
			removed, err := h.removeFinished(ctx, current, "commands", state, r)
			add(&total, removed)
			if err != nil {
				return err
			}
		}
	}
	if total.Rows == 0 && total.Results == 0 {
		return nil
	}
	size, err := h.Store.HistorySize(ctx)
	if err != nil {
		return err
	}
	h.Log.InfoContext(ctx, "removed old history",
		"rows", total.Rows, "results", total.Results, "bytes", total.Bytes, "commands", total.Commands,
		slog.Group("left", "waiting", size.Waiting, "finished", size.Finished, "results", size.Results, "commands", size.Commands))
	return nil
}

// removeByAge removes rows of one kind that are older than an age.
func (h *History) removeByAge(ctx context.Context, current func() storage.Lease, kind string, age time.Duration,
	remove func(context.Context, storage.Lease, time.Time, int) (int, error),
) error {
	if age == 0 {
		return nil
	}
	total := 0
	for {
		began := time.Now()
		n, err := remove(ctx, current(), h.Now().Add(-age), batchRows)
		if err != nil {
			return err
		}
		total += n
		if n < batchRows {
			break
		}
		if err := backoff.Sleep(ctx, max(minPause, time.Since(began))); err != nil {
			return err
		}
	}
	if total > 0 {
		h.Log.InfoContext(ctx, "removed old rows", "kind", kind, "rows", total)
	}
	return nil
}

func (h *History) removeFinished(ctx context.Context, current func() storage.Lease, name string, state storage.State, r rule) (storage.Removed, error) {
	return h.scan(ctx, current, fmt.Sprintf("%s %s %s", name, state, r.requestType), r,
		func(ctx context.Context, l storage.Lease, removal storage.Removal) (storage.Removed, error) {
			return h.Store.RemoveFinished(ctx, l, state, removal)
		})
}

// scan applies a rule from where its last scan ended. Rows that the last scan
// left are of other types and need no second look.
func (h *History) scan(ctx context.Context, current func() storage.Lease, name string, r rule,
	remove func(context.Context, storage.Lease, storage.Removal) (storage.Removed, error)) (total storage.Removed, err error) {
	removal := storage.Removal{
		Before: h.Now().Add(-r.age), Type: r.requestType, Except: r.except, Limit: batchRows,
		After: storage.HistoryKey{At: h.scanned[name]},
	}
	for {
		began := time.Now()
		out, err := remove(ctx, current(), removal)
		if err != nil {
			return total, err
		}
		add(&total, out)
		if out.Done {
			break
		}
		removal.After = out.Next
		h.scanned[name] = out.Next.At.Add(-overlap)
		if err := backoff.Sleep(ctx, max(minPause, time.Since(began))); err != nil {
			return total, err
		}
	}
	h.scanned[name] = removal.Before.Add(-overlap)
	return total, nil
}

func add(total *storage.Removed, r storage.Removed) {
	total.Looked += r.Looked
	total.Rows += r.Rows
	total.Results += r.Results
	total.Bytes += r.Bytes
	total.Commands += r.Commands
}

// rule is one age of a retention.
type rule struct {
	requestType string   // empty: all types
	except      []string // types with rules of their own
	age         time.Duration
}

// rules returns the ages that remove something.
func rules(r storage.Retention) []rule {
	types := slices.Sorted(maps.Keys(r.ByType))
	var all []rule
	for _, t := range types {
		if age := r.ByType[t]; age > 0 {
			all = append(all, rule{requestType: t, age: age})
		}
	}
	if r.Default > 0 {
		all = append(all, rule{except: types, age: r.Default})
	}
	return all
}
