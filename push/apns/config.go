package apns

import (
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"time"
)

// DefaultURL is the production service. MDM certificates are production only.
const DefaultURL = "https://api.push.apple.com"

// Config holds what is optional about a [Client]. The zero value works.
type Config struct {
	// URL is the root of the service, https only, without a path.
	// Default: [DefaultURL]. Apple also listens on port 2197.
	URL string
	// RootCAs verifies the server's certificate. Default: the system's roots.
	RootCAs *x509.CertPool
	// Workers bounds the pushes in flight; a worker is a stream that waits
	// for its answer. Streams that stall make room, see
	// [Client.Concurrency]. Default: 1000.
	Workers int
	// Expiration is how long APNs keeps a notification for a device that is
	// offline. Whole seconds count. Default: 7 days.
	Expiration time.Duration
	// DialTimeout bounds the making of a connection: TCP, proxy, TLS and
	// the first HTTP/2 exchange. Default: 15 seconds.
	DialTimeout time.Duration
	// StreamTimeout bounds the wait for one answer. Keep it above
	// PingInterval plus PingTimeout, so that the client detects a dead
	// connection and repeats its pushes before they time out.
	// Default: 30 seconds.
	StreamTimeout time.Duration
	// PushTimeout bounds a whole push from the moment it has a worker:
	// certificate, dial, and all tries. Default: 60 seconds.
	PushTimeout time.Duration
	// PingInterval is how long a connection may be silent before its health
	// is checked with a PING. Default: 10 seconds.
	PingInterval time.Duration
	// PingTimeout is how long the answer to a PING may take before the
	// connection is closed. Default: 5 seconds.
	PingTimeout time.Duration
	// MaxConnsPerTopic bounds the connections of one topic that take new
	// pushes. Default: 16.
	MaxConnsPerTopic int
	// CertificateTTL is how long the client uses a topic's certificate before
	// it asks the source again. A renewed certificate is in use within this
	// time plus the source's own, or at once after
	// [Client.CertificateChanged].
	// Default: 30 seconds.
	CertificateTTL time.Duration
	// Proxy names the proxy for the service's URL, as in
	// [http.Transport.Proxy]; http and https proxies are supported. A nil
	// URL means none. Default: [http.ProxyFromEnvironment].
	Proxy func(*url.URL) (*url.URL, error)
	// Logger receives changes of state (certificate replaced, dial failed),
	// never single pushes. Default: discard.
	Logger *slog.Logger
	// Now is the clock of expirations and of CertificateTTL.
	// Default: [time.Now].
	Now func() time.Time
}

// withDefaults validates cfg and sets the defaults of zero fields. The second
// result is the URL with the host and port to connect to.
func (cfg Config) withDefaults() (Config, *url.URL, error) {
	if cfg.URL == "" {
		cfg.URL = DefaultURL
	}
	server, err := parseServer(cfg.URL)
	if err != nil {
		return cfg, nil, err
	}
	for _, err := range []error{
		setDefault("Workers", &cfg.Workers, 1000),
		setDefault("MaxConnsPerTopic", &cfg.MaxConnsPerTopic, 16),
		setDefault("Expiration", &cfg.Expiration, 7*24*time.Hour),
		setDefault("DialTimeout", &cfg.DialTimeout, 15*time.Second),
		setDefault("StreamTimeout", &cfg.StreamTimeout, 30*time.Second),
		setDefault("PushTimeout", &cfg.PushTimeout, 60*time.Second),
		setDefault("PingInterval", &cfg.PingInterval, 10*time.Second),
		setDefault("PingTimeout", &cfg.PingTimeout, 5*time.Second),
		setDefault("CertificateTTL", &cfg.CertificateTTL, 30*time.Second),
	} {
		if err != nil {
			return cfg, nil, err
		}
	}
	if cfg.Expiration < time.Second {
		return cfg, nil, fmt.Errorf("apns: Config.Expiration: %v is less than a second", cfg.Expiration)
	}
	if cfg.PushTimeout < cfg.StreamTimeout {
		return cfg, nil, fmt.Errorf("apns: Config.PushTimeout: %v is less than StreamTimeout, %v", cfg.PushTimeout, cfg.StreamTimeout)
	}
	if cfg.Proxy == nil {
		cfg.Proxy = func(u *url.URL) (*url.URL, error) {
			return http.ProxyFromEnvironment(&http.Request{URL: u})
		}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	return cfg, server, nil
}

// parseServer returns the scheme, host and port of Config.URL.
func parseServer(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	switch {
	case err != nil:
		// The parser's error repeats its input, which may hold credentials.
		return nil, errors.New("apns: Config.URL: not a URL")
	case u.Scheme != "https":
		return nil, fmt.Errorf("apns: Config.URL: scheme is %q, must be https", u.Scheme)
	case u.Hostname() == "":
		return nil, errors.New("apns: Config.URL: no host")
	case u.User != nil, u.RawQuery != "", u.Fragment != "", u.Path != "" && u.Path != "/":
		return nil, errors.New("apns: Config.URL: only scheme, host and port are allowed")
	}
	return &url.URL{Scheme: "https", Host: u.Host}, nil
}

// setDefault sets a field of Config that is zero, and refuses a negative one.
func setDefault[T int | time.Duration](name string, field *T, value T) error {
	if *field < 0 {
		return fmt.Errorf("apns: Config.%s: %v is negative", name, *field)
	}
	if *field == 0 {
		*field = value
	}
	return nil
}

// hostPort returns the address to dial for an https URL.
func hostPort(u *url.URL, defaultPort string) string {
	port := u.Port()
	if port == "" {
		port = defaultPort
	}
	return net.JoinHostPort(u.Hostname(), port)
}
