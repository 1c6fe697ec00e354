package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/http/httpguts"

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
	certHeader    string // a leading colon asks for RFC 9440, as in NanoMDM
	tlsClientAuth bool
	clockSkew     time.Duration
	retro         bool
	reenroll      storage.Reenroll
	renewal       storage.Renewal

	authenticateURL *url.URL
	authenticateKey secret

	checkin         bool
	disableMDM      bool
	uaZLDC          bool
	returnToService string
	dm              *url.URL
	dmSendHMACKey   secret
	dmRecvHMACKey   secret
	authProxyURL    *url.URL

	api       secret
	migration bool

	storage        string // sqlite, pgsql or mysql
	storageDSN     secret
	storageOptions storageOptions
	sealKeyFile    string
	sealCommands   bool
	retainCommands storage.Retention
	retainResults  storage.Retention
	retainAudit    time.Duration // 0 is for ever
	retainEvents   time.Duration // 0 is for ever

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
	webhookWorkers    int // 0: this replica sends nothing
	webhookTimeout    time.Duration
	webhookMaxAge     time.Duration
	webhookMaxBacklog int
	expiryNotice      time.Duration

	maxBody      int64 // bytes
	maxInFlight  int64 // bytes
	maxRequests  int
	drainDelay   time.Duration
	drainTimeout time.Duration

	debug   bool
	dump    bool
	version bool
	help    bool
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
	flagOnly bool   // not read from the environment

	set func(string) error
}

