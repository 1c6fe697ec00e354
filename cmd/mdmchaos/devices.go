//go:build linux

package main

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

// fleet are simulated devices that sleep until they are pushed.
type fleet struct {
	history *history
	devices []*sleeper
	byToken map[string]*sleeper
	client  *http.Client
	busy    sync.WaitGroup
}

// sleeper is one device. One in eight enrolls again now and then.
type sleeper struct {
	device   *mdmtest.Device
	id       string
	restless bool
	rng      *rand.Rand
	pushed   chan struct{} // holds one push, however many came
	asleep   chan struct{} // closed when the device wakes up; nil: it is awake

	mu        sync.Mutex // guards rng, restless and enrolling
	enrolling bool
}

var markerPattern = regexp.MustCompile(`<string>(op-\d+-\d+)</string>`)

// nonce is what a device writes into its answer to a command, always the same.
func nonce(id, uuid string) string {
	h := fnv.New64a()
	_, _ = h.Write([]byte(id + "\x00" + uuid))
	return "nonce-" + strconv.FormatUint(h.Sum64(), 36)
}

// answerTo decides how a device answers: some commands fail, some are refused
// at first.
func (s *sleeper) answerTo(f *fleet, c *mdmtest.Command) mdmtest.Answer {
	marker := ""
	if m := markerPattern.FindSubmatch(c.Raw); m != nil {
		marker = string(m[1])
	}
	f.history.offered(s.id, c.UUID, marker)
	s.mu.Lock()
	dice := s.rng.IntN(20)
	s.mu.Unlock()
	answer := mdmtest.Answer{Status: mdmtest.StatusAcknowledged}
	switch dice {
	case 0:
		return mdmtest.Answer{Status: mdmtest.StatusNotNow}
	case 1:
		answer.Status = mdmtest.StatusError
	}
	var p mdmtest.Plist
	answer.Payload = p.String("Nonce", nonce(s.id, c.UUID)).Content()
	return answer
}

func newFleet(h *history, ca *mdmtest.CA, url string, count int, seed uint64) (*fleet, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = count
	f := &fleet{history: h, byToken: make(map[string]*sleeper), client: &http.Client{Transport: transport, Timeout: 45 * time.Second}}
	for i := range count {
		identity, err := ca.Issue(fmt.Sprintf("chaos %04d", i))
		if err != nil {
			return nil, err
		}
		s := &sleeper{restless: i%8 == 7, rng: rand.New(rand.NewPCG(seed, uint64(i))), pushed: make(chan struct{}, 1)}
		s.device, err = mdmtest.NewDevice(url+"/mdm", identity, mdmtest.Config{
			Client: f.client, MaxCommands: 500,
			Behaviour: func(c *mdmtest.Command) mdmtest.Answer { return s.answerTo(f, c) },
			Observe:   func(_ string, _ time.Duration, err error) { h.answered(err == nil) },
		})
		if err != nil {
			return nil, err
		}
		s.id = s.device.UDID()
		f.devices = append(f.devices, s)
		f.byToken[string(s.device.PushToken())] = s
	}
	return f, nil
}

// wake is the fake APNs' word that a push arrived.
func (f *fleet) wake(p apnstest.Push) {
	if s := f.byToken[string(p.Token)]; s != nil {
		select {
		case s.pushed <- struct{}{}:
		default:
		}
	}
}

// enroll enrolls all devices for the first time, before anything is broken.
func (f *fleet) enroll(ctx context.Context) error {
	for _, s := range f.devices {
		if err := s.device.Enroll(ctx); err != nil {
			return fmt.Errorf("enrolling: %w", err)
		}
	}
	return nil
}

// run lets the devices live until the context ends.
func (f *fleet) run(ctx context.Context) {
	for _, s := range f.devices {
		f.busy.Go(func() { s.live(ctx, f) })
	}
}

func (f *fleet) wait() {
	f.busy.Wait()
	f.client.CloseIdleConnections()
}

func (s *sleeper) live(ctx context.Context, f *fleet) {
	if s.asleep != nil {
		select {
		case <-s.asleep:
			s.poll(ctx, f)
		case <-ctx.Done():
			return
		}
	}
	enrollAt := time.Now().Add(s.pause(5*time.Second, 10*time.Second))
	for ctx.Err() == nil {
		if s.isRestless() && time.Now().After(enrollAt) {
			s.enrollAgain(ctx, f)
			enrollAt = time.Now().Add(s.pause(5*time.Second, 10*time.Second))
		}
		again := time.NewTimer(time.Second)
		select {
		case <-s.pushed:
		case <-again.C:
			again.Stop()
			continue
		case <-ctx.Done():
			again.Stop()
			return
		}
		again.Stop()
		s.poll(ctx, f)
	}
}

// poll is one conversation, repeated until it reached its end: a device
// repeats what failed.
func (s *sleeper) poll(ctx context.Context, f *fleet) {
	for ctx.Err() == nil {
		visit, err := s.device.Poll(ctx)
		for _, x := range append(visit.Resent, visit.Exchanges...) {
			f.history.reported(s.id, result{
				uuid: x.Command.UUID, requestType: x.Command.RequestType, status: string(x.Status), nonce: nonce(s.id, x.Command.UUID),
			})
		}
		if err == nil && !endsWithNotNow(visit) {
			return
		}
		_ = backoff.Sleep(ctx, s.pause(100*time.Millisecond, 600*time.Millisecond))
	}
}

// endsWithNotNow: a device comes back by itself if NotNow was the last thing
// that it said, and only then.
func endsWithNotNow(v mdmtest.Visit) bool {
	return len(v.Exchanges) > 0 && v.Exchanges[len(v.Exchanges)-1].Status == mdmtest.StatusNotNow
}

// enrollAgain enrolls as after an erase. Authenticate and TokenUpdate are each
// repeated until they succeed.
func (s *sleeper) enrollAgain(ctx context.Context, f *fleet) {
	s.setEnrolling(true)
	defer s.setEnrolling(false)
	f.history.enrolling(s.id)
	for _, step := range []func(context.Context) error{s.device.Authenticate, s.device.TokenUpdate} {
		for step(ctx) != nil {
			if backoff.Sleep(ctx, s.pause(100*time.Millisecond, 600*time.Millisecond)) != nil {
				return
			}
		}
	}
	f.history.enrolling(s.id) // what was queued until now may have been cleared
}

func (s *sleeper) isRestless() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.restless
}

// rest keeps the device from enrolling again.
func (s *sleeper) rest() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.restless = false
}

func (s *sleeper) setEnrolling(enrolling bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.enrolling = enrolling
}

func (s *sleeper) isEnrolling() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.enrolling
}

func (s *sleeper) pause(low, high time.Duration) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return low + time.Duration(s.rng.Int64N(int64(high-low)))
}
