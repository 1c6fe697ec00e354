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
	sinks    []sink
	naming   naming // in the scenario sinks
	history  *history
	fleet    *fleet
	leases   *leaseWatch
	faults   int
	phases   phases
	times    punctuality
}

func runScenario(ctx context.Context, o *options, out io.Writer, s scenario) (result outcome, err error) {
	dir, err := os.MkdirTemp("", "mdmchaos-"+s.name+"-")
	if err != nil {
		return outcome{}, err
	}
	// Database servers run as users of their own.
	if err := os.Chmod(dir, 0o777); err != nil {
		return outcome{}, err
	}
	w := &world{o: o, out: out, dir: dir, rng: rand.New(rand.NewPCG(o.seed, o.seed)), history: newHistory(), sinks: s.sinks}
	defer func() {
		w.stop()
		if o.keep || err != nil || len(result.violations) > 0 {
			fmt.Fprintf(out, "%s: logs are in %s\n", s.name, dir)
			return
		}
		err = os.RemoveAll(dir)
	}()
	began := time.Now()
	if err := w.start(ctx, s); err != nil {
		return outcome{}, err
	}
	w.phases.start = time.Since(began)
	violations, err := w.live(ctx, s)
	if err != nil {
		return outcome{}, err
	}
	w.leases.end()
	result = outcome{
		scenario: s.name, faults: w.faults, violations: violations, stall: w.history.stall,
		times: w.times, takeovers: w.leases.takeovers, takeover: w.leases.longest, phases: w.phases,
	}
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
	if s.program != nil {
		program = s.program(w.o)
	}
	for i := range w.o.replicas {
		storage, dsn := w.database.source(i)
		args, err := s.args(w, i)
		if err != nil {
			return err
		}
		args = append(args, "-ca", caFile, "-apns-url", w.apns.URL(), "-apns-ca", apnsCA)
		r, err := newReplica(w.dir, program, i, storage, dsn, args...)
		if err != nil {
			return err
		}
		if s.env != nil {
			r.env = append(r.env, s.env(i)...)
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
	if len(w.sinks) > 1 {
		// A replica learns within three seconds of a sink that another one names.
		if err := backoff.Sleep(ctx, 5*time.Second); err != nil {
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
	storage, dsn := w.database.source(0)
	if w.leases, err = watchLeases(ctx, storage, dsn); err != nil {
		return err
	}
	return w.fleet.enroll(ctx)
}

// live runs devices, operators and faults, lets everything settle, and checks.
func (w *world) live(ctx context.Context, s scenario) ([]string, error) {
	devices, sleepForever := context.WithCancel(ctx)
	defer sleepForever()
	finish, giveUp := context.WithCancel(ctx)
	defer giveUp()
	queueing, stopQueueing := context.WithCancel(ctx)
	defer stopQueueing()
	var awake, asleep []string
	if s.times {
		awake, asleep = w.fleet.sleep()
	}
	w.fleet.run(devices)
	defer w.fleet.wait()
	defer sleepForever()
	began := time.Now()
	all := w.queue(queueing, finish, awake, asleep)
	if err := w.breakThings(ctx, s); err != nil {
		return nil, err
	}
	stopQueueing()
	broken := time.Now()
	if err := w.heal(ctx); err != nil {
		return nil, err
	}
	w.print("everything runs")
	patience := time.AfterFunc(w.o.settle, giveUp)
	defer patience.Stop()
	all.busy.Wait()
	w.print("the operators are done")
	for _, call := range all.givenUp {
		w.print("%s", call)
	}
	for _, s := range w.fleet.devices {
		s.rest()
	}
	if s.times {
		if err := w.awaitEnds(ctx); err != nil {
			return nil, err
		}
		w.fleet.wakeAll()
	}
	unsettled := settled(ctx, w.o.settle, w.history, w.fleet, w.sinks, w.receiver, func(err error) { w.print("%v", err) })
	sleepForever()
	w.fleet.wait()
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	quiet := time.Now()
	violations, err := check(ctx, newAPI(w.balancer.url()), w.history, w.fleet, w.sinks, w.receiver, &w.times)
	w.phases.faults, w.phases.settle, w.phases.check = broken.Sub(began), quiet.Sub(broken), time.Since(quiet)
	violations = append(violations, all.violations...)
	if unsettled != nil {
		violations = append(violations, fmt.Sprintf("%v: %v", errUnsettled, unsettled))
	}
	return violations, err
}

// queue lets operators work until ctx ends; finish ends their repetitions. If
// some devices sleep, two of the operators queue commands with times.
func (w *world) queue(ctx, finish context.Context, awake, asleep []string) *operators {
	var ids []string
	for _, s := range w.fleet.devices {
		if s.asleep == nil {
			ids = append(ids, s.id)
		}
	}
	all := &operators{}
	start := func(i int, keyed bool, plan func(*operator, *call)) {
		o := &operator{
			number: i, keyed: keyed, api: newAPI(w.balancer.url()), history: w.history, ids: ids, plan: plan,
			rng: rand.New(rand.NewPCG(w.o.seed, uint64(1000+i))), pause: 200 * time.Millisecond,
		}
		all.busy.Go(func() { o.run(ctx, finish, all) })
	}
	for i := range w.o.operators {
		start(i, i%2 == 1, nil)
	}
	if asleep != nil {
		for i := range 2 {
			start(w.o.operators+i, true, planTimes(awake, asleep))
		}
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
	if w.leases != nil {
		w.leases.end()
	}
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
