package main

import (
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// options is the daemon's configuration after flags, environment and defaults
// were read and checked. A URL that was not given is nil, a list empty.
type options struct {
	listen         string
	apiListen      string // empty: the API shares listen
	tlsCert        string
	tlsKey         string
	trustedProxies []netip.Prefix

	ca            string
	intermediate  string
	topicCAs      map[string]string // files by APNs topic
	certHeader    string            // a leading colon asks for RFC 9440, as in NanoMDM
	tlsClientAuth bool
	clockSkew     time.Duration
	retro         bool
	reenroll      storage.Reenroll
	renewal       storage.Renewal
	allowExpired  bool

	authenticateURL *url.URL
	authenticateCA  string
	authenticateKey secret

	checkin         bool
	mdmPaths        []string
	disableMDM      bool
	uaZLDC          bool
	returnToService string
	dm              *url.URL
	dmCA            string
	dmSendHMACKey   secret
	dmRecvHMACKey   secret
	authProxyURL    *url.URL
	authProxyCA     string

	api       secret
	migration bool

	storage        string // sqlite, pgsql or mysql
	storageDSN     secret
	storageCA      string
	storageOptions storageOptions
	sealKeyFile    string
	sealCommands   bool
	retainCommands storage.Retention
	retainResults  storage.Retention
	retainAudit    time.Duration // 0 is for ever
	retainEvents   time.Duration // 0 is for ever
	retainUsers    time.Duration // 0 is for ever
	maxEventBytes  int64

	apnsURL        *url.URL
	apnsCA         string
	pushWorkers    int
	pushRate       float64 // per second, 0 is unlimited
	pushExpiration time.Duration
	pushRetry      []time.Duration // empty is off
	pushTimeout    time.Duration

	webhookURL        *url.URL
	webhookHMACKey    secret
	webhookOldKey     secret
	webhookConfig     string
	webhookCA         string
	webhookAllowed    []netip.Prefix
	mirrorURL         *url.URL
	mirrorKey         secret
	secretParams      []string
	webhookWorkers    int // 0: this replica sends nothing
	webhookTimeout    time.Duration
	webhookMaxAge     time.Duration
	webhookMaxBacklog int
	expiryNotice      time.Duration

	maxBody int64 // bytes
	// maxCheckin, maxStatus and maxHourlyBytes are of devices' messages.
	maxCheckin, maxStatus, maxHourlyBytes int64
	maxInFlight                           int64 // bytes
	maxRequests                           int
	drainDelay                            time.Duration
	drainTimeout                          time.Duration
	maxUserChannels                       int

	debug           bool
	debugEnrollment string
	logFormat       string // text or json
	dump            bool
	version         bool
	help            bool
}

// Format implements fmt.Formatter and shows nothing: package fmt does not ask
// the secrets in fields that are not exported to hide themselves.
func (options) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// storageOptions is -storage-options, parsed. A zero field was not given: the
// engine's own default holds.
type storageOptions struct {
	deleteAcked     bool // delete=1: keep nothing of an acknowledged command
	connMaxLifetime time.Duration
	connMaxIdleTime time.Duration
	maxOpenConns    int
	maxTotalConns   int // of all replicas together
}

// secret is a value that no log line and no formatted text shows. Convert it to
// a string to use it.
type secret string

const redacted = "[redacted]"

func (s secret) String() string {
	if s == "" {
		return ""
	}
	return redacted
}

// GoString keeps %#v from showing the value.
func (s secret) GoString() string { return strconv.Quote(s.String()) }

// LogValue implements slog.LogValuer.
func (s secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// The groups of -help and docs/configuration.md, in the table's order.
const (
	groupListening = "Listening"
	groupIdentity  = "Device identity"
	groupProtocol  = "Device protocol"
	groupAPI       = "Operator API"
	groupStorage   = "Storage"
	groupPush      = "Push"
	groupWebhook   = "Webhook"
	groupLimits    = "Limits"
	groupOperation = "Logs and help"
)

// option is one row of the configuration table.
type option struct {
	name   string
	arg    string // what -help calls its value; empty for a switch
	def    string // default, in the form that the flag takes
	group  string
	help   string // a sentence for -help and the documentation
	detail string // further sentences for the documentation alone

	secret   bool   // also read from the file that -name-file names
	oldName  string // this row is the old name of that option
	file     bool   // the value names a file that must exist
	private  bool   // the file holds keys
	flagOnly bool   // not read from the environment

	set func(string) error
}

// table returns the rows in the order that -help shows them. Setting a row
// writes to o.
func (o *options) table() []option {
	return []option{
		{name: "listen", arg: "ADDRESS", def: ":9000", group: groupListening, set: to(&o.listen, parseListen),
			help:   "Address for devices and the API, HOST:PORT or unix:PATH.",
			detail: "`unix:PATH` is a Unix socket that the daemon makes with mode 0660; every process that its owner, group and folder let in is a trusted proxy."},
		{name: "api-listen", arg: "ADDRESS", group: groupListening, set: to(&o.apiListen, parseListen),
			help:   "Serve the API here and not on -listen.",
			detail: "Then the device side alone faces the internet. `/healthz`, `/readyz` and `/version` are on both, `/metrics` and `/migration` go with the API."},
		{name: "tls-cert", arg: "FILE", group: groupListening, file: true, set: to(&o.tlsCert, parseText),
			help:   "Serve TLS with this PEM certificate and its chain.",
			detail: "Without it the daemon speaks plain HTTP and belongs behind a proxy that terminates TLS."},
		{name: "tls-key", arg: "FILE", group: groupListening, file: true, private: true, set: to(&o.tlsKey, parseText),
			help: "Unencrypted PEM private key of -tls-cert."},
		{name: "trusted-proxies", arg: "LIST", group: groupListening, set: to(&o.trustedProxies, parsePrefixes),
			help:   "Networks whose requests may set -cert-header, as 10.0.0.0/8,::1.",
			detail: "Without it every peer may, as in NanoMDM, and the daemon warns at start. The client's address in the log is taken from `X-Forwarded-For` if these networks, or a Unix socket, sent it; a `traceparent` is then believed from them alone."},

		{name: "ca", arg: "FILE", group: groupIdentity, file: true, set: to(&o.ca, parseText),
			help:   "PEM file of the CAs that issue device identities. Required.",
			detail: "Not required with `-disable-mdm`."},
		{name: "intermediate", arg: "FILE", group: groupIdentity, file: true, set: to(&o.intermediate, parseText),
			help: "PEM file of intermediate CAs below those of -ca."},
		{name: "topic-ca", arg: "LIST", group: groupIdentity, set: to(&o.topicCAs, parseTopicCAs),
			help:   "PEM files of the CAs whose devices alone enroll to a topic: TOPIC=FILE,...",
			detail: "For tenants with CAs of their own, all of them in `-ca`, too: a device of one tenant's CA can neither enroll to another's APNs topic nor take over a device there; it gets 400, and the audit has a record. A file names the CAs that issue the devices' certificates themselves, or CAs above those of `-intermediate`. Enrolled devices stay, until they enroll again."},
		{name: "cert-header", arg: "NAME", group: groupIdentity, set: to(&o.certHeader, parseHeaderName),
			help:   "Take the device certificate from this header of the proxy's.",
			detail: "A name that begins with a colon (`:Client-Cert`) is read as RFC 9440. Without it, and without `-tls-client-auth`, the device's `Mdm-Signature` header is its identity. The proxy must remove the header from what clients send."},
		{name: "tls-client-auth", group: groupIdentity, set: to(&o.tlsClientAuth, parseSwitch),
			help:   "Take the device certificate from the TLS connection.",
			detail: "Needs `-tls-cert` and `-tls-key`, excludes `-cert-header`. The certificate is requested and not required, since the API shares the listener."},
		{name: "clock-skew", arg: "TIME", def: "1m", group: groupIdentity, set: to(&o.clockSkew, parseDuration),
			help:   "Accept certificates that begin this much later than now.",
			detail: "For a CA whose clock runs ahead, and a device that enrolls at once. The end of a certificate gets no such grace."},
		{name: "retro", group: groupIdentity, set: to(&o.retro, parseSwitch),
			help: "Pin a first certificate to enrollments that have none."},
		{name: "reenroll", arg: "POLICY", def: "allow", group: groupIdentity, set: to(&o.reenroll, parseReenroll),
			help:   "Which certificates may enroll a device again: allow, same-subject, deny.",
			detail: "The pinned certificate always may. `allow`: any of `-ca`, as in NanoMDM. `same-subject`: one with the subject of the pinned one that names the device by UDID or serial number, in its subject or alternative names. `deny`: none, until an operator opens a renewal window. See [identity and keys](identity-and-keys.md)."},
		{name: "renewal", arg: "POLICY", def: "window", group: groupIdentity, set: to(&o.renewal, parseRenewal),
			help:   "When a device may renew its certificate: deny, window, same-subject.",
			detail: "Devices that renew their certificate by themselves come with another one, and no Authenticate. `deny`: they have to enroll anew. `window`: it is taken while an operator's renewal window is open. `same-subject`: besides, at any time, if it has the subject of the pinned one and names the device. Queue and tokens stay."},
		{name: "expired-certificates", arg: "POLICY", def: "refuse", group: groupIdentity, set: to(&o.allowExpired, parseExpired),
			help:   "Whether a pinned certificate counts after its end: refuse or pinned.",
			detail: "`pinned`: a certificate that has expired acts for the enrollment that it is pinned to, as in MicroMDM, so that devices which came from there are not lost; it is never pinned anew. Expired CAs stay refused. `nanomdm_identity_expired_messages_total` counts the messages, and `nanoctl enrollments ls -certificate-expires-in 0d` lists the devices, whose certificates are to be renewed."},
		{name: "authenticate-url", arg: "URL", group: groupIdentity, set: to(&o.authenticateURL, parseURL),
			help:   "Ask this URL before a certificate is pinned to an enrollment.",
			detail: "403 refuses: the device gets Apple's document for an unrecognized device. 200 and 204 agree, and while there is no answer devices that need one get 503. See [identity and keys](identity-and-keys.md)."},
		{name: "authenticate-ca", arg: "FILE", group: groupIdentity, file: true, set: to(&o.authenticateCA, parseText),
			help:   "PEM file of private CAs to trust for -authenticate-url.",
			detail: "Beside the system's."},
		{name: "authenticate-key", arg: "KEY", group: groupIdentity, secret: true, set: to(&o.authenticateKey, parseSecret),
			help: "Sign questions to -authenticate-url in X-Hmac-Signature."},

		{name: "checkin", group: groupProtocol, set: to(&o.checkin, parseSwitch),
			help: "Take check-ins at /checkin; /mdm then takes only reports."},
		{name: "mdm-paths", arg: "LIST", group: groupProtocol, set: to(&o.mdmPaths, parsePaths),
			help:   "More paths for check-ins and reports, such as /mdm/apple/mdm.",
			detail: "Use the paths of the server that devices come from: `/mdm/apple/mdm` for Fleet, `/mdm/checkin,/mdm/connect` for MicroMDM. Each takes both."},
		{name: "disable-mdm", group: groupProtocol, set: to(&o.disableMDM, parseSwitch),
			help: "Serve the API alone. Needs -api."},
		{name: "ua-zl-dc", group: groupProtocol, set: to(&o.uaZLDC, parseSwitch),
			help: "Answer UserAuthenticate with an empty DigestChallenge, not 410."},
		{name: "return-to-service", arg: "FILE", group: groupProtocol, file: true, set: to(&o.returnToService, parseText),
			help: "Plist that answers a device's ReturnToService check-in."},
		{name: "dm", arg: "URL", group: groupProtocol, set: to(&o.dm, parseURL),
			help:   "Base URL of the declarative management backend.",
			detail: "The device's endpoint is appended to it, so that it ends with a slash: `https://kmfddm.example.org/`."},
		{name: "dm-ca", arg: "FILE", group: groupProtocol, file: true, set: to(&o.dmCA, parseText),
			help:   "PEM file of private CAs to trust for -dm.",
			detail: "Beside the system's."},
		{name: "dm-send-hmac-key", arg: "KEY", group: groupProtocol, secret: true, set: to(&o.dmSendHMACKey, parseSecret),
			help: "Sign requests to the -dm backend in X-Hmac-Signature."},
		{name: "dm-recv-hmac-key", arg: "KEY", group: groupProtocol, secret: true, set: to(&o.dmRecvHMACKey, parseSecret),
			help: "Require that signature on the backend's responses."},
		{name: "auth-proxy-url", arg: "URL", group: groupProtocol, set: to(&o.authProxyURL, parseURL),
			help:   "Pass /authproxy/ of enrolled devices on to this URL.",
			detail: "The target sees the enrollment in `X-Enrollment-ID` and the request in `X-Trace-ID`."},
		{name: "auth-proxy-ca", arg: "FILE", group: groupProtocol, file: true, set: to(&o.authProxyCA, parseText),
			help:   "PEM file of private CAs to trust for -auth-proxy-url.",
			detail: "Beside the system's."},

		{name: "api", arg: "KEY", group: groupAPI, secret: true, set: to(&o.api, parseSecret),
			help:   "API key. Without it the API is off.",
			detail: "Clients send it as the password of the Basic user `nanomdm`."},
		{name: "migration", group: groupAPI, set: to(&o.migration, parseSwitch),
			help:   "Accept enrollments of another server at /migration. Needs -api.",
			detail: "`PUT /migration` takes check-ins (Authenticate, TokenUpdate, SetBootstrapToken, UserAuthenticate, CheckOut), as NanoMDM's nano2nano sends them. Turn it off again after the move."},

		{name: "storage", arg: "NAME", def: "sqlite", group: groupStorage, set: to(&o.storage, parseStorage),
			help: "Database: sqlite, pgsql or mysql (MariaDB too)."},
		{name: "storage-dsn", arg: "DSN", group: groupStorage, secret: true, set: to(&o.storageDSN, parseSecret),
			help:   "Its data source name; for sqlite a file, nanomdm.db unless given.",
			detail: "`sqlite`: a file name, or `:memory:`. `pgsql`: `postgres://user:password@host/name` or `host=... dbname=...`. `mysql`: `user:password@tcp(host:3306)/name`."},
		{name: "storage-ca", arg: "FILE", group: groupStorage, file: true, set: to(&o.storageCA, parseText),
			help:   "PEM file of private CAs to trust for the database server.",
			detail: "Beside the system's. The connection then uses TLS and verifies the server's name; `sslmode=verify-ca` of PostgreSQL leaves the name out. A MySQL DSN needs no `tls` parameter then, or `tls=true`."},
		{name: "storage-options", arg: "LIST", group: groupStorage, set: to(&o.storageOptions, parseStorageOptions),
			help:   "Store settings as key=value,key=value.",
			detail: "The keys are below."},
		{name: "retain-commands", arg: "AGES", def: "0", group: groupStorage, set: to(&o.retainCommands, parseRetention),
			help:   "How long to keep finished commands with their results, as 90d.",
			detail: "A list: an age for all, and ages of single request types, as in `90d,ProfileList=7d`. Ages are days (`30d`) or Go durations; 0 is for ever. See the operations guide."},
		{name: "retain-results", arg: "AGES", def: "0", group: groupStorage, set: to(&o.retainResults, parseRetention),
			help:   "How long to keep results, as 30d,InstalledApplicationList=2d.",
			detail: "Of the same form. The command and its state stay."},
		{name: "retain-events", arg: "AGE", def: "7d", group: groupStorage, set: to(&o.retainEvents, parseAge),
			help:   "How long to keep events in the log; 0 is for ever.",
			detail: "At least as long as `-webhook-max-age`: what a receiver is still to get stays until then. Without a receiver there are no events."},
		{name: "max-event-bytes", arg: "BYTES", def: "16G", group: groupStorage, set: to(&o.maxEventBytes, parseSize),
			help:   "What the events in the log may take in the database.",
			detail: "The oldest beyond it are removed, whatever their age. If too many wait for receivers, the oldest of these become dead letters first. An event of topic `nanomdm.EventLogFull` and `nanomdm_events_trimmed_total` say so."},
		{name: "retain-users", arg: "AGE", def: "90d", group: groupStorage, set: to(&o.retainUsers, parseAge),
			help:   "How long to keep users that logged in and never enrolled; 0 is for ever.",
			detail: "Counted from the last UserAuthenticate. They count for `-max-user-channels`."},
		{name: "retain-audit", arg: "AGE", def: "0", group: groupStorage, set: to(&o.retainAudit, parseAge),
			help:   "How long to keep the audit records of the API, as 365d.",
			detail: "An age as above; 0 is for ever."},
		{name: "seal-key-file", arg: "FILE", group: groupStorage, file: true, private: true, set: to(&o.sealKeyFile, parseText),
			help:   "Seal push keys and devices' tokens with the keys in this file.",
			detail: "A key is 32 bytes in base64, one in a line, as `openssl rand -base64 32` prints them. The first one seals, all open. A database with values of a key that is not there is refused. See [identity and keys](identity-and-keys.md)."},
		{name: "seal-commands", group: groupStorage, set: to(&o.sealCommands, parseSwitch),
			help:   "Seal commands, too. Needs -seal-key-file.",
			detail: "Profiles often carry passwords and keys. It makes each command a few microseconds dearer, and its text cannot be searched with SQL."},
		{name: "dsn", arg: "DSN", group: groupStorage, secret: true, oldName: "storage-dsn", set: to(&o.storageDSN, parseSecret),
			help: "Old name of -storage-dsn."},

		{name: "apns-url", arg: "URL", def: "https://api.push.apple.com", group: groupPush, set: to(&o.apnsURL, parseHTTPSURL),
			help: "Push server, to be changed only for tests."},
		{name: "apns-ca", arg: "FILE", group: groupPush, file: true, set: to(&o.apnsCA, parseText),
			help: "PEM file of the CAs to trust for -apns-url, not the system's."},
		{name: "push-workers", arg: "N", def: "1000", group: groupPush, set: to(&o.pushWorkers, parseCount),
			help: "Pushes under way at once, at most."},
		{name: "push-rate", arg: "N", def: "0", group: groupPush, set: to(&o.pushRate, parseRate),
			help: "Pushes started per second, at most; 0 is unlimited."},
		{name: "push-expiration", arg: "TIME", def: "168h", group: groupPush, set: to(&o.pushExpiration, parsePositive),
			help: "How long Apple keeps a push for a device that is off."},
		{name: "push-retry", arg: "LIST", def: "3m,1h,24h", group: groupPush, set: to(&o.pushRetry, parseDurations),
			help:   "When to push silent devices with commands again; 0: off.",
			detail: "The last one repeats."},
		{name: "push-timeout", arg: "TIME", def: "10s", group: groupPush, set: to(&o.pushTimeout, parsePositive),
			help:   "When an API call stops waiting for its pushes.",
			detail: "Pushes not finished by then are reported as owed and are sent afterwards."},

		{name: "webhook-url", arg: "URL", group: groupWebhook, set: to(&o.webhookURL, parseURL),
			help: "Send each device event to this URL."},
		{name: "webhook-hmac-key", arg: "KEY", group: groupWebhook, secret: true, set: to(&o.webhookHMACKey, parseSecret),
			help:   "Sign events with this key.",
			detail: "`X-Hmac-Signature` is NanoMDM's, `webhook-signature` that of the Standard Webhooks specification. See [webhooks](webhooks.md)."},
		{name: "webhook-old-key", arg: "KEY", group: groupWebhook, secret: true, set: to(&o.webhookOldKey, parseSecret),
			help:   "Sign with this key, too, while receivers change theirs.",
			detail: "In `webhook-signature` alone, which may hold several. Receivers that check `X-Hmac-Signature` have to change at the same moment."},
		{name: "webhook-config", arg: "FILE", group: groupWebhook, file: true, private: true, set: to(&o.webhookConfig, parseText),
			help:   "JSON file of further receivers, with keys and filters.",
			detail: "Its form is in [webhooks](webhooks.md). It holds keys: keep others from reading it. Receivers can also be made through the API."},
		{name: "webhook-ca", arg: "FILE", group: groupWebhook, file: true, set: to(&o.webhookCA, parseText),
			help:   "PEM file of private CAs to trust for all receivers.",
			detail: "Beside the system's."},
		{name: "mirror-url", arg: "URL", group: groupWebhook, set: to(&o.mirrorURL, parseURL),
			help:   "Send devices' check-ins to this migration endpoint, too.",
			detail: "Of the server that they came from, such as `https://old.example.org/migration`, so that they can go back to it. Authenticate, TokenUpdate, SetBootstrapToken and CheckOut go there as they came, in order for each enrollment, and are tried again as events are; the sink is called `mirror`. See [upgrading](upgrading.md#the-way-back)."},
		{name: "mirror-key", arg: "KEY", group: groupWebhook, secret: true, set: to(&o.mirrorKey, parseSecret),
			help:   "API key of the server at -mirror-url.",
			detail: "It is sent as the password of the user `nanomdm`."},
		{name: "secret-params", arg: "LIST", def: "ticket", group: groupWebhook, set: to(&o.secretParams, parseNames),
			help:   "Query parameters of enrollment URLs that events show as a hash.",
			detail: "They are secret, such as a ticket that proves the right to enroll; an event has `sha256:` and the hash. The question to `-authenticate-url` has them as they are. Empty hides none."},
		{name: "webhook-networks", arg: "LIST", group: groupWebhook, set: to(&o.webhookAllowed, parsePrefixes),
			help:   "Networks and addresses, beside public ones, that receivers made through the API may have.",
			detail: "Such as `10.1.0.0/16, ::1`. Without it those receivers reach no loopback, private or link-local address, so that an API key is no way into the server's network. Receivers of `-webhook-url` and `-webhook-config` are not limited."},
		{name: "webhook-workers", arg: "N", def: "32", group: groupWebhook, set: to(&o.webhookWorkers, parseCountOrNone),
			help:   "Events sent at once to each receiver; 0: none from here.",
			detail: "One replica at a time sends. One with 0 leaves it, and the keeping of the event log, to the others."},
		{name: "webhook-timeout", arg: "TIME", def: "30s", group: groupWebhook, set: to(&o.webhookTimeout, parsePositive),
			help: "How long a receiver may take to answer."},
		{name: "webhook-max-age", arg: "AGE", def: "3d", group: groupWebhook, set: to(&o.webhookMaxAge, parsePositiveAge),
			help:   "How long an event is tried before it is a dead letter.",
			detail: "Dead letters are kept like other events, and can be sent again through the API."},
		{name: "webhook-max-backlog", arg: "N", def: "1000000", group: groupWebhook, set: to(&o.webhookMaxBacklog, parseCount),
			help:   "How many events may wait for a receiver.",
			detail: "The oldest beyond it become dead letters at once, and lose their payload."},
		{name: "expiry-notice", arg: "AGE", def: "30d", group: groupWebhook, set: to(&o.expiryNotice, parsePositiveAge),
			help:   "How long before its end a certificate is announced.",
			detail: "To receivers that ask for `nanomdm.PushCertificateExpiring` or `nanomdm.IdentityCertificateExpiring`."},

		{name: "max-body", arg: "BYTES", def: "16M", group: groupLimits, set: to(&o.maxBody, parseSize),
			help: "Largest request body; k, M and G are powers of 1024."},
		{name: "max-checkin", arg: "BYTES", def: "256K", group: groupLimits, set: to(&o.maxCheckin, parseSize),
			help: "Largest check-in, such as a TokenUpdate."},
		{name: "max-status", arg: "BYTES", def: "4M", group: groupLimits, set: to(&o.maxStatus, parseSize),
			help: "Largest declarative management message."},
		{name: "max-hourly-bytes", arg: "BYTES", def: "1G", group: groupLimits, set: to(&o.maxHourlyBytes, parseSize),
			help:   "Bytes that one device may send in an hour; beyond it 503.",
			detail: "To one replica, in bodies of more than 16 KiB, and as much again in smaller ones, each of which counts 1 KiB more than it has. It bounds what one device adds to the event log, too: keep `-max-event-bytes` well above it. The log and `nanoctl show` name the device."},
		{name: "max-in-flight", arg: "BYTES", def: "256M", group: groupLimits, set: to(&o.maxInFlight, parseSize),
			help:   "Memory for request bodies of all devices and their copies at once; beyond it 503.",
			detail: "Each byte of a body counts ten times: twice while it arrives, eight times while it is decoded and stored. The first 4 KiB of each body do not count, so that large ones do not crowd polls out. At least 16 times `-max-body`."},
		{name: "max-requests", arg: "N", def: "4096", group: groupLimits, set: to(&o.maxRequests, parseCount),
			help:   "Requests under way at once; beyond it 503.",
			detail: "Counted apart for devices and for the API, so that neither starves the other. A device's certificate has at most 16 of them, and one client address half; a quarter of that may wait for their bodies. Name your proxies in `-trusted-proxies`, or their addresses are the clients'."},
		{name: "max-user-channels", arg: "N", def: "200", group: groupLimits, set: to(&o.maxUserChannels, parseCount),
			help:   "Users that one device may have; a new one beyond it is refused.",
			detail: "Users who only began to authenticate count. Existing users stay."},
		{name: "drain-delay", arg: "TIME", def: "0", group: groupLimits, set: to(&o.drainDelay, parseDuration),
			help:   "How long a stop is only announced at /readyz first.",
			detail: "Requests are served as before meanwhile. Give load balancers the time that they take to notice."},
		{name: "drain-timeout", arg: "TIME", def: "30s", group: groupLimits, set: to(&o.drainTimeout, parsePositive),
			help:   "How long a stop waits for requests under way.",
			detail: "SIGINT and SIGTERM begin the stop; a second signal ends the daemon at once with exit code 1."},

		{name: "debug", group: groupOperation, set: to(&o.debug, parseSwitch),
			help:   "Log more.",
			detail: "Each request is a line then, those of devices with the enrollment and the message type."},
		{name: "debug-enrollment", arg: "ID", group: groupOperation, set: to(&o.debugEnrollment, parseText),
			help:   "Log more of this device and its users alone.",
			detail: "The id of the enrollment, which is the UDID of most devices."},
		{name: "log-format", arg: "FORMAT", def: logText, group: groupOperation, set: to(&o.logFormat, parseLogFormat),
			help: "Format of the log's lines: text or json."},
		{name: "dump", group: groupOperation, set: to(&o.dump, parseSwitch),
			help:   "Write raw device requests and replies to standard output.",
			detail: "They hold secrets: tokens, profiles, results."},
		{name: "version", group: groupOperation, flagOnly: true, set: to(&o.version, parseSwitch),
			help: "Print the version and leave."},
		{name: "help", group: groupOperation, flagOnly: true, set: to(&o.help, parseSwitch),
			help: "Print this and leave."},
	}
}

func (op *option) isSwitch() bool { return op.arg == "" }

// fileFlag is the flag that names a file with the secret's value.
func (op *option) fileFlag() string {
	if op.oldName != "" {
		return op.oldName + "-file"
	}
	return op.name + "-file"
}

// names are the row's flags: its own, and its -file form if it has one.
func (op *option) names() []string {
	if op.secret && op.oldName == "" {
		return []string{op.name, op.fileFlag()}
	}
	return []string{op.name}
}

const envPrefix = "NANOMDM_"

func envName(flagName string) string {
	return envPrefix + strings.ToUpper(strings.ReplaceAll(flagName, "-", "_"))
}

const helpHead = `nanomdm is an Apple MDM server.

Usage: nanomdm -ca FILE -api KEY [options]

Each option can come from the environment: -storage-dsn is NANOMDM_STORAGE_DSN.
A flag beats the environment, which beats the default. A KEY or DSN is a secret:
-api-file FILE reads that of -api from a file, and so for the others.
`

const helpFoot = `
Example: TLS by a proxy on this machine, data in PostgreSQL

  nanomdm -ca ca.pem -api-file api.key -listen 127.0.0.1:9000 \
      -storage pgsql -storage-dsn-file dsn.txt
`

// writeHelp writes what -help shows. It ignores errors of w, like package flag.
func writeHelp(w io.Writer) {
	const column, width = 26, 80
	var b strings.Builder
	b.WriteString(helpHead)
	group := ""
	for _, op := range new(options).table() {
		if op.group != group {
			group = op.group
			fmt.Fprintf(&b, "\n%s\n", group)
		}
		lines := wrap(op.help, width-column)
		if op.def != "" {
			def, last := "(default "+op.def+")", &lines[len(lines)-1]
			if len(*last)+1+len(def) <= width-column {
				*last += " " + def
			} else {
				lines = append(lines, def)
			}
		}
		lead := fmt.Sprintf("  -%s %s", op.name, op.arg)
		if len(lead) >= column { // a line of its own
			fmt.Fprintln(&b, lead)
			lead = ""
		}
		for _, line := range lines {
			fmt.Fprintf(&b, "%-*s%s\n", column, lead, line)
			lead = ""
		}
	}
	b.WriteString(helpFoot)
	_, _ = io.WriteString(w, b.String())
}

// wrap breaks a text at blanks into lines of at most width bytes.
func wrap(text string, width int) []string {
	var lines []string
	line := ""
	for word := range strings.FieldsSeq(text) {
		switch {
		case line == "":
			line = word
		case len(line)+1+len(word) > width:
			lines = append(lines, line)
			line = word
		default:
			line += " " + word
		}
	}
	return append(lines, line)
}
