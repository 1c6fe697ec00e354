package main

import (
	"context"
	"crypto/rand"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/http/metrics"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/callout"
	"github.com/nanomdm/nanomdm/service/webhook"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/textinput"
)

// loadSinks reads the configured sinks: of -webhook-url, which gets everything
// and skips events that its receiver fails to take, since receivers of NanoMDM
// were never waited for, of -mirror-url, and of the file of -webhook-config.
func loadSinks(o options) ([]storage.EventSink, error) {
	var sinks []storage.EventSink
	if o.webhookConfig != "" {
		text, err := textinput.ReadFile(o.webhookConfig)
		if err == nil {
			if sinks, err = webhook.ParseConfig(text); err != nil {
				err = fmt.Errorf("%s: %w", o.webhookConfig, err)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("-webhook-config: %w", err)
		}
	}
	for _, own := range []struct {
		name, option string
		given        bool
	}{{webhook.DefaultSink, "-webhook-url", o.webhookURL != nil}, {webhook.MirrorSink, "-mirror-url", o.mirrorURL != nil}} {
		if own.given && slices.ContainsFunc(sinks, func(k storage.EventSink) bool { return k.Name == own.name }) {
			return nil, fmt.Errorf("-webhook-config: the name %s is that of %s: give the sink another one", own.name, own.option)
		}
	}
	if o.mirrorURL != nil {
		sinks = append(sinks, webhook.Mirror(o.mirrorURL, string(o.mirrorKey)))
	}
	if o.webhookURL == nil {
		return sinks, nil
	}
	k := webhook.Sink{Name: webhook.DefaultSink, URL: o.webhookURL.String(), Tokens: true, Filter: storage.EventFilter{Idle: true},
		OnError: storage.OnErrorSkip}
	for _, key := range []secret{o.webhookHMACKey, o.webhookOldKey} {
		if key != "" {
			k.Keys = append(k.Keys, string(key))
		}
	}
	sink, err := k.Check()
	if err != nil {
		return nil, fmt.Errorf("-webhook-url and its keys: %w", err)
	}
	return append(sinks, sink), nil
}

// events adds the deliverer of events, and returns the sinks and the middleware
// that makes the events.
func (b *building) events(ctx context.Context, store *sqlstore.Store) (*webhook.Sinks, service.Middleware, error) {
	o := b.o
	sinks, err := webhook.OpenSinks(ctx, store, b.sinks, b.log)
	if err != nil {
		return nil, nil, err
	}
	b.s.background("event sinks", sinks.Run)
	if o.webhookWorkers == 0 {
		return sinks, webhook.Middleware(sinks, o.secretParams, store.Now, nil), nil
	}
	retention := o.retainEvents
	if retention == 0 {
		retention = -1 // for ever
	}
	deliverer := webhook.NewDeliverer(store, sinks, rand.Text(), webhook.Config{
		Workers: o.webhookWorkers, Timeout: o.webhookTimeout, MaxAge: o.webhookMaxAge, MaxBacklog: int64(o.webhookMaxBacklog),
		Retention: retention, MaxLogBytes: o.maxEventBytes, Notice: o.expiryNotice, Now: store.Now, RootCAs: b.webhookCA, Guard: callout.Guard{Allowed: o.webhookAllowed}, Logger: b.log, Supervisor: b.s.supervisor,
	})
	b.s.background("events", deliverer.Run)
	b.metrics.Add(metrics.Source{Name: "deliveries", Collect: func(_ context.Context, emit metrics.Emit) error {
		emit("nanomdm_events_trimmed_total", float64(deliverer.Trimmed()))
		for _, s := range deliverer.Stats() {
			emit("nanomdm_webhook_delivered_total", float64(s.Delivered), s.Sink)
			emit("nanomdm_webhook_failures_total", float64(s.Failures), s.Sink)
			emit("nanomdm_webhook_given_up_total", float64(s.Dead), s.Sink, "age")
			emit("nanomdm_webhook_given_up_total", float64(s.Dropped), s.Sink, "count")
			emit("nanomdm_webhook_given_up_total", float64(s.Refused), s.Sink, "refused")
			emit("nanomdm_webhook_down", truth(s.Down), s.Sink)
		}
		return nil
	}})
	return sinks, webhook.Middleware(sinks, o.secretParams, store.Now, deliverer.Wake), nil
}
