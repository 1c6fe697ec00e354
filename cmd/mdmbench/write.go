package main

import (
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"strings"
	"time"
)

// goal is one line of the table of goals: a figure and its bounds for
// PostgreSQL, MySQL and MariaDB, and SQLite.
type goal struct {
	what    string
	bounds  [3]float64
	atMost  bool
	measure func(*report) (float64, bool)
}

func goals(o *options) []goal {
	return []goal{
		{"idle, 8 connections", [3]float64{1.0, 0.8, 1.1}, false, ratioOf("idle", 8)},
		{"idle, 128 connections", [3]float64{1.25, 1.1, 1.25}, false, ratioOf("idle", 128)},
		{"idle, 256 connections", [3]float64{1.25, 1.1, 1.25}, false, ratioOf("idle", 256)},
		{"fetch and acknowledge, 10 commands each, 64 connections", [3]float64{0.7, 0.5, 0.55}, false, ratioOf("fetch and acknowledge", 64)},
		{"enroll, 64 connections", [3]float64{0.8, 0.8, 0.8}, false, ratioOf("enroll", 64)},
		{
			fmt.Sprintf("idle with %d finished commands a device, to idle with none", o.history),
			[3]float64{0.95, 0.95, 0.95}, false, quotient(historyName(o.history), historyName(0)),
		},
		{
			fmt.Sprintf("idle at %d enrollments, to idle at %d", o.fleet, o.devices),
			[3]float64{0.9, 0.9, 0.9}, false, quotient(fleetName(o.fleet), fleetName(o.devices)),
		},
		{"memory of the daemon, MB, with that many enrollments and a tenth of them polling and reporting", [3]float64{100, 100, 100}, true, func(r *report) (float64, bool) {
			return float64(r.loaded) / 1e6, r.loaded > 0
		}},
		{"reports with webhook, to reports without", [3]float64{0.8, 0.8, 0.8}, false, hookedRatio},
		{fmt.Sprintf("p99 of %d reports a second while the webhook receiver hangs, to p99 without webhook", pacedReports), [3]float64{1.2, 1.2, 1.2}, true, hangingLatency},
		{"commits a report, 64 connections", [3]float64{0.05, 0.05, 0.06}, true, commitsPerReport},
		{"enqueue by 8 callers of 500 ids each, to NanoMDM's statements", [3]float64{1, 1, 1}, false, func(r *report) (float64, bool) {
			return r.enqueueRatio, r.enqueueRatio > 0
		}},
	}
}

// commitsPerReport goes by the database's count, which hides nothing, and
// where there is none by the daemon's.
func commitsPerReport(r *report) (float64, bool) {
	m, ok := r.find("fetch and acknowledge", 64)
	commits := m.commits
	if m.dbCounts {
		commits = m.dbCommits
	}
	// Reports are durable, so that none of them is committed by nothing.
	return commits * (commandsEach + 1) / commandsEach, ok && commits > 0
}

func ratioOf(name string, connections int) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		m, ok := r.find(name, connections)
		return m.ratio, ok
	}
}

// quotient compares two measurements by their ratios to the reference, so that
// a machine that was slower meanwhile does not count.
func quotient(of, to string) func(*report) (float64, bool) {
	return func(r *report) (float64, bool) {
		m, ok := r.find(of, 8)
		n, also := r.find(to, 8)
		if !ok || !also {
			return 0, false
		}
		return m.ratio / n.ratio, true
	}
}

func (g goal) bound(e engine) float64 {
	switch e.storage {
	case "pgsql":
		return g.bounds[0]
	case "mysql":
		return g.bounds[1]
	}
	return g.bounds[2]
}

