//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

// scenario is a cluster and the faults that it meets.
type scenario struct {
	name, about string
	database    func(dir string) database
	// args are what one replica is started with, in addition.
	args func(replica int) []string
	// upgrade is set when the replicas begin as the release before.
	upgrade bool
	// fault breaks one thing and mends it, again and again until the time is up.
	fault func(ctx context.Context, w *world) error
}

func scenarios() []scenario {
	return []scenario{
		{name: "kills", about: "PostgreSQL; replicas are killed", database: postgres, fault: killReplica},
		{name: "stops", about: "PostgreSQL; replicas are stopped for seconds and go on", database: postgres, fault: stopReplica},
		{name: "cuts", about: "PostgreSQL; connections break right after COMMIT was sent", database: postgres, fault: cutCommits},
		{name: "failover", about: "PostgreSQL with a synchronous standby; the primary dies", database: synchronousPostgres, fault: failOver},
		{name: "lagging", about: "the same; the standby hangs before the primary dies", database: synchronousPostgres, fault: failOverLagging},
		{name: "pgbouncer", about: "PostgreSQL behind PgBouncer in transaction mode; replicas are killed", database: pooledPostgres, fault: killReplica},
		{name: "disk-full", about: "PostgreSQL; the data's disk is full for seconds", database: smallPostgres, fault: fillDisk},
		{name: "galera-one", about: "Galera, one node takes all writes; nodes are killed and stopped", database: galera(1), fault: breakGalera},
		{name: "galera-many", about: "Galera, each replica writes to a node of its own; nodes and replicas are killed", database: galera(galeraNodes), fault: breakGaleraAndReplicas},
		{name: "galera-calm", about: "Galera with several writers and no fault: certification alone", database: galera(galeraNodes), fault: nothing},
		{name: "upgrade", about: "PostgreSQL; replicas change between the release before (-before) and this one", database: postgres, upgrade: true, fault: changeRelease},
	}
}

func postgres(dir string) database            { return &pgCluster{dir: dir} }
func synchronousPostgres(dir string) database { return &pgCluster{dir: dir, synchronous: true} }
func pooledPostgres(dir string) database      { return &pgCluster{dir: dir, pooled: true} }
func smallPostgres(dir string) database       { return &pgCluster{dir: dir, diskSize: 512 << 20} }

func galera(writers int) func(string) database {
	return func(dir string) database { return &galeraCluster{dir: dir, writers: writers} }
}

// world is a running system.
type world struct {
	o        *options
	out      io.Writer
	dir      string
	rng      *rand.Rand
	database database
	replicas []*replica
	balancer *balancer
	apns     *apnstest.Server
	receiver *receiver
	history  *history
	fleet    *fleet
	faults   int
}

// note counts a fault and prints it if asked to.
func (w *world) note(format string, args ...any) {
	w.faults++
	if w.o.verbose {
		fmt.Fprintf(w.out, "  %s "+format+"\n", append([]any{time.Now().Format("15:04:05.000")}, args...)...)
	}
}

// between waits for a random time.
func (w *world) between(ctx context.Context, low, high time.Duration) error {
	return backoff.Sleep(ctx, low+time.Duration(w.rng.Int64N(int64(high-low))))
}

func killReplica(ctx context.Context, w *world) error {
	r := w.replicas[w.rng.IntN(len(w.replicas))]
	w.note("kill %s", r.name)
	r.kill()
	if err := w.between(ctx, 0, 2*time.Second); err != nil {
		return err
	}
	return r.start()
}

func stopReplica(ctx context.Context, w *world) error {
	r := w.replicas[w.rng.IntN(len(w.replicas))]
	w.note("stop %s", r.name)
	r.pause()
	defer r.resume()
	return w.between(ctx, time.Second, 15*time.Second)
}

func cutCommits(_ context.Context, w *world) error {
	w.note("cut after COMMIT")
	w.database.(*pgCluster).relay.cutCommits.Store(int64(1 + w.rng.IntN(8)))
	return nil
}

func failOver(ctx context.Context, w *world) error {
	w.note("fail over")
	if err := w.database.(*pgCluster).failOver(ctx); err != nil {
		return err
	}
	return w.between(ctx, time.Second, 4*time.Second)
}

func failOverLagging(ctx context.Context, w *world) error {
	w.note("fail over after the standby hung")
	if err := w.database.(*pgCluster).lag(ctx, 3*time.Second+time.Duration(w.rng.Int64N(int64(9*time.Second)))); err != nil {
		return err
	}
	return w.between(ctx, time.Second, 4*time.Second)
}

