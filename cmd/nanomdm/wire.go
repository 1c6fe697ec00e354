package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/groob/plist"

	"github.com/nanomdm/nanomdm/certverify"
	"github.com/nanomdm/nanomdm/http/gate"
	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/http/httpmdm"
	"github.com/nanomdm/nanomdm/http/metrics"
	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/http/stall"
	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/release"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/service/certauth"
	"github.com/nanomdm/nanomdm/service/core"
	"github.com/nanomdm/nanomdm/service/devicelog"
	"github.com/nanomdm/nanomdm/service/dm"
	"github.com/nanomdm/nanomdm/service/dump"
	"github.com/nanomdm/nanomdm/service/webhook"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/supervise"
	"github.com/nanomdm/nanomdm/textinput"
)

// building is the daemon while it is being put together: first what needs no
// database, by wire, and the rest when there is one, by assemble.
type building struct {
	o      options
	log    *slog.Logger
	stdout io.Writer
	now    func() time.Time // the clock of this machine

	side    *deviceSide
	s       *server
	gate    *gate.Gate
	metrics *metrics.Metrics
	systemd *notifier
	stalls  *stall.Watch
	sealer  storage.Sealer // nil: nothing is sealed
	// Pools of CAs; nil is the system's.
	apnsCA, storageCA, webhookCA *x509.CertPool
	sinks                        []storage.EventSink

	address  string      // of the listener
	front    *gate.Front // of devices, and of the API without -api-listen
	apiFront *gate.Front // nil without -api-listen
}

// wire puts the daemon together. Everything that has to be closed is a
// component of the server that it returns. Errors of several files are reported
// at once. The database is opened when the server runs, so that a start while
// the database is away waits, with probes answered. now is the machine's clock,
// which the store bounds by its database's.
func wire(o options, environ []string, log *slog.Logger, stdout io.Writer, now func() time.Time) (*server, error) {
	counters := metrics.New(release.String())
	side, err := loadDeviceSide(o, log, counters.Checked)
	if err != nil {
		return nil, err
	}
	b := &building{o: o, log: log, stdout: stdout, now: now, side: side, gate: gate.New(log), metrics: counters}
	if b.systemd, err = newNotifier(lookup(environ)); err != nil {
		return nil, err
	}
	if err := b.loadFiles(); err != nil {
		return nil, err
	}
	b.s = newServer(log, o.drainTimeout, stopTimeout)
	b.s.drainDelay = o.drainDelay
	turned := map[string]func(){"http": counters.TurnedAway("device", "headers"), "api": counters.TurnedAway("api", "headers")}
	b.s.turned = func(server string) { turned[server]() }
	b.s.supervisor = supervise.New(supervise.Config{Logger: log, Failed: counters.Restarted, Failing: b.gate.SetFailing})
	b.s.stopping = func() {
		b.gate.Drain()
		b.notify(notifyStopping)
	}
	b.stalls = stall.New(log, nil)
	b.s.background("stall watch", b.stalls.Run)
	if err := b.openListeners(); err != nil {
		return nil, err
	}
	b.addStore()
	return b.s, nil
}

// loadFiles reads the files of options that are not the device side's.
func (b *building) loadFiles() (err error) {
	if b.sealer, err = loadSealer(b.o, b.log); err != nil {
		return err
	}
	if b.apnsCA, err = loadAPNsCA(b.o, b.log); err != nil {
		return err
	}
	if b.storageCA, err = loadRoots("storage-ca", b.o.storageCA, b.log); err != nil {
		return err
	}
	if b.webhookCA, err = loadRoots("webhook-ca", b.o.webhookCA, b.log); err != nil {
		return err
	}
	b.sinks, err = loadSinks(b.o)
	return err
}

