package main

import (
	"fmt"
	"io"
	"time"
)

// progressEvery is how often a line is printed.
const progressEvery = 5 * time.Second

// progress prints how far a phase is, how fast, and how long it still takes.
type progress struct {
	w   io.Writer
	now func() time.Time

	phase          string
	total, done    int64
	begun, printed time.Time
}

func (p *progress) begin(phase string, total int64) {
	p.phase, p.total, p.done = phase, total, 0
	p.begun = p.now()
	p.printed = p.begun
}

func (p *progress) step(n int) {
	p.done += int64(n)
	if p.now().Sub(p.printed) >= progressEvery {
		p.print()
	}
}

func (p *progress) end() {
	if p.done > 0 {
		p.print()
	}
}

func (p *progress) print() {
	now := p.now()
	p.printed = now
	rate := float64(p.done) / max(now.Sub(p.begun).Seconds(), 0.001)
	line := fmt.Sprintf("%s: %d of %d, %.0f a second", p.phase, p.done, p.total, rate)
	if left := p.total - p.done; left > 0 && rate > 0 {
		line += fmt.Sprintf(", %s left", (time.Duration(float64(left)/rate) * time.Second).Round(time.Second))
	}
	fmt.Fprintln(p.w, line)
}
