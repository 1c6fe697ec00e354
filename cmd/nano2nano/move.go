package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nanomdm/nanomdm/cmd/nano2nano/foreign"
	"github.com/nanomdm/nanomdm/release"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// Bounds of a batch, which is one transaction of the target.
const (
	batchRecords = 200
	batchBytes   = 4 << 20
)

// mover is one run.
type mover struct {
	o     *options
	e     *env
	state *state
	src   foreign.Source
	to    storage.Importer
	store *sqlstore.Store // nil with -url and -dry-run

	tally     tally
	progress  progress
	comparing bool

	mu       sync.Mutex // for what both sides report
	problems io.Writer
}

// tally is what a run did.
type tally struct {
	certs, commands, devices storage.Imported
	channels, users, pins    int
	waiting, finished        int
	tokens, bootstraps       int
	discarded                int // first messages of UserAuthenticate
	left, noted              map[string]int
	differ, newer, surplus   int
}

func move(ctx context.Context, e *env, args []string) (err error) {
	o, err := parse(e, args)
	if err != nil {
		return err
	}
	if o.version {
		_, err := fmt.Fprintln(e.out, release.String())
		return err
	}
	m := &mover{o: o, e: e, problems: e.err}
	m.tally.left, m.tally.noted = make(map[string]int), make(map[string]int)
	if o.problems != "" {
		f, err := os.Create(o.problems)
		if err != nil {
			return usage("-problems: %v", err)
		}
		w := bufio.NewWriter(f)
		m.problems = w
		defer func() { err = errors.Join(err, w.Flush(), f.Close()) }()
	}
	if m.state, err = loadState(o, e.now()); err != nil {
		return usage("-state: %v", err)
	}
	o.source.Since, o.source.Report = m.state.Since, m.report
	if m.src, err = foreign.Open(ctx, o.source); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.src.Close()) }()
	fmt.Fprintf(e.out, "Source: %s\n", m.src)
	if err := m.openTarget(ctx); err != nil {
		return err
	}
	if m.store != nil {
		defer func() { err = errors.Join(err, m.store.Close()) }()
	}
	return m.run(ctx)
}

func (m *mover) openTarget(ctx context.Context) (err error) {
	switch {
	case m.o.dryRun:
		m.to = nowhere{}
	case m.o.url != "":
		m.to, err = newEndpoint(m.o.url, m.o.key)
	default:
		if m.store, err = openStore(ctx, m.o, m.e.now); err == nil {
			m.to = m.store
		}
	}
	return err
}

func (m *mover) run(ctx context.Context) error {
	total, err := m.src.Count(ctx)
	if err != nil {
		return err
	}
	fmt.Fprintf(m.e.out, "It holds %d devices and %d commands.\n", total.Devices, total.Commands)
	if !m.state.Since.IsZero() {
		fmt.Fprintf(m.e.out, "Reading what changed since %s.\n", m.state.Since.UTC().Format(time.RFC3339))
	}
	m.progress = progress{w: m.e.err, now: m.e.now}
	if !m.o.check {
		if err := m.transfer(ctx, total); err != nil {
			return err
		}
	}
	if m.store != nil && (m.o.compare || m.o.check) {
		if err := m.compareAll(ctx, total); err != nil {
			return err
		}
	}
	if err := m.summary(ctx); err != nil {
		return err
	}
	if !m.o.check && !m.o.dryRun {
		m.state.Done = true
		if err := m.state.save(); err != nil {
			return err
		}
	}
	return m.verdict()
}

// verdict is the error of a run that left something out.
func (m *mover) verdict() error {
	var parts []string
	for _, part := range []struct {
		n    int
		text string
	}{{total(m.tally.left), "rows were left out"}, {m.tally.differ, "devices differ"}} {
		if part.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", part.n, part.text))
		}
	}
	if len(parts) == 0 {
		return nil
	}
	return &exitError{exitPartial, errors.New(strings.Join(parts, ", "))}
}

func total(counts map[string]int) (n int) {
	for _, count := range counts {
		n += count
	}
	return n
}

