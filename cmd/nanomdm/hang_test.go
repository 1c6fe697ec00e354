package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/service/webhook"
	"github.com/nanomdm/nanomdm/storage/storagetest"
)

// How long the receiver of TestReceiverHangs hangs, and how much devices say
// meanwhile.
var (
	hang        = flag.Duration("hang", 3*time.Second, "how long the webhook receiver hangs, on each engine")
	hangReports = flag.Int("hang-reports", 100, "reports a second meanwhile")
)

// hanger is a receiver that can be made to hang. It notes how far each
// enrollment's reports, which are numbered, came in.
type hanger struct {
	*httptest.Server

	mu    sync.Mutex
	free  chan struct{} // closed: it answers
	last  map[string]int
	wrong []string
}

func newHanger(t *testing.T) *hanger {
	h := &hanger{free: make(chan struct{}), last: make(map[string]int)}
	close(h.free)
	h.Server = httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		var e webhook.Event
		if err := json.NewDecoder(r.Body).Decode(&e); err != nil {
			return // it gave up
		}
		h.mu.Lock()
		free := h.free
		h.mu.Unlock()
		select {
		case <-free:
			h.take(&e)
		case <-r.Context().Done():
		}
	}))
	t.Cleanup(h.Close)
	return h
}

func (h *hanger) take(e *webhook.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	id := e.Acknowledge.IDs.ID
	n, err := strconv.Atoi(e.Acknowledge.CommandUUID)
	switch next := h.last[id] + 1; {
	case err != nil || n > next:
		h.wrong = append(h.wrong, fmt.Sprintf("%s of %s before %d", e.Acknowledge.CommandUUID, id, next))
	case n == next: // others are repeats
		h.last[id] = n
	}
}

func (h *hanger) hang() (open func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	free := make(chan struct{})
	h.free = free
	return func() { close(free) }
}

func (h *hanger) taken() (n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, last := range h.last {
		n += last
	}
	return n
}

// reporters are devices that acknowledge commands, which are numbered, at a
// steady rate.
type reporters struct {
	devices []*mdmtest.Device
	said    []int // by device, the number of its last report
	queued  int   // the last command that was queued for all of them
}

// report has them report for some time and returns how long each took. The
// commands for it are queued before.
func (r *reporters) report(t *testing.T, m *mortal, length time.Duration) []time.Duration {
	each := time.Duration(len(r.devices)) * time.Second / time.Duration(*hangReports)
	r.queue(m, slices.Max(r.said)+int(length/each)+2)
	took := make([][]time.Duration, len(r.devices))
	ctx, cancel := context.WithTimeout(t.Context(), length)
	defer cancel()
	var busy sync.WaitGroup
	for i, d := range r.devices {
		busy.Go(func() {
			pace(ctx, each*time.Duration(i)/time.Duration(len(r.devices)))
			ticks := time.NewTicker(each)
			defer ticks.Stop()
			for ctx.Err() == nil {
				begun := time.Now()
				r.said[i]++
				if _, err := d.Report(t.Context(), mdmtest.StatusAcknowledged, strconv.Itoa(r.said[i]), nil); err != nil {
					t.Error(err)
					return
				}
				took[i] = append(took[i], time.Since(begun))
				select {
				case <-ticks.C:
				case <-ctx.Done():
				}
			}
		})
	}
	busy.Wait()
	return slices.Concat(took...)
}

func (r *reporters) queue(m *mortal, through int) {
	var ids []string
	for _, d := range r.devices {
		ids = append(ids, d.UDID())
	}
	for ; r.queued < through; r.queued++ {
		command := mdmtest.NewCommand(strconv.Itoa(r.queued+1), "DeviceInformation", nil)
		status, body, _ := m.api("PUT", "/v1/enqueue/"+strings.Join(ids, ",")+"?nopush=1", "nanomdm", testKey, command)
		require.Equal(m.t, 200, status, body)
	}
}

// A receiver that hangs costs devices nothing and the daemon no memory, and
// gets everything afterwards, in order for each enrollment. Run with
// -args -hang=10m -hang-reports=1000 and see with -v what was measured.
func TestReceiverHangs(t *testing.T) {
	for _, e := range storagetest.Engines(t) {
		t.Run(e.Name, func(t *testing.T) {
			cfg := e.Config(t)
			h := newHanger(t)
			m := newMortal(t, "-storage", cfg.Driver, "-storage-dsn", cfg.DSN, "-webhook-timeout", "2s", "-webhook-networks", "127.0.0.1")
			r := &reporters{said: make([]int, max(2, *hangReports/5))}
			client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: len(r.said)}, Timeout: 20 * time.Second}
			for i := range r.said {
				d := m.device(fmt.Sprintf("D%04d", i), mdmtest.Config{Client: client})
				require.NoError(t, d.Enroll(t.Context()))
				r.devices = append(r.devices, d)
			}
			m.measured("without a webhook", r.report(t, m, *hang/10))
			for i, d := range r.devices {
				h.last[d.UDID()] = r.said[i]
			}
			status, body, _ := m.api("PUT", "/v1/sinks/hook", "nanomdm", testKey, []byte(`{"url": "`+h.URL+`", "filter": {"topics": ["mdm.Connect"]}}`))
			require.Equal(t, 200, status, body)
			m.measured("while it answers", r.report(t, m, *hang/10))
			open := h.hang()
			for i := range 10 {
				m.measured(fmt.Sprintf("while it hangs, part %d of 10", i+1), r.report(t, m, *hang/10))
			}
			open()
			said, begun := 0, time.Now()
			for _, n := range r.said {
				said += n
			}
			t.Logf("%d of %d reports wait", said-h.taken(), said)
			for last, since := h.taken(), time.Now(); h.taken() < said; pace(t.Context(), 50*time.Millisecond) {
				if n := h.taken(); n > last {
					last, since = n, time.Now()
				}
				require.Less(t, time.Since(since), time.Minute, "%d of %d came in, and no more come: %s", h.taken(), said, m.log)
			}
			require.Empty(t, h.wrong)
			t.Logf("all taken after %v, %d MB", time.Since(begun).Round(time.Millisecond), m.resident()>>20)
		})
	}
}

// measured logs how long reports took and the daemon's memory.
func (m *mortal) measured(what string, took []time.Duration) {
	m.t.Helper()
	require.NotEmpty(m.t, took)
	slices.Sort(took)
	m.t.Logf("%s: %d reports, p50 %v, p99 %v, %d MB", what, len(took), took[len(took)/2].Round(10*time.Microsecond),
		took[len(took)*99/100].Round(10*time.Microsecond), m.resident()>>20)
}

// resident is the memory of the daemon's process, in bytes.
func (m *mortal) resident() int {
	m.t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", m.cmd.Process.Pid))
	if os.IsNotExist(err) {
		return 0 // not Linux
	}
	require.NoError(m.t, err)
	pages, err := strconv.Atoi(strings.Fields(string(text))[1])
	require.NoError(m.t, err)
	return pages * os.Getpagesize()
}
