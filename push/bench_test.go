package push_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

// What NanoMDM pushes a second, by APNs' latency: five workers for a call, and
// one call at a time.
var peers = map[time.Duration]float64{20 * time.Millisecond: 238, 100 * time.Millisecond: 49}

// measured is what a benchmark has used so far.
type measured struct {
	at  time.Time
	cpu time.Duration
}

func measure(b *testing.B) measured {
	var u syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &u))
	return measured{time.Now(), time.Duration(u.Utime.Nano() + u.Stime.Nano())}
}

// report shows the rate since m, what it is of NanoMDM's, and the CPU time of
// a push, in which the fake APNs' share is included: with that, what is
// measured on a busy machine can be judged.
func (m measured) report(b *testing.B, latency time.Duration, pushes int) {
	now := measure(b)
	rate := float64(pushes) / now.at.Sub(m.at).Seconds()
	b.ReportMetric(rate, "pushes/s")
	b.ReportMetric(rate/peers[latency], "x-NanoMDM")
	b.ReportMetric(float64((now.cpu-m.cpu).Microseconds())/float64(pushes), "cpu-us/push")
	b.ReportMetric(0, "ns/op")
}

// The service, its database (SQLite, durable) and the fake APNs share the
// machine. There is one connection of 1,000 streams.
func benchWorld(b *testing.B, latency time.Duration, n int) (*world, *push.Service, []string) {
	w := newWorld(b, apnstest.Config{Latency: latency})
	all := ids(n)
	w.enroll(all...)
	s := w.service(push.Config{Wait: time.Minute, APNs: apns.Config{MaxConnsPerTopic: 1}})
	ask(b, s, all) // the connection is warm
	return w, s, all
}

func ask(b *testing.B, s *push.Service, ids []string) {
	results, err := s.Push(context.Background(), push.Request{IDs: ids})
	if err != nil {
		b.Error(err)
	}
	for _, id := range ids {
		if results[id].APNsID == "" {
			b.Errorf("%s: %+v", id, results[id])
			return
		}
	}
}

// One call with 2,000 ids.
func BenchmarkCallOf2000(b *testing.B) {
	for _, latency := range []time.Duration{20 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(fmt.Sprintf("latency=%v", latency), func(b *testing.B) {
			_, s, all := benchWorld(b, latency, 2000)
			n, m := 0, measure(b)
			for b.Loop() {
				ask(b, s, all)
				n += len(all)
			}
			m.report(b, latency, n)
		})
	}
}

// 64 callers with one id each, again and again.
func Benchmark64Callers(b *testing.B) {
	for _, latency := range []time.Duration{20 * time.Millisecond, 100 * time.Millisecond} {
		b.Run(fmt.Sprintf("latency=%v", latency), func(b *testing.B) {
			_, s, all := benchWorld(b, latency, 64)
			m := measure(b)
			b.ResetTimer()
			var wg sync.WaitGroup
			for caller, id := range all {
				wg.Go(func() {
					for i := caller; i < b.N; i += len(all) {
						ask(b, s, []string{id})
					}
				})
			}
			wg.Wait()
			m.report(b, latency, b.N)
		})
	}
}

// One in a hundred streams is never answered: how long until all others are.
func BenchmarkOthersOfStalled(b *testing.B) {
	const latency = 20 * time.Millisecond
	for _, stalled := range []float64{0, 0.01} {
		b.Run(fmt.Sprintf("stalled=%v", stalled), func(b *testing.B) {
			var arrived atomic.Int64
			others := make(chan struct{}, 1)
			all := ids(2000)
			want := int64(float64(len(all)) * (1 - 1.1*stalled)) // they are spread, not counted off
			w := newWorld(b, apnstest.Config{Latency: latency, OnPush: func(apnstest.Push) {
				if arrived.Add(1) == want {
					others <- struct{}{}
				}
			}})
			w.enroll(all...)
			s := w.service(push.Config{APNs: apns.Config{MaxConnsPerTopic: 1, StreamTimeout: 10 * time.Second, PushTimeout: 10 * time.Second}})
			ask(b, s, all)
			<-others
			w.apns.SetStall(stalled)
			var took time.Duration
			n := 0
			for b.Loop() {
				arrived.Store(0)
				begin := time.Now()
				done := make(chan error, 1)
				go func() {
					_, err := s.Push(b.Context(), push.Request{IDs: all, Owed: true})
					done <- err
				}()
				<-others
				took += time.Since(begin)
				n += int(want)
				b.StopTimer()
				require.NoError(b, <-done)
				w.eventually("the others have given up", func() bool { return s.Stats().InFlight == 0 && s.Stats().Waiting == 0 })
				b.StartTimer()
			}
			rate := float64(n) / took.Seconds()
			b.ReportMetric(rate, "pushes/s")
			b.ReportMetric(rate/peers[latency], "x-NanoMDM")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// What memory a service takes while so many pushes are owed and none of them
// gets through: when the sweep works through them, and when one call has asked
// for all. The fake APNs' share is included.
func BenchmarkOwed(b *testing.B) {
	for _, n := range []int{2000, 20_000, 100_000} {
		w := newWorld(b, apnstest.Config{})
		all := ids(n)
		w.enroll(all...)
		for chunk := range slices.Chunk(all, 10_000) {
			w.enqueue("C-"+chunk[0], chunk...)
		}
		w.apns.SetStall(1)
		for _, called := range []bool{false, true} {
			b.Run(fmt.Sprintf("owed=%d/called=%v", n, called), func(b *testing.B) {
				before := heap()
				s := w.service(push.Config{APNs: apns.Config{StreamTimeout: 10 * time.Minute, PushTimeout: 10 * time.Minute}})
				if called {
					_, err := s.Push(b.Context(), push.Request{IDs: all, Owed: true, Async: true})
					require.NoError(b, err)
				} else {
					w.clock.Advance(10 * time.Minute)
					stop := w.sweep(s)
					defer stop()
				}
				w.eventually("there is no room any more", func() bool { return s.Stats().InFlight >= 2000 })
				for b.Loop() {
				}
				b.ReportMetric(float64(heap()-before)/(1<<20), "MiB")
				b.ReportMetric(0, "ns/op")
				ctx, cancel := context.WithCancel(context.Background())
				cancel() // nobody waits for stalled pushes
				_ = s.Close(ctx)
			})
		}
	}
}

func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}
