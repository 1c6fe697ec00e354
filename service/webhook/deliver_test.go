package webhook

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/storage"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestDeliversInOrderWhatFailsNowAndThen(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.n%5 == 0 {
				rw.WriteHeader(500)
			}
		})
		d := w.deliver("a", Config{Workers: 8})
		var ids []string
		for i := range 20 {
			ids = append(ids, fmt.Sprint("D", i))
		}
		w.enroll(ids...)
		for _, c := range commands(30) {
			for _, id := range ids {
				w.report(id, c)
			}
		}
		w.drained(time.Minute)
		for _, id := range ids {
			require.Equal(t, append([]string{"Authenticate", "TokenUpdate"}, commands(30)...), w.receiver.taken(id))
		}
		require.EqualValues(t, 20*32, d.Stats()[0].Delivered)
		require.EqualValues(t, len(w.receiver.requests())-20*32, d.Stats()[0].Failures)
		require.Zero(t, d.Stats()[0].Dead)
	})
}

func TestParallelAcrossEnrollmentsOnly(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(http.ResponseWriter, *delivery) { time.Sleep(time.Second) })
		w.deliver("a", Config{Workers: 4})
		ids := []string{"A", "B", "C", "D", "E", "F", "G", "H"}
		w.enroll(ids...)
		w.drained(time.Minute)
		require.Equal(t, 4, w.receiver.mostAtOnce())
		got := w.receiver.requests()
		require.Len(t, got, 16)
		// Two of each of eight, four at once, a second each.
		require.Less(t, got[15].at.Sub(got[0].at), 6*time.Second)
		require.LessOrEqual(t, w.receiver.dials, 4, "connections are used again")
	})
}

func TestConnectionsAreUsedAgain(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.n%2 == 0 {
				rw.WriteHeader(503)
			}
			_, _ = io.WriteString(rw, strings.Repeat("thank you ", 5000)) // 50 KB, to be read
		})
		w.deliver("a", Config{Workers: 1})
		w.enroll("A", "B", "C")
		for _, c := range commands(20) {
			w.report("A", c)
		}
		w.drained(10 * time.Minute)
		require.Equal(t, 1, w.receiver.dials)
	})
}

// A user and password in the URL are sent as any client does, and a redirect
// is no delivery and is not followed.
func TestURLWithPasswordAndRedirect(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t, hook(func(k *storage.EventSink) { k.URL = "http://ann:secret@receiver/hook" }))
		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.n == 1 {
				rw.Header().Set("Location", "http://elsewhere/")
				rw.WriteHeader(302)
			}
		})
		w.deliver("a", Config{Workers: 1})
		w.enroll("A")
		w.report("A", "C1")
		w.drained(10 * time.Minute)
		got := w.receiver.requests()
		require.Equal(t, []string{"Authenticate", "TokenUpdate", "C1"}, w.receiver.taken("A"))
		require.Len(t, got, 4, "the one that was redirected came again")
		require.Equal(t, 302, got[0].status)
		for _, d := range got {
			user, password, ok := (&http.Request{Header: d.header}).BasicAuth()
			require.True(t, ok)
			require.Equal(t, []string{"ann", "secret"}, []string{user, password})
		}
	})
}

func TestBackoff(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.enrollment() == "bad" {
				rw.WriteHeader(500)
			}
		})
		w.deliver("a", Config{})
		w.enroll("bad")
		w.report("bad", "C1")
		for range 400 { // others keep the receiver from counting as down
			w.enroll("good")
			time.Sleep(time.Second)
		}
		var tries []time.Time
		for _, d := range w.receiver.requests() {
			if d.enrollment() == "bad" {
				require.Equal(t, "Authenticate", d.what(), "nothing overtakes")
				tries = append(tries, d.at)
			}
		}
		require.Greater(t, len(tries), 7)
		for i := 1; i < len(tries); i++ {
			pause := min(100*time.Millisecond<<(i-1), 5*time.Minute)
			got := tries[i].Sub(tries[i-1])
			require.GreaterOrEqual(t, got, pause/2, i)
			require.LessOrEqual(t, got, pause*5/4+200*time.Millisecond, i)
		}
		require.Zero(t, w.log.count("is down"))
		w.receiver.answers(nil)
		w.drained(6 * time.Minute)
		require.Equal(t, []string{"Authenticate", "TokenUpdate", "C1"}, w.receiver.taken("bad"))
	})
}

