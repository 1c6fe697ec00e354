package webhook

import (
	"fmt"
	"net/http"
	"strconv"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
)

func TestAssess(t *testing.T) {
	retry := backoff.Policy{First: time.Second, Max: time.Hour}
	refused := &failure{received: true, answered: true}
	absent := &failure{}
	event := func(attempts int) *storage.Event { return &storage.Event{Attempts: attempts} }
	for name, c := range map[string]struct {
		got         verdict
		want        verdict
		least, most time.Duration
	}{
		"hold refused":       {assess(storage.OnErrorHold, event(2), refused, 1, 0, retry), verdict{attempts: 3, ofReceiver: true}, 3 * time.Second, 5 * time.Second},
		"hold without word":  {assess("", event(2), refused, 1, 0, retry), verdict{attempts: 3, ofReceiver: true}, 3 * time.Second, 5 * time.Second},
		"hold absent":        {assess(storage.OnErrorHold, event(0), absent, 3, 0, retry), verdict{attempts: 3, ofReceiver: true}, 3 * time.Second, 5 * time.Second},
		"skip first":         {assess(storage.OnErrorSkip, event(0), refused, 1, 0, retry), verdict{attempts: 1}, time.Second, 3 * time.Second},
		"skip second":        {assess(storage.OnErrorSkip, event(1), refused, 1, 0, retry), verdict{attempts: 2}, 15 * time.Second, 25 * time.Second},
		"skip third":         {assess(storage.OnErrorSkip, event(2), refused, 1, 0, retry), verdict{attempts: 3, dead: true, refused: true}, 0, time.Minute},
		"skip absent":        {assess(storage.OnErrorSkip, event(2), absent, 1, 4, retry), verdict{attempts: 2, ofReceiver: true}, 12 * time.Second, 20 * time.Second},
		"skip, then refused": {assess(storage.OnErrorSkip, event(0), refused, 3, 100, retry), verdict{attempts: 1}, time.Second, 3 * time.Second},
		"cannot be sent":     {assess(storage.OnErrorHold, event(0), &failure{permanent: true}, 1, 0, retry), verdict{attempts: 1, dead: true}, 0, 0},
	} {
		require.GreaterOrEqual(t, c.got.pause, c.least, name)
		require.LessOrEqual(t, c.got.pause, c.most, name)
		c.got.pause = 0
		require.Equal(t, c.want, c.got, name)
	}
}

func skipping(k *storage.EventSink) { k.OnError = storage.OnErrorSkip }

// attempts of a delivery, as its header says.
func (d *delivery) attempt(t *testing.T) int {
	text := d.header.Get("webhook-attempt")
	if text == "" {
		return 1
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err)
	require.Greater(t, n, 1)
	return n
}

// tries lists the attempts of each event of some kind, by its ID.
func (w *world) tries(is func(d *delivery) bool) map[string][]int {
	all := make(map[string][]int)
	for _, d := range w.receiver.requests() {
		if is(&d) {
			all[d.event.EventID] = append(all[d.event.EventID], d.attempt(w.t))
		}
	}
	return all
}

// Receivers that fail at some events in each way that receivers do: those
// events come three times, within the time that the policy says, the next
// ones of the enrollment follow, and others are as quick as ever.
func TestSkip(t *testing.T) {
	bad := func(d *delivery) bool { return d.enrollment()[0] == 'b' && d.what() == "TokenUpdate" }
	for name, c := range map[string]struct {
		answer func(rw http.ResponseWriter, d *delivery)
		last   time.Duration // from the first try of an event to its last
	}{
		"refuses":     {status(500), 30 * time.Second},
		"not found":   {status(404), 30 * time.Second},
		"redirects":   {status(302), 30 * time.Second},
		"crashes":     {func(http.ResponseWriter, *delivery) { panic(http.ErrAbortHandler) }, 30 * time.Second},
		"retry after": {func(rw http.ResponseWriter, _ *delivery) { rw.Header().Set("Retry-After", "3600"); rw.WriteHeader(500) }, 30 * time.Second},
		"too late":    {func(_ http.ResponseWriter, d *delivery) { <-d.done }, 90 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				w := newWorld(t, hook(skipping))
				w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
					if bad(d) {
						c.answer(rw, d)
					}
				})
				d := w.deliver("a", Config{Workers: 4})
				var good, poor []string
				for i := range 20 {
					good, poor = append(good, fmt.Sprint("g", i)), append(poor, fmt.Sprint("b", i))
				}
				w.enroll(poor...)
				w.enroll(good...)
				for _, id := range append(poor, good...) {
					w.report(id, "C1")
				}
				begun := time.Now()
				w.drained(4 * time.Minute)
				for _, id := range poor {
					require.Equal(t, []string{"Authenticate", "C1"}, w.receiver.taken(id))
				}
				for _, id := range good {
					require.Equal(t, []string{"Authenticate", "TokenUpdate", "C1"}, w.receiver.taken(id))
				}
				for _, d := range w.receiver.requests() {
					if d.enrollment()[0] == 'g' {
						require.Less(t, d.at.Sub(begun), 10*time.Second, "others are not harmed")
					}
				}
				tries := w.tries(bad)
				require.Len(t, tries, 20)
				for _, n := range tries {
					require.Equal(t, []int{1, 2, 3}, n)
				}
				for _, n := range w.tries(func(d *delivery) bool { return !bad(d) }) {
					require.Equal(t, []int{1}, n)
				}
				first := make(map[string]time.Time)
				for _, d := range w.receiver.requests() {
					if at, ok := first[d.event.EventID]; ok {
						require.Less(t, d.at.Sub(at), c.last)
					} else {
						first[d.event.EventID] = d.at
					}
				}
				require.Zero(t, w.log.count("is down"))
				require.Equal(t, 1, w.log.count("failed to take an event"), "one warning a minute")
				stats := d.Stats()[0]
				require.EqualValues(t, 20, stats.Refused)
				require.Zero(t, stats.Dead)
				require.EqualValues(t, 20, w.backlog().Dead)

				// A dead letter can be asked for again.
				w.receiver.answers(nil)
				n, err := w.store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Dead: true})
				require.NoError(t, err)
				require.EqualValues(t, 20, n)
				w.drained(time.Minute)
				require.Contains(t, w.receiver.taken("b7"), "TokenUpdate")
			})
		})
	}
}

