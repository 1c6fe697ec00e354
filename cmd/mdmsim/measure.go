package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/bits"
	"net"
	"net/url"
	"slices"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// histogram counts durations in buckets of at most 1.6 % width, so that a run
// of days takes no more memory than one of seconds. The zero value is empty.
type histogram struct {
	buckets [histogramBuckets]uint64
	count   uint64
	max     time.Duration
}

const (
	histogramStepBits = 6 // 64 buckets for each power of two
	histogramBuckets  = (64 - histogramStepBits) << histogramStepBits
)

func bucketOf(micros uint64) int {
	if micros < 1<<histogramStepBits {
		return int(micros)
	}
	shift := bits.Len64(micros) - 1 - histogramStepBits
	return shift<<histogramStepBits + int(micros>>shift)
}

// bucketEnd is the largest number of microseconds in the bucket.
func bucketEnd(bucket int) uint64 {
	if bucket < 2<<histogramStepBits {
		return uint64(bucket)
	}
	shift := bucket>>histogramStepBits - 1
	return uint64(bucket-shift<<histogramStepBits+1)<<shift - 1
}

func (h *histogram) add(d time.Duration) {
	h.buckets[bucketOf(uint64(max(0, d.Microseconds())))]++
	h.count++
	h.max = max(h.max, d)
}

// quantile is an upper bound of the q-th part of what was added.
func (h *histogram) quantile(q float64) time.Duration {
	rank := uint64(q*float64(h.count-1)) + 1
	var seen uint64
	for bucket, count := range h.buckets {
		if seen += count; count > 0 && seen >= rank {
			return min(h.max, time.Duration(bucketEnd(bucket))*time.Microsecond)
		}
	}
	return h.max
}

// measure gathers what the requests of a run took and how they failed. It is
// safe for concurrent use.
type measure struct {
	mu     sync.Mutex
	kinds  map[string]*histogram
	errors map[string]int // by kind and cause
	total  int
	failed int
}

func newMeasure() *measure {
	return &measure{kinds: make(map[string]*histogram), errors: make(map[string]int)}
}

// observe counts one request.
func (m *measure) observe(kind string, took time.Duration, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.total++
	if err != nil {
		m.failed++
		m.errors[kind+": "+cause(err)]++
		return
	}
	h := m.kinds[kind]
	if h == nil {
		h = new(histogram)
		m.kinds[kind] = h
	}
	h.add(took)
}

// fail counts an error that is not one request's.
func (m *measure) fail(what string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failed++
	m.errors[what]++
}

func (m *measure) totals() (total, failed int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.total, m.failed
}

// isCanceled tells what the end of a run broke off, which is no error.
func isCanceled(err error) bool { return errors.Is(err, context.Canceled) }

// cause is the part of an error that repeats: without local ports and URLs.
func cause(err error) string {
	var refused *mdmtest.RefusedError
	if errors.As(err, &refused) {
		return fmt.Sprintf("the server answered %d %.80q", refused.Response.Status, refused.Response.Body)
	}
	var op *net.OpError
	if errors.As(err, &op) {
		return op.Op + ": " + op.Err.Error()
	}
	var request *url.Error
	if errors.As(err, &request) {
		if request.Timeout() {
			return "no answer in time"
		}
		return request.Err.Error()
	}
	return err.Error()
}

// print writes the table of latencies and the errors, the most frequent first.
func (m *measure) print(w io.Writer) {
	m.mu.Lock()
	defer m.mu.Unlock()
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(table, "message\tcount\tp50 ms\tp90 ms\tp99 ms\tmax ms\t")
	for _, kind := range slices.Sorted(maps.Keys(m.kinds)) {
		h := m.kinds[kind]
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%s\t%s\t\n", kind, h.count,
			millis(h.quantile(.5)), millis(h.quantile(.9)), millis(h.quantile(.99)), millis(h.max))
	}
	table.Flush()
	if len(m.errors) == 0 {
		return
	}
	fmt.Fprintf(w, "\n%d errors:\n", m.failed)
	causes := slices.SortedFunc(maps.Keys(m.errors), func(a, b string) int { return m.errors[b] - m.errors[a] })
	for i, what := range causes {
		if i == 20 {
			fmt.Fprintf(w, "  and %d other kinds\n", len(causes)-i)
			break
		}
		fmt.Fprintf(w, "  %6d × %s\n", m.errors[what], what)
	}
}

func millis(d time.Duration) string {
	return fmt.Sprintf("%.2f", float64(d)/float64(time.Millisecond))
}
