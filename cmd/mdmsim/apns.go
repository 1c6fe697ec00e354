package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

type apnsOptions struct {
	url, caDir, key, topic string
	listen                 string
	apnsCA, apnsCAKey      string
	latency                time.Duration
	devices, connections   int
	commands               int
	rotate                 time.Duration
	access                 access
}

func runAPNs(ctx context.Context, s streams, args []string) error {
	o, err := parseAPNs(s, args)
	if err != nil {
		return err
	}
	ca, _, err := openCA(o.caDir)
	if err != nil {
		return err
	}
	identities, err := openIdentities(ca, o.caDir, o.devices)
	if err != nil {
		return err
	}
	apnsCA, err := openAPNsCA(o.apnsCA, o.apnsCAKey)
	if err != nil {
		return err
	}
	apns, err := apnstest.NewServer(apnstest.Config{Addr: o.listen, CA: apnsCA, Latency: o.latency})
	if err != nil {
		return err
	}
	defer apns.Close()
	client := o.access.client(o.connections + o.devices)
	defer client.CloseIdleConnections()
	defer o.access.close()
	r := &pushRun{
		o: o, out: &lockedWriter{w: s.out}, apns: apns, measure: newMeasure(),
		api:   &api{client: client, base: strings.TrimSuffix(o.url, "/"), key: o.key},
		woken: make(map[string]*sleeper), asked: make(map[string]question),
	}
	for _, id := range identities {
		if err := r.add(id); err != nil {
			return err
		}
	}
	return r.run(ctx)
}

func parseAPNs(s streams, args []string) (*apnsOptions, error) {
	flags := newFlags(s, "apns", "-url URL [flags]", `
Runs a fake APNs and simulated devices that wake and poll when they are pushed.
It prints the flags with which to start the server, waits for it, uploads a push
certificate and enrolls the devices. Then it shows what the pushes bring, until
it is interrupted; or, with -time, queues commands through the API, measures how
long each takes until its acknowledgement was taken, and ends. The authority of
the fake APNs is kept, so that the server can be started first; "mdmsim ca"
makes it ahead of time.`)
	o := &apnsOptions{}
	flags.StringVar(&o.url, "url", "http://127.0.0.1:9000", "base `URL` of the server, without /mdm")
	flags.StringVar(&o.caDir, "ca-dir", defaultCADir, "`directory` of the CA and the devices; made if need be")
	flags.StringVar(&o.apnsCA, "apns-ca", "", "PEM `file` of the fake APNs' authority; apns-ca.pem in -ca-dir unless given")
	flags.StringVar(&o.apnsCAKey, "apns-ca-key", "", "its key's `file`; apns-ca.key in -ca-dir unless given")
	flags.StringVar(&o.key, "api", "", "API `key` (better given in NANOMDM_API)")
	flags.StringVar(&o.topic, "topic", mdmtest.DefaultTopic, "APNs topic of the devices")
	o.access.flags(flags)
	flags.DurationVar(&o.rotate, "rotate", 0, "upload a new push certificate this often, as for a renewal; 0 is never")
	flags.StringVar(&o.listen, "listen", "127.0.0.1:2197", "`address` of the fake APNs")
	flags.DurationVar(&o.latency, "latency", 20*time.Millisecond, "how long the fake APNs takes to answer")
	flags.IntVar(&o.devices, "devices", 3, "how many devices")
	flags.IntVar(&o.commands, "time", 0, "how many commands to queue and time; 0 is to wait for pushes")
	flags.IntVar(&o.connections, "connections", 1, "how many commands are under way at once, with -time")
	if err := parse(s, flags, args); err != nil {
		return nil, err
	}
	if o.key == "" {
		o.key = s.env("NANOMDM_API")
	}
	certFile, keyFile := apnsCAFiles(o.caDir)
	o.apnsCA, o.apnsCAKey = cmp.Or(o.apnsCA, certFile), cmp.Or(o.apnsCAKey, keyFile)
	switch {
	case o.devices < 1 || o.connections < 1:
		return nil, badUsage(s, "-devices and -connections are at least 1")
	case o.commands < 0:
		return nil, badUsage(s, "-time is not negative")
	case o.rotate < 0:
		return nil, badUsage(s, "-rotate is not negative")
	case o.key == "":
		return nil, badUsage(s, "%v", errNoKey)
	}
	if err := o.access.check(o.url); err != nil {
		return nil, badUsage(s, "%v", err)
	}
	return o, nil
}

