package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"golang.org/x/sync/errgroup"
)

type loadOptions struct {
	url, caDir, key    string
	devices, users     int
	connections        int
	enroll             bool
	polls              int
	duration           time.Duration
	commands, batch    int
	requestTypes       string
	notNow, failing    float64
	seed               uint64
	signedAttributes   bool
	checkinPath, topic string
	applications       int
	access             access
}

func runLoad(ctx context.Context, s streams, args []string) error {
	o, err := parseLoad(s, args)
	if err != nil {
		return err
	}
	l, err := newLoad(s, o)
	if err != nil {
		return err
	}
	defer l.client.CloseIdleConnections()
	defer o.access.close()
	return l.run(ctx)
}

func parseLoad(s streams, args []string) (*loadOptions, error) {
	flags := newFlags(s, "load", "-url URL [flags]", `
Enrolls simulated devices, queues commands for them through the API if asked,
polls until each channel was served, and prints latencies and errors. It fails
if there was an error, or if a command got lost or was offered again after the
server had taken its result. Devices are kept in the CA's directory: a second
run with -enroll=false polls with the same ones.`)
	o := &loadOptions{}
	flags.StringVar(&o.url, "url", "http://127.0.0.1:9000", "base `URL` of the server, without /mdm")
	flags.StringVar(&o.checkinPath, "checkin-path", "/mdm", "`path` for check-ins: /checkin for a server with -checkin")
	flags.StringVar(&o.caDir, "ca-dir", defaultCADir, "`directory` of the CA and the devices; made if need be")
	flags.StringVar(&o.key, "api", "", "API `key`, for -commands-per-device (better given in NANOMDM_API)")
	flags.IntVar(&o.devices, "devices", 100, "how many devices")
	flags.IntVar(&o.users, "users", 0, "how many user channels each device has")
	flags.IntVar(&o.connections, "connections", 8, "how many connections at once")
	flags.BoolVar(&o.enroll, "enroll", true, "enroll the devices first")
	flags.IntVar(&o.polls, "polls", 1, "how often each channel polls")
	flags.DurationVar(&o.duration, "duration", 0, "poll for so long, in place of -polls")
	flags.IntVar(&o.commands, "commands-per-device", 0, "how many commands to queue for each channel, without push")
	flags.IntVar(&o.batch, "batch", 100, "how many channels one API call queues for")
	flags.StringVar(&o.requestTypes, "commands", "DeviceInformation,ProfileList,SecurityInfo,InstalledApplicationList",
		"the `request types` to take turns with")
	flags.IntVar(&o.applications, "applications", 20, "how many applications each device has, for the size of its list")
	flags.Float64Var(&o.notNow, "notnow", 0, "how many answers are NotNow, from 0 to 1")
	flags.Float64Var(&o.failing, "error", 0, "how many answers are Error, from 0 to 1")
	flags.Uint64Var(&o.seed, "seed", 1, "seed of those chances")
	flags.BoolVar(&o.signedAttributes, "signed-attributes", false, "sign with signed attributes")
	o.access.flags(flags)
	flags.StringVar(&o.topic, "topic", mdmtest.DefaultTopic, "APNs topic of the devices")
	if err := parse(s, flags, args); err != nil {
		return nil, err
	}
	if o.key == "" {
		o.key = s.env("NANOMDM_API")
	}
	switch {
	case o.devices < 1 || o.connections < 1 || o.batch < 1:
		return nil, badUsage(s, "-devices, -connections and -batch are at least 1")
	case o.users < 0 || o.polls < 0 || o.commands < 0:
		return nil, badUsage(s, "-users, -polls and -commands-per-device are not negative")
	case o.notNow < 0 || o.failing < 0 || o.notNow+o.failing > 1:
		return nil, badUsage(s, "-notnow and -error are between 0 and 1 together")
	case o.commands > 0 && o.key == "":
		return nil, badUsage(s, "-commands-per-device: %v", errNoKey)
	}
	if err := o.access.check(o.url); err != nil {
		return nil, badUsage(s, "%v", err)
	}
	return o, nil
}

// load is one run.
type load struct {
	o        *loadOptions
	s        streams
	client   *http.Client
	api      *api
	devices  []*mdmtest.Device
	channels []*loadChannel
	measure  *measure

	phase       atomic.Value // string, for the progress line
	steps, goal atomic.Int64
}