func fillDisk(ctx context.Context, w *world) error {
	c := w.database.(*pgCluster)
	w.note("fill the disk")
	if err := c.fillDisk(); err != nil {
		return err
	}
	if err := w.between(ctx, 2*time.Second, 6*time.Second); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(c.mounted, "filler")); err != nil {
		return err
	}
	// PostgreSQL ends itself when its log has no room.
	return c.heal(ctx)
}

func breakGalera(ctx context.Context, w *world) error {
	c := w.database.(*galeraCluster)
	i := w.rng.IntN(len(c.nodes))
	if w.rng.IntN(2) == 0 {
		w.note("kill %s", c.nodes[i].name)
		return c.lose(ctx, i, func(ctx context.Context) error { return w.between(ctx, 0, 4*time.Second) })
	}
	w.note("stop %s", c.nodes[i].name)
	c.nodes[i].process.signal(syscall.SIGSTOP)
	if err := w.between(ctx, time.Second, 4*time.Second); err != nil {
		return err
	}
	return c.heal(ctx)
}

func breakGaleraAndReplicas(ctx context.Context, w *world) error {
	if w.rng.IntN(2) == 0 {
		return killReplica(ctx, w)
	}
	return breakGalera(ctx, w)
}

// changeRelease replaces one replica's program, as a rolling upgrade or a step
// back does: the replica drains, and starts as the other release.
func changeRelease(ctx context.Context, w *world) error {
	r := w.replicas[w.rng.IntN(len(w.replicas))]
	program := w.o.nanomdm
	if r.program == program {
		program = w.o.before
	}
	w.note("%s becomes %s", r.name, program)
	r.stop()
	r.program = program
	if err := r.start(); err != nil {
		return err
	}
	return r.ready(ctx, time.Minute)
}

func nothing(context.Context, *world) error { return nil }

// outcome is one row of the summary.
type outcome struct {
	scenario                         string
	faults                           int
	requests, failed, calls, results int
	stall                            time.Duration
	violations                       []string
	took                             time.Duration
}

func (o outcome) print(out io.Writer) {
	fmt.Fprintf(out, "%-12s %3d faults, %6d requests (%d failed), %6d commands queued, %6d answers taken, longest stall %v, %d violations, %v\n",
		o.scenario, o.faults, o.requests, o.failed, o.calls, o.results, o.stall.Round(100*time.Millisecond), len(o.violations), o.took.Round(time.Second))
	for i, v := range o.violations {
		if i == 20 {
			fmt.Fprintf(out, "    and %d more\n", len(o.violations)-i)
			break
		}
		fmt.Fprintf(out, "    %s\n", v)
	}
}

func runScenario(ctx context.Context, o *options, out io.Writer, s scenario) (result outcome, err error) {
	began := time.Now()
	dir, err := os.MkdirTemp("", "mdmchaos-"+s.name+"-")
	if err != nil {
		return outcome{}, err
	}
	// Database servers run as users of their own.
	if err := os.Chmod(dir, 0o777); err != nil {
		return outcome{}, err
	}
	w := &world{o: o, out: out, dir: dir, rng: rand.New(rand.NewPCG(o.seed, o.seed)), history: newHistory()}
	defer func() {
		w.stop()
		if o.keep || err != nil || len(result.violations) > 0 {
			fmt.Fprintf(out, "%s: logs are in %s\n", s.name, dir)
			return
		}
		err = os.RemoveAll(dir)
	}()
	if err := w.start(ctx, s); err != nil {
		return outcome{}, err
	}
	violations, err := w.live(ctx, s)
	if err != nil {
		return outcome{}, err
	}
	result = outcome{scenario: s.name, faults: w.faults, violations: violations, stall: w.history.stall, took: time.Since(began)}
	result.requests, result.failed, result.calls, result.results = w.history.counts()
	return result, nil
}