// table returns the rows in the order that -help shows them. Setting a row
// writes to o.
func (o *options) table() []option {
	return []option{
		{name: "listen", arg: "ADDRESS", def: ":9000", group: groupListening, set: to(&o.listen, parseListen),
			help:   "Address for devices and the API, HOST:PORT or unix:PATH.",
			detail: "`unix:PATH` is a Unix socket that the daemon makes with mode 0660; whoever the file's owner, group and folder let in counts as a trusted proxy."},
		{name: "api-listen", arg: "ADDRESS", group: groupListening, set: to(&o.apiListen, parseListen),
			help:   "Serve the API here and not on -listen.",
			detail: "Then the device side alone faces the internet. `/healthz`, `/readyz` and `/version` are on both, `/metrics` and `/migration` go with the API."},
		{name: "tls-cert", arg: "FILE", group: groupListening, file: true, set: to(&o.tlsCert, parseText),
			help:   "Serve TLS with this PEM certificate and its chain.",
			detail: "Without it the daemon speaks plain HTTP and belongs behind a proxy that terminates TLS."},
		{name: "tls-key", arg: "FILE", group: groupListening, file: true, set: to(&o.tlsKey, parseText),
			help: "Unencrypted PEM private key of -tls-cert."},
		{name: "trusted-proxies", arg: "LIST", group: groupListening, set: to(&o.trustedProxies, parsePrefixes),
			help:   "Networks whose requests may set -cert-header, as 10.0.0.0/8,::1.",
			detail: "Without it every peer may, as in NanoMDM, and the daemon warns at start. The client's address in the log is taken from `X-Forwarded-For` if these networks, or a Unix socket, sent it; a `traceparent` is then believed from them alone."},

		{name: "ca", arg: "FILE", group: groupIdentity, file: true, set: to(&o.ca, parseText),
			help:   "PEM file of the CAs that issue device identities. Required.",
			detail: "Not required with `-disable-mdm`."},
		{name: "intermediate", arg: "FILE", group: groupIdentity, file: true, set: to(&o.intermediate, parseText),
			help: "PEM file of intermediate CAs below those of -ca."},
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
			help:   "Who may enroll a known device anew: allow, same-subject or deny.",
			detail: "What a certificate has to be, other than the pinned one, for Authenticate of a device that is known. `allow`: any of `-ca`, as in NanoMDM. `same-subject`: one with the subject of the pinned one that names the device by UDID or serial number, in its subject or alternative names. `deny`: none, until an operator opens a renewal window. See [identity and keys](identity-and-keys.md)."},
		{name: "renewal", arg: "POLICY", def: "window", group: groupIdentity, set: to(&o.renewal, parseRenewal),
			help:   "Who may renew a certificate without enrolling: deny, window, same-subject.",
			detail: "Devices that renew their certificate by themselves come with another one, and no Authenticate. `deny`: they have to enroll anew. `window`: it is taken while an operator's renewal window is open. `same-subject`: besides, at any time, if it has the subject of the pinned one and names the device. Queue and tokens stay."},
		{name: "authenticate-url", arg: "URL", group: groupIdentity, set: to(&o.authenticateURL, parseURL),
			help:   "Ask this URL before a certificate is pinned to an enrollment.",
			detail: "403 refuses: the device gets Apple's document for an unrecognized device. 200 and 204 agree, and while there is no answer devices that need one get 503. See [identity and keys](identity-and-keys.md)."},
		{name: "authenticate-key", arg: "KEY", group: groupIdentity, secret: true, set: to(&o.authenticateKey, parseSecret),
			help: "Sign questions to -authenticate-url in X-Hmac-Signature."},

		{name: "checkin", group: groupProtocol, set: to(&o.checkin, parseSwitch),
			help: "Take check-ins at /checkin; /mdm then takes only reports."},
		{name: "disable-mdm", group: groupProtocol, set: to(&o.disableMDM, parseSwitch),
			help: "Serve the API alone. Needs -api."},
		{name: "ua-zl-dc", group: groupProtocol, set: to(&o.uaZLDC, parseSwitch),
			help: "Answer UserAuthenticate with an empty DigestChallenge, not 410."},
		{name: "return-to-service", arg: "FILE", group: groupProtocol, file: true, set: to(&o.returnToService, parseText),
			help: "Plist that answers a device's ReturnToService check-in."},
		{name: "dm", arg: "URL", group: groupProtocol, set: to(&o.dm, parseURL),
			help:   "Base URL of the declarative management backend.",
			detail: "The device's endpoint is appended to it, so that it ends with a slash: `https://kmfddm.example.org/`."},
		{name: "dm-send-hmac-key", arg: "KEY", group: groupProtocol, secret: true, set: to(&o.dmSendHMACKey, parseSecret),
			help: "Sign requests to the -dm backend in X-Hmac-Signature."},
		{name: "dm-recv-hmac-key", arg: "KEY", group: groupProtocol, secret: true, set: to(&o.dmRecvHMACKey, parseSecret),
			help: "Require that signature on the backend's responses."},
		{name: "auth-proxy-url", arg: "URL", group: groupProtocol, set: to(&o.authProxyURL, parseURL),
			help:   "Pass /authproxy/ of enrolled devices on to this URL.",
			detail: "The target sees the enrollment in `X-Enrollment-ID` and the request in `X-Trace-ID`."},

		{name: "api", arg: "KEY", group: groupAPI, secret: true, set: to(&o.api, parseSecret),
			help:   "API key. Without it the API is off.",
			detail: "Clients send it as the password of the Basic user `nanomdm`."},
		{name: "migration", group: groupAPI, set: to(&o.migration, parseSwitch),
			help:   "Accept enrollments of another server at /migration. Needs -api.",
			detail: "`PUT /migration` takes Authenticate and TokenUpdate plists, as NanoMDM's nano2nano sends them. Turn it off again after the move."},

		{name: "storage", arg: "NAME", def: "sqlite", group: groupStorage, set: to(&o.storage, parseStorage),
			help: "Database: sqlite, pgsql or mysql (MariaDB too)."},
		{name: "storage-dsn", arg: "DSN", group: groupStorage, secret: true, set: to(&o.storageDSN, parseSecret),
			help:   "Its data source name; for sqlite a file, nanomdm.db unless given.",
			detail: "`sqlite`: a file name, or `:memory:`. `pgsql`: `postgres://user:password@host/name` or `host=... dbname=...`. `mysql`: `user:password@tcp(host:3306)/name`."},
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
		{name: "retain-audit", arg: "AGE", def: "0", group: groupStorage, set: to(&o.retainAudit, parseAge),
			help:   "How long to keep the audit records of the API, as 365d.",
			detail: "An age as above; 0 is for ever."},
		{name: "seal-key-file", arg: "FILE", group: groupStorage, file: true, set: to(&o.sealKeyFile, parseText),
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
		{name: "webhook-config", arg: "FILE", group: groupWebhook, file: true, set: to(&o.webhookConfig, parseText),
			help:   "JSON file of further receivers, with keys and filters.",
			detail: "Its form is in [webhooks](webhooks.md). It holds keys: keep others from reading it. Receivers can also be made through the API."},
		{name: "webhook-workers", arg: "N", def: "32", group: groupWebhook, set: to(&o.webhookWorkers, parseCountOrNone),
			help:   "Events sent at once to each receiver; 0: none from here.",
			detail: "One replica at a time sends. One with 0 leaves it, and the keeping of the event log, to the others."},
		{name: "webhook-timeout", arg: "TIME", def: "10s", group: groupWebhook, set: to(&o.webhookTimeout, parsePositive),
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
		{name: "max-in-flight", arg: "BYTES", def: "256M", group: groupLimits, set: to(&o.maxInFlight, parseSize),
			help:   "Request bodies held at once by all; beyond it 503.",
			detail: "The first 16 KiB of each body do not count, so that large ones do not crowd polls out."},
		{name: "max-requests", arg: "N", def: "4096", group: groupLimits, set: to(&o.maxRequests, parseCount),
			help:   "Requests under way at once; beyond it 503.",
			detail: "Counted apart for devices and for the API, so that neither starves the other."},
		{name: "drain-delay", arg: "TIME", def: "0", group: groupLimits, set: to(&o.drainDelay, parseDuration),
			help:   "How long a stop is only announced at /readyz first.",
			detail: "Requests are served as before meanwhile. Give load balancers the time that they take to notice."},
		{name: "drain-timeout", arg: "TIME", def: "30s", group: groupLimits, set: to(&o.drainTimeout, parsePositive),
			help:   "How long a stop waits for requests under way.",
			detail: "SIGINT and SIGTERM begin the stop; a second signal ends the daemon at once with exit code 1."},

		{name: "debug", group: groupOperation, set: to(&o.debug, parseSwitch),
			help: "Log more."},
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

// mistakes is a bad configuration. Each element says what to change.
type mistakes []string

func (m mistakes) Error() string {
	if len(m) == 1 {
		return "configuration: " + m[0]
	}
	return fmt.Sprintf("configuration: %d mistakes:\n  %s", len(m), strings.Join(m, "\n  "))
}

// given is an option's value and where it came from.
type given struct {
	text   string
	label  string // -listen or NANOMDM_LISTEN
	onLine bool   // on the command line
}

// configuration is one reading of the command line and the environment.
type configuration struct {
	stat     func(string) (fs.FileInfo, error)
	flags    map[string][]string
	environ  map[string]string
	mistakes mistakes
	warnings []string
}

// parseOptions reads the configuration from the command line and the
// environment ("NAME=value" strings) and looks files up with stat. The warnings
// are for the log. The error is flag.ErrHelp when help was asked for, else one
// that names all mistakes; it never shows a secret. When -version was given
// nothing is checked.
func parseOptions(args, environ []string, stat func(string) (fs.FileInfo, error)) (options, []string, error) {
	var o options
	table := o.table()
	c := &configuration{stat: stat}
	c.readFlags(table, args)
	for _, op := range table {
		if op.flagOnly {
			c.resolve(&op)
		}
	}
	switch {
	case o.help:
		return o, nil, flag.ErrHelp
	case o.version:
		return o, nil, nil
	}
	c.readEnviron(table, environ)
	for _, op := range table {
		if !op.flagOnly {
			c.resolve(&op)
		}
	}
	c.checkListening(&o)
	c.checkStorage(&o)
	c.checkRoles(&o)
	if len(c.mistakes) > 0 {
		return o, c.warnings, c.mistakes
	}
	return o, c.warnings, nil
}

func (c *configuration) mistake(format string, args ...any) {
	c.mistakes = append(c.mistakes, fmt.Sprintf(format, args...))
}

func (c *configuration) warn(format string, args ...any) {
	c.warnings = append(c.warnings, fmt.Sprintf(format, args...))
}

// rawFlag collects a flag's values unparsed, so that a bad one does not keep
// the flag package from reading on.
type rawFlag struct {
	values   *[]string
	isSwitch bool
}

func (f rawFlag) String() string     { return "" }
func (f rawFlag) IsBoolFlag() bool   { return f.isSwitch }
func (f rawFlag) Set(v string) error { *f.values = append(*f.values, v); return nil }

func (c *configuration) readFlags(table []option, args []string) {
	set := flag.NewFlagSet("nanomdm", flag.ContinueOnError)
	set.SetOutput(io.Discard)
	raw := make(map[string]*[]string)
	for _, op := range table {
		for _, name := range op.names() {
			raw[name] = new([]string)
			set.Var(rawFlag{values: raw[name], isSwitch: op.isSwitch()}, name, "")
		}
	}
	known := names(table, func(name string) string { return name })
	for {
		before := args
		err := set.Parse(args)
		args = set.Args()
		switch {
		case errors.Is(err, flag.ErrHelp): // -h; -help is in the table
			*raw["help"] = append(*raw["help"], "true")
			continue
		case err == nil && len(args) == 0:
			c.flags = make(map[string][]string, len(raw))
			for name, values := range raw {
				c.flags[name] = *values
			}
			return
		case err == nil:
			c.mistake("%q is not an option: remove it", args[0])
			args = args[1:]
			continue
		case len(args) > 0 && malformed(args[0]): // Parse stops before it
			c.mistake("%q is not an option: remove it", args[0])
			args = args[1:]
			continue
		}
		bad := before[len(before)-len(args)-1]
		name, _, hasValue := strings.Cut(strings.TrimLeft(bad, "-"), "=")
		if raw[name] != nil {
			c.mistake("-%s: give it a value", name)
			continue
		}
		c.mistake("-%s is not an option: did you mean -%s? (-help lists all)", name, nearest(name, known))
		if !hasValue && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
			args = args[1:] // most likely its value
		}
	}
}

// malformed says whether package flag takes an argument for a flag without a
// name.
func malformed(arg string) bool {
	name, isFlag := strings.CutPrefix(arg, "-")
	name = strings.TrimPrefix(name, "-")
	return isFlag && name != "" && (name[0] == '-' || name[0] == '=')
}

// notOurs are names under our prefix that others set: the tests' servers, what
// Kubernetes adds for a service called nanomdm, and NanoMDM's -version, which
// it does not read from the environment either.
var notOurs = regexp.MustCompile(`^NANOMDM_(\w*STORAGE_TEST_DSN|SERVICE_(HOST|PORT)\w*|PORT(_\d+_\w+)?|VERSION)$`)

func (c *configuration) readEnviron(table []option, environ []string) {
	c.environ = make(map[string]string)
	known := names(slices.DeleteFunc(slices.Clone(table), func(op option) bool { return op.flagOnly }), envName)
	for _, pair := range environ {
		name, value, _ := strings.Cut(pair, "=")
		switch {
		case !strings.HasPrefix(name, envPrefix), notOurs.MatchString(name):
		case slices.Contains(known, name):
			c.environ[name] = value
		default:
			c.warn("%s in the environment is not an option and is ignored: did you mean %s?", name, nearest(name, known))
		}
	}
	slices.Sort(c.warnings)
}

// given returns the value of a flag name. An empty variable counts as not
// given: that is how compose files and unit files leave one out.
func (c *configuration) given(name string) (given, bool) {
	if values := c.flags[name]; len(values) > 0 {
		return given{values[len(values)-1], "-" + name, true}, true
	}
	if value := c.environ[envName(name)]; value != "" {
		return given{value, envName(name), false}, true
	}
	return given{}, false
}

// isGiven says whether a flag name has a value that is not empty.
func (c *configuration) isGiven(name string) bool {
	g, _ := c.given(name)
	return g.text != ""
}

// resolve finds an option's value and sets it.
func (c *configuration) resolve(op *option) {
	g, ok := c.given(op.name)
	if op.secret {
		g, ok = c.resolveSecret(op, g, ok)
	}
	if !ok {
		if op.def == "" {
			return
		}
		g = given{text: op.def, label: "-" + op.name}
	}
	if op.file && g.text != "" {
		if info, err := c.stat(g.text); err != nil || info.IsDir() {
			c.mistake("%s: no such file: %s", g.label, g.text)
			return
		}
	}
	if err := op.set(g.text); err != nil {
		c.mistake("%s: %v", g.label, err)
	}
}

func (c *configuration) resolveSecret(op *option, inline given, ok bool) (given, bool) {
	if op.oldName != "" { // its file form belongs to the new name
		return inline, ok
	}
	file, inFile := c.given(op.fileFlag())
	switch {
	case ok && inFile:
		c.mistake("%s and %s are both given: keep one", inline.label, file.label)
		return given{}, false
	case !inFile:
		if ok && inline.onLine && op.name != "storage-dsn" {
			c.warnOnLine(op, inline)
		}
		return inline, ok
	}
	text, err := os.ReadFile(file.text)
	if err != nil {
		c.mistake("%s: %v", file.label, err)
		return given{}, false
	}
	value := strings.TrimSuffix(strings.TrimSuffix(string(text), "\n"), "\r")
	if value == "" {
		c.mistake("%s: %s is empty: write the value into it", file.label, file.text)
		return given{}, false
	}
	return given{text: value, label: file.label}, true
}

func (c *configuration) warnOnLine(op *option, g given) {
	c.warn("%s on the command line shows in the list of processes: use -%s or %s",
		g.label, op.fileFlag(), envName(op.fileFlag()))
}

func (c *configuration) checkListening(o *options) {
	cert, key := c.isGiven("tls-cert"), c.isGiven("tls-key")
	switch {
	case cert && !key:
		c.mistake("-tls-cert needs the key too: give -tls-key")
	case key && !cert:
		c.mistake("-tls-key needs the certificate too: give -tls-cert")
	}
	if o.tlsClientAuth && !cert {
		c.mistake("-tls-client-auth needs TLS: give -tls-cert and -tls-key")
	}
	if o.tlsClientAuth && o.certHeader != "" {
		c.mistake("-tls-client-auth and -cert-header are two ways to identify a device: keep one")
	}
	if o.maxBody > 0 && o.maxInFlight > 0 && o.maxInFlight < o.maxBody {
		c.mistake("-max-in-flight is smaller than -max-body: make it at least as large")
	}
}

func (c *configuration) checkRoles(o *options) {
	apiGiven := c.isGiven("api-file") || o.api != ""
	if !o.disableMDM && !c.isGiven("ca") {
		c.mistake("-ca: name the PEM file of the CAs that issue device identities (or give -disable-mdm)")
	}
	if o.disableMDM && !apiGiven {
		c.mistake("-disable-mdm without -api leaves nothing to do: give -api, or remove -disable-mdm")
	}
	if o.apiListen != "" && !apiGiven {
		c.mistake("-api-listen needs the API: give -api")
	}
	if o.migration && !apiGiven {
		c.mistake("-migration needs the API: give -api")
	}
	if !c.isGiven("dm") && (o.dmSendHMACKey != "" || o.dmRecvHMACKey != "") {
		c.warn("-dm-send-hmac-key and -dm-recv-hmac-key do nothing without -dm")
	}
	if o.authenticateKey != "" && !c.isGiven("authenticate-url") {
		c.warn("-authenticate-key does nothing without -authenticate-url")
	}
	if o.webhookHMACKey != "" && !c.isGiven("webhook-url") {
		c.warn("-webhook-hmac-key does nothing without -webhook-url")
	}
	if c.isGiven("webhook-old-key") && !c.isGiven("webhook-hmac-key") && !c.isGiven("webhook-hmac-key-file") {
		c.mistake("-webhook-old-key is a second key: give -webhook-hmac-key, too")
	}
	if o.retainEvents > 0 && o.retainEvents < o.webhookMaxAge {
		c.mistake("-retain-events is shorter than -webhook-max-age: make it at least as long")
	}
}

func (c *configuration) checkStorage(o *options) {
	if o.sealCommands && o.sealKeyFile == "" {
		c.mistake("-seal-commands needs keys: give -seal-key-file")
	}
	for _, name := range []string{"storage", "storage-dsn", "dsn", "storage-options"} {
		if len(c.flags[name]) > 1 {
			c.mistake("-%s is given %d times: this daemon writes to one store, keep one", name, len(c.flags[name]))
		}
	}
	dsn, byNewName := c.given("storage-dsn")
	byFile := c.isGiven("storage-dsn-file")
	old, byOldName := c.given("dsn")
	if byOldName && (byNewName || byFile) {
		c.mistake("-dsn is the old name of -storage-dsn, and both are given: keep -storage-dsn")
	}
	if !c.isGiven("storage") && !byNewName && !byOldName && !byFile {
		c.checkLeftBehind()
	}
	switch o.storage {
	case "sqlite":
		if o.storageDSN == "" && !byFile {
			o.storageDSN = sqliteFile
		}
	case "pgsql", "mysql":
		if o.storageDSN == "" && !byFile {
			c.mistake("-storage %s needs to know the database: give -storage-dsn or -storage-dsn-file", o.storage)
		}
		for _, g := range []given{dsn, old} {
			if g.onLine {
				c.warnOnLine(&option{name: "storage-dsn"}, g)
			}
		}
	}
}

const sqliteFile = "nanomdm.db"

// checkLeftBehind keeps a first start in a directory of NanoMDM's, where the
// file store was the default, from coming up with an empty database.
func (c *configuration) checkLeftBehind() {
	if _, err := c.stat(sqliteFile); err == nil {
		return
	}
	for _, dir := range []string{"dbkv", "db"} {
		if info, err := c.stat(dir); err == nil && info.IsDir() {
			c.mistake("the directory %s looks like NanoMDM's file store, which this daemon does not read: "+
				"give -storage sqlite (or pgsql, mysql) to start with a database, and %s", dir, howToMove)
		}
	}
}

const howToMove = "bring the enrollments with NanoMDM's nano2nano through PUT /migration (give -migration and -api)"

// to returns a setter that parses a text into p, and leaves p alone on error.
func to[T any](p *T, parse func(string) (T, error)) func(string) error {
	return func(text string) error {
		v, err := parse(text)
		if err != nil {
			return err
		}
		*p = v
		return nil
	}
}

func parseText(s string) (string, error)   { return s, nil }
func parseSecret(s string) (secret, error) { return secret(s), nil }

func parseSwitch(s string) (bool, error) {
	v, err := strconv.ParseBool(s)
	if err != nil {
		return false, fmt.Errorf("%q is neither true nor false", s)
	}
	return v, nil
}

// unixPrefix begins an address that is the path of a Unix socket.
const unixPrefix = "unix:"

func parseListen(s string) (string, error) {
	if path, ok := strings.CutPrefix(s, unixPrefix); ok {
		if path == "" {
			return "", fmt.Errorf("%q names no socket: write unix:/run/nanomdm/nanomdm.sock", s)
		}
		return s, nil
	}
	if _, _, err := net.SplitHostPort(s); err != nil {
		return "", fmt.Errorf("%q is not HOST:PORT, such as :9000 or 127.0.0.1:9000, and not unix:PATH", s)
	}
	return s, nil
}

func parseReenroll(s string) (storage.Reenroll, error) {
	switch s {
	case "allow":
		return storage.ReenrollAllow, nil
	case "same-subject":
		return storage.ReenrollSameSubject, nil
	case "deny":
		return storage.ReenrollDeny, nil
	}
	return 0, fmt.Errorf("%q is not a policy: use allow, same-subject or deny", s)
}

func parseRenewal(s string) (storage.Renewal, error) {
	switch s {
	case "deny":
		return storage.RenewalDeny, nil
	case "window":
		return storage.RenewalWindow, nil
	case "same-subject":
		return storage.RenewalSameSubject, nil
	}
	return 0, fmt.Errorf("%q is not a policy: use deny, window or same-subject", s)
}

func parseHeaderName(s string) (string, error) {
	if s != "" && !httpguts.ValidHeaderFieldName(strings.TrimPrefix(s, ":")) {
		return "", fmt.Errorf("%q is not the name of a header", s)
	}
	return s, nil
}

func parsePrefixes(s string) ([]netip.Prefix, error) {
	var list []netip.Prefix
	for _, field := range fields(s) {
		prefix, err := netip.ParsePrefix(field)
		if err != nil {
			addr, err := netip.ParseAddr(field)
			if err != nil {
				return nil, fmt.Errorf("%q is not a network such as 10.0.0.0/8", field)
			}
			prefix = netip.PrefixFrom(addr, addr.BitLen())
		}
		list = append(list, prefix.Masked())
	}
	return list, nil
}

// parseURL does not repeat the text in its error: it may hold a password.
func parseURL(s string) (*url.URL, error) {
	if s == "" {
		return nil, nil
	}
	u, err := url.Parse(s)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Hostname() == "" {
		return nil, errors.New("not a URL with http or https and a host, such as https://mdm.example.org/")
	}
	return u, nil
}

func parseHTTPSURL(s string) (*url.URL, error) {
	u, err := parseURL(s)
	if err != nil || u == nil || u.Scheme != "https" {
		return nil, errors.New("not a URL with https and a host, such as https://api.push.apple.com")
	}
	return u, nil
}

func parseStorage(s string) (string, error) {
	switch s {
	case "sqlite", "pgsql", "mysql":
		return s, nil
	case "file", "filekv", "inmem", "dbkv":
		return "", fmt.Errorf("%s is a store of NanoMDM's that this daemon does not have: "+
			"use sqlite (or pgsql, mysql), and %s", s, howToMove)
	}
	return "", fmt.Errorf("%q is not a database: use sqlite, pgsql (PostgreSQL) or mysql (MySQL, MariaDB)", s)
}

func parseStorageOptions(s string) (storageOptions, error) {
	var o storageOptions
	var seen []string
	for _, field := range fields(s) {
		key, value, _ := strings.Cut(field, "=")
		if slices.Contains(seen, key) {
			return o, fmt.Errorf("%s is given twice: keep one", key)
		}
		seen = append(seen, key)
		var err error
		switch key {
		case "delete":
			err = to(&o.deleteAcked, parseSwitch)(value)
		case "conn_max_lifetime":
			err = to(&o.connMaxLifetime, parsePositive)(value)
		case "conn_max_idle_time":
			err = to(&o.connMaxIdleTime, parsePositive)(value)
		case "max_open_conns":
			err = to(&o.maxOpenConns, parseCount)(value)
		default:
			return o, fmt.Errorf("%q is not a setting: use delete, conn_max_lifetime, conn_max_idle_time, max_open_conns", key)
		}
		if err != nil {
			return o, fmt.Errorf("%s: %w", key, err)
		}
	}
	return o, nil
}

func parseCount(s string) (int, error) {
	n, err := strconv.Atoi(s)
	if err != nil || n < 1 {
		return 0, fmt.Errorf("%q is not a number of 1 or more", s)
	}
	return n, nil
}

func parseCountOrNone(s string) (int, error) {
	if s == "0" {
		return 0, nil
	}
	n, err := parseCount(s)
	if err != nil {
		return 0, fmt.Errorf("%q is not a number of 0 or more", s)
	}
	return n, nil
}

func parseRate(s string) (float64, error) {
	r, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(r) || math.IsInf(r, 0) || r < 0 {
		return 0, fmt.Errorf("%q is not a number of 0 or more", s)
	}
	return r, nil
}

func parsePositive(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("%q is not a time above zero, such as 30s, 5m or 168h", s)
	}
	return d, nil
}

// parseDuration takes 0, too.
func parseDuration(s string) (time.Duration, error) {
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, fmt.Errorf("%q is not a time of 0 or more, such as 0, 15s or 1m", s)
	}
	return d, nil
}