// report writes a problem of a row. The comparison reads the source anew and
// would report it twice.
func (m *mover) report(p foreign.Problem) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.comparing {
		return
	}
	word, counts := "left out", m.tally.left
	if p.Note {
		word, counts = "note", m.tally.noted
	}
	counts[p.Kind]++
	fmt.Fprintf(m.problems, "%s: %s %s: %s\n", word, p.Kind, p.Key, p.Reason)
}

func (m *mover) refused(list []storage.Refusal) {
	for _, r := range list {
		m.report(foreign.Problem{Kind: r.Kind, Key: r.Key, Reason: r.Reason})
	}
}

// transfer moves everything, from where the last run stopped.
func (m *mover) transfer(ctx context.Context, total foreign.Counts) error {
	if m.state.Phase == phaseCerts {
		err := m.src.PushCerts(ctx, func(c storage.PushCert) error {
			done, err := m.to.ImportPushCerts(ctx, []storage.PushCert{c})
			m.add(&m.tally.certs, done)
			return err
		})
		if err != nil {
			return fmt.Errorf("moving push certificates: %w", err)
		}
		if err := m.reached(phaseCommands, ""); err != nil {
			return err
		}
	}
	if m.state.Phase == phaseCommands {
		m.progress.begin(phaseCommands, total.Commands)
		err := pump(ctx, m.state.After, m.src.Commands, func(c storage.CommandRecord) (int, string) { return len(c.Raw), c.UUID },
			func(ctx context.Context, batch []storage.CommandRecord) error {
				return m.put(ctx, phaseCommands, batch[len(batch)-1].UUID, len(batch), func(i, j int) error {
					done, err := m.to.ImportCommands(ctx, batch[i:j])
					m.add(&m.tally.commands, done)
					return err
				}, func(i int) string { return batch[i].UUID })
			})
		if err != nil {
			return fmt.Errorf("moving commands: %w", err)
		}
		if err := m.reached(phaseDevices, ""); err != nil {
			return err
		}
	}
	m.progress.begin(phaseDevices, total.Devices)
	err := pump(ctx, m.state.After, m.src.Devices, deviceSize, func(ctx context.Context, batch []*storage.DeviceRecord) error {
		for _, d := range batch {
			m.tally.count(d)
		}
		return m.put(ctx, phaseDevices, batch[len(batch)-1].Channel.ID, len(batch), func(i, j int) error {
			done, err := m.to.ImportDevices(ctx, batch[i:j])
			m.add(&m.tally.devices, done)
			return err
		}, func(i int) string { return batch[i].Channel.ID })
	})
	if err != nil {
		return fmt.Errorf("moving devices: %w", err)
	}
	m.progress.end()
	return nil
}

func (m *mover) add(into *storage.Imported, done storage.Imported) {
	into.Written += done.Written
	into.Kept += done.Kept
	m.refused(done.Refused)
}

func (m *mover) reached(phase, after string) error {
	if m.o.dryRun {
		m.state.Phase, m.state.After = phase, after
		return nil
	}
	return m.state.reached(phase, after, m.e.now())
}

// put writes a batch. If the target cannot take it, each record is tried by
// itself, so that one bad record leaves out no other one.
func (m *mover) put(ctx context.Context, phase, last string, n int, write func(i, j int) error, key func(i int) string) error {
	err := write(0, n)
	if err != nil && m.recordsFault(ctx, err) {
		for i := range n {
			if err = write(i, i+1); err != nil {
				if !m.recordsFault(ctx, err) {
					break
				}
				m.report(foreign.Problem{Kind: strings.TrimSuffix(phase, "s"), Key: key(i), Reason: err.Error()})
				err = nil
			}
		}
	}
	if err != nil {
		return err
	}
	m.progress.step(n)
	return m.reached(phase, last)
}

// recordsFault says whether an error may be that of one record. An endpoint
// refuses records without an error.
func (m *mover) recordsFault(ctx context.Context, err error) bool {
	return m.store != nil && ctx.Err() == nil &&
		!errors.Is(err, storage.ErrUnavailable) && !errors.Is(err, storage.ErrBusy) && !errors.Is(err, storage.ErrClosed)
}

