package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// commandsEach is how many commands a device fetches and acknowledges.
const commandsEach = 10

const (
	// chunkIDs is how many ids a call has that queues a command for all devices.
	chunkIDs = 1000
	// enqueueCallers callers queue callerCalls commands each, for callerIDs ids.
	enqueueCallers, callerCalls, callerIDs = 8, 20, 500
)

// row is one measurement, the medians of its rounds.
type row struct {
	name            string
	connections     int
	ratio           float64   // to the reference, 0 if it had no part
	low, high       float64   // of the rounds' ratios
	rate, reference float64   // requests a second
	rates           []float64 // of the rounds
	p50, p99        time.Duration
	p99s            []time.Duration // of the rounds
	daemon, db      time.Duration   // processor time a request
	referenceCPU    time.Duration
	allocations     float64 // a request
	statements      float64 // a request, by the daemon's count
	commits         float64 // group commits a request, by the daemon's count
	dbCommits       float64 // writing transactions a request, by the database's
	dbCounts        bool
	requests        int
	failed          int
	failure         string
}

// report is what was measured on one engine.
type report struct {
	engine  engine
	note    string
	rows    []row
	enqueue float64 // rows a second
	// peerEnqueue is rows a second of NanoMDM's statements, and enqueueRatio the
	// ratio to them; 0 if the engine is none of NanoMDM's.
	peerEnqueue, enqueueRatio float64
	loaded                    int64 // memory of the daemon, with many devices; 0 if it was not measured
	resident                  int64
}

// find returns the row of a name, with that many connections unless they are 0, and
// whether there is one.
func (r *report) find(name string, connections int) (row, bool) {
	i := slices.IndexFunc(r.rows, func(m row) bool { return m.name == name && (m.connections == connections || connections == 0) })
	if i < 0 {
		return row{}, false
	}
	return r.rows[i], true
}

// run is the measuring of one engine.
type bench struct {
	o         *options
	ca        *mdmtest.CA
	db        *database
	daemon    *process
	reference *process
	made      int // devices so far
	report    *report
}

func measureEngine(ctx context.Context, o *options, e engine) (_ *report, err error) {
	dir, err := os.MkdirTemp("", "mdmbench-")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err == nil { // or the daemon's log is of use
			err = os.RemoveAll(dir)
		}
	}()
	b := &bench{o: o, report: &report{engine: e}}
	if b.ca, err = mdmtest.NewCA(); err != nil {
		return nil, err
	}
	if err := b.ca.Save(dir); err != nil {
		return nil, err
	}
	caFile := filepath.Join(dir, "ca.pem")
	if b.db, err = e.create(ctx, dir); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, b.db.drop()) }()
	b.report.note = b.db.note
	if b.reference, err = startReference(caFile); err != nil {
		return nil, err
	}
	defer b.reference.stop()
	if b.daemon, err = startDaemon(ctx, o.program, dir, caFile, e.storage, b.db.dsn); err != nil {
		return nil, err
	}
	defer b.daemon.stop()
	if err := b.all(ctx); err != nil {
		return nil, fmt.Errorf("%w (the daemon's log is in %s)", err, dir)
	}
	b.report.resident, err = b.daemon.resident()
	return b.report, err
}

// measurement is one of those that -only chooses from.
type measurement struct {
	name string
	make func(b *bench, ctx context.Context, devices []device) error
}

// inOrder are the measurements in an order in which nothing disturbs what
// follows: commands that wait come last. Enrolling, which gives the others
// their devices, goes before them.
var inOrder = [...]measurement{
	{"idle", (*bench).idles},
	{"history", (*bench).history},
	{"fetch", (*bench).fetch},
	{"mixed", (*bench).mixed},
	{"webhook", (*bench).webhook},
	{"fleet", (*bench).largeFleet},
	{"enqueue", (*bench).enqueue},
}

