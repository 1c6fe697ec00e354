package main

import (
	"context"
	"crypto/x509"
	"time"

	"github.com/nanomdm/nanomdm/http/metrics"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// The ages at which metrics that cost a query are read anew.
const (
	waitingEvery      = 15 * time.Second
	certificatesEvery = 5 * time.Minute
)

// observe adds the sources of the metrics that the daemon and the store keep
// themselves.
func (b *building) observe(store *sqlstore.Store) {
	b.metrics.Add(metrics.Source{Name: "daemon", Collect: b.collectDaemon})
	for _, source := range []struct {
		name    string
		every   time.Duration
		collect func(context.Context, *sqlstore.Store, metrics.Emit) error
	}{
		{"store", 0, collectStore},
		{"waiting", waitingEvery, collectWaiting},
		{"webhook", waitingEvery, collectWebhook},
		{"certificates", certificatesEvery, collectCertificates},
	} {
		b.metrics.Add(metrics.Source{Name: source.name, Every: source.every, Collect: func(ctx context.Context, emit metrics.Emit) error {
			return source.collect(ctx, store, emit)
		}})
	}
}

func (b *building) collectDaemon(_ context.Context, emit metrics.Emit) error {
	ready, _ := b.gate.Ready()
	emit("nanomdm_ready", truth(ready))
	emit("nanomdm_stalls_total", float64(b.stalls.Count()))
	emit("nanomdm_store_up", truth(b.gate.StoreUp()))
	emit("nanomdm_sealing", truth(b.sealer != nil), "secrets")
	emit("nanomdm_sealing", truth(b.o.sealCommands), "commands")
	now := time.Now()
	if cfg := b.side.tls; cfg != nil && cfg.Certificates[0].Leaf != nil {
		emit("nanomdm_tls_certificate_expiry_seconds", cfg.Certificates[0].Leaf.NotAfter.Sub(now).Seconds())
	}
	if !b.side.caNotAfter.IsZero() {
		emit("nanomdm_ca_certificate_expiry_seconds", b.side.caNotAfter.Sub(now).Seconds())
	}
	return nil
}

func collectStore(_ context.Context, store *sqlstore.Store, emit metrics.Emit) error {
	emitStore(emit, store.Stats())
	for pool, stats := range store.Pools() {
		emit("nanomdm_store_pool_connections", float64(stats.InUse), pool, "in_use")
		emit("nanomdm_store_pool_connections", float64(stats.Idle), pool, "idle")
		emit("nanomdm_store_pool_max_connections", float64(stats.MaxOpenConnections), pool)
		emit("nanomdm_store_pool_waits_total", float64(stats.WaitCount), pool)
		emit("nanomdm_store_pool_wait_seconds_total", stats.WaitDuration.Seconds(), pool)
	}
	return nil
}

func collectWaiting(ctx context.Context, store *sqlstore.Store, emit metrics.Emit) error {
	waiting, err := store.WaitingCounts(ctx)
	if err != nil {
		return err
	}
	for state, backlog := range waiting.Waiting {
		emit("nanomdm_queue_commands", float64(backlog.Count), state.String())
		emit("nanomdm_queue_oldest_seconds", age(backlog.Oldest), state.String())
	}
	emit("nanomdm_push_owed_enrollments", float64(waiting.PushesOwed))
	emit("nanomdm_events_unnumbered", float64(waiting.Unnumbered))
	return nil
}

func collectWebhook(ctx context.Context, store *sqlstore.Store, emit metrics.Emit) error {
	size, err := store.EventLogSize(ctx)
	if err != nil {
		return err
	}
	emit("nanomdm_events_log_bytes", float64(size.Bytes))
	emit("nanomdm_events_log_events", float64(size.Events))
	backlogs, err := store.EventBacklogs(ctx)
	if err != nil {
		return err
	}
	for _, sink := range backlogs {
		emit("nanomdm_webhook_backlog_events", float64(sink.Behind), sink.Sink)
		emit("nanomdm_webhook_oldest_seconds", age(sink.Oldest), sink.Sink)
		emit("nanomdm_webhook_events", float64(sink.Waiting), sink.Sink, "waiting")
		emit("nanomdm_webhook_events", float64(sink.Again), sink.Sink, "again")
		emit("nanomdm_webhook_events", float64(sink.Dead), sink.Sink, "dead")
		emit("nanomdm_webhook_events", float64(sink.Dropped), sink.Sink, "dropped")
	}
	sinks, err := store.EventSinks(ctx)
	if err != nil {
		return err
	}
	for _, sink := range sinks {
		emit("nanomdm_webhook_off", truth(!sink.Enabled), sink.Name)
	}
	return nil
}

func collectCertificates(ctx context.Context, store *sqlstore.Store, emit metrics.Emit) error {
	now := time.Now()
	counts, err := store.CertificatesExpiring(ctx, now, now.Add(7*24*time.Hour), now.Add(30*24*time.Hour))
	if err != nil {
		return err
	}
	for i, within := range []string{"0d", "7d", "30d"} {
		emit("nanomdm_identity_certificates_expiring", float64(counts[i]), within)
	}
	next, err := store.NextCertificateExpiry(ctx, now)
	if err != nil {
		return err
	}
	if !next.IsZero() {
		emit("nanomdm_identity_certificate_expiry_seconds", next.Sub(now).Seconds())
	}
	pushCerts, err := store.PushCertificatesExpiry(ctx)
	if err != nil {
		return err
	}
	for topic, at := range pushCerts {
		emit("nanomdm_push_certificate_expiry_seconds", at.Sub(now).Seconds(), topic)
	}
	return nil
}

func age(since time.Time) float64 {
	if since.IsZero() {
		return 0
	}
	return time.Since(since).Seconds()
}

func emitStore(emit metrics.Emit, stats sqlstore.Stats) {
	emit("nanomdm_database_clock_offset_seconds", stats.ClockOffset.Seconds())
	emit("nanomdm_store_schema_newer", truth(stats.SchemaNewer))
	emit("nanomdm_store_statements_total", float64(stats.Statements))
	emit("nanomdm_store_removed_total", float64(stats.RemovedRows), "queue")
	emit("nanomdm_store_removed_total", float64(stats.RemovedResults), "results")
	emit("nanomdm_store_removed_total", float64(stats.RemovedCommands), "commands")
	emit("nanomdm_store_removed_result_bytes_total", float64(stats.RemovedResultBytes))
	emit("nanomdm_queue_promoted_total", float64(stats.Promoted))
	emit("nanomdm_queue_expired_total", float64(stats.Expired))
	emit("nanomdm_events_dropped_total", float64(stats.EventsDropped))
	emit("nanomdm_events_unreadable_total", float64(stats.EventsUnreadable))
	for _, lease := range stats.Leases {
		emit("nanomdm_lease_held", 1, lease)
	}
	emit("nanomdm_store_retries_total", float64(stats.Retries))
	emit("nanomdm_store_activity_dropped_total", float64(stats.ActivityDropped))
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// earliest returns when the first of the certificates expires.
func earliest(certs []*x509.Certificate) time.Time {
	var first time.Time
	for _, cert := range certs {
		if first.IsZero() || cert.NotAfter.Before(first) {
			first = cert.NotAfter
		}
	}
	return first
}