// openListeners opens the listener, and the API's own with -api-listen. Their
// fronts turn requests away until the server has started.
func (b *building) openListeners() error {
	listener, err := listen("listen", b.o.listen)
	if err != nil {
		return err
	}
	b.address = listener.Addr().String()
	b.front = b.gate.Front()
	maxHeader := maxHeaderBytes
	if b.o.api != "" && b.o.apiListen == "" {
		maxHeader = maxAPIHeaderBytes
	}
	b.s.serve("http", listener, b.logged(b.front), b.side.tls, maxHeader)
	ready := []any{"version", release.String(), "listen", b.address, "storage", b.o.storage, "api", b.o.api != ""}
	if b.o.apiListen != "" {
		apiListener, err := listen("api-listen", b.o.apiListen)
		if err != nil {
			return errors.Join(err, listener.Close())
		}
		b.apiFront = b.gate.Front()
		b.s.serve("api", apiListener, b.logged(b.apiFront), withoutClientAuth(b.side.tls), maxAPIHeaderBytes)
		ready = append(ready, "api_listen", apiListener.Addr().String())
	}
	b.s.started = func() {
		b.gate.Started()
		b.notify(notifyReady)
		b.log.Info("nanomdm is ready", ready...)
	}
	return nil
}

func (b *building) logged(next http.Handler) http.Handler {
	return requestlog.Middleware(b.log, requestlog.Config{Trusted: b.o.trustedProxies, Panicked: b.metrics.Panicked}, next)
}

// notify sends a state to systemd. A failure is only logged.
func (b *building) notify(state string) {
	if err := b.systemd.notify(state); err != nil {
		b.log.Warn("systemd was not notified", "error", err)
	}
}

// addStore adds the component that opens the store, and everything that needs
// it.
func (b *building) addStore() {
	var store *sqlstore.Store
	b.s.add(component{
		name: "store",
		start: func(ctx context.Context) (err error) {
			cfg := sqlstore.Config{
				Driver:          b.o.storage,
				DSN:             string(b.o.storageDSN),
				Now:             b.now,
				DatabaseClock:   true,
				Logger:          b.log,
				Supervisor:      b.s.supervisor,
				ConnMaxLifetime: b.o.storageOptions.connMaxLifetime,
				ConnMaxIdleTime: b.o.storageOptions.connMaxIdleTime,
				MaxOpenConns:    b.o.storageOptions.maxOpenConns,
				RootCAs:         b.storageCA,
				Sealer:          b.sealer,
				SealCommands:    b.o.sealCommands,
				MaxUserChannels: b.o.maxUserChannels,
				Committed:       b.metrics.Committed,
				Polled:          b.metrics.Polled,
			}
			store, err = openStore(ctx, cfg, b.log, func() { b.notify(notifyWaiting(openPauses.Max)) })
			if err != nil {
				return err
			}
			if err := b.assemble(ctx, store); err != nil {
				return errors.Join(err, store.Close())
			}
			return nil
		},
		stop: func(context.Context) error { return store.Close() },
	})
}

// assemble puts together the parts that need the store. It runs while the
// server starts: components that it adds start next, in order, and requests are
// let in when all of them have.
func (b *building) assemble(ctx context.Context, store *sqlstore.Store) error {
	devices := http.NewServeMux()
	operators := devices
	devices.Handle("/version", httpapi.Version(release.String()))
	if b.apiFront != nil {
		operators = http.NewServeMux()
		operators.Handle("/version", httpapi.Version(release.String()))
	}
	pusher, err := b.push(store)
	if err != nil {
		return err
	}
	sinks, events, err := b.events(ctx, store)
	if err != nil {
		return err
	}
	var api *httpapi.API
	if b.o.api != "" {
		if api, err = b.addAPI(operators, store, pusher, sinks); err != nil {
			return err
		}
	}
	if b.side.identity != nil {
		protocol := core.New(store, b.side.core)
		h := b.deviceHandler(store, protocol, events)
		b.addDevices(devices, b.deviceRoutes(h, store))
		if b.o.migration {
			operators.Handle("/migration", api.Migration(h.Migration(protocol)))
		}
	}
	b.observe(store)
	b.upkeep(store)
	b.watch(store)
	b.s.add(component{name: "doors", start: func(context.Context) error {
		b.front.Open(devices)
		if b.apiFront != nil {
			b.apiFront.Open(operators)
		}
		return nil
	}})
	return nil
}

