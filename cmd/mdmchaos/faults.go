//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

// note counts a fault and prints it if asked to.
func (w *world) note(format string, args ...any) {
	w.faults++
	w.print(format, args...)
}

// print prints one line, with the time, if asked to.
func (w *world) print(format string, args ...any) {
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