func parseDurations(s string) ([]time.Duration, error) {
	if s == "0" {
		return nil, nil
	}
	var list []time.Duration
	for _, field := range fields(s) {
		d, err := parsePositive(field)
		if err != nil {
			return nil, err
		}
		list = append(list, d)
	}
	if len(list) == 0 {
		return nil, errors.New("empty: give times such as 3m,1h,24h, or 0 for off")
	}
	return list, nil
}

// parseSize reads bytes with a suffix: k, M or G, in either case.
func parseSize(s string) (int64, error) {
	digits, shift := s, 0
	if s != "" {
		if i := strings.IndexByte("kmg", s[len(s)-1]|0x20); i >= 0 {
			digits, shift = s[:len(s)-1], 10*(i+1)
		}
	}
	n, err := strconv.ParseInt(digits, 10, 64)
	if err != nil || n < 1 || n > math.MaxInt64>>shift {
		return 0, fmt.Errorf("%q is not a size in bytes, such as 65536, 512k or 16M", s)
	}
	return n << shift, nil
}

// fields splits a comma list, without blanks and empty fields.
func fields(s string) []string {
	var list []string
	for field := range strings.SplitSeq(s, ",") {
		if field = strings.TrimSpace(field); field != "" {
			list = append(list, field)
		}
	}
	return list
}

func names(table []option, form func(string) string) []string {
	var list []string
	for i := range table {
		for _, name := range table[i].names() {
			list = append(list, form(name))
		}
	}
	return list
}

// nearest returns the candidate with the smallest edit distance to name.
func nearest(name string, candidates []string) string {
	best, least := "", math.MaxInt
	for _, candidate := range candidates {
		if d := distance(name, candidate); d < least {
			best, least = candidate, d
		}
	}
	return best
}

// distance is the number of bytes to insert, remove or change to get from a to b.
func distance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			change := diagonal
			if a[i] != b[j] {
				change++
			}
			diagonal = row[j+1]
			row[j+1] = min(change, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
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
