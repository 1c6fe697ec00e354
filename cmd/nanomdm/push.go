package main

import (
	"context"
	"crypto/rand"
	"crypto/x509"
	"log/slog"

	"github.com/nanomdm/nanomdm/http/metrics"
	"github.com/nanomdm/nanomdm/push"
	"github.com/nanomdm/nanomdm/push/apns"
	"github.com/nanomdm/nanomdm/storage/lease"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// push starts the service that wakes devices and adds it, and its sweep under
// a lease, which stops first.
func (b *building) push(store *sqlstore.Store) (*push.Service, error) {
	o := b.o
	service, err := push.New(store, push.Config{
		APNs: apns.Config{
			URL: o.apnsURL.String(), RootCAs: b.apnsCA, Workers: o.pushWorkers, Expiration: o.pushExpiration, Now: store.Now, Logger: b.log,
		},
		Rate: o.pushRate, Retry: o.pushRetry, Wait: o.pushTimeout, Now: store.Now, Logger: b.log, Supervisor: b.s.supervisor,
	})
	if err != nil {
		return nil, err
	}
	b.s.add(component{name: "push", stop: service.Close})
	holder := rand.Text()
	b.s.background("push sweep", func(ctx context.Context) error {
		return lease.Hold(ctx, store, "push", holder, leaseTTL, b.log, service.Sweep)
	})
	b.metrics.Add(metrics.Source{Name: "push", Collect: func(_ context.Context, emit metrics.Emit) error {
		emitPush(emit, service.Stats())
		return nil
	}})
	return service, nil
}

func emitPush(emit metrics.Emit, stats push.Stats) {
	for _, o := range stats.Outcomes {
		emit("nanomdm_pushes_total", float64(o.Count), o.Topic, o.Class, o.Reason)
	}
	emit("nanomdm_push_enrollments", float64(stats.Waiting), "waiting")
	emit("nanomdm_push_enrollments", float64(stats.InFlight), "in_flight")
	emit("nanomdm_push_swept_total", float64(stats.Swept))
	emit("nanomdm_push_stopped_topics", float64(len(stats.Stopped)))
	emit("nanomdm_push_outcomes_dropped_total", float64(stats.RecordsDropped))
	emit("nanomdm_push_connections", float64(stats.APNs.Connections))
	emit("nanomdm_push_dials_total", float64(stats.APNs.Dials-stats.APNs.DialFailures), "ok")
	emit("nanomdm_push_dials_total", float64(stats.APNs.DialFailures), "failed")
	emit("nanomdm_push_retries_total", float64(stats.APNs.Retries))
}

// loadAPNsCA reads -apns-ca, which replaces the system's CAs. Without it there
// is nil.
func loadAPNsCA(o options, log *slog.Logger) (*x509.CertPool, error) {
	if o.apnsCA == "" {
		return nil, nil
	}
	pool := x509.NewCertPool()
	return pool, addRoots(pool, "apns-ca", o.apnsCA, log)
}
