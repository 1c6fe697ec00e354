//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
)

// sink is a receiver of events, as a scenario names it.
type sink struct {
	name        string
	requestType string // of the commands whose answers it gets; empty is all
}

// takes says whether the sink gets the answers to a type of command.
func (k sink) takes(requestType string) bool {
	return k.requestType == "" || k.requestType == requestType
}

// everything is the sink of -webhook-url.
var everything = []sink{{name: "webhook"}}

// sinkPerType are sinks that share no event: an event is stored for one of them
// or not at all.
func sinkPerType() []sink {
	var sinks []sink
	for _, t := range requestTypes {
		sinks = append(sinks, sink{name: "answers-" + strconv.Itoa(len(sinks)), requestType: t.name})
	}
	return sinks
}

const (
	// absenceLimit is how long the daemon believes in a sink that no running
	// replica names.
	absenceLimit = 45 * time.Second
	// outageLimit bounds the longest outage.
	outageLimit = absenceLimit + 15*time.Second
)

// naming says which replica names each sink, by the sink's number.
type naming []int

// of lists the sinks that a replica names.
func (n naming) of(replica int) map[int]bool {
	named := make(map[int]bool)
	for k, r := range n {
		if r == replica {
			named[k] = true
		}
	}
	return named
}

func (w *world) sinkFile(replica int) string {
	return filepath.Join(w.dir, "sinks-"+strconv.Itoa(replica)+".json")
}

// nameSinks writes the files of sinks that replicas are started with.
func (w *world) nameSinks(n naming) error {
	for replica := range w.o.replicas {
		list := []any{}
		for k := range n.of(replica) {
			list = append(list, map[string]any{
				"name": w.sinks[k].name, "url": w.receiver.url(w.sinks[k].name),
				"filter": map[string]any{"topics": []string{"mdm.Connect"}, "request_types": []string{w.sinks[k].requestType}},
			})
		}
		content, err := json.Marshal(map[string]any{"sinks": list})
		if err != nil {
			return err
		}
		if err := os.WriteFile(w.sinkFile(replica), content, 0o600); err != nil {
			return err
		}
	}
	w.naming = n
	return nil
}

// differentSinks are the arguments of replicas that name different sinks.
func differentSinks(w *world, replica int) ([]string, error) {
	if w.naming == nil {
		n := make(naming, len(w.sinks))
		for k := range n {
			n[k] = k % w.o.replicas
		}
		if err := w.nameSinks(n); err != nil {
			return nil, err
		}
	}
	return []string{"-webhook-config", w.sinkFile(replica)}, nil
}

// renameSinks lets other replicas name the sinks: those whose configuration
// changes are killed and start again.
func (w *world) renameSinks() error {
	next := make(naming, len(w.sinks))
	for k := range next {
		next[k] = w.rng.IntN(w.o.replicas)
	}
	before := w.naming
	if err := w.nameSinks(next); err != nil {
		return err
	}
	for i, r := range w.replicas {
		if maps.Equal(before.of(i), next.of(i)) {
			continue
		}
		r.kill()
		if err := r.start(); err != nil {
			return err
		}
	}
	return nil
}

// breakSinks takes the database, a replica or the receivers away. A sink is
// never without a running replica that names it for absenceLimit.
func breakSinks(ctx context.Context, w *world) error {
	switch w.rng.IntN(5) {
	case 0:
		return w.outage(ctx, absenceLimit+time.Second, outageLimit)
	case 1, 2:
		return w.outage(ctx, 2*time.Second, 15*time.Second)
	case 3:
		r := w.replicas[w.rng.IntN(len(w.replicas))]
		w.note("stop %s", r.name)
		r.pause()
		defer r.resume()
		return w.between(ctx, 5*time.Second, 25*time.Second)
	default:
		away := 2*time.Second + time.Duration(w.rng.Int64N(int64(18*time.Second)))
		w.note("the receivers fail for %v, and sinks change their replicas", away)
		w.receiver.fail(away)
		if err := w.renameSinks(); err != nil {
			return err
		}
		return backoff.Sleep(ctx, away)
	}
}

// outage takes the database away from all replicas, by refused connections or
// by silence, and changes in half of the cases which replica names which sink.
func (w *world) outage(ctx context.Context, low, high time.Duration) error {
	c := w.database.(*pgCluster)
	silent, rename := w.rng.IntN(2) == 0, w.rng.IntN(2) == 0
	w.note("the database is away (silent: %v, sinks change their replicas: %v)", silent, rename)
	if silent {
		c.hang()
	} else {
		c.relay.refuse(true)
	}
	if rename {
		if err := w.renameSinks(); err != nil {
			return err
		}
	}
	if err := w.between(ctx, low, high); err != nil {
		return err
	}
	w.print("the database is back")
	if err := c.heal(ctx); err != nil {
		return fmt.Errorf("after an outage: %w", err)
	}
	return nil
}
