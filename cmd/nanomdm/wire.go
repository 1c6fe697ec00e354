package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
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
	"github.com/nanomdm/nanomdm/release"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/service/certauth"
	"github.com/nanomdm/nanomdm/service/core"
	"github.com/nanomdm/nanomdm/service/devicelog"
	"github.com/nanomdm/nanomdm/service/dm"
	"github.com/nanomdm/nanomdm/service/dump"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/textinput"
)

// building is the daemon while it is being put together: first what needs no
// database, by wire, and the rest when there is one, by assemble.
type building struct {
	o      options
	log    *slog.Logger
	stdout io.Writer

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

// wire puts the daemon together: what is closed when it stops is a component
// of the server that it returns. Errors of several files are reported at once.
// The database is opened when the server runs, so that a start while it is
// away waits, with probes answered.
func wire(o options, environ []string, log *slog.Logger, stdout io.Writer) (*server, error) {
	counters := metrics.New(release.String())
	side, err := loadDeviceSide(o, log, counters.Checked)
	if err != nil {
		return nil, err
	}
	b := &building{o: o, log: log, stdout: stdout, side: side, gate: gate.New(log), metrics: counters}
	if b.systemd, err = newNotifier(lookup(environ)); err != nil {
		return nil, err
	}
	if b.sealer, err = loadSealer(o, log); err != nil {
		return nil, err
	}
	if b.apnsCA, err = loadAPNsCA(o, log); err != nil {
		return nil, err
	}
	if b.storageCA, err = loadRoots("storage-ca", o.storageCA, log); err != nil {
		return nil, err
	}
	if b.webhookCA, err = loadRoots("webhook-ca", o.webhookCA, log); err != nil {
		return nil, err
	}
	if b.sinks, err = loadSinks(o); err != nil {
		return nil, err
	}
	listener, err := listen("listen", o.listen)
	if err != nil {
		return nil, err
	}
	b.s = newServer(log, o.drainTimeout, stopTimeout)
	b.stalls = stall.New(log, nil)
	b.s.background("stall watch", b.stalls.Run)
	b.s.drainDelay = o.drainDelay
	b.address = listener.Addr().String()
	b.front = b.gate.Front()
	maxHeader := maxHeaderBytes
	if o.api != "" && o.apiListen == "" {
		maxHeader = maxAPIHeaderBytes
	}
	b.s.serve("http", listener, b.logged(b.front), side.tls, maxHeader)
	ready := []any{"version", release.String(), "listen", listener.Addr().String(), "storage", o.storage, "api", o.api != ""}
	if o.apiListen != "" {
		apiListener, err := listen("api-listen", o.apiListen)
		if err != nil {
			return nil, errors.Join(err, listener.Close())
		}
		b.apiFront = b.gate.Front()
		b.s.serve("api", apiListener, b.logged(b.apiFront), withoutClientAuth(side.tls), maxAPIHeaderBytes)
		ready = append(ready, "api_listen", apiListener.Addr().String())
	}
	b.s.started = func() {
		b.gate.Started()
		b.tell(notifyReady)
		log.Info("nanomdm is ready", ready...)
	}
	b.s.restarted = b.metrics.Restarted
	b.s.failing = b.gate.SetFailing
	b.s.stopping = func() {
		b.gate.Drain()
		b.tell(notifyStopping)
	}
	b.addStore()
	return b.s, nil
}

func (b *building) logged(next http.Handler) http.Handler {
	return requestlog.Middleware(b.log, requestlog.Config{Trusted: b.o.trustedProxies, Panicked: b.metrics.Panicked}, next)
}

// tell is for messages that nobody can do anything about if they fail.
func (b *building) tell(state string) {
	if err := b.systemd.notify(state); err != nil {
		b.log.Warn("systemd was not told", "error", err)
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
				DatabaseClock:   true,
				Logger:          b.log,
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
			store, err = openStore(ctx, cfg, b.log, func() { b.tell(notifyWaiting(openPauses.Max)) })
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

// assemble puts together what needs the store. It runs while the server
// starts: components that it adds start next, in order, and requests are let
// in when all of them have.
func (b *building) assemble(ctx context.Context, store *sqlstore.Store) error {
	o, log, s, side := b.o, b.log, b.s, b.side
	mux := http.NewServeMux() // the device side's
	operators := mux
	mux.Handle("/version", httpapi.Version(release.String()))
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
	protocol := core.New(store, side.core)
	var api *httpapi.API
	if o.api != "" {
		if api, err = httpapi.New(string(o.api), store, pusher, httpapi.Config{
			MaxBody: o.maxBody, Refused: b.metrics.APIRefused, SinksChanged: sinks.Refresh, SinkGuard: callout.Guard{Allowed: o.webhookAllowed}, Draining: s.draining(),
			Version: release.String(), Logger: log,
		}); err != nil {
			return err
		}
		routes := http.NewServeMux()
		api.Register(routes)
		operators.Handle("/", gate.Limit(o.maxRequests, b.metrics.TurnedAway("api", "limit"), routes))
		operators.Handle("GET /metrics", api.Reader(b.metrics.Handler()))
	}
	if side.identity != nil {
		chain := []service.Middleware{b.metrics.Middleware()}
		if o.dump {
			log.Warn("-dump writes what devices say and are told to standard output, their tokens and passwords with it: not for production")
			chain = append(chain, dump.New(b.stdout))
		}
		chain = append(chain, devicelog.New(log), events, certauth.New(certauth.Config{
			Retro: o.retro, Reenroll: o.reenroll, Renewal: o.renewal, Confirm: side.confirm,
		}))
		h := httpmdm.New(service.Chain(protocol, chain...), side.identity, httpmdm.Config{
			Pins: store, Refusals: store, MaxBody: o.maxBody, MaxCheckin: o.maxCheckin, MaxStatus: o.maxStatus, MaxHourly: o.maxHourlyBytes, MaxInFlight: o.maxInFlight, MaxRequests: o.maxRequests,
			Refused: b.metrics.Refused, Stalled: b.stalls.Since,
			AuthProxyTransport: side.authProxy, Logger: log,
		})
		s.background("record of refusals", h.RecordRefusals)
		if o.migration {
			operators.Handle("/migration", api.Migration(h.Migration(protocol)))
		}
		routes := map[string]http.Handler{"/mdm": h.MDM(httpmdm.Any)}
		if o.checkin {
			routes["/mdm"], routes["/checkin"] = h.MDM(httpmdm.Reports), h.MDM(httpmdm.Checkins)
		}
		for _, path := range o.mdmPaths {
			routes[path] = h.MDM(httpmdm.Any)
		}
		if o.authProxyURL != nil {
			if o.certHeader == "" && !o.tlsClientAuth {
				log.Warn("devices that sign their messages are refused at /authproxy/ without a body, unless the signature has a signing time; use -cert-header or -tls-client-auth")
			}
			routes["/authproxy/"] = h.AuthProxy("/authproxy/", o.authProxyURL, store)
		}
		b.addDevices(mux, routes)
	}

	b.observe(store)
	b.upkeep(store)
	s.background("database watch", func(ctx context.Context) error {
		return b.gate.Watch(ctx, func(ctx context.Context) (bool, error) {
			err := store.Ping(ctx)
			return err != nil && !errors.Is(err, sqlstore.ErrSchema), err
		})
	})
	if b.systemd != nil && b.systemd.watchdog > 0 {
		s.background("watchdog", func(ctx context.Context) error { return b.systemd.watch(ctx, log) })
	}
	s.add(component{name: "doors", start: func(context.Context) error {
		b.front.Open(mux)
		if b.apiFront != nil {
			b.apiFront.Open(operators)
		}
		return nil
	}})
	return nil
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

// withoutClientAuth is for a listener where nobody is asked for a certificate.
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

// deviceSide is what the device side needs from files. identity is nil with
// -disable-mdm.
type deviceSide struct {
	identity   *httpmdm.Identity
	tls        *tls.Config
	core       core.Config
	confirm    certauth.Confirmer // nil without -authenticate-url
	caNotAfter time.Time          // of the first of -ca to expire; zero without devices
	authProxy  http.RoundTripper  // nil without -auth-proxy-url
}

func loadDeviceSide(o options, log *slog.Logger, checked func()) (*deviceSide, error) {
	side := &deviceSide{core: core.Config{EmptyDigestChallenge: o.uaZLDC}}
	var errs []error
	fail := func(flag string, err error) { errs = append(errs, fmt.Errorf("-%s: %w", flag, err)) }

	if o.tlsCert != "" {
		cert, err := loadServerCertificate(o, log)
		if err != nil {
			errs = append(errs, err)
		}
		side.tls = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
		if o.tlsClientAuth {
			// Requested, not required: the API shares the listener. What is
			// shown is verified by httpmdm.
			side.tls.ClientAuth = tls.RequestClientCert
		}
	}
	if o.disableMDM {
		return side, errors.Join(errs...)
	}

	if o.reenroll == storage.ReenrollAllow {
		log.Warn("any certificate of -ca may enroll a known device anew, and then gets its commands; -reenroll same-subject and deny are stricter")
	}
	if verifier, notAfter, err := loadVerifier(o, checked, log); err != nil {
		errs = append(errs, err)
	} else {
		side.caNotAfter = notAfter
		side.identity = chooseIdentity(o, verifier, log)
	}
	if o.dm != nil {
		roots, err := loadRoots("dm-ca", o.dmCA, log)
		if err != nil {
			errs = append(errs, err)
		}
		backend, err := dm.New(o.dm.String(), dm.Config{
			SendKey: []byte(o.dmSendHMACKey), RecvKey: []byte(o.dmRecvHMACKey), Client: callout.Client(callout.Transport(roots)),
		})
		if err != nil {
			fail("dm", err)
		} else {
			side.core.DeclarativeManagement = backend
		}
	}
	if o.authenticateURL != nil {
		roots, err := loadRoots("authenticate-ca", o.authenticateCA, log)
		if err != nil {
			errs = append(errs, err)
		}
		hook, err := certauth.NewHook(o.authenticateURL.String(), certauth.HookConfig{
			Key: []byte(o.authenticateKey), Client: callout.Client(callout.Transport(roots)),
		})
		if err != nil {
			fail("authenticate-url", err)
		} else {
			side.confirm = hook
		}
	}
	if o.authProxyURL != nil {
		roots, err := loadRoots("auth-proxy-ca", o.authProxyCA, log)
		if err != nil {
			errs = append(errs, err)
		}
		side.authProxy = callout.Transport(roots)
	}
	if o.returnToService != "" {
		var err error
		if side.core.ReturnToService, err = readDict(o.returnToService); err != nil {
			fail("return-to-service", err)
		}
	}
	return side, errors.Join(errs...)
}

func loadVerifier(o options, checked func(), log *slog.Logger) (*certverify.Verifier, time.Time, error) {
	roots, notAfter, err := loadCAs("ca", o.ca, log)
	if err != nil {
		return nil, time.Time{}, err
	}
	var intermediates pemFile
	if o.intermediate != "" {
		if intermediates, _, err = loadCAs("intermediate", o.intermediate, log); err != nil {
			return nil, time.Time{}, err
		}
	}
	verifier, err := certverify.New(roots.data, intermediates.data, certverify.Config{ClockSkew: o.clockSkew, Checked: checked})
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("-ca, -intermediate: %w", err)
	}
	return verifier, notAfter, nil
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