const intro = `# Performance

%s
Of ours and NanoMDM in one run, PostgreSQL 15 and 2,000 devices on 2 processors that
all share (1 December 2026; requests a second):

| | NanoMDM | ours |
|---|---|---|
| enroll, 8 connections | 556 | 1,668 |
| poll, 8 connections | 783 | 5,021 |
| poll, 128 connections | 444, 6 %% of them failed | 10,036, none failed |
| fetch and acknowledge, 64 connections | 379 | 5,314 |
| memory, MB | 17 to 25 | 39 to 47 |

The rest of this page is written by cmd/mdmbench; "make bench" writes it anew. Made
with %s on %s/%s with %d processors, %s, %d devices, %d rounds.

The reference is a server in the same run that does the least a server of signed
requests can do: net/http, body read, signature verified by smallstep/pkcs7,
certificate chained to the CA each time, empty reply. Ratios above 1 are possible,
since the daemon remembers verified certificates and parses signatures with less
garbage.

## Goals

Each cell is what was measured, and the goal. **Bold** is a goal that was missed;
[Performance notes](performance-notes.md#where-the-time-goes) say why.

`

const method = `
## Method

- Daemon, reference server and database are processes of their own and share the
  machine with the client. Requests are signed (ECDSA P-256, SHA-256) before a
  measurement begins and are written to kept connections as they are, so that the
  client costs the same few microseconds in all measurements.
- In each round the reference and then the daemon get the same requests over as
  many connections. A ratio is the median of the rounds' ratios, with the least and
  the most in brackets. Differences under 15 %% are noise.
- Each reply is checked: idle must be answered empty, and each report with the next
  command or, after the last, with nothing. Of mixed, only the status is checked.
  A wrong reply counts as failed and not into the rate.
- Fetch and acknowledge: %d commands a device, each visit one poll and %d reports on
  one connection. Mixed: three polls a device, a command for one in four, a
  TokenUpdate for one in ten.
- Of the large fleet a tenth polls, with identities; the others were enrolled in the
  database by a second replica. Memory is the most that was resident up to then.
- Reports with webhook are fetch and acknowledge while each report is told to a
  receiver, which is part of the client; it answers at once, or takes the requests
  and does not answer. It takes the waiting requests afterwards. Each round begins
  and ends with reports without one, and is compared with the two of them, by their
  requests/s or p99; the figure is the median of the rounds. A first turn, on tables
  that are nearly empty, does not count. With %d reports a second, a latency is from
  when its message was due, and %d devices report, for %v or a little longer while a
  receiver hangs and half of it before and after; while one answers, only until each
  has come once. The reference has no part.
- History and the size of the fleet are compared by their ratios to the reference.
  With history, %d devices poll, at 8 connections.
- CPU is from /proc, in units of 10 ms, for the daemon's process and the database
  server's tree of processes, over all rounds; SQLite is in the daemon's. Statements,
  group commits and allocations are the daemon's own counts (/metrics). The database's
  count of commits is of all its clients, writes of last-seen times and of leases
  included: numbered transactions on PostgreSQL, Com_commit on MySQL and MariaDB.
- Enqueue is %d callers that each queue commands for %d ids, half of which their
  neighbours name, too, through the API and without push. Beside it, the client runs
  NanoMDM's statements in as many connections on the same server, in tables like its
  own, with neither API nor daemon. NanoMDM has no SQLite.
`

// everyMinutes is how often a device of the opening sentence sends a message.
const everyMinutes = 15

// capacity says how much of a machine a fleet of the measured size takes, by
// the rate of the mixed load: a line for each engine.
func capacity(o *options, reports []*report) string {
	var b strings.Builder
	due := float64(o.fleet) / (everyMinutes * 60)
	fmt.Fprintf(&b, "%d devices that each send a message every %d minutes are %.0f messages a second. A\nmachine with %d processors, which daemon, database and clients share, takes:\n\n"+
		"| | messages a second, mixed | so the fleet needs | 99 of 100 answered within, at full load | daemon's memory |\n|---|---|---|---|---|\n",
		o.fleet, everyMinutes, due, runtime.NumCPU())
	for _, r := range reports {
		if m, ok := r.find("mixed", 64); ok {
			fmt.Fprintf(&b, "| %s | %.0f | %.1f %% | %.0f ms | %d MB |\n", r.engine.label, m.rate, 100*due/m.rate, m.p99.Seconds()*1000, r.resident>>20)
		}
	}
	return b.String()
}