func measurements() []string {
	names := []string{"enroll"}
	for _, m := range inOrder {
		names = append(names, m.name)
	}
	return names
}

func (o *options) wants(name string) bool {
	return o.only == "" || slices.Contains(strings.Split(o.only, ","), name)
}

// all measures everything that is wanted.
func (b *bench) all(ctx context.Context) error {
	enroll := b.enroll
	if !b.o.wants("enroll") {
		enroll = func(ctx context.Context) ([]device, error) { return b.add(ctx, b.o.devices) }
	}
	devices, err := enroll(ctx)
	if err != nil {
		return err
	}
	for _, m := range inOrder {
		if !b.o.wants(m.name) {
			continue
		}
		if err := m.make(b, ctx, devices); err != nil {
			return err
		}
	}
	return nil
}

// sample is one round against one server.
type sample struct {
	outcome
	cpu time.Duration
}

func (b *bench) drive(ctx context.Context, p *process, l load, visits [][]message) (sample, error) {
	before, err := p.cpu()
	if err != nil {
		return sample{}, err
	}
	o, err := drive(ctx, p.addr, l, visits)
	if err != nil {
		return sample{}, err
	}
	after, err := p.cpu()
	return sample{o, after - before}, err
}

// series is what the rounds of one measurement found.
type series struct {
	name                      string
	load                      load
	ratios, rates, references []float64
	p50s, p99s                []time.Duration

	// These are of all rounds.
	requests, referenceRequests                 int
	daemon, db, reference                       time.Duration // processor time
	statements, commits, allocations, dbCommits float64
	dbCounts                                    bool
	failed                                      int
	failure                                     string
}

// compare makes the rounds of one measurement, with the requests that prepare
// makes for each.
func (b *bench) compare(ctx context.Context, name string, l load,
	prepare func(round int) ([][]message, error),
) error {
	s := &series{name: name, load: l}
	for round := range b.o.rounds {
		visits, err := prepare(round)
		if err != nil {
			return err
		}
		if err := b.round(ctx, s, visits); err != nil {
			return err
		}
	}
	b.conclude(s)
	return nil
}

// round has the reference and the daemon take turns with the same requests.
// The reference has no part where requests are sent at a rate: it keeps up.
func (b *bench) round(ctx context.Context, s *series, visits [][]message) error {
	var ref sample
	var err error
	if s.load.rate == 0 {
		lax := s.load
		lax.lax = true
		if ref, err = b.drive(ctx, b.reference, lax, visits); err != nil {
			return err
		}
		if ref.failed > 0 {
			return fmt.Errorf("the reference failed: %s", ref.failure)
		}
	}
	before, err := b.readCounters(ctx)
	if err != nil {
		return err
	}
	var o sample
	err = b.profiled(ctx, fmt.Sprintf("%s-%d", s.name, s.load.connections), func() (err error) {
		o, err = b.drive(ctx, b.daemon, s.load, visits)
		return err
	})
	if err != nil {
		return err
	}
	after, err := b.readCounters(ctx)
	if err != nil {
		return err
	}
	s.add(o, ref, before, after)
	return nil
}

// counters are what daemon and database have counted so far.
type counters struct {
	daemon  map[string]float64 // by metric
	cpu     time.Duration      // of the database
	commits float64
	known   bool // the database counts commits
}

func (b *bench) readCounters(ctx context.Context) (c counters, err error) {
	if c.daemon, err = b.daemon.metrics(ctx); err != nil {
		return c, err
	}
	if c.commits, c.known, err = b.db.commits(ctx); err != nil {
		return c, err
	}
	c.cpu, err = b.db.cpu()
	return c, err
}

