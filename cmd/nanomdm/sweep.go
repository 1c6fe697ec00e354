package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

const (
	// sweepTTL is how long the sweeps stand still when their replica dies.
	sweepTTL = 15 * time.Second
	// queueEvery is how late a command may become due, or expire for those who
	// look at its state; a device is never offered an expired one.
	queueEvery = time.Second
	// keysAge is how long an idempotency key is remembered, and keysEvery how
	// often old ones are looked for.
	keysAge   = 7 * 24 * time.Hour
	keysEvery = time.Hour
	// historyEvery is how often history is looked through.
	historyEvery = time.Hour
	// ackedEvery and ackedAge are when an acknowledged command goes with
	// delete=1. Its device has had the time to repeat its report by then.
	ackedEvery = 5 * time.Second
	ackedAge   = 10 * time.Second
	// sweepRows is how many rows one transaction looks at.
	sweepRows = 256
	// sweepPause is the least pause between two removals. It is as long as the
	// removal took, if that is longer, so that half of the time is others'.
	sweepPause = 20 * time.Millisecond
	// lookBack is how far before the end of the last look the next one begins:
	// a transaction may commit later than its time says.
	lookBack = 15 * time.Minute
)

// sweepStore is what the sweeps need.
type sweepStore interface {
	storage.Leases
	storage.Sweeps
	storage.AuditUpkeep
	storage.EnqueueUpkeep
}

// sweep adds the sweeps of queue and history, each under its lease.
func (b *building) sweep(store *sqlstore.Store) {
	holder := rand.Text()
	b.s.background("queue sweep", func(ctx context.Context) error {
		return lease.Hold(ctx, store, "queue", holder, sweepTTL, b.log, (&queueSweep{store: store, log: b.log, now: time.Now}).work)
	})
	h := &historySweep{
		store: store, log: b.log, now: time.Now, commands: b.o.retainCommands, results: b.o.retainResults,
		audit: b.o.retainAudit, deleteAcked: b.o.storageOptions.deleteAcked,
	}
	if h.idle() {
		return
	}
	b.s.background("history sweep", func(ctx context.Context) error {
		return lease.Hold(ctx, store, "history", holder, sweepTTL, b.log, h.work)
	})
}

// queueSweep ends commands whose time is over, queues those whose time has
// come and forgets old idempotency keys.
type queueSweep struct {
	store sweepStore
	log   *slog.Logger
	now   func() time.Time
}

func (q *queueSweep) work(ctx context.Context, current func() storage.Lease) error {
	var forgot time.Time // when keys were last looked for; another holder begins anew
	forget := func(ctx context.Context, l storage.Lease, limit int) (int, error) {
		now := q.now()
		if now.Sub(forgot) < keysEvery {
			return 0, nil
		}
		n, err := q.store.ForgetEnqueued(ctx, l, now.Add(-keysAge), limit)
		if err == nil && n < limit {
			forgot = now
		}
		return n, err
	}
	return repeat(ctx, queueEvery, q.log, "cannot sweep the queue", func() error {
		for _, step := range []func(context.Context, storage.Lease, int) (int, error){
			q.store.ExpireCommands, q.store.PromoteCommands, forget,
		} {
			for {
				n, err := step(ctx, current(), sweepRows)
				if err != nil {
					return err
				}
				if n < sweepRows {
					break
				}
			}
		}
		return nil
	})
}

// repeat calls step at once and then every so often until ctx ends. When the
// lease is lost it waits for lease.Hold to notice. Other failures are logged,
// once for each outage.
func repeat(ctx context.Context, every time.Duration, log *slog.Logger, complaint string, step func() error) error {
	failing := false
	for {
		err := step()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, storage.ErrLeaseLost):
			<-ctx.Done()
			return ctx.Err()
		case err != nil && !failing:
			log.WarnContext(ctx, complaint, "error", err)
		}
		failing = err != nil
		if err := wait(ctx, every); err != nil {
			return err
		}
	}
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// historySweep removes what is older than the operator wants to keep.
type historySweep struct {
	store             sweepStore
	log               *slog.Logger
	now               func() time.Time
	commands, results storage.Retention
	audit             time.Duration
	deleteAcked       bool

	// looked is where each rule's look through history begins. It belongs to
	// work: another holder begins from the beginning.
	looked map[string]time.Time
}

// idle says that everything is kept for ever.
func (h *historySweep) idle() bool {
	return !h.deleteAcked && h.audit == 0 && len(rules(h.commands)) == 0 && len(rules(h.results)) == 0
}

func (h *historySweep) work(ctx context.Context, current func() storage.Lease) error {
	h.looked = make(map[string]time.Time)
	every := historyEvery
	if h.deleteAcked {
		every = ackedEvery
	}
	var last time.Time
	return repeat(ctx, every, h.log, "cannot remove history", func() error {
		if h.deleteAcked {
			if _, err := h.finished(ctx, current, "delete", storage.Acknowledged, rule{age: ackedAge}); err != nil {
				return err
			}
		}
		if now := h.now(); last.IsZero() || now.Sub(last) >= historyEvery {
			if err := h.retain(ctx, current); err != nil {
				return err
			}
			last = now
		}
		return nil
	})
}

