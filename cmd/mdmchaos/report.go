//go:build linux

package main

import (
	"fmt"
	"os"
	"strings"
	"time"
)

// writeSummary writes the table of a run.
func writeSummary(o *options, outcomes []outcome) error {
	var b strings.Builder
	fmt.Fprintf(&b, "Seed %d, %d devices, %d operators, %d replicas, %v of faults in each scenario.\n\n", o.seed, o.devices, o.operators, o.replicas, o.duration)
	b.WriteString("| scenario | faults | requests | without an answer | commands queued | answers taken | longest stall | violations |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|\n")
	for _, r := range outcomes {
		fmt.Fprintf(&b, "| %s | %d | %d | %d | %d | %d | %v | %d |\n", r.scenario, r.faults, r.requests, r.failed, r.calls, r.results,
			r.stall.Round(100*time.Millisecond), len(r.violations))
	}
	return os.WriteFile(o.out, []byte(b.String()), 0o644)
}