// add adds a round: of the daemon, of the reference if there was one, and the
// counters before and after the daemon's turn.
func (s *series) add(o, ref sample, before, after counters) {
	delta := func(name string) float64 { return after.daemon[name] - before.daemon[name] }
	s.rates = append(s.rates, o.rate())
	if s.load.rate == 0 {
		s.ratios, s.references = append(s.ratios, o.rate()/ref.rate()), append(s.references, ref.rate())
	}
	s.p50s, s.p99s = append(s.p50s, o.percentile(0.5)), append(s.p99s, o.percentile(0.99))
	s.daemon, s.db, s.reference = s.daemon+o.cpu, s.db+after.cpu-before.cpu, s.reference+ref.cpu
	s.statements += delta("nanomdm_store_statements_total")
	s.commits += delta("nanomdm_store_commit_messages_count")
	s.allocations += delta("go_memstats_mallocs_total")
	s.dbCommits, s.dbCounts = s.dbCommits+after.commits-before.commits, after.known
	s.requests, s.referenceRequests = s.requests+o.requests, s.referenceRequests+ref.requests
	s.failed += o.failed
	if s.failure == "" {
		s.failure = o.failure
	}
}

// conclude reports what the rounds of a measurement found.
func (b *bench) conclude(s *series) {
	n := float64(s.requests)
	m := row{
		name: s.name, connections: s.load.connections,
		rate: median(s.rates), rates: s.rates, p50: median(s.p50s), p99: median(s.p99s), p99s: s.p99s,
		daemon: s.daemon / time.Duration(s.requests), db: s.db / time.Duration(s.requests),
		statements: s.statements / n, commits: s.commits / n, allocations: s.allocations / n,
		dbCommits: s.dbCommits / n, dbCounts: s.dbCounts,
		requests: s.requests, failed: s.failed, failure: s.failure,
	}
	compared := ""
	if len(s.ratios) > 0 {
		m.ratio, m.low, m.high = median(s.ratios), slices.Min(s.ratios), slices.Max(s.ratios)
		m.reference = median(s.references)
		m.referenceCPU = s.reference / time.Duration(s.referenceRequests)
		compared = fmt.Sprintf("  %.2f of the reference (%.2f to %.2f, %v)", m.ratio, m.low, m.high, m.referenceCPU.Round(time.Microsecond))
	}
	b.report.rows = append(b.report.rows, m)
	fmt.Fprintf(os.Stderr, "%-10s  %-32s %3d connections  %6.0f/s%s  p99 %v  daemon %v + database %v  %d failed %s\n",
		b.db.label, m.name, m.connections, m.rate, compared, m.p99.Round(100*time.Microsecond),
		m.daemon.Round(time.Microsecond), m.db.Round(time.Microsecond), m.failed, m.failure)
}

// median of the values, which stay in their order.
func median[T float64 | time.Duration](values []T) T {
	values = slices.Sorted(slices.Values(values))
	n := len(values)
	return (values[(n-1)/2] + values[n/2]) / 2
}

// more makes devices that are not enrolled yet.
func (b *bench) more(ctx context.Context, count int) ([]device, error) {
	devices, err := newDevices(ctx, b.ca, b.made, count)
	b.made += count
	return devices, err
}

// enroll measures enrolling and returns the devices of the first round.
func (b *bench) enroll(ctx context.Context) ([]device, error) {
	var first []device
	err := b.compare(ctx, "enroll", load{connections: 64}, func(round int) ([][]message, error) {
		devices, err := b.more(ctx, b.o.devices)
		if err != nil {
			return nil, err
		}
		if round == 0 {
			first = devices
		}
		return parallel(ctx, len(devices), func(i int) ([]message, error) { return devices[i].enrollment() })
	})
	return first, err
}

// add enrolls further devices, unmeasured.
func (b *bench) add(ctx context.Context, count int) ([]device, error) {
	devices, err := b.more(ctx, count)
	if err != nil {
		return nil, err
	}
	visits, err := parallel(ctx, count, func(i int) ([]message, error) { return devices[i].enrollment() })
	if err != nil {
		return nil, err
	}
	return devices, b.flawless(ctx, visits)
}