// addAPI adds the operator side's routes to mux.
func (b *building) addAPI(mux *http.ServeMux, store *sqlstore.Store, pusher *push.Service, sinks *webhook.Sinks) (*httpapi.API, error) {
	api, err := httpapi.New(string(b.o.api), store, pusher, httpapi.Config{
		MaxBody: b.o.maxBody, Refused: b.metrics.APIRefused, SinksChanged: sinks.Refresh, SinkGuard: callout.Guard{Allowed: b.o.webhookAllowed},
		Draining: b.s.draining(), ExpiredServed: b.o.allowExpired, Version: release.String(), Now: store.Now, Logger: b.log,
	})
	if err != nil {
		return nil, err
	}
	routes := http.NewServeMux()
	api.Register(routes)
	mux.Handle("/", gate.Limit(b.o.maxRequests, b.metrics.TurnedAway("api", "limit"), routes))
	mux.Handle("GET /metrics", api.Reader(b.metrics.Handler()))
	return api, nil
}

// deviceHandler puts the middleware before the protocol, and both behind the
// device side of HTTP.
func (b *building) deviceHandler(store *sqlstore.Store, protocol service.Handler, events service.Middleware) *httpmdm.Handler {
	chain := []service.Middleware{b.metrics.Middleware()}
	if b.o.dump {
		b.log.Warn("-dump writes every message of devices and every answer to standard output, tokens and passwords included: not for production")
		chain = append(chain, dump.New(b.stdout))
	}
	chain = append(chain, devicelog.New(b.log), events, certauth.New(certauth.Config{
		Retro: b.o.retro, Reenroll: b.o.reenroll, Renewal: b.o.renewal, Confirm: b.side.confirm, Expired: b.metrics.Expired,
		TopicCAs: b.side.topicCAs,
	}))
	h := httpmdm.New(service.Chain(protocol, chain...), b.side.identity, httpmdm.Config{
		Pins: store, Refusals: store, MaxBody: b.o.maxBody, MaxCheckin: b.o.maxCheckin, MaxStatus: b.o.maxStatus, MaxHourly: b.o.maxHourlyBytes,
		MaxInFlight: b.o.maxInFlight, MaxRequests: b.o.maxRequests, Refused: b.metrics.Refused, Stalled: b.stalls.Since,
		AuthProxyTransport: b.side.authProxy, Logger: b.log,
	})
	b.s.background("record of refusals", h.RecordRefusals)
	return h
}

// deviceRoutes returns the paths of the device side.
func (b *building) deviceRoutes(h *httpmdm.Handler, store *sqlstore.Store) map[string]http.Handler {
	routes := map[string]http.Handler{"/mdm": h.MDM(httpmdm.Any)}
	if b.o.checkin {
		routes["/mdm"], routes["/checkin"] = h.MDM(httpmdm.Reports), h.MDM(httpmdm.Checkins)
	}
	for _, path := range b.o.mdmPaths {
		routes[path] = h.MDM(httpmdm.Any)
	}
	if b.o.authProxyURL != nil {
		if b.o.certHeader == "" && !b.o.tlsClientAuth {
			b.log.Warn("devices that sign their messages are refused at /authproxy/ without a body, unless the signature has a signing time; use -cert-header or -tls-client-auth")
		}
		routes["/authproxy/"] = h.AuthProxy("/authproxy/", b.o.authProxyURL, store)
	}
	return routes
}

