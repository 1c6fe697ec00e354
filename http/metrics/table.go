package metrics

import "github.com/prometheus/client_golang/prometheus"

// Kind is the kind of a metric.
type Kind string

// The kinds.
const (
	Counter   Kind = "counter"
	Gauge     Kind = "gauge"
	Histogram Kind = "histogram"
)

// Metric is a row of the Table.
type Metric struct {
	Name   string
	Kind   Kind
	Labels []string
	Help   string // a sentence
	Group  string
}

// The groups, in the Table's order.
const (
	groupDevices  = "Device requests"
	groupHTTP     = "HTTP"
	groupStore    = "Store"
	groupQueue    = "Queue"
	groupPush     = "Push"
	groupEvents   = "Events and webhook"
	groupIdentity = "Certificates and secrets"
	groupDaemon   = "The daemon"
)

// Table lists every metric that begins with nanomdm_. Labels are bounded: a
// value that comes from outside is one of a fixed list, or a topic, sink or
// lease that an operator made.
func Table() []Metric {
	return []Metric{
		{"nanomdm_device_requests_total", Counter, []string{"message", "outcome"}, "Device messages by type (reports: by status) and outcome: ok, refused, unavailable, error.", groupDevices},
		{"nanomdm_device_request_duration_seconds", Histogram, []string{"message"}, "Time from the decoded message to its answer.", groupDevices},
		{"nanomdm_device_refusals_total", Counter, []string{"reason"}, "Device requests that were refused, by reason; see below.", groupDevices},

		{"nanomdm_http_turned_away_total", Counter, []string{"side", "reason"}, "Requests answered 503 at the door: side is device or api, reason is limit (-max-requests), database, or headers, whose connections are cut.", groupHTTP},
		{"nanomdm_http_panics_total", Counter, nil, "Panics of handlers, each answered 500. Any is a bug.", groupHTTP},

		{"nanomdm_api_refusals_total", Counter, []string{"reason"}, "API requests refused for their key: no_key, wrong_key, slowed (too many wrong ones from the address), forbidden (the role or topics of a right one), cross_origin (a page of another origin made the request).", groupHTTP},

		{"nanomdm_store_up", Gauge, nil, "1 while the database answers and its schema is current.", groupStore},
		{"nanomdm_store_schema_newer", Gauge, nil, "1 if the next release has migrated the database: this replica serves on, and is to be upgraded before the release after that.", groupStore},
		{"nanomdm_database_clock_offset_seconds", Gauge, nil, "How far the database's clock is ahead of this machine's. Beyond a second times follow the database's; beyond five is a warning in the log.", groupStore},
		{"nanomdm_store_statements_total", Counter, nil, "SQL statements sent.", groupStore},
		{"nanomdm_store_retries_total", Counter, nil, "Transactions begun again after a deadlock, a lost connection or a failover.", groupStore},
		{"nanomdm_store_commit_messages", Histogram, nil, "Device messages in each group commit: 1, up to 2, 4, ... 256.", groupStore},
		{"nanomdm_store_poll_messages", Histogram, nil, "Device messages that change nothing in each shared read: 1, up to 2, 4, ... 256.", groupStore},
		{"nanomdm_store_activity_dropped_total", Counter, nil, "Last-seen times that were dropped because the database was away for long.", groupStore},
		{"nanomdm_store_pool_connections", Gauge, []string{"pool", "state"}, "Connections by pool (write, read) and state (in_use, idle).", groupStore},
		{"nanomdm_store_pool_max_connections", Gauge, []string{"pool"}, "Most connections that a pool opens.", groupStore},
		{"nanomdm_store_pool_waits_total", Counter, []string{"pool"}, "Times that a connection had to be waited for.", groupStore},
		{"nanomdm_store_pool_wait_seconds_total", Counter, []string{"pool"}, "Time spent waiting for connections.", groupStore},
		{"nanomdm_store_removed_total", Counter, []string{"what"}, "Rows of history that retention removed: queue, results, commands.", groupStore},
		{"nanomdm_store_removed_result_bytes_total", Counter, nil, "Bytes of results that retention removed.", groupStore},
		{"nanomdm_lease_held", Gauge, []string{"lease"}, "1 for each lease for periodic work that this replica holds.", groupStore},

		{"nanomdm_queue_commands", Gauge, []string{"state"}, "Commands that wait, by state: scheduled, queued, notnow. Counted up to 100000 for each.", groupQueue},
		{"nanomdm_queue_oldest_seconds", Gauge, []string{"state"}, "Age of the oldest of those.", groupQueue},
		{"nanomdm_queue_promoted_total", Counter, nil, "Scheduled commands that became due by this replica's sweep.", groupQueue},
		{"nanomdm_queue_expired_total", Counter, nil, "Commands that expired by this replica's sweep.", groupQueue},

		{"nanomdm_push_owed_enrollments", Gauge, nil, "Enrollments that are owed a push.", groupPush},
		{"nanomdm_pushes_total", Counter, []string{"topic", "class", "reason"}, "Pushes that ended, by APNs topic (empty if there is no certificate for it), class (accepted, token_dead, do_not_retry, our_fault, certificate_fault, retry_later) and by APNs' reason, if it gave one. At most 1000 of them.", groupPush},
		{"nanomdm_push_enrollments", Gauge, []string{"state"}, "Enrollments that this replica pushes to (in_flight), or will next because a caller asked for it (waiting).", groupPush},
		{"nanomdm_push_swept_total", Counter, nil, "Pushes that this replica's sweep claimed: owed pushes that were not sent in time, and silent devices.", groupPush},
		{"nanomdm_push_stopped_topics", Gauge, nil, "Topics that this replica does not push to, because APNs refused their certificate or there is none.", groupPush},
		{"nanomdm_push_outcomes_dropped_total", Counter, nil, "Outcomes of pushes that were not stored because the database was away for long; those pushes are sent again.", groupPush},
		{"nanomdm_push_connections", Gauge, nil, "Connections to APNs.", groupPush},
		{"nanomdm_push_dials_total", Counter, []string{"result"}, "Connections to APNs that were tried, by result: ok, failed.", groupPush},
		{"nanomdm_push_retries_total", Counter, nil, "Requests to APNs that were sent again within one push, after a cut connection and the like.", groupPush},

		{"nanomdm_events_unnumbered", Gauge, nil, "Committed events that the holder of the events lease has not numbered yet. Counted up to 100000.", groupEvents},
		{"nanomdm_events_dropped_total", Counter, nil, "Events without a change, such as idle polls, that were dropped because the database was away for long.", groupEvents},
		{"nanomdm_events_log_bytes", Gauge, nil, "Bytes of the event log, compressed, as they were written.", groupEvents},
		{"nanomdm_events_log_events", Gauge, nil, "Events of the log.", groupEvents},
		{"nanomdm_events_trimmed_total", Counter, nil, "Events that this replica removed before their time, because the log had more than `-max-event-bytes`.", groupEvents},
		{"nanomdm_events_unreadable_total", Counter, nil, "Times that a batch of events, or a payload that is stored by itself, was wanted and could not be read, because it is damaged or sealed with a key that is not here. The log names it.", groupEvents},
		{"nanomdm_webhook_backlog_events", Gauge, []string{"sink"}, "Numbered events that a sink has before it.", groupEvents},
		{"nanomdm_webhook_oldest_seconds", Gauge, []string{"sink"}, "Age of the oldest event that a sink has before it or that waits for its next try; 0 if there is none.", groupEvents},
		{"nanomdm_webhook_events", Gauge, []string{"sink", "state"}, "Events that a sink did not take at once, by state: waiting (for the next try), again (asked for again), dead (given up), dropped (too many). Counted up to 100000 each.", groupEvents},
		{"nanomdm_webhook_delivered_total", Counter, []string{"sink"}, "Events that this replica delivered.", groupEvents},
		{"nanomdm_webhook_failures_total", Counter, []string{"sink"}, "Tries of this replica that failed.", groupEvents},
		{"nanomdm_webhook_given_up_total", Counter, []string{"sink", "why"}, "Dead letters of this replica, by reason: `age`, `count`, or `refused` of a sink that skips.", groupEvents},
		{"nanomdm_webhook_down", Gauge, []string{"sink"}, "1 if the sink's receiver does not answer as it should, as seen by the replica that delivers.", groupEvents},
		{"nanomdm_webhook_off", Gauge, []string{"sink"}, "1 if the sink is off: an operator turned it off, or its receiver answered 410.", groupEvents},

		{"nanomdm_push_certificate_expiry_seconds", Gauge, []string{"topic"}, "Time until a topic's push certificate expires; negative when it has. At most 1000 topics.", groupIdentity},
		{"nanomdm_identity_certificates_expiring", Gauge, []string{"within"}, "Pinned device certificates that expire within 7d or 30d, or have (0d). Counted up to 100000.", groupIdentity},
		{"nanomdm_identity_certificate_expiry_seconds", Gauge, nil, "Time until the next pinned device certificate expires.", groupIdentity},
		{"nanomdm_identity_expired_messages_total", Counter, nil, "Messages of devices whose pinned certificate has expired; see -expired-certificates.", groupIdentity},
		{"nanomdm_identity_signature_checks_total", Counter, nil, "Signatures on certificates of device requests that were checked. A known certificate needs none, a new device one and one for each new intermediate; many more than there are new devices are somebody's forgeries.", groupIdentity},
		{"nanomdm_ca_certificate_expiry_seconds", Gauge, nil, "Time until the first of the certificates in -ca expires.", groupIdentity},
		{"nanomdm_tls_certificate_expiry_seconds", Gauge, nil, "Time until the certificate of -tls-cert expires.", groupIdentity},
		{"nanomdm_sealing", Gauge, []string{"what"}, "1 if these are sealed at rest: secrets (push keys, tokens) by -seal-key-file, commands by -seal-commands.", groupIdentity},

		{"nanomdm_ready", Gauge, nil, "What /readyz says.", groupDaemon},
		{"nanomdm_background_restarts_total", Counter, []string{"component"}, "Failures of background work, which starts again. Five in a row make the replica unready. Any is a bug.", groupDaemon},
		{"nanomdm_stalls_total", Counter, nil, "Times that the process stood still for more than 2 seconds: it was stopped, its machine was paused or had no time for it. Check-ins that it held are answered 503.", groupDaemon},
		{"nanomdm_metrics_source_failures_total", Counter, []string{"source"}, "Times that a source of metrics could not answer; its metrics are missing then.", groupDaemon},
		{"nanomdm_build_info", Gauge, []string{"version", "goversion"}, "Always 1.", groupDaemon},
	}
}

// find panics if there is no such row: the names are this package's own.
func find(name string) Metric {
	for _, m := range Table() {
		if m.Name == name {
			return m
		}
	}
	panic("metrics: no row " + name)
}

func counterVec(name string) *prometheus.CounterVec {
	m := find(name)
	return prometheus.NewCounterVec(prometheus.CounterOpts{Name: m.Name, Help: m.Help}, m.Labels)
}

func gaugeVec(name string) *prometheus.GaugeVec {
	m := find(name)
	return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: m.Name, Help: m.Help}, m.Labels)
}

func histogramVec(name string, buckets ...float64) *prometheus.HistogramVec {
	m := find(name)
	return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: m.Name, Help: m.Help, Buckets: buckets}, m.Labels)
}