// loadChannel is a channel with what it was sent in this run. One worker has
// it at a time.
type loadChannel struct {
	*mdmtest.Channel
	polls   int
	waiting map[string]bool // by command UUID; false once the server took a terminal result
}

func newLoad(s streams, o *loadOptions) (*load, error) {
	ca, _, err := openCA(o.caDir)
	if err != nil {
		return nil, err
	}
	identities, err := openIdentities(ca, o.caDir, o.devices)
	if err != nil {
		return nil, err
	}
	base := strings.TrimSuffix(o.url, "/")
	client := o.access.client(o.connections)
	l := &load{
		o: o, s: s, client: client, measure: newMeasure(),
		api: &api{client: client, base: base, key: o.key},
	}
	cfg := mdmtest.Config{
		CheckinURL: base + o.checkinPath, Client: client, Topic: o.topic, Apps: o.applications,
		Sign:      mdmtest.SignOptions{SignedAttributes: o.signedAttributes},
		Behaviour: mdmtest.Random(o.seed, mdmtest.Rates{NotNow: o.notNow, Error: o.failing}),
		Observe:   l.observe,
	}
	for _, id := range identities {
		cfg := cfg
		o.access.configure(&cfg, id)
		device, err := mdmtest.NewDevice(base+"/mdm", id, cfg)
		if err != nil {
			return nil, err
		}
		l.devices = append(l.devices, device)
		l.channels = append(l.channels, newLoadChannel(device.Channel))
		for i := range o.users {
			l.channels = append(l.channels, newLoadChannel(device.User(fmt.Sprintf("user%d", i+1))))
		}
	}
	return l, nil
}

func newLoadChannel(channel *mdmtest.Channel) *loadChannel {
	return &loadChannel{Channel: channel, waiting: make(map[string]bool)}
}

// observe leaves out what failed because the run was ended.
func (l *load) observe(kind string, took time.Duration, err error) {
	if !isCanceled(err) {
		l.measure.observe(kind, took, err)
	}
}

func (l *load) run(ctx context.Context) error {
	done := make(chan struct{})
	var progress sync.WaitGroup
	progress.Go(func() { l.progress(done) })
	start := time.Now()
	err := l.phases(ctx)
	took := time.Since(start)
	close(done)
	progress.Wait()

	total, failed := l.measure.totals()
	fmt.Fprintf(l.s.out, "-url is %s\n", l.api.base)
	fmt.Fprintf(l.s.out, "%d devices, %d channels, %d connections: %d requests in %.1f s, %.0f a second\n\n",
		len(l.devices), len(l.channels), l.o.connections, total, took.Seconds(), float64(total)/took.Seconds())
	l.measure.print(l.s.out)
	switch {
	case err != nil:
		return err
	case failed > 0:
		return fmt.Errorf("%d errors", failed)
	}
	return nil
}

func (l *load) phases(ctx context.Context) error {
	if l.o.enroll {
		if err := l.enroll(ctx); err != nil {
			return err
		}
	}
	if l.o.commands > 0 {
		if err := l.enqueue(ctx); err != nil {
			return err
		}
	}
	if err := l.poll(ctx); err != nil {
		return err
	}
	l.audit()
	return nil
}