// pushRun is one run of the fake APNs with its devices.
type pushRun struct {
	o       *apnsOptions
	out     io.Writer
	apns    *apnstest.Server
	api     *api
	measure *measure
	devices []*mdmtest.Device
	woken   map[string]*sleeper // by push token; fixed before the first push

	mu    sync.Mutex
	asked map[string]question // by command UUID
}

// sleeper is a device that waits for a push.
type sleeper struct {
	device *mdmtest.Device
	// pushed has room for one: a push that comes during a poll causes
	// another poll, however many come.
	pushed chan struct{}
}

// question is a command whose time runs.
type question struct {
	start time.Time
	taken chan struct{} // closed when the acknowledgement was taken
}

func (r *pushRun) add(id *mdmtest.Identity) error {
	cfg := mdmtest.Config{
		Client: r.api.client, Topic: r.o.topic, Observe: func(kind string, took time.Duration, err error) {
			if !isCanceled(err) {
				r.measure.observe(kind, took, err)
			}
		},
	}
	r.o.access.configure(&cfg, id)
	device, err := mdmtest.NewDevice(r.api.base+"/mdm", id, cfg)
	if err != nil {
		return err
	}
	r.devices = append(r.devices, device)
	r.woken[string(device.PushToken())] = &sleeper{device: device, pushed: make(chan struct{}, 1)}
	return nil
}

func (r *pushRun) run(ctx context.Context) error {
	certificate, err := r.writeFiles()
	if err != nil {
		return err
	}
	if err := r.awaitServer(ctx); err != nil {
		return err
	}
	if _, err := r.api.do(ctx, http.MethodPut, "/v1/pushcert", certificate); err != nil {
		return fmt.Errorf("uploading the push certificate: %w", err)
	}
	// From the first enrollment on no push is missed: a sleeper that is not
	// yet in bed finds it waiting.
	r.apns.SetOnPush(r.wake)
	for _, device := range r.devices {
		if err := device.Enroll(ctx); err != nil {
			return fmt.Errorf("enrolling: %w", err)
		}
	}
	fmt.Fprintf(r.out, "Enrolled, and asleep until pushed:\n")
	for _, device := range r.devices {
		fmt.Fprintf(r.out, "  %s\n", device.EnrollmentID())
	}
	return r.serve(ctx)
}

// writeFiles writes what the server needs and returns the push certificate.
func (r *pushRun) writeFiles() ([]byte, error) {
	cert, key, err := r.apns.PushCertificate(r.o.topic)
	if err != nil {
		return nil, err
	}
	both := slices.Concat(cert, key)
	push := filepath.Join(r.o.caDir, "push.pem")
	if err := os.WriteFile(push, both, 0o600); err != nil {
		return nil, err
	}
	fmt.Fprintf(r.out, `The fake APNs answers on %s. The server needs these flags, and the API
key in NANOMDM_API:

  -ca %s -apns-url %s -apns-ca %s

Its push certificate, %s, is uploaded as soon as the server answers on %s.
`, r.apns.URL(), filepath.Join(r.o.caDir, "ca.pem"), r.apns.URL(), r.o.apnsCA, push, r.api.base)
	return both, nil
}

func (r *pushRun) awaitServer(ctx context.Context) error {
	ticker := time.NewTicker(100 * time.Millisecond)
	defer ticker.Stop()
	for {
		version, err := r.api.version(ctx)
		if err == nil {
			fmt.Fprintf(r.out, "Server %s is there: -url is %s, devices speak to %s/mdm.\n", version, r.api.base, r.api.base)
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("the server did not answer: %w", err)
		}
	}
}

// serve lets the devices sleep and wake until the run is over.
func (r *pushRun) serve(ctx context.Context) error {
	awake, stop := context.WithCancel(ctx)
	var sleepers sync.WaitGroup
	for _, s := range r.woken {
		sleepers.Go(func() { r.sleep(awake, s) })
	}
	if r.o.rotate > 0 {
		sleepers.Go(func() { r.rotate(awake) })
	}
	if r.o.commands == 0 {
		<-ctx.Done()
	} else {
		r.timeCommands(ctx)
	}
	r.apns.SetOnPush(nil)
	stop()
	sleepers.Wait()

	counts := r.apns.Counts()
	fmt.Fprintf(r.out, "\n%d pushes, %d accepted, over %d connections\n\n", counts.Requests, counts.Accepted, counts.Handshakes)
	r.measure.print(r.out)
	if _, failed := r.measure.totals(); failed > 0 {
		return fmt.Errorf("%d errors", failed)
	}
	if r.o.commands > 0 {
		return ctx.Err() // interrupted before the end
	}
	return nil
}