// A fleet of one, all of whose events wait, must not keep the probes of a
// receiver that was down from it.
func TestReceiverComesBack(t *testing.T) {
	for _, fleet := range []int{1, 3, 50} {
		t.Run(fmt.Sprint(fleet), func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				w := newWorld(t)
				d := w.deliver("a", Config{})
				w.receiver.answers(status(502))
				var ids []string
				for i := range fleet {
					ids = append(ids, fmt.Sprint("D", i))
				}
				w.enroll(ids...)
				for _, c := range commands(30) {
					for _, id := range ids {
						w.report(id, c)
					}
					time.Sleep(30 * time.Second) // a quarter of an hour in all
				}
				require.Equal(t, 1, w.log.count("is down"))
				require.True(t, d.Stats()[0].Down)
				stored := w.storedSink()
				require.WithinDuration(t, time.Now().Add(-15*time.Minute), stored.DownSince, 5*time.Minute, "each replica can tell")
				require.Contains(t, stored.DownError, "502")
				tries := len(w.receiver.requests())
				require.Less(t, tries, 800, "it is only tried now and then")
				w.receiver.answers(nil)
				w.drained(2 * time.Minute)
				require.Equal(t, 1, w.log.count("is back"))
				require.False(t, d.Stats()[0].Down)
				require.Zero(t, w.storedSink().DownSince)
				for _, id := range ids {
					require.Equal(t, append([]string{"Authenticate", "TokenUpdate"}, commands(30)...), w.receiver.taken(id))
				}
			})
		})
	}
}

// The replica that stored that a receiver is down may be gone when it is back.
func TestReceiverComesBackToAnotherReplica(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(status(502))
		w.enroll("A")
		d := w.deliver("first", Config{})
		for _, c := range commands(20) {
			w.report("A", c)
			time.Sleep(30 * time.Second)
		}
		since := w.storedSink().DownSince
		require.NotZero(t, since)
		d.stop()
		w.deliver("second", Config{})
		for _, c := range commands(40)[20:] {
			w.report("A", c)
			time.Sleep(30 * time.Second)
		}
		require.Equal(t, since, w.storedSink().DownSince, "it has been down all the time")
		w.receiver.answers(nil)
		w.drained(10 * time.Minute)
		require.Zero(t, w.storedSink().DownSince)
		require.Empty(t, w.storedSink().DownError)
	})
}

func TestHangingReceiver(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(_ http.ResponseWriter, d *delivery) { <-d.done })
		d := w.deliver("a", Config{Workers: 16, Timeout: 10 * time.Second})
		var ids []string
		for i := range 100 {
			ids = append(ids, fmt.Sprint("D", i))
		}
		w.enroll(ids...)
		for _, c := range commands(10) {
			begun := time.Now()
			for _, id := range ids {
				w.report(id, c)
			}
			require.Equal(t, begun, time.Now(), "devices do not wait for it")
			time.Sleep(time.Minute)
		}
		require.True(t, d.Stats()[0].Down)
		require.LessOrEqual(t, w.receiver.mostAtOnce(), 2*16, "the receiver notices late that the sender has left")
		require.Less(t, len(w.receiver.requests()), 600)
		require.Equal(t, 1, w.log.count("no answer in time"))
		w.receiver.answers(nil)
		w.drained(time.Minute)
		for _, id := range ids {
			require.Equal(t, append([]string{"Authenticate", "TokenUpdate"}, commands(10)...), w.receiver.taken(id))
		}
	})
}