// flawless drives visits, unmeasured, at the daemon.
func (b *bench) flawless(ctx context.Context, visits [][]message) error {
	o, err := drive(ctx, b.daemon.addr, load{connections: 64}, visits)
	if err == nil && o.failed > 0 {
		err = fmt.Errorf("%d of %d requests failed: %s", o.failed, o.requests, o.failure)
	}
	return err
}

// polls is a visit of one poll for each device.
func polls(ctx context.Context, devices []device) ([][]message, error) {
	return parallel(ctx, len(devices), func(i int) ([]message, error) {
		m, err := devices[i].idle("")
		return []message{m}, err
	})
}

func (b *bench) idles(ctx context.Context, devices []device) error {
	for _, connections := range []int{2, 8, 64, 128, 256} {
		if err := b.idle(ctx, "idle", devices, connections); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) idle(ctx context.Context, name string, devices []device, connections int) error {
	visits, err := polls(ctx, devices)
	if err != nil {
		return err
	}
	// Whatever is done once for each device is done before.
	if err := b.flawless(ctx, visits); err != nil {
		return err
	}
	return b.compare(ctx, name, load{connections: connections, duration: b.o.duration}, func(int) ([][]message, error) { return visits, nil })
}

// visits queues commands for the devices and makes the visits that fetch and
// acknowledge them.
func (b *bench) visits(ctx context.Context, devices []device, commands int) ([][]message, error) {
	return b.repeatedVisits(ctx, devices, commands, 1)
}

// repeatedVisits is visits for devices that come so often, each time for that
// many commands.
func (b *bench) repeatedVisits(ctx context.Context, devices []device, commands, times int) ([][]message, error) {
	var uuids []string
	for range commands * times {
		uuid, err := enqueue(ctx, b.daemon, devices)
		if err != nil {
			return nil, err
		}
		uuids = append(uuids, uuid)
	}
	return parallel(ctx, len(devices)*times, func(i int) ([]message, error) {
		now, after := uuids[i/len(devices)*commands:], ""
		if len(now) > commands {
			now, after = now[:commands], now[commands]
		}
		return devices[i%len(devices)].fetch(now, after)
	})
}

func (b *bench) fetch(ctx context.Context, devices []device) error {
	return b.compare(ctx, "fetch and acknowledge", load{connections: 64}, func(int) ([][]message, error) {
		return b.visits(ctx, devices, commandsEach)
	})
}

// mixed is three polls for each device, a command for one in four, and a
// TokenUpdate for one in ten, all at once.
func (b *bench) mixed(ctx context.Context, devices []device) error {
	quarter := devices[:(len(devices)+3)/4]
	return b.compare(ctx, "mixed", load{connections: 64, lax: true}, func(int) ([][]message, error) {
		idle, err := polls(ctx, devices)
		if err != nil {
			return nil, err
		}
		fetches, err := b.visits(ctx, quarter, 1)
		if err != nil {
			return nil, err
		}
		var visits [][]message
		for i := range idle {
			visits = append(visits, idle[i], idle[(i*7)%len(idle)], idle[(i*13)%len(idle)])
			if i < len(fetches) {
				visits = append(visits, fetches[i])
			}
			if i%10 == 0 {
				both, err := devices[i].enrollment()
				if err != nil {
					return nil, err
				}
				visits = append(visits, both[1:])
			}
		}
		return visits, nil
	})
}

// history measures idle of devices with none, some and many finished commands.
func (b *bench) history(ctx context.Context, _ []device) error {
	if b.o.history == 0 {
		return nil
	}
	devices, err := b.add(ctx, b.o.historyFleet)
	if err != nil {
		return err
	}
	finished := 0
	for _, goal := range []int{0, b.o.history / 10, b.o.history} {
		for finished < goal {
			n := min(25, goal-finished)
			visits, err := b.visits(ctx, devices, n)
			if err != nil {
				return err
			}
			if err := b.flawless(ctx, visits); err != nil {
				return err
			}
			finished += n
		}
		if err := b.idle(ctx, historyName(goal), devices, 8); err != nil {
			return err
		}
	}
	return nil
}

func historyName(finished int) string { return fmt.Sprintf("idle, %d finished commands", finished) }

func fleetName(enrollments int) string { return fmt.Sprintf("idle, %d enrollments", enrollments) }

// largeFleet measures idle before and after many more have enrolled.
func (b *bench) largeFleet(ctx context.Context, devices []device) error {
	if b.o.fleet == 0 {
		return nil
	}
	if err := b.idle(ctx, fleetName(b.o.devices), devices, 8); err != nil {
		return err
	}
	for b.made < b.o.fleet {
		n := min(10_000, b.o.fleet-b.made)
		more, err := b.add(ctx, n/pollingShare)
		if err != nil {
			return err
		}
		devices = append(devices, more...)
		if err := b.plant(ctx, n-n/pollingShare); err != nil {
			return err
		}
	}
	if err := b.idle(ctx, fleetName(b.o.fleet), devices, 8); err != nil {
		return err
	}
	return b.fullLoad(ctx, devices)
}

// fullLoad has all devices poll, fetch and report over many connections, and
// notes the memory of the daemon at its highest so far.
func (b *bench) fullLoad(ctx context.Context, devices []device) error {
	visits, err := b.visits(ctx, devices, 1)
	if err != nil {
		return err
	}
	o, err := drive(ctx, b.daemon.addr, load{connections: 256}, visits)
	if err != nil {
		return err
	}
	if o.failed > 0 {
		return fmt.Errorf("%d of %d requests failed: %s", o.failed, o.requests, o.failure)
	}
	b.report.loaded, err = b.daemon.resident()
	fmt.Fprintf(os.Stderr, "%-10s  memory with %d devices at 256 connections, and before: at most %d MB\n", b.db.label, len(devices), b.report.loaded>>20)
	return err
}

// pollingShare is the part of a large fleet, one in so many, that polls.
const pollingShare = 10

// plant enrolls devices that are never heard of again. It goes to the database
// as a second replica would: their signatures are of no interest.
func (b *bench) plant(ctx context.Context, count int) error {
	store, err := sqlstore.Open(ctx, sqlstore.Config{Driver: b.db.storage, DSN: b.db.dsn})
	if err != nil {
		return fmt.Errorf("opening the database: %w", err)
	}
	var next atomic.Int64
	work, ctx := errgroup.WithContext(ctx)
	for range 128 {
		work.Go(func() error {
			for {
				i := int(next.Add(1)) - 1
				if i >= count {
					return nil
				}
				if err := enrollDirectly(ctx, store, deviceID(b.made+i)); err != nil {
					return fmt.Errorf("enrolling: %w", err)
				}
			}
		})
	}
	err = work.Wait()
	b.made += count
	return errors.Join(err, store.Close())
}

func enrollDirectly(ctx context.Context, store *sqlstore.Store, udid string) error {
	hash := sha256.Sum256([]byte(udid))
	src := storage.Source{
		Enroll: mdm.EnrollID{Type: mdm.Device, ID: udid},
		Pin:    &storage.Pin{Hash: hex.EncodeToString(hash[:]), NotAfter: time.Now().AddDate(1, 0, 0)},
	}
	d := device{udid: udid}
	authenticate := &mdm.Authenticate{
		Topic: mdmtest.DefaultTopic, DeviceName: "Mac", Model: "Mac16,1", ModelName: "MacBook Pro",
		OSVersion: "26.0", BuildVersion: "25A354", SerialNumber: "S" + udid[:8], Raw: d.authenticate(),
	}
	if _, err := store.Apply(ctx, &storage.Authenticate{Src: src, Message: authenticate}); err != nil {
		return err
	}
	update := &mdm.TokenUpdate{
		Topic: mdmtest.DefaultTopic, PushMagic: "magic " + udid, Token: []byte("token " + udid), Raw: d.tokenUpdate(),
	}
	_, err := store.Apply(ctx, &storage.TokenUpdate{Src: src, Message: update})
	return err
}

// enqueue measures rows queued a second by several callers at once, some of whose
// enrollments are the same, and what NanoMDM's statements take on the same server.
func (b *bench) enqueue(ctx context.Context, devices []device) (err error) {
	ids := udidsOf(devices)
	var p *peer
	if b.db.driver != "" {
		if p, err = newPeer(ctx, b.db, devices); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.close()) }()
	}
	var rates, peerRates, ratios []float64
	for range b.o.rounds {
		rate, err := callers(ctx, ids, func(ctx context.Context, ids []string) error {
			return enqueueCommand(ctx, b.daemon, mdmtest.NewUUID(), ids)
		})
		if err != nil {
			return err
		}
		rates = append(rates, rate)
		if p == nil {
			continue
		}
		peerRate, err := callers(ctx, ids, p.enqueue)
		if err != nil {
			return fmt.Errorf("enqueueing by NanoMDM's statements: %w", err)
		}
		peerRates, ratios = append(peerRates, peerRate), append(ratios, rate/peerRate)
	}
	b.report.enqueue = median(rates)
	if p != nil {
		b.report.peerEnqueue, b.report.enqueueRatio = median(peerRates), median(ratios)
	}
	fmt.Fprintf(os.Stderr, "%-10s  enqueue  %.0f rows a second (NanoMDM's statements: %.0f)\n", b.db.label, b.report.enqueue, b.report.peerEnqueue)
	return nil
}