// A receiver that refuses everything, also what is sent again, is not down.
func TestSkipEverything(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t, hook(skipping))
		w.receiver.answers(status(500))
		d := w.deliver("a", Config{})
		w.enroll("A", "B")
		w.drained(3 * time.Minute)
		require.Len(t, w.receiver.requests(), 4*3)
		require.EqualValues(t, 4, d.Stats()[0].Refused)
		_, err := w.store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", Dead: true})
		require.NoError(t, err)
		w.drained(3 * time.Minute)
		require.Len(t, w.receiver.requests(), 4*6)
		require.Zero(t, w.log.count("is down"))
		require.False(t, d.Stats()[0].Down)
	})
}

// Of a receiver that is not there or says that it is not available, each
// event is kept however often it failed, and failures to reach the receiver
// leave an event its three tries.
func TestSkipKeepsEventsOfAReceiverThatIsAway(t *testing.T) {
	for name, answer := range map[string]func(http.ResponseWriter, *delivery){
		"502": status(502), "503": status(503), "504": status(504), "429": status(429), "refused": nil,
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				w := newWorld(t, hook(skipping))
				w.receiver.answers(answer)
				w.receiver.refuses(answer == nil)
				d := w.deliver("a", Config{})
				w.enroll("A", "B", "C")
				for _, c := range commands(30) {
					w.report("A", c)
					time.Sleep(time.Minute)
				}
				require.True(t, d.Stats()[0].Down)
				require.Zero(t, w.backlog().Dead)
				require.Equal(t, 1, w.log.count("is down"))
				tried := len(w.receiver.requests())
				w.receiver.refuses(false)
				w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
					if d.what() == "TokenUpdate" {
						rw.WriteHeader(500)
					}
				})
				w.drained(5 * time.Minute)
				require.Equal(t, append([]string{"Authenticate"}, commands(30)...), w.receiver.taken("A"))
				require.EqualValues(t, 3, w.backlog().Dead)
				after := make(map[string]int)
				for _, d := range w.receiver.requests()[tried:] {
					after[d.what()]++
				}
				require.Equal(t, 3*3, after["TokenUpdate"])
				require.Equal(t, 1, after["C029"])
			})
		})
	}
}

// A sink that holds numbers its repetitions, too.
func TestAttemptHeader(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		w := newWorld(t)
		w.receiver.answers(func(rw http.ResponseWriter, d *delivery) {
			if d.n < 6 {
				rw.WriteHeader(500)
			}
		})
		w.deliver("a", Config{})
		w.enroll("A")
		w.drained(time.Minute)
		tries := w.tries(func(d *delivery) bool { return true })
		require.Len(t, tries, 2)
		for id, n := range tries {
			if id == w.receiver.requests()[0].event.EventID {
				require.Equal(t, []int{1, 2, 3, 4, 5, 6}, n)
			} else {
				require.Equal(t, []int{1}, n)
			}
		}
		last := w.receiver.requests()[6]
		_, err := w.store.Redeliver(t.Context(), storage.Redelivery{Sink: "hook", After: 1})
		require.NoError(t, err)
		w.drained(time.Minute)
		again := w.receiver.requests()[7]
		require.Equal(t, last.event, again.event)
		require.Equal(t, 2, again.attempt(t), "it was sent before")
	})
}