// A receiver that takes its time for one enrollment holds up nobody else.
func TestSlowLane(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(_ http.ResponseWriter, d *delivery) {
			if d.enrollment() == "slow" {
				time.Sleep(8 * time.Second)
			}
		})
		w.deliver("a", Config{Workers: 2})
		w.enroll("slow", "quick")
		for _, c := range commands(10) {
			w.report("slow", c)
			w.report("quick", c)
			time.Sleep(time.Second)
		}
		time.Sleep(3 * time.Second)
		require.Len(t, w.receiver.taken("quick"), 12)
		require.Less(t, len(w.receiver.taken("slow")), 3)
		w.drained(3 * time.Minute)
		require.Equal(t, append([]string{"Authenticate", "TokenUpdate"}, commands(10)...), w.receiver.taken("slow"))
		require.Len(t, w.receiver.requests(), 24, "none is sent twice")
	})
}

func TestRetryAfter(t *testing.T) {
	for name, value := range map[string]func() string{
		"seconds": func() string { return "120" },
		"date":    func() string { return time.Now().Add(120 * time.Second).UTC().Format(http.TimeFormat) },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				w := newWorld(t)
				w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
					if d.n == 1 {
						rw.Header().Set("Retry-After", value())
						rw.WriteHeader(429)
					}
				})
				w.deliver("a", Config{Workers: 1})
				w.enroll("A", "B")
				w.drained(5 * time.Minute)
				got := w.receiver.requests()
				require.Len(t, got, 5)
				require.GreaterOrEqual(t, got[1].at.Sub(got[0].at), 119*time.Second)
				require.Less(t, got[1].at.Sub(got[0].at), 122*time.Second)
			})
		})
	}
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "x": 0, "-5": 0, "0": 0, "7": 7 * time.Second, "99999999": time.Hour,
		"Sun, 01 Mar 2026 12:00:30 GMT": 30 * time.Second, "Sun, 01 Mar 2026 11:00:30 GMT": 0, "Sun, 01 Mar 2026 18:00:30 GMT": time.Hour,
	} {
		require.Equal(t, want, retryAfter(value, now), value)
	}
}

func TestGone(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.n == 3 {
				rw.WriteHeader(410)
			}
		})
		w.deliver("a", Config{})
		w.enroll("A")
		w.report("A", "C1")
		w.report("A", "C2")
		time.Sleep(time.Minute)
		require.Len(t, w.receiver.requests(), 3)
		require.Equal(t, 1, w.log.count("answered 410"))
		sinks, err := w.store.EventSinks(t.Context())
		require.NoError(t, err)
		require.False(t, sinks[0].Enabled)
		require.Equal(t, "the receiver answered 410 Gone", sinks[0].Reason)
		require.False(t, w.sinks.Wants(&storage.Event{Topic: storage.TopicConnect}, "Device"), "nothing is written for it")
		w.report("A", "missed")
		require.NoError(t, w.store.PutEventSink(t.Context(), hook(func(k *storage.EventSink) { k.Configured = true })))
		time.Sleep(10 * time.Second)
		w.report("A", "C3")
		w.drained(time.Minute)
		require.Equal(t, []string{"Authenticate", "TokenUpdate", "C1", "C2", "C3"}, w.receiver.taken("A"))
	})
}

func TestDeadLetters(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.what() == "C1" || d.what() == "C2" {
				rw.WriteHeader(400)
			}
		})
		d := w.deliver("a", Config{MaxAge: 3 * time.Minute, Retention: 12 * time.Minute})
		w.enroll("A", "B")
		for _, c := range []string{"C1", "C2", "C3"} {
			w.report("A", c)
		}
		w.report("B", "B1")
		w.drained(9 * time.Minute)
		require.Equal(t, []string{"Authenticate", "TokenUpdate", "C3"}, w.receiver.taken("A"))
		require.EqualValues(t, 2, w.backlog().Dead)
		require.EqualValues(t, 2, d.Stats()[0].Dead)
		require.GreaterOrEqual(t, w.log.count("far behind"), 1, "there was an alarm before")

		w.receiver.answers(nil)
		n, err := w.store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Dead: true})
		require.NoError(t, err)
		require.EqualValues(t, 2, n)
		w.drained(time.Minute)
		require.Equal(t, []string{"Authenticate", "TokenUpdate", "C3", "C1", "C2"}, w.receiver.taken("A"))
		require.Zero(t, w.backlog().Dead)

		time.Sleep(14 * time.Minute)
		events, _, err := w.store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{Limit: 10})
		require.NoError(t, err)
		require.Empty(t, events, "the log has its time")
	})
}

