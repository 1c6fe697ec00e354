//go:build linux

package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// outcome is one row of the summary.
type outcome struct {
	scenario                         string
	faults                           int
	requests, failed, calls, results int
	stall                            time.Duration // the longest time without a good answer
	takeovers                        int           // changes of a lease's holder
	takeover                         time.Duration // the longest of them
	violations                       []string
	times                            punctuality
	phases                           phases
}

// phases are how long the parts of a scenario took.
type phases struct{ start, faults, settle, check time.Duration }

func (p phases) String() string {
	return fmt.Sprintf("start %v, faults %v, settle %v, check %v", p.start.Round(time.Second),
		p.faults.Round(time.Second), p.settle.Round(time.Second), p.check.Round(time.Second))
}

func (o outcome) print(out io.Writer) {
	fmt.Fprintf(out, "%-12s %3d faults, %6d requests (%d failed), %6d commands queued, %6d answers taken, longest stall %v, %d take-overs in %v at most, %d violations (%v)\n",
		o.scenario, o.faults, o.requests, o.failed, o.calls, o.results, o.stall.Round(100*time.Millisecond),
		o.takeovers, o.takeover.Round(100*time.Millisecond), len(o.violations), o.phases)
	if o.times != (punctuality{}) {
		fmt.Fprintf(out, "    %v\n", &o.times)
	}
	for i, v := range o.violations {
		if i == 20 {
			fmt.Fprintf(out, "    and %d more\n", len(o.violations)-i)
			break
		}
		fmt.Fprintf(out, "    %s\n", v)
	}
}

// writeSummary writes the table of a run.
func writeSummary(o *options, outcomes []outcome) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Seed %d, %d devices, %d operators, %d replicas, %v of faults in each scenario.\n\n", o.seed, o.devices, o.operators, o.replicas, o.duration)
	b.WriteString("| scenario | faults | requests | without an answer | commands queued | answers taken | longest stall | take-overs | longest take-over | violations |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|---|\n")
	for _, r := range outcomes {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %v | %d | %v | %d |\n", r.scenario, r.faults, r.requests, r.failed, r.calls, r.results,
			r.stall.Round(100*time.Millisecond), r.takeovers, r.takeover.Round(100*time.Millisecond), len(r.violations))
	}
	return os.WriteFile(o.out, []byte(b.String()), 0o644)
}
