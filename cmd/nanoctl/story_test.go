package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sync/errgroup"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/push/apnstest"
)

// The stories in testdata are whole errands of operators: nanoctl itself
// against the real daemon, simulated devices and a fake APNs.

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"nanoctl": main})
}

const mainKey = "the-main-key"

// buildDaemon builds the daemon and returns its path.
func buildDaemon(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "nanomdm")
	out, err := exec.Command("go", "build", "-o", program, "../nanomdm").CombinedOutput()
	if err != nil {
		t.Fatalf("building the daemon: %v\n%s", err, out)
	}
	return program
}

func TestStories(t *testing.T) {
	program := buildDaemon(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata",
		Setup: func(env *testscript.Env) error {
			env.Setenv("HOME", env.WorkDir)
			env.Setenv("XDG_CONFIG_HOME", filepath.Join(env.WorkDir, ".config"))
			w := &world{program: program, dir: env.WorkDir, behaviour: make(map[string]mdmtest.Behaviour)}
			env.Values[worldKey{}] = w
			env.Defer(w.end)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"daemon": inWorld((*world).startDaemon), "stop-daemon": inWorld((*world).stopDaemon),
			"enroll": inWorld((*world).enroll), "checkout": inWorld((*world).checkout), "bootstrap": inWorld((*world).bootstrap),
			"behave": inWorld((*world).behave), "poll": inWorld((*world).poll), "got": inWorld((*world).got),
			"hold": inWorld((*world).holdAnswers), "release": inWorld((*world).release),
			"apns": inWorld((*world).apnsMood), "pushcert": inWorld((*world).pushCert), "wait-for": inWorld((*world).waitFor),
			"mode": inWorld((*world).mode), "code": inWorld((*world).code), "guess": inWorld((*world).guess), "settled": inWorld((*world).settled),
			"receiver": inWorld((*world).startReceiver), "received": inWorld((*world).received),
		},
	})
}

type worldKey struct{}

// inWorld makes a command of the scripts; it fails the script, or has to fail
// if it is negated.
func inWorld(do func(*world, *testscript.TestScript, []string) error) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, negated bool, args []string) {
		err := do(ts.Value(worldKey{}).(*world), ts, args)
		switch {
		case negated && err == nil:
			ts.Fatalf("it did not fail")
		case !negated && err != nil:
			ts.Fatalf("%v", err)
		}
	}
}

// world is a daemon with its devices and its APNs.
type world struct {
	program, dir string
	ca           *mdmtest.CA
	apns         *apnstest.Server
	daemon       *exec.Cmd
	log          logBuffer
	url          string
	client       *http.Client
	devices      []*mdmtest.Device
	wakes        sync.WaitGroup // devices that a push woke
	receiver     *httptest.Server
	events       chan string  // topics that the receiver took
	refusal      atomic.Int32 // status with which the receiver refuses events; 0: it takes them

	mu        sync.Mutex
	behaviour map[string]mdmtest.Behaviour // by UDID
	held      []held
	ended     map[string]string // state by enrollment, of the last settled
}

// logBuffer is the daemon's log.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// patience is how long anything in a story may take.
const patience = time.Minute

var listening = regexp.MustCompile(`address=(127\.0\.0\.1:\d+)`)

// startDaemon starts the daemon with further flags, anew if it ran before.
func (w *world) startDaemon(ts *testscript.TestScript, args []string) error {
	if w.ca == nil {
		var err error
		if w.ca, err = mdmtest.NewCA(); err != nil {
			return err
		}
		if err := w.ca.Save(filepath.Join(w.dir, "ca")); err != nil {
			return err
		}
		if w.apns, err = apnstest.NewServer(apnstest.Config{OnPush: w.wake}); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(w.dir, "apns-ca.pem"), w.apns.CAPEM(), 0o600); err != nil {
			return err
		}
		w.client = &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 32, MaxConnsPerHost: 32}}
	}
	if err := w.stopDaemon(ts, nil); err != nil {
		return err
	}
	w.daemon = exec.Command(w.program, append([]string{
		"-ca", "ca/ca.pem", "-listen", "127.0.0.1:0", "-webhook-networks", "127.0.0.0/8", "-storage-dsn", "mdm.db", "-apns-url", w.apns.URL(), "-apns-ca", "apns-ca.pem",
		"-webhook-networks", "127.0.0.0/8", // where the receivers are
	}, args...)...)
	w.daemon.Dir, w.daemon.Env = w.dir, []string{"NANOMDM_API=" + mainKey, "PATH=" + os.Getenv("PATH")}
	before := len(w.log.String())
	w.daemon.Stdout, w.daemon.Stderr = &w.log, &w.log
	if err := w.daemon.Start(); err != nil {
		return err
	}
	err := eventually(func() bool {
		m := listening.FindStringSubmatch(w.log.String()[before:])
		if m == nil {
			return false
		}
		w.url = "http://" + m[1]
		resp, err := http.Get(w.url + "/readyz")
		if err != nil {
			return false
		}
		resp.Body.Close()
		return resp.StatusCode == http.StatusOK
	})
	if err != nil {
		return fmt.Errorf("the daemon does not start: %w\n%s", err, w.log.String())
	}
	ts.Setenv("NANOMDM_URL", w.url)
	ts.Setenv("NANOMDM_API", mainKey)
	return nil
}