// start brings up everything and enrolls the devices.
func (w *world) start(ctx context.Context, s scenario) error {
	w.database = s.database(w.dir)
	if err := w.database.start(ctx); err != nil {
		return err
	}
	ca, err := mdmtest.NewCA()
	if err != nil {
		return err
	}
	caFile := filepath.Join(w.dir, "ca.pem")
	if err := os.WriteFile(caFile, ca.PEM(), 0o600); err != nil {
		return err
	}
	if w.apns, err = apnstest.NewServer(apnstest.Config{OnPush: func(p apnstest.Push) { w.fleet.wake(p) }}); err != nil {
		return err
	}
	apnsCA := filepath.Join(w.dir, "apns-ca.pem")
	if err := os.WriteFile(apnsCA, w.apns.CAPEM(), 0o600); err != nil {
		return err
	}
	if w.receiver, err = newReceiver(); err != nil {
		return err
	}
	program := w.o.nanomdm
	if s.upgrade {
		program = w.o.before
	}
	for i := range w.o.replicas {
		storage, dsn := w.database.source(i)
		args := []string{"-ca", caFile, "-apns-url", w.apns.URL(), "-apns-ca", apnsCA, "-webhook-url", w.receiver.url}
		if s.args != nil {
			args = append(args, s.args(i)...)
		}
		r, err := newReplica(w.dir, program, i, storage, dsn, args...)
		if err != nil {
			return err
		}
		if err := r.start(); err != nil {
			return err
		}
		w.replicas = append(w.replicas, r)
	}
	for _, r := range w.replicas {
		if err := r.ready(ctx, time.Minute); err != nil {
			return err
		}
	}
	if w.balancer, err = startBalancer(ctx, w.dir, w.replicas); err != nil {
		return err
	}
	if w.fleet, err = newFleet(w.history, ca, w.balancer.url(), w.o.devices, w.o.seed); err != nil {
		return err
	}
	cert, key, err := w.apns.PushCertificate(mdmtest.DefaultTopic)
	if err != nil {
		return err
	}
	if status, content, err := newAPI(w.balancer.url()).do(ctx, "PUT", "/v1/pushcert", "", append(cert, key...)); err != nil || status != 200 {
		return fmt.Errorf("uploading the push certificate: %d %s %w", status, content, err)
	}
	return w.fleet.enroll(ctx)
}

// live runs devices, operators and faults, lets everything settle, and checks.
func (w *world) live(ctx context.Context, s scenario) ([]string, error) {
	devices, sleepForever := context.WithCancel(ctx)
	defer sleepForever()
	finish, giveUp := context.WithTimeout(ctx, w.o.duration+w.o.settle)
	defer giveUp()
	queueing, stopQueueing := context.WithCancel(ctx)
	defer stopQueueing()
	w.fleet.run(devices)
	defer w.fleet.wait()
	defer sleepForever()
	all := w.queue(queueing, finish)
	if err := w.breakThings(ctx, s); err != nil {
		return nil, err
	}
	stopQueueing()
	if err := w.heal(ctx); err != nil {
		return nil, err
	}
	all.busy.Wait()
	for _, s := range w.fleet.devices {
		s.rest()
	}
	unsettled := settled(ctx, w.o.settle, w.history, w.fleet, w.receiver)
	sleepForever()
	w.fleet.wait()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	violations, err := check(ctx, newAPI(w.balancer.url()), w.history, w.fleet, w.receiver)
	violations = append(violations, all.violations...)
	if unsettled != nil {
		violations = append(violations, fmt.Sprintf("%v: %v", errUnsettled, unsettled))
	}
	return violations, err
}

func (w *world) queue(ctx, finish context.Context) *operators {
	var ids []string
	for _, s := range w.fleet.devices {
		ids = append(ids, s.id)
	}
	all := &operators{}
	for i := range w.o.operators {
		o := &operator{
			number: i, keyed: i%2 == 1, api: newAPI(w.balancer.url()), history: w.history, ids: ids,
			rng: rand.New(rand.NewPCG(w.o.seed, uint64(1000+i))), pause: 200 * time.Millisecond,
		}
		all.busy.Go(func() { o.run(ctx, finish, all) })
	}
	return all
}

func (w *world) breakThings(ctx context.Context, s scenario) error {
	ctx, cancel := context.WithTimeout(ctx, w.o.duration)
	defer cancel()
	for {
		if err := w.between(ctx, 500*time.Millisecond, 3*time.Second); err != nil {
			return nil // the time is up, or the run was interrupted, which its next step sees
		}
		if err := s.fault(context.WithoutCancel(ctx), w); err != nil {
			return err
		}
	}
}

func (w *world) heal(ctx context.Context) error {
	if err := w.database.heal(ctx); err != nil {
		return err
	}
	for _, r := range w.replicas {
		if err := r.start(); err != nil {
			return err
		}
		r.resume()
	}
	for _, r := range w.replicas {
		if err := r.ready(ctx, time.Minute); err != nil {
			return err
		}
	}
	return nil
}

func (w *world) stop() {
	if w.balancer != nil {
		w.balancer.process.stop(syscall.SIGTERM)
	}
	for _, r := range w.replicas {
		r.stop()
	}
	if w.database != nil {
		w.database.stop()
	}
	if w.receiver != nil {
		w.receiver.close()
	}
	if w.apns != nil {
		w.apns.Close()
	}
}