func TestDownForTooLong(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(status(503))
		w.deliver("a", Config{MaxAge: 30 * time.Minute, Retention: 4 * time.Hour})
		for i := range 10 {
			w.enroll(fmt.Sprint("D", i))
		}
		for _, c := range commands(60) {
			for i := range 10 {
				w.report(fmt.Sprint("D", i), c)
			}
			time.Sleep(time.Minute)
		}
		require.Greater(t, w.backlog().Dead, int64(160))
		w.receiver.answers(nil)
		w.drained(10 * time.Minute)
		for i := range 10 {
			taken := w.receiver.taken(fmt.Sprint("D", i))
			require.IsIncreasing(t, taken)
			require.Equal(t, "C059", taken[len(taken)-1])
			require.Greater(t, len(taken), 25)
			require.Less(t, len(taken), 50)
		}
	})
}

func TestTooManyWait(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(status(503))
		d := w.deliver("a", Config{MaxBacklog: 100})
		w.enroll("A", "B")
		for _, c := range commands(400) {
			w.report("A", c)
			w.report("B", c)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(10 * time.Minute)
		b := w.backlog()
		require.LessOrEqual(t, b.Behind, int64(100))
		require.EqualValues(t, b.Dropped, d.Stats()[0].Dropped)
		require.EqualValues(t, 804, b.Behind+b.Waiting+b.Dropped)
		require.Equal(t, 1, w.log.count("too many events wait"))
		w.receiver.answers(nil)
		w.drained(10 * time.Minute)
		taken := w.receiver.taken("A")
		require.Equal(t, "C399", taken[len(taken)-1])
		time.Sleep(time.Minute)
		events, _, err := w.store.ReadEvents(t.Context(), storage.Scope{}, storage.EventQuery{Limit: 1000})
		require.NoError(t, err)
		require.Len(t, events, 804)
		bare := 0
		for _, e := range events {
			if e.RawSize < 0 {
				bare++
			}
		}
		require.EqualValues(t, b.Dropped, bare, "what was dropped is kept without its payload")
		n, err := w.store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Dead: true})
		require.NoError(t, err)
		require.Zero(t, n, "and cannot be sent any more")
	})
}

// A receiver is away while devices send a lot.
func TestTooManyBytesWait(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(status(503))
		const most = 1 << 20
		d := w.deliver("a", Config{MaxLogBytes: most})
		w.enroll("A", "B")
		noise := rand.NewChaCha8([32]byte{})
		for _, c := range commands(300) {
			for _, id := range []string{"A", "B"} {
				raw := make([]byte, 4<<10)
				noise.Read(raw)
				w.says(id, &mdm.Report{Enrollment: mdm.Enrollment{UDID: id}, Status: mdm.StatusAcknowledged, CommandUUID: c, Raw: raw})
			}
			time.Sleep(time.Millisecond)
		}
		time.Sleep(10 * time.Minute)
		size, err := w.store.EventLogSize(t.Context())
		require.NoError(t, err)
		require.LessOrEqual(t, size.Bytes, int64(most))
		require.Greater(t, size.Bytes, int64(most*9/10), "it drops no more than it has to")
		stats := d.Stats()[0]
		require.Positive(t, stats.Dead+stats.Dropped)
		require.Positive(t, d.Trimmed())
		require.EqualValues(t, 604, size.Events+d.Trimmed())
		require.Equal(t, 1, w.log.count("fill the event log"))
		w.receiver.answers(nil)
		w.drained(10 * time.Minute)
		for _, id := range []string{"A", "B"} {
			taken := w.receiver.taken(id)
			require.IsIncreasing(t, taken)
			require.Equal(t, "C299", taken[len(taken)-1])
		}
	})
}