// leftOut are the engines without a report.
func leftOut(reports []*report) (labels []string) {
	for _, e := range engines() {
		if !slices.ContainsFunc(reports, func(r *report) bool { return r.engine.name == e.name }) {
			labels = append(labels, e.label)
		}
	}
	return labels
}

// write renders the results in Markdown.
func write(w io.Writer, o *options, reports []*report) error {
	var b strings.Builder
	fmt.Fprintf(&b, intro, capacity(o, reports), runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(),
		time.Now().UTC().Format("2 January 2006"), o.devices, o.rounds)
	if left := leftOut(reports); len(left) > 0 {
		fmt.Fprintf(&b, "Not measured: %s.\n\n", strings.Join(left, ", "))
	}
	b.WriteString("| |")
	for _, r := range reports {
		fmt.Fprintf(&b, " %s |", r.engine.label)
	}
	b.WriteString("\n|---|" + strings.Repeat("---|", len(reports)) + "\n")
	for _, g := range goals(o) {
		line, any := "| "+g.what+" |", false
		for _, r := range reports {
			cell, ok := g.cell(r)
			line += " " + cell + " |"
			any = any || ok
		}
		if any {
			b.WriteString(line + "\n")
		}
	}
	for _, r := range reports {
		r.write(&b)
	}
	fmt.Fprintf(&b, method, commandsEach, commandsEach, pacedReports, min(pacedDevices, o.devices), o.paced, o.historyFleet, enqueueCallers, callerIDs)
	_, err := io.WriteString(w, b.String())
	return err
}

func (g goal) cell(r *report) (string, bool) {
	value, ok := g.measure(r)
	if !ok {
		return "not measured", false
	}
	bound := g.bound(r.engine)
	// As it is printed: a goal is not missed by a digit that nobody sees.
	shown := math.Round(value*100) / 100
	met, sign := shown >= bound, "≥"
	if g.atMost {
		met, sign = shown <= bound, "≤"
	}
	if !met {
		return fmt.Sprintf("**%.2f** (%s %.2f)", value, sign, bound), true
	}
	return fmt.Sprintf("%.2f (%s %.2f)", value, sign, bound), true
}

func (r *report) write(b *strings.Builder) {
	fmt.Fprintf(b, "\n## %s\n\n%s. The daemon's memory at its highest: %d MB. Enqueue: %.0f rows a second.\n\n",
		r.engine.label, r.note, r.resident>>20, r.enqueue)
	b.WriteString("| | connections | requests/s | reference | ratio | p50 / p99 ms | CPU µs a request: daemon + database (reference) |" +
		" allocations | statements | group commits | database's commits | failed |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, m := range r.rows {
		dbCommits := "no count"
		if m.dbCounts {
			dbCommits = fmt.Sprintf("%.3f", m.dbCommits)
		}
		failed := fmt.Sprint(m.failed)
		if m.failed > 0 {
			failed = fmt.Sprintf("%d of %d: %s", m.failed, m.requests, strings.ReplaceAll(m.failure, "|", "/"))
		}
		reference, ratio, cpu := "–", "–", "–"
		if m.ratio > 0 {
			reference, cpu = fmt.Sprintf("%.0f", m.reference), fmt.Sprint(m.referenceCPU.Microseconds())
			ratio = fmt.Sprintf("%.2f (%.2f to %.2f)", m.ratio, m.low, m.high)
		}
		fmt.Fprintf(b, "| %s | %d | %.0f | %s | %s | %.1f / %.1f | %d + %d (%s) | %.0f | %.3f | %.3f | %s | %s |\n",
			m.name, m.connections, m.rate, reference, ratio,
			m.p50.Seconds()*1000, m.p99.Seconds()*1000,
			m.daemon.Microseconds(), m.db.Microseconds(), cpu,
			m.allocations, m.statements, m.commits, dbCommits, failed)
	}
}