// callers has several callers queue commands, each for its own stretch of ids that
// shares half with its neighbours', and returns rows a second.
func callers(ctx context.Context, ids []string, enqueue func(ctx context.Context, ids []string) error) (float64, error) {
	each := min(callerIDs, len(ids))
	g, ctx := errgroup.WithContext(ctx)
	start := time.Now()
	for caller := range enqueueCallers {
		begin := caller * each / 2 % (len(ids) - each + 1)
		g.Go(func() error {
			for range callerCalls {
				if err := enqueue(ctx, ids[begin:begin+each]); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err := g.Wait()
	return float64(enqueueCallers*callerCalls*each) / time.Since(start).Seconds(), err
}

// profiled runs work, if profiles were asked for under perf(1), and leaves the
// functions that cost most in text files.
func (b *bench) profiled(ctx context.Context, name string, work func() error) error {
	if b.o.profiles == "" {
		return work()
	}
	if err := os.MkdirAll(b.o.profiles, 0o755); err != nil {
		return err
	}
	base := filepath.Join(b.o.profiles, b.db.engine.name+"-"+strings.ReplaceAll(name, " ", "-"))
	record := exec.Command("perf", "record", "-q", "-F", "499", "-g",
		"-p", fmt.Sprint(b.daemon.cmd.Process.Pid), "-o", base+".perf")
	record.Stderr = os.Stderr
	if err := record.Start(); err != nil {
		return fmt.Errorf("profiling: %w", err)
	}
	err := work()
	// perf writes its file when it is interrupted, and then fails by that
	// signal; whether the file is good, the report tells.
	_ = record.Process.Signal(syscall.SIGINT)
	_ = record.Wait()
	if err != nil {
		return err
	}
	for suffix, flags := range map[string][]string{".self.txt": {"--no-children"}, ".total.txt": {"--children"}} {
		args := append([]string{"report", "--stdio", "-g", "none", "--percent-limit", "0.5", "-i", base + ".perf"}, flags...)
		text, err := exec.CommandContext(ctx, "perf", args...).Output()
		if err != nil {
			return fmt.Errorf("reading the profile: %w", err)
		}
		if err := os.WriteFile(base+suffix, text, 0o644); err != nil {
			return err
		}
	}
	return nil
}