func TestStopAndStart(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(_ http.ResponseWriter, d *delivery) { time.Sleep(100 * time.Millisecond) })
		var ids []string
		for i := range 40 {
			ids = append(ids, fmt.Sprint("D", i))
		}
		w.enroll(ids...)
		for _, c := range commands(5) {
			for _, id := range ids {
				w.report(id, c)
			}
		}
		for i := range 20 {
			r := w.deliver(fmt.Sprint("r", i), Config{Workers: 8})
			time.Sleep(1100 * time.Millisecond)
			begun := time.Now()
			r.stop()
			require.Less(t, time.Since(begun), 4*time.Second)
		}
		w.deliver("last", Config{})
		w.drained(time.Minute)
		for _, id := range ids {
			require.Equal(t, append([]string{"Authenticate", "TokenUpdate"}, commands(5)...), w.receiver.taken(id))
		}
		require.Len(t, w.receiver.requests(), 40*7, "a stop in good order sends nothing twice")
	})
}

// Two replicas: when the one that holds the lease stands still, the other one
// goes on, in order.
func TestTakeover(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(_ http.ResponseWriter, d *delivery) { time.Sleep(50 * time.Millisecond) })
		w.enroll("A", "B", "C")
		for _, c := range commands(200) {
			for _, id := range []string{"A", "B", "C"} {
				w.report(id, c)
			}
		}
		w.deliver("first", Config{})
		w.deliver("second", Config{})
		time.Sleep(3 * time.Second)
		held, err := w.store.PeekLease(t.Context(), leaseName)
		require.NoError(t, err)
		require.NotEmpty(t, held.Holder)
		// Somebody takes the lease by force: what the holder writes from now
		// on fails, and it must stop.
		_, err = w.store.TakeLease(t.Context(), held, "usurper")
		require.NoError(t, err)
		w.drained(2 * time.Minute)
		for _, id := range []string{"A", "B", "C"} {
			require.Equal(t, append([]string{"Authenticate", "TokenUpdate"}, commands(200)...), w.receiver.taken(id))
		}
		now, err := w.store.PeekLease(t.Context(), leaseName)
		require.NoError(t, err)
		require.NotEqual(t, "usurper", now.Holder)
	})
}

func TestSinkChangesWhileDelivering(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t, hook(nil), storage.EventSink{Name: "log"})
		w.deliver("a", Config{})
		put := func(change func(*storage.EventSink)) {
			t.Helper()
			k := hook(change)
			k.Name = "other"
			require.NoError(t, w.store.PutEventSink(t.Context(), k))
			require.NoError(t, w.sinks.Refresh(t.Context()))
		}
		w.enroll("A")
		w.drained(time.Minute)
		put(func(k *storage.EventSink) { k.URL = "http://receiver.example.org/other"; k.Keys = []string{"other"} })
		w.report("A", "C1")
		w.drained(time.Minute)
		time.Sleep(time.Second)
		require.Len(t, w.receiver.requests(), 4, "a new sink begins with what is new")

		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.header.Get(callout.HeaderSignature) != "" {
				rw.WriteHeader(500)
			}
		})
		w.report("A", "C2")
		time.Sleep(5 * time.Second)
		require.NoError(t, w.store.DeleteEventSink(t.Context(), "other"))
		require.NoError(t, w.sinks.Refresh(t.Context()))
		w.report("A", "C3")
		time.Sleep(10 * time.Minute)
		n := len(w.receiver.requests())
		put(nil) // of the same name, which is another one
		w.receiver.answers(nil)
		w.report("A", "C4")
		w.drained(time.Minute)
		time.Sleep(time.Minute)
		require.Len(t, w.receiver.requests(), n+2)
	})
}