// finishedStates are those that a row ends in.
var finishedStates = [...]storage.State{
	storage.Acknowledged, storage.Failed, storage.FormatError, storage.Cancelled, storage.Expired, storage.Superseded,
}

// retain looks once through history for what is too old.
func (h *historySweep) retain(ctx context.Context, current func() storage.Lease) error {
	if err := h.retainAudit(ctx, current); err != nil {
		return err
	}
	var total storage.Removed
	for _, r := range rules(h.results) {
		removed, err := h.look(ctx, current, "results "+r.requestType, r, h.store.RemoveResults)
		add(&total, removed)
		if err != nil {
			return err
		}
	}
	for _, r := range rules(h.commands) {
		for _, state := range finishedStates {
			removed, err := h.finished(ctx, current, "commands", state, r)
			add(&total, removed)
			if err != nil {
				return err
			}
		}
	}
	if total.Rows == 0 && total.Results == 0 {
		return nil
	}
	size, err := h.store.HistorySize(ctx)
	if err != nil {
		return err
	}
	h.log.InfoContext(ctx, "removed old history",
		"rows", total.Rows, "results", total.Results, "bytes", total.Bytes, "commands", total.Commands,
		slog.Group("left", "waiting", size.Waiting, "finished", size.Finished, "results", size.Results, "commands", size.Commands))
	return nil
}

// retainAudit removes old audit records.
func (h *historySweep) retainAudit(ctx context.Context, current func() storage.Lease) error {
	if h.audit == 0 {
		return nil
	}
	total := 0
	for {
		began := time.Now()
		n, err := h.store.RemoveAudit(ctx, current(), h.now().Add(-h.audit), sweepRows)
		if err != nil {
			return err
		}
		total += n
		if n < sweepRows {
			break
		}
		if err := wait(ctx, max(sweepPause, time.Since(began))); err != nil {
			return err
		}
	}
	if total > 0 {
		h.log.InfoContext(ctx, "removed old audit records", "records", total)
	}
	return nil
}

func (h *historySweep) finished(ctx context.Context, current func() storage.Lease, name string, state storage.State, r rule) (storage.Removed, error) {
	return h.look(ctx, current, fmt.Sprintf("%s %s %s", name, state, r.requestType), r,
		func(ctx context.Context, l storage.Lease, removal storage.Removal) (storage.Removed, error) {
			return h.store.RemoveFinished(ctx, l, state, removal)
		})
}

// look applies a rule from where its last look ended. What was left then is of
// other types, and need not be looked at again.
func (h *historySweep) look(ctx context.Context, current func() storage.Lease, name string, r rule,
	step func(context.Context, storage.Lease, storage.Removal) (storage.Removed, error)) (total storage.Removed, err error) {
	removal := storage.Removal{
		Before: h.now().Add(-r.age), Type: r.requestType, Except: r.except, Limit: sweepRows,
		After: storage.HistoryKey{At: h.looked[name]},
	}
	for {
		began := time.Now()
		out, err := step(ctx, current(), removal)
		if err != nil {
			return total, err
		}
		add(&total, out)
		if out.Done {
			break
		}
		removal.After = out.Next
		h.looked[name] = out.Next.At.Add(-lookBack)
		if err := wait(ctx, max(sweepPause, time.Since(began))); err != nil {
			return total, err
		}
	}
	h.looked[name] = removal.Before.Add(-lookBack)
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
	except      []string // but these, which have rules of their own
	age         time.Duration
}

// rules are those that remove something.
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

var requestTypePattern = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9]*$`)

// parseRetention reads ages such as 30d,InstalledApplicationList=2d.
func parseRetention(s string) (storage.Retention, error) {
	var r storage.Retention
	hasDefault := false
	for _, field := range fields(s) {
		requestType, text, isType := strings.Cut(field, "=")
		if !isType {
			requestType, text = "", field
		}
		age, err := parseAge(text)
		if err != nil {
			return storage.Retention{}, err
		}
		switch _, twice := r.ByType[requestType]; {
		case !isType && hasDefault:
			return storage.Retention{}, fmt.Errorf("%q is a second age for all request types: keep one", text)
		case !isType:
			hasDefault, r.Default = true, age
		case !requestTypePattern.MatchString(requestType):
			return storage.Retention{}, fmt.Errorf("%q is not a request type such as InstalledApplicationList", requestType)
		case twice:
			return storage.Retention{}, fmt.Errorf("%s is given twice: keep one", requestType)
		default:
			if r.ByType == nil {
				r.ByType = make(map[string]time.Duration)
			}
			r.ByType[requestType] = age
		}
	}
	return r, nil
}

// maxDays keeps ages in what a Duration holds.
const maxDays = 36500

// parseAge reads a duration of Go's, or days as 30d; 0 is for ever.
func parseAge(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.Atoi(days)
		if err == nil && n >= 0 && n <= maxDays {
			return time.Duration(n) * 24 * time.Hour, nil
		}
	} else if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return d, nil
	}
	return 0, fmt.Errorf("%q is not an age such as 30d or 12h; 0 is for ever", s)
}

func parsePositiveAge(s string) (time.Duration, error) {
	d, err := parseAge(s)
	if err != nil || d == 0 {
		return 0, fmt.Errorf("%q is not an age above zero, such as 3d or 12h", s)
	}
	return d, nil
}