// deviceSize is about how many bytes a device holds.
func deviceSize(d *storage.DeviceRecord) (size int, key string) {
	channel := func(c *storage.ChannelRecord) {
		for _, item := range c.Queue {
			size += 200
			if item.Result != nil {
				size += len(item.Result.Raw)
			}
		}
	}
	size = len(d.Authenticate.Raw) + len(d.TokenUpdate.Raw) + len(d.UnlockToken.Value)
	channel(&d.Channel)
	for i := range d.Users {
		size += len(d.Users[i].TokenUpdate.Raw) + len(d.Users[i].UserAuthenticate.Raw)
		channel(&d.Users[i].Channel)
	}
	return size, d.Channel.ID
}

// pump reads records and writes them in batches, the next batch being read
// while one is written.
func pump[T any](ctx context.Context, after string, read func(context.Context, string, func(T) error) error,
	size func(T) (int, string), write func(context.Context, []T) error) error {
	batches := make(chan []T)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(batches)
		var batch []T
		bytes := 0
		send := func() error {
			if len(batch) == 0 {
				return nil
			}
			select {
			case batches <- batch:
				batch, bytes = nil, 0
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		err := read(ctx, after, func(record T) error {
			batch = append(batch, record)
			n, _ := size(record)
			if bytes += n; len(batch) < batchRecords && bytes < batchBytes {
				return nil
			}
			return send()
		})
		if err != nil {
			return err
		}
		return send()
	})
	g.Go(func() error {
		for batch := range batches {
			if err := write(ctx, batch); err != nil {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}

// count adds what a device holds.
func (t *tally) count(d *storage.DeviceRecord) {
	t.channels += 1 + len(d.Users)
	t.users += len(d.Users)
	t.pins += len(d.Pins)
	if len(d.UnlockToken.Value) > 0 {
		t.tokens++
	}
	if len(d.BootstrapToken.Value) > 0 {
		t.bootstraps++
	}
	queue := func(c *storage.ChannelRecord) {
		for _, item := range c.Queue {
			if item.State.Terminal() {
				t.finished++
			} else {
				t.waiting++
			}
		}
	}
	queue(&d.Channel)
	for i := range d.Users {
		queue(&d.Users[i].Channel)
		if d.Users[i].UserAuthenticateDiscarded {
			t.discarded++
		}
	}
}

// summary prints what was done and what was left.
func (m *mover) summary(ctx context.Context) error {
	t, out := &m.tally, m.e.out
	verb := "Moved"
	if m.o.dryRun {
		verb = "Would move"
	}
	if !m.o.check {
		fmt.Fprintf(out, "%s: %d devices, %d user channels, %d certificate pins, %d unlock tokens, %d bootstrap tokens,\n", verb, t.devices.Written, t.users, t.pins, t.tokens, t.bootstraps)
		fmt.Fprintf(out, "  %d commands, %d waiting and %d finished queue rows, %d push certificates.\n", t.commands.Written+t.commands.Kept, t.waiting, t.finished, t.certs.Written)
		if t.devices.Kept > 0 {
			fmt.Fprintf(out, "Kept as they are here: %d channels that spoke to this server since.\n", t.devices.Kept)
		}
	}
	if m.o.url != "" {
		fmt.Fprintf(out, "Lost through -url: all of the above but devices and user channels. Use -to to keep it.\n")
	}
	if t.discarded > 0 {
		fmt.Fprintf(out, "Of %d users the first UserAuthenticate message is left, as the second one counts.\n", t.discarded)
	}
	left, err := m.src.Left(ctx)
	if err != nil {
		return err
	}
	for _, part := range left {
		fmt.Fprintf(out, "Left at the source: %d %s.\n", part.Count, part.What)
	}
	for _, list := range []struct {
		counts map[string]int
		text   string
	}{{t.left, "Left out"}, {t.noted, "Notes"}} {
		for _, kind := range sortedKeys(list.counts) {
			fmt.Fprintf(out, "%s: %d of kind %s.\n", list.text, list.counts[kind], kind)
		}
	}
	return nil
}

func sortedKeys(counts map[string]int) []string {
	keys := make([]string, 0, len(counts))
	for key := range counts {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}
