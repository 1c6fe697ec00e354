// Package metrics shows what the daemon does, in Prometheus' text format.
//
// Every metric is a row of one Table, from which docs/metrics.md is made.
// Device requests are counted by a service.Middleware; counters and gauges
// that live elsewhere come from Sources, which are asked at each scrape, or
// less often if asking costs something.
//
// It is a package below http, and not a middleware of package service alone,
// because half of what it counts never reaches the service chain: refusals,
// panics, requests turned away.
package metrics

import (
	"context"
	"errors"
	"net/http"
	"runtime"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// Metrics is a registry of its own. Its methods may be called concurrently.
type Metrics struct {
	registry  *prometheus.Registry
	requests  *prometheus.CounterVec
	durations *prometheus.HistogramVec
	refusals  *prometheus.CounterVec
	turned    *prometheus.CounterVec
	api       *prometheus.CounterVec
	panics    prometheus.Counter
	checks    prometheus.Counter
	expired   prometheus.Counter
	commits   prometheus.Observer
	polls     prometheus.Observer
	failures  *prometheus.CounterVec
	restarts  *prometheus.CounterVec
}

// scrapeTimeout bounds how long the Sources together may hold a scrape.
const scrapeTimeout = 8 * time.Second

// New makes Metrics for a binary of that version.
func New(version string) *Metrics {
	m := &Metrics{registry: prometheus.NewRegistry()}
	m.requests = counterVec("nanomdm_device_requests_total")
	m.durations = histogramVec("nanomdm_device_request_duration_seconds", .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10)
	m.refusals = counterVec("nanomdm_device_refusals_total")
	m.turned = counterVec("nanomdm_http_turned_away_total")
	m.api = counterVec("nanomdm_api_refusals_total")
	m.failures = counterVec("nanomdm_metrics_source_failures_total")
	m.restarts = counterVec("nanomdm_background_restarts_total")
	panics, checks := counterVec("nanomdm_http_panics_total"), counterVec("nanomdm_identity_signature_checks_total")
	expired := counterVec("nanomdm_identity_expired_messages_total")
	m.panics, m.checks, m.expired = panics.WithLabelValues(), checks.WithLabelValues(), expired.WithLabelValues()
	commits := histogramVec("nanomdm_store_commit_messages", 1, 2, 4, 8, 16, 32, 64, 128, 256)
	polls := histogramVec("nanomdm_store_poll_messages", 1, 2, 4, 8, 16, 32, 64, 128, 256)
	m.commits, m.polls = commits.WithLabelValues(), polls.WithLabelValues()
	build := gaugeVec("nanomdm_build_info")
	build.WithLabelValues(version, runtime.Version()).Set(1)
	m.registry.MustRegister(m.restarts, m.requests, m.durations, m.refusals, m.turned, m.api, m.failures, panics, checks, expired, commits, polls, build,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

// Handler answers GET /metrics. The caller guards it.
func (m *Metrics) Handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// Refused counts a device request that was refused before the service chain,
// or by an error of it; httpmdm's Config.Refused.
func (m *Metrics) Refused(reason string) { m.refusals.WithLabelValues(reason).Inc() }

// APIRefused counts an API request that was refused for its key; httpapi's
// Config.Refused.
func (m *Metrics) APIRefused(reason string) { m.api.WithLabelValues(reason).Inc() }

// Panicked counts a panic; requestlog's Config.Panicked.
func (m *Metrics) Panicked() { m.panics.Inc() }

// Restarted counts a failure of a background component, which starts again.
func (m *Metrics) Restarted(component string) { m.restarts.WithLabelValues(component).Inc() }

// Checked counts a signature check of a device's certificate; certverify's
// Config.Checked.
func (m *Metrics) Checked() { m.checks.Inc() }

// Expired counts a message of a device with an expired certificate; certauth's
// Config.Expired.
func (m *Metrics) Expired() { m.expired.Inc() }

// Committed counts a group commit of so many device messages; sqlstore's
// Config.Committed.
func (m *Metrics) Committed(messages int) { m.commits.Observe(float64(messages)) }

// Polled counts a shared read for so many device messages; sqlstore's
// Config.Polled.
func (m *Metrics) Polled(messages int) { m.polls.Observe(float64(messages)) }

// TurnedAway returns the counter of requests that package gate turned away,
// on a side (device or api) and for a reason (limit or database).
func (m *Metrics) TurnedAway(side, reason string) func() {
	return m.turned.WithLabelValues(side, reason).Inc
}

// Middleware counts and times device messages. It belongs outermost.
func (m *Metrics) Middleware() service.Middleware {
	return func(next service.Handler) service.Handler {
		return service.HandlerFunc(func(ctx context.Context, r *service.Request) (*service.Response, error) {
			start := time.Now()
			resp, err := next.Handle(ctx, r)
			message := messageLabel(r.Message)
			m.requests.WithLabelValues(message, outcomeLabel(resp, err)).Inc()
			m.durations.WithLabelValues(message).Observe(time.Since(start).Seconds())
			return resp, err
		})
	}
}

// messageLabel is the message's type, and for reports their status: what a
// device writes there becomes a label only if Apple defines it.
func messageLabel(msg mdm.Message) string {
	report, ok := msg.(*mdm.Report)
	if !ok {
		return string(msg.Kind())
	}
	switch report.Status {
	case mdm.StatusIdle, mdm.StatusAcknowledged, mdm.StatusError, mdm.StatusCommandFormatError, mdm.StatusNotNow,
		mdm.StatusUnreadable:
		return string(report.Status)
	}
	return "OtherReport"
}

func outcomeLabel(resp *service.Response, err error) string {
	var se *service.StatusError
	status := http.StatusOK
	switch {
	case err == nil && resp != nil && resp.Status != 0:
		status = resp.Status
	case err == nil:
	case errors.As(err, &se):
		status = se.Status
	case errors.Is(err, storage.ErrIdentity), errors.Is(err, storage.ErrNotEnrolled), errors.Is(err, storage.ErrTopic), errors.Is(err, storage.ErrTopicCA), errors.Is(err, storage.ErrOwnWord),
		errors.Is(err, storage.ErrTooManyChannels):
		return "refused"
	case errors.Is(err, storage.ErrUnavailable), errors.Is(err, storage.ErrBusy), errors.Is(err, storage.ErrClosed),
		errors.Is(err, storage.ErrGivenUp), errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return "unavailable"
	default:
		return "error"
	}
	switch {
	case status < 400:
		return "ok"
	case status < 500:
		return "refused"
	case status == http.StatusServiceUnavailable:
		return "unavailable"
	}
	return "error"
}

// Emit takes one value of a row of the Table: its name, the value, and the
// values of the row's labels, in their order.
type Emit func(name string, value float64, labels ...string)

// Source is where values come from that are kept elsewhere.
type Source struct {
	// Name stands in nanomdm_metrics_source_failures_total.
	Name string
	// Every is the age at which Collect is called again; with 0 it is called at
	// each scrape. If Collect takes long, it is called less often, so that
	// scrapes cost no more than a twentieth of the time.
	Every time.Duration
	// Collect emits the values, or returns an error: then they are missing
	// until the next time, and the failure is counted. It is not called
	// again before it has returned.
	Collect func(ctx context.Context, emit Emit) error
}

// Add registers a source.
func (m *Metrics) Add(s Source) {
	m.registry.MustRegister(&sourceCollector{source: s, failures: m.failures.WithLabelValues(s.Name), rows: byName()})
}

// sourceCollector is a Source as Prometheus wants it.
type sourceCollector struct {
	source   Source
	failures prometheus.Counter
	rows     map[string]row

	mu    sync.Mutex
	next  time.Time // when to ask again
	known []prometheus.Metric
}

type row struct {
	desc *prometheus.Desc
	kind prometheus.ValueType
}

func byName() map[string]row {
	rows := make(map[string]row)
	for _, metric := range Table() {
		r := row{desc: prometheus.NewDesc(metric.Name, metric.Help, metric.Labels, nil), kind: prometheus.GaugeValue}
		if metric.Kind == Counter {
			r.kind = prometheus.CounterValue
		}
		rows[metric.Name] = r
	}
	return rows
}

// Describe implements prometheus.Collector. Which rows a source emits is seen
// when it does.
func (c *sourceCollector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c *sourceCollector) Collect(out chan<- prometheus.Metric) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now := time.Now(); !now.Before(c.next) {
		c.ask()
		c.next = now.Add(max(c.source.Every, 20*time.Since(now)))
		if c.source.Every == 0 {
			c.next = time.Time{}
		}
	}
	for _, metric := range c.known {
		out <- metric
	}
}

func (c *sourceCollector) ask() {
	ctx, cancel := context.WithTimeout(context.Background(), scrapeTimeout)
	defer cancel()
	var fresh []prometheus.Metric
	err := c.source.Collect(ctx, func(name string, value float64, labels ...string) {
		r, ok := c.rows[name]
		if !ok {
			fresh = append(fresh, prometheus.NewInvalidMetric(prometheus.NewInvalidDesc(errNotInTable), errNotInTable))
			return
		}
		metric, err := prometheus.NewConstMetric(r.desc, r.kind, value, labels...)
		if err != nil {
			metric = prometheus.NewInvalidMetric(r.desc, err)
		}
		fresh = append(fresh, metric)
	})
	if err != nil {
		c.failures.Inc()
		fresh = nil
	}
	c.known = fresh
}

var errNotInTable = errors.New("a source emitted a metric that is not in the table")