func eventually(true func() bool) error {
	for end := time.Now().Add(patience); !true(); {
		if time.Now().After(end) {
			return fmt.Errorf("not within %v", patience)
		}
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

func (w *world) stopDaemon(*testscript.TestScript, []string) error {
	if w.daemon == nil {
		return nil
	}
	w.wakes.Wait()
	// A connection that was dialled and never used keeps a server that is
	// going down for five seconds.
	w.client.CloseIdleConnections()
	if err := w.daemon.Process.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	err := w.daemon.Wait()
	w.daemon = nil
	if err != nil {
		return fmt.Errorf("the daemon's end: %w\n%s", err, w.log.String())
	}
	return nil
}

func (w *world) end() {
	_ = w.release(nil, nil)
	if w.daemon != nil {
		if w.apns != nil {
			w.apns.SetOnPush(nil)
		}
		w.wakes.Wait()
		_ = w.daemon.Process.Kill()
		_ = w.daemon.Wait()
	}
	if w.receiver != nil {
		w.receiver.Close()
	}
	if w.apns != nil {
		w.apns.Close()
		w.client.CloseIdleConnections()
	}
}

// enroll [-count N] [-kind KIND] [-topic TOPIC] [-user NAME] NAME...: the names
// are the devices' UDIDs; their serial numbers are S and the name. With a count
// there are NAME001 and so on.
func (w *world) enroll(_ *testscript.TestScript, args []string) error {
	flags := flag.NewFlagSet("enroll", flag.ContinueOnError)
	count := flags.Int("count", 0, "")
	kind := flags.String("kind", "Mac", "")
	topic := flags.String("topic", mdmtest.DefaultTopic, "")
	user := flags.String("user", "", "")
	if err := flags.Parse(args); err != nil {
		return err
	}
	names := flags.Args()
	if *count > 0 {
		prefix := names[0]
		names = nil
		for i := range *count {
			names = append(names, fmt.Sprintf("%s%03d", prefix, i+1))
		}
	}
	kinds := []mdmtest.Kind{mdmtest.Mac, mdmtest.IPhone, mdmtest.IPad, mdmtest.SharedIPad, mdmtest.UserEnrollment}
	i := slices.IndexFunc(kinds, func(k mdmtest.Kind) bool { return k.String() == *kind })
	if i < 0 {
		return fmt.Errorf("no kind %q", *kind)
	}
	var fresh []*mdmtest.Device
	for _, name := range names {
		id, err := w.ca.Issue(name)
		if err != nil {
			return err
		}
		d, err := mdmtest.NewDevice(w.url+"/mdm", id, mdmtest.Config{
			Kind: kinds[i], UDID: name, Serial: "S" + strings.ToUpper(name), Topic: *topic, Client: w.client,
			Behaviour: func(c *mdmtest.Command) mdmtest.Answer { return w.answer(name, c) },
		})
		if err != nil {
			return err
		}
		fresh = append(fresh, d)
	}
	w.mu.Lock()
	w.devices = append(w.devices, fresh...)
	w.mu.Unlock()
	return each(fresh, func(ctx context.Context, d *mdmtest.Device) error {
		if err := d.Enroll(ctx); err != nil || *user == "" {
			return err
		}
		return d.User(*user).TokenUpdate(ctx)
	})
}

// each works on devices, several at a time.
func each(devices []*mdmtest.Device, work func(context.Context, *mdmtest.Device) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(16)
	for _, d := range devices {
		g.Go(func() error { return work(ctx, d) })
	}
	return g.Wait()
}

// named finds devices: by name, or by a pattern such as m00*.
func (w *world) named(patterns []string) ([]*mdmtest.Device, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var found []*mdmtest.Device
	for _, pattern := range patterns {
		before := len(found)
		for _, d := range w.devices {
			if ok, err := filepath.Match(pattern, d.UDID()); err != nil {
				return nil, err
			} else if ok {
				found = append(found, d)
			}
		}
		if len(found) == before {
			return nil, fmt.Errorf("no device %s", pattern)
		}
	}
	return found, nil
}

func (w *world) checkout(_ *testscript.TestScript, args []string) error {
	devices, err := w.named(args)
	if err != nil {
		return err
	}
	return each(devices, func(ctx context.Context, d *mdmtest.Device) error { return d.CheckOut(ctx) })
}

// bootstrap NAME TOKEN escrows a bootstrap token.
func (w *world) bootstrap(_ *testscript.TestScript, args []string) error {
	devices, err := w.named(args[:1])
	if err != nil {
		return err
	}
	return each(devices, func(ctx context.Context, d *mdmtest.Device) error { return d.SetBootstrapToken(ctx, []byte(args[1])) })
}

// behave STATUS NAME...: the devices answer commands with this status.
func (w *world) behave(_ *testscript.TestScript, args []string) error {
	devices, err := w.named(args[1:])
	if err != nil {
		return err
	}
	answer := mdmtest.Answer{Status: mdmtest.Status(args[0])}
	if answer.Status == mdmtest.StatusError {
		answer.ErrorChain = []mdmtest.ErrorItem{{Code: 4001, Domain: "MCInstallationErrorDomain", Description: "Profile installation failed."}}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, d := range devices {
		w.behaviour[d.UDID()] = func(*mdmtest.Command) mdmtest.Answer { return answer }
	}
	return nil
}

// held is a device that has a command and has not answered it.
type held struct {
	free chan struct{} // closed when it may answer
	done chan struct{} // closed when its connection has ended
}

// holdAnswers NAME...: the devices have a command and have not answered it
// until release.
func (w *world) holdAnswers(_ *testscript.TestScript, args []string) error {
	devices, err := w.named(args)
	if err != nil {
		return err
	}
	has := make(chan struct{}, len(devices))
	for _, d := range devices {
		h := held{make(chan struct{}), make(chan struct{})}
		w.mu.Lock()
		w.held = append(w.held, h)
		w.behaviour[d.UDID()] = func(*mdmtest.Command) mdmtest.Answer {
			has <- struct{}{}
			<-h.free
			return mdmtest.Answer{}
		}
		w.mu.Unlock()
		go func() {
			defer close(h.done)
			_, _ = d.Poll(context.Background())
		}()
	}
	for range devices {
		select {
		case <-has:
		case <-time.After(patience):
			return errors.New("not all were given a command")
		}
	}
	return nil
}

// release lets held devices answer, one after the other.
func (w *world) release(*testscript.TestScript, []string) error {
	w.mu.Lock()
	all := w.held
	w.held = nil
	clear(w.behaviour)
	w.mu.Unlock()
	for _, h := range all {
		close(h.free)
		<-h.done
	}
	return nil
}

func (w *world) answer(udid string, c *mdmtest.Command) mdmtest.Answer {
	w.mu.Lock()
	behaviour := w.behaviour[udid]
	w.mu.Unlock()
	if behaviour == nil {
		return mdmtest.Answer{}
	}
	return behaviour(c)
}

// wake is what a push does.
func (w *world) wake(p apnstest.Push) {
	w.mu.Lock()
	i := slices.IndexFunc(w.devices, func(d *mdmtest.Device) bool { return bytes.Equal(d.PushToken(), p.Token) })
	var d *mdmtest.Device
	if i >= 0 {
		d = w.devices[i]
	}
	w.mu.Unlock()
	if d != nil {
		w.wakes.Go(func() { _, _ = d.Poll(context.Background()) })
	}
}

// poll NAME...: each connects once.
func (w *world) poll(_ *testscript.TestScript, args []string) error {
	devices, err := w.named(args)
	if err != nil {
		return err
	}
	return each(devices, func(ctx context.Context, d *mdmtest.Device) error {
		_, err := d.Poll(ctx)
		return err
	})
}

// got NAME [REQUEST_TYPE...]: each connects and is given these commands.
func (w *world) got(_ *testscript.TestScript, args []string) error {
	devices, err := w.named(args[:1])
	if err != nil {
		return err
	}
	return each(devices, func(ctx context.Context, d *mdmtest.Device) error {
		visit, err := d.Poll(ctx)
		if err != nil {
			return err
		}
		got := []string{}
		for _, x := range visit.Exchanges {
			got = append(got, x.Command.RequestType)
		}
		if !slices.Equal(got, args[1:]) {
			return fmt.Errorf("%s was given %q", d.UDID(), got)
		}
		return nil
	})
}

// apnsMood ok, dead-tokens or silent: what APNs says from now on; asleep and
// awake: whether pushes wake devices.
func (w *world) apnsMood(_ *testscript.TestScript, args []string) error {
	for _, mood := range args {
		switch mood {
		case "ok":
			w.apns.SetAnswer(nil)
		case "dead-tokens":
			w.apns.SetAnswer(func(apnstest.Push) apnstest.Answer {
				return apnstest.Answer{Status: 410, Reason: "Unregistered", Timestamp: time.Now()}
			})
		case "asleep":
			w.apns.SetOnPush(nil)
		case "awake":
			w.apns.SetOnPush(w.wake)
		default:
			return fmt.Errorf("no mood %q", mood)
		}
	}
	return nil
}

// pushCert TOPIC FILE writes a push certificate with its key.
func (w *world) pushCert(ts *testscript.TestScript, args []string) error {
	cert, key, err := w.apns.PushCertificate(args[0])
	if err != nil {
		return err
	}
	return os.WriteFile(ts.MkAbs(args[1]), append(cert, key...), 0o600)
}

// waitFor PATTERN COMMAND...: until what nanoctl prints matches.
func (w *world) waitFor(ts *testscript.TestScript, args []string) error {
	pattern, err := regexp.Compile(args[0])
	if err != nil {
		return err
	}
	var out bytes.Buffer
	err = eventually(func() bool {
		out.Reset()
		e := &env{in: strings.NewReader(""), out: &out, err: io.Discard, getenv: ts.Getenv, home: func() (string, error) { return w.dir, nil }}
		run(context.Background(), e, args[1:])
		return pattern.MatchString(out.String())
	})
	if err != nil {
		return fmt.Errorf("%w: %s", err, out.String())
	}
	return nil
}

// mode OCTAL FILE
func (w *world) mode(ts *testscript.TestScript, args []string) error {
	var mode os.FileMode
	if _, err := fmt.Sscanf(args[0], "%o", &mode); err != nil {
		return err
	}
	return os.Chmod(ts.MkAbs(args[1]), mode)
}

// code N COMMAND...: the command leaves with this exit code.
func (w *world) code(ts *testscript.TestScript, args []string) error {
	want, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		exit := (*exec.ExitError)(nil)
		if !errors.As(err, &exit) {
			return err
		}
		got = exit.ExitCode()
	}
	if got != want {
		return fmt.Errorf("exit code %d", got)
	}
	return nil
}

// guess N: so many wrong keys.
func (w *world) guess(_ *testscript.TestScript, args []string) error {
	n, err := strconv.Atoi(args[0])
	if err != nil {
		return err
	}
	for i := range n {
		req, err := http.NewRequest(http.MethodGet, w.url+"/v1/keys", nil)
		if err != nil {
			return err
		}
		req.Header.Set("Authorization", fmt.Sprint("Bearer guess", i))
		resp, err := w.client.Do(req)
		if err != nil {
			return err
		}
		resp.Body.Close()
	}
	return nil
}

// settled UUID N: the command has ended for N enrollments, by an answer or a
// cancellation, and no differently than when that was looked at last.
func (w *world) settled(ts *testscript.TestScript, args []string) error {
	var out bytes.Buffer
	e := &env{in: strings.NewReader(""), out: &out, err: &out, getenv: ts.Getenv}
	if code := run(context.Background(), e, []string{"status", args[0], "-o", "json"}); code != 0 {
		return errors.New(out.String())
	}
	var status struct{ Enrollments []queueItem }
	if err := json.Unmarshal(out.Bytes(), &status); err != nil {
		return err
	}
	if fmt.Sprint(len(status.Enrollments)) != args[1] {
		return fmt.Errorf("%d enrollments", len(status.Enrollments))
	}
	states := make(map[string]string)
	for _, q := range status.Enrollments {
		if q.State != "acknowledged" && q.State != "cancelled" {
			return fmt.Errorf("%s is %s", q.EnrollmentID, q.State)
		}
		states[q.EnrollmentID] = q.State
	}
	if w.ended != nil && !maps.Equal(w.ended, states) {
		return fmt.Errorf("they were %v and are %v", w.ended, states)
	}
	w.ended = states
	return nil
}

// receiver [STATUS]: listen for a sink at RECEIVER, and refuse events with STATUS.
func (w *world) startReceiver(ts *testscript.TestScript, args []string) error {
	w.refusal.Store(0)
	if len(args) > 0 {
		status, err := strconv.Atoi(args[0])
		if err != nil {
			return err
		}
		w.refusal.Store(int32(status))
	}
	if w.receiver != nil {
		return nil
	}
	w.events = make(chan string, 100)
	w.receiver = httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var e event
		if r.Header.Get("X-Hmac-Signature") == "" || json.NewDecoder(r.Body).Decode(&e) != nil {
			rw.WriteHeader(http.StatusBadRequest)
			return
		}
		if status := int(w.refusal.Load()); status != 0 {
			rw.WriteHeader(status)
			return
		}
		w.events <- e.Topic
	}))
	ts.Setenv("RECEIVER", w.receiver.URL+"/")
	return nil
}

// received TOPIC: the receiver is sent an event.
func (w *world) received(_ *testscript.TestScript, args []string) error {
	select {
	case topic := <-w.events:
		if topic != args[0] {
			return fmt.Errorf("received %s", topic)
		}
		return nil
	case <-time.After(patience):
		return errors.New("nothing was received")
	}
}