// each runs work for all items with as many workers as connections. Work that
// fails was counted; only the end of the run stops the others.
func each[T any](ctx context.Context, l *load, phase string, items []T, work func(context.Context, T)) error {
	l.phase.Store(phase)
	l.steps.Store(0)
	l.goal.Store(int64(len(items)))
	queue := make(chan T)
	var workers sync.WaitGroup
	for range min(l.o.connections, len(items)) {
		workers.Go(func() {
			for item := range queue {
				work(ctx, item)
				l.steps.Add(1)
			}
		})
	}
	defer workers.Wait()
	defer close(queue)
	for _, item := range items {
		select {
		case queue <- item:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (l *load) enroll(ctx context.Context) error {
	return each(ctx, l, "enrolling", l.devices, func(ctx context.Context, d *mdmtest.Device) {
		// The Observe of the devices has counted what fails.
		if d.Enroll(ctx) != nil {
			return
		}
		for i := range l.o.users {
			if d.User(fmt.Sprintf("user%d", i+1)).TokenUpdate(ctx) != nil {
				return
			}
		}
	})
}

// enqueue queues each command for a batch of channels with one call. The
// calls of one batch run one after the other, for the order of its commands.
func (l *load) enqueue(ctx context.Context) error {
	requestTypes := strings.Split(l.o.requestTypes, ",")
	batches := slices.Collect(slices.Chunk(l.channels, l.o.batch))
	return each(ctx, l, "queueing", batches, func(ctx context.Context, batch []*loadChannel) {
		ids := make([]string, len(batch))
		for i, channel := range batch {
			ids[i] = channel.EnrollmentID()
		}
		for i := range l.o.commands {
			uuid := mdmtest.NewUUID()
			command := mdmtest.NewCommand(uuid, strings.TrimSpace(requestTypes[i%len(requestTypes)]), nil)
			start := time.Now()
			err := l.api.enqueue(ctx, ids, command, false)
			l.observe("enqueue", time.Since(start), err)
			if err != nil {
				return
			}
			for _, channel := range batch {
				channel.waiting[uuid] = true
			}
		}
	})
}

// poll gives each channel its turns. A channel has one connection at a time,
// as a device or a user's agent has.
func (l *load) poll(ctx context.Context) error {
	turns := make(chan *loadChannel, len(l.channels))
	goal := len(l.channels) * l.o.polls
	var stop <-chan time.Time
	if l.o.duration > 0 {
		timer := time.NewTimer(l.o.duration)
		defer timer.Stop()
		stop, goal = timer.C, 0
	}
	l.phase.Store("polling")
	l.steps.Store(0)
	l.goal.Store(int64(goal))
	if goal == 0 && stop == nil {
		return nil
	}
	for _, channel := range l.channels {
		turns <- channel
	}

	work := make(chan *loadChannel)
	group, ctx := errgroup.WithContext(ctx)
	for range min(l.o.connections, len(l.channels)) {
		group.Go(func() error {
			for channel := range work {
				l.visit(ctx, channel)
				l.steps.Add(1)
				turns <- channel // it has room for all channels
			}
			return nil
		})
	}
	group.Go(func() error {
		defer close(work)
		for given := 0; goal == 0 || given < goal; {
			select {
			case channel := <-turns:
				if goal > 0 && channel.polls == l.o.polls {
					continue
				}
				channel.polls++
				given++
				select {
				case work <- channel:
				case <-ctx.Done():
					return ctx.Err()
				}
			case <-stop:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	return group.Wait()
}

// visit polls once and counts what the server offered.
func (l *load) visit(ctx context.Context, channel *loadChannel) {
	visit, err := channel.Poll(ctx)
	if errors.Is(err, mdmtest.ErrEndless) {
		l.measure.fail(err.Error())
	}
	for _, exchange := range slices.Concat(visit.Resent, visit.Exchanges) {
		uuid := exchange.Command.UUID
		waiting, ours := channel.waiting[uuid]
		if !ours {
			continue // of an earlier run, or another operator's
		}
		if !waiting {
			l.measure.fail("a command was offered again after its result was taken")
		}
		if exchange.Status != mdmtest.StatusNotNow {
			channel.waiting[uuid] = false
		}
	}
}

// audit counts the commands that never came. With NotNow, or polls that ended
// by the clock, some may legally wait.
func (l *load) audit() {
	left := 0
	for _, channel := range l.channels {
		for _, waiting := range channel.waiting {
			if waiting {
				left++
			}
		}
	}
	switch {
	case left == 0:
	case l.o.notNow > 0 || l.o.duration > 0 || l.o.polls == 0:
		fmt.Fprintf(l.s.out, "%d commands still wait\n", left)
	default:
		l.measure.fail(fmt.Sprintf("%d commands were queued and not offered", left))
	}
}

func (l *load) progress(done <-chan struct{}) {
	ticker := time.NewTicker(time.Second)
	defer ticker.Stop()
	start, before := time.Now(), 0
	for {
		select {
		case <-done:
			return
		case <-ticker.C:
		}
		total, failed := l.measure.totals()
		phase, _ := l.phase.Load().(string)
		goal := ""
		if n := l.goal.Load(); n > 0 {
			goal = fmt.Sprintf("/%d", n)
		}
		fmt.Fprintf(l.s.err, "%4.0f s  %-9s %d%s  %d requests/s  %d errors\n",
			time.Since(start).Seconds(), phase, l.steps.Load(), goal, total-before, failed)
		before = total
	}
}
