package apns_test

import (
	"context"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

// benchmark measures rounds of n pushes, callers at a time, on one warm
// connection of 1,000 streams. Client and server share the machine.
func benchmark(b *testing.B, latency time.Duration, stall float64, n int) {
	srv := newServer(b, apnstest.Config{Latency: latency})
	c := newClient(b, srv, newSource(b, srv), apns.Config{MaxConnsPerTopic: 1, StreamTimeout: time.Second})
	var failed int
	round := func() {
		failed = 0
		for _, o := range pushAll(c, n) {
			if o.Class != apns.Accepted {
				failed++
			}
		}
	}
	round()
	srv.SetStall(stall)
	for b.Loop() {
		round()
	}
	if stall == 0 && failed > 0 {
		b.Fatalf("%d of %d pushes failed", failed, n)
	}
	b.ReportMetric(float64(n)*float64(b.N)/b.Elapsed().Seconds(), "pushes/s")
}

// One call with 2,000 ids.
func BenchmarkPush2000(b *testing.B) {
	for _, latency := range []time.Duration{20 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(fmt.Sprintf("latency=%v", latency), func(b *testing.B) { benchmark(b, latency, 0, 2000) })
	}
}

// 64 callers with one id each, again and again.
func BenchmarkPush64Callers(b *testing.B) {
	for _, latency := range []time.Duration{20 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(fmt.Sprintf("latency=%v", latency), func(b *testing.B) {
			srv := newServer(b, apnstest.Config{Latency: latency})
			c := newClient(b, srv, newSource(b, srv), apns.Config{MaxConnsPerTopic: 1})
			pushAll(c, 64)
			b.ResetTimer()
			var wg sync.WaitGroup
			for caller := range 64 {
				wg.Go(func() {
					for i := caller; i < b.N; i += 64 {
						if o := c.Push(context.Background(), notification(caller)); o.Class != apns.Accepted {
							b.Errorf("outcome %+v", o)
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "pushes/s")
		})
	}
}