// rotate replaces the push certificate again and again. A push that is accepted
// with the one before, as long as a server may remember it, is no error.
func (r *pushRun) rotate(ctx context.Context) {
	ticker := time.NewTicker(r.o.rotate)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return
		}
		start := time.Now()
		cert, key, err := r.apns.PushCertificate(r.o.topic)
		if err == nil {
			_, err = r.api.do(ctx, http.MethodPut, "/v1/pushcert", slices.Concat(cert, key))
		}
		if !isCanceled(err) {
			r.measure.observe("push certificate", time.Since(start), err)
		}
	}
}

// wake is called by the fake APNs for each accepted push.
func (r *pushRun) wake(push apnstest.Push) {
	s := r.woken[string(push.Token)]
	switch {
	case s == nil:
		r.measure.fail("a push to a token that no device has")
	case push.Magic != s.device.PushMagic() || push.Topic != r.o.topic:
		r.measure.fail("a push with a wrong magic or topic")
	default:
		select {
		case s.pushed <- struct{}{}:
		default: // it is to wake anyway
		}
	}
}

// sleep is the life of a device.
func (r *pushRun) sleep(ctx context.Context, s *sleeper) {
	for {
		select {
		case <-s.pushed:
		case <-ctx.Done():
			return
		}
		visit, err := s.device.Poll(ctx)
		var did []string
		for _, exchange := range slices.Concat(visit.Resent, visit.Exchanges) {
			did = append(did, fmt.Sprintf("%s %s", exchange.Command.RequestType, exchange.Status))
			r.answered(exchange.Command.UUID)
		}
		switch {
		case r.o.commands > 0 || isCanceled(err):
		case err != nil:
			fmt.Fprintf(r.out, "%s  %s  %v\n", time.Now().Format(time.TimeOnly), s.device.EnrollmentID(), err)
		default:
			fmt.Fprintf(r.out, "%s  %s  pushed: %d commands  %s\n",
				time.Now().Format(time.TimeOnly), s.device.EnrollmentID(), len(did), strings.Join(did, ", "))
		}
	}
}

// answered ends the time of a command, if it is one of ours.
func (r *pushRun) answered(uuid string) {
	r.mu.Lock()
	q, ours := r.asked[uuid]
	delete(r.asked, uuid)
	r.mu.Unlock()
	if ours {
		r.measure.observe("enqueue to acknowledged", time.Since(q.start), nil)
		close(q.taken)
	}
}

// timeCommands queues the commands and waits for each.
func (r *pushRun) timeCommands(ctx context.Context) {
	queue := make(chan *mdmtest.Device)
	var workers sync.WaitGroup
	for range r.o.connections {
		workers.Go(func() {
			for device := range queue {
				r.timeOne(ctx, device)
			}
		})
	}
	defer workers.Wait()
	defer close(queue)
	for i := range r.o.commands {
		select {
		case queue <- r.devices[i%len(r.devices)]:
		case <-ctx.Done():
			return
		}
	}
}

func (r *pushRun) timeOne(ctx context.Context, device *mdmtest.Device) {
	uuid := mdmtest.NewUUID()
	q := question{start: time.Now(), taken: make(chan struct{})}
	r.mu.Lock()
	r.asked[uuid] = q
	r.mu.Unlock()

	err := r.api.enqueue(ctx, []string{device.EnrollmentID()}, mdmtest.NewCommand(uuid, "DeviceInformation", nil), true)
	if isCanceled(err) {
		return
	}
	r.measure.observe("enqueue", time.Since(q.start), err)
	if err != nil {
		return
	}
	timer := time.NewTimer(r.o.access.timeout)
	defer timer.Stop()
	select {
	case <-q.taken:
	case <-timer.C:
		r.measure.fail(fmt.Sprintf("a command was not acknowledged in %v", r.o.access.timeout))
	case <-ctx.Done():
	}
}

// lockedWriter lets the devices write whole lines.
type lockedWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