// watch adds what watches the database and reports to systemd's watchdog.
func (b *building) watch(store *sqlstore.Store) {
	b.s.background("database watch", func(ctx context.Context) error {
		return b.gate.Watch(ctx, func(ctx context.Context) (bool, error) {
			err := store.Ping(ctx)
			return err != nil && !errors.Is(err, sqlstore.ErrSchema), err
		})
	})
	if b.systemd != nil && b.systemd.watchdog > 0 {
		b.s.background("watchdog", func(ctx context.Context) error { return b.systemd.watch(ctx, b.log) })
	}
}

// addDevices puts the device side's routes behind one limit, and turns them
// away while the database is.
func (b *building) addDevices(mux *http.ServeMux, routes map[string]http.Handler) {
	inner := http.NewServeMux()
	guarded := gate.Limit(b.o.maxRequests, b.metrics.TurnedAway("device", "limit"),
		b.gate.Shed(b.metrics.TurnedAway("device", "database"), inner))
	for path, handler := range routes {
		inner.Handle(path, handler)
		mux.Handle(path, guarded)
	}
}

// withoutClientAuth returns the configuration of a listener that asks no client
// for a certificate.
func withoutClientAuth(cfg *tls.Config) *tls.Config {
	if cfg == nil {
		return nil
	}
	cfg = cfg.Clone()
	cfg.ClientAuth = tls.NoClientCert
	return cfg
}

// lookup reads from an environment in the form of os.Environ.
func lookup(environ []string) func(string) string {
	return func(name string) string {
		for _, pair := range environ {
			if key, value, _ := strings.Cut(pair, "="); key == name {
				return value
			}
		}
		return ""
	}
}

// deviceSide is everything that the device side needs from files. identity is
// nil with -disable-mdm.
type deviceSide struct {
	identity   *httpmdm.Identity
	tls        *tls.Config
	core       core.Config
	confirm    certauth.Confirmer           // nil without -authenticate-url
	topicCAs   map[string]certauth.Verifier // by APNs topic
	caNotAfter time.Time                    // of the first of -ca to expire; zero without devices
	authProxy  http.RoundTripper            // nil without -auth-proxy-url
}

func loadDeviceSide(o options, log *slog.Logger, checked func()) (*deviceSide, error) {
	side := &deviceSide{core: core.Config{EmptyDigestChallenge: o.uaZLDC}}
	var errs []error
	if o.tlsCert != "" {
		errs = append(errs, side.loadTLS(o, log))
	}
	if o.disableMDM {
		return side, errors.Join(errs...)
	}
	if o.reenroll == storage.ReenrollAllow {
		log.Warn("any certificate of -ca may enroll a known device anew, and then gets its commands; -reenroll same-subject and deny are stricter")
	}
	if o.retro {
		log.Warn("-retro lets any certificate of -ca speak for an enrollment that has none pinned: turn it off after the migration")
	}
	errs = append(errs, side.loadVerifiers(o, checked, log))
	if o.dm != nil {
		errs = append(errs, side.loadDM(o, log))
	}
	if o.authenticateURL != nil {
		errs = append(errs, side.loadAuthenticateHook(o, log))
	}
	if o.authProxyURL != nil {
		roots, err := loadRoots("auth-proxy-ca", o.authProxyCA, log)
		errs = append(errs, err)
		side.authProxy = callout.Transport(roots)
	}
	if o.returnToService != "" {
		var err error
		side.core.ReturnToService, err = readDict(o.returnToService)
		errs = append(errs, ofOption("return-to-service", err))
	}
	return side, errors.Join(errs...)
}

// ofOption names the option that an error is about.
func ofOption(name string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("-%s: %w", name, err)
}

func (side *deviceSide) loadTLS(o options, log *slog.Logger) error {
	cert, err := loadServerCertificate(o, log)
	side.tls = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
	if o.tlsClientAuth {
		// Requested, not required: the API shares the listener. httpmdm verifies
		// the certificate that a client shows.
		side.tls.ClientAuth = tls.RequestClientCert
	}
	return err
}

func (side *deviceSide) loadDM(o options, log *slog.Logger) error {
	roots, rootsErr := loadRoots("dm-ca", o.dmCA, log)
	backend, err := dm.New(o.dm.String(), dm.Config{
		SendKey: []byte(o.dmSendHMACKey), RecvKey: []byte(o.dmRecvHMACKey), Client: callout.Client(callout.Transport(roots)),
	})
	if err == nil {
		side.core.DeclarativeManagement = backend
	}
	return errors.Join(rootsErr, ofOption("dm", err))
}

func (side *deviceSide) loadAuthenticateHook(o options, log *slog.Logger) error {
	roots, rootsErr := loadRoots("authenticate-ca", o.authenticateCA, log)
	hook, err := certauth.NewHook(o.authenticateURL.String(), certauth.HookConfig{
		Key: []byte(o.authenticateKey), Client: callout.Client(callout.Transport(roots)),
	})
	if err == nil {
		side.confirm = hook
	}
	return errors.Join(rootsErr, ofOption("authenticate-url", err))
}

// loadVerifiers makes the verifier of -ca and those of the APNs topics that are
// bound to CAs.
func (side *deviceSide) loadVerifiers(o options, checked func(), log *slog.Logger) error {
	var intermediates pemFile
	var err error
	if o.intermediate != "" {
		if intermediates, _, err = loadCAs("intermediate", o.intermediate, log); err != nil {
			return err
		}
	}
	verifier := func(option, file string, checked func()) (*certverify.Verifier, time.Time, error) {
		roots, notAfter, err := loadCAs(option, file, log)
		if err != nil {
			return nil, notAfter, err
		}
		v, err := certverify.New(roots.data, intermediates.data, certverify.Config{ClockSkew: o.clockSkew, AllowExpired: o.allowExpired, Checked: checked})
		if err != nil {
			return nil, notAfter, fmt.Errorf("-%s, -intermediate: %w", option, err)
		}
		return v, notAfter, nil
	}
	all, notAfter, err := verifier("ca", o.ca, checked)
	errs := []error{err}
	if err == nil {
		side.caNotAfter = notAfter
		side.identity = chooseIdentity(o, all, log)
	}
	side.topicCAs = make(map[string]certauth.Verifier)
	for _, topic := range slices.Sorted(maps.Keys(o.topicCAs)) {
		v, _, err := verifier("topic-ca", o.topicCAs[topic], nil)
		side.topicCAs[topic] = v
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// loadCAs reads the CAs of an option's file, and returns when the first of them
// expires.
func loadCAs(option, path string, log *slog.Logger) (pemFile, time.Time, error) {
	f, err := readPEMFile(option, path)
	if err != nil {
		return f, time.Time{}, err
	}
	certs, err := f.certificates()
	if err != nil {
		return f, time.Time{}, err
	}
	return f, earliest(certs), f.checkCAs(certs, time.Now(), log)
}

func chooseIdentity(o options, v httpmdm.Verifier, log *slog.Logger) *httpmdm.Identity {
	switch {
	case o.certHeader != "":
		if len(o.trustedProxies) == 0 && !strings.HasPrefix(o.listen, unixPrefix) {
			log.Warn("every peer that can reach the listener is believed to set the certificate header; name your proxies with -trusted-proxies",
				"header", o.certHeader)
		}
		return httpmdm.HeaderIdentity(v, strings.TrimPrefix(o.certHeader, ":"), o.trustedProxies)
	case o.tlsClientAuth:
		return httpmdm.TLSIdentity(v)
	}
	return httpmdm.SignatureIdentity(v)
}

// readDict reads a property list file that holds a dict.
func readDict(path string) (map[string]any, error) {
	data, err := textinput.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var dict map[string]any
	if err := plist.Unmarshal(data, &dict); err != nil {
		return nil, fmt.Errorf("%s is not a property list with a dict: %w", path, err)
	}
	return dict, nil
}
