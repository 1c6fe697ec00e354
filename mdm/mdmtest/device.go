package mdmtest

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"
)

// Kind is the kind of device and of its enrollment.
type Kind int

const (
	// Mac is a macOS computer in a device enrollment; it has user channels.
	Mac Kind = iota
	// IPhone is an iPhone in a device enrollment, without user channels.
	IPhone
	// IPad is an iPad of one user, without user channels.
	IPad
	// SharedIPad is an iPad with a user channel for each user who logs in.
	SharedIPad
	// UserEnrollment is a Mac that its user enrolled: it has an EnrollmentID
	// in place of the UDID, and user channels.
	UserEnrollment
)

// String is the name for people.
func (k Kind) String() string {
	switch k {
	case IPhone:
		return "iPhone"
	case IPad:
		return "iPad"
	case SharedIPad:
		return "Shared iPad"
	case UserEnrollment:
		return "Mac (User Enrollment)"
	}
	return "Mac"
}

// Auth is how a device proves its identity.
type Auth int

const (
	// AuthSignature signs each request in the Mdm-Signature header.
	AuthSignature Auth = iota
	// AuthHeader sends the certificate in a header of RFC 9440's form, as a
	// reverse proxy would.
	AuthHeader
	// AuthTLS sends nothing: the Config's Client has the certificate.
	AuthTLS
)

// Config is what a device can be told; the zero value is a Mac that signs.
type Config struct {
	Kind Kind
	// CheckinURL is where check-in messages go; empty is the device's URL.
	CheckinURL string
	// Client does the requests and may serve any number of devices; nil is
	// http.DefaultClient.
	Client *http.Client
	// UDID and Serial default to values derived from the certificate. For
	// UserEnrollment, UDID is the EnrollmentID and Serial is not sent.
	UDID   string
	Serial string
	// Topic defaults to DefaultTopic.
	Topic string

	Auth Auth
	// CertHeader is the header's name for AuthHeader; empty is Client-Cert.
	CertHeader string
	// Sign is the form of signatures for AuthSignature.
	Sign SignOptions
	// Header is sent with each request, in addition.
	Header http.Header

	// Behaviour decides about commands; nil obeys all.
	Behaviour Behaviour
	// Apps is how many applications are installed; 0 is a handful.
	Apps int
	// MaxCommands ends a connection, with an error, at a server that never
	// stops offering commands; 0 is 10,000.
	MaxCommands int
	// Observe is called after each request with its message type or, for a
	// report, its status, possibly from several goroutines at once.
	Observe func(kind string, took time.Duration, err error)
}

// DefaultTopic is the APNs topic of a device that was given none.
const DefaultTopic = "com.apple.mgmt.External.simulated"

// Device is a simulated device. Its embedded Channel is the device channel.
// It is safe for concurrent use.
type Device struct {
	*Channel
	cfg        Config
	identity   *Identity
	url        *url.URL
	certHeader string

	mu    sync.Mutex
	users map[string]*Channel
}

// NewDevice makes a device that is not enrolled yet and talks to the given
// ServerURL.
func NewDevice(serverURL string, identity *Identity, cfg Config) (*Device, error) {
	if identity == nil || identity.Cert == nil || identity.Key == nil {
		return nil, errors.New("making a device: identity is missing")
	}
	base, err := url.Parse(serverURL)
	if err != nil || base.Host == "" {
		return nil, fmt.Errorf("making a device: %q is no URL of a server", serverURL)
	}
	if cfg.CheckinURL == "" {
		cfg.CheckinURL = serverURL
	}
	if cfg.Client == nil {
		cfg.Client = http.DefaultClient
	}
	if cfg.Topic == "" {
		cfg.Topic = DefaultTopic
	}
	if cfg.CertHeader == "" {
		cfg.CertHeader = "Client-Cert"
	}
	if cfg.Apps == 0 {
		cfg.Apps = 5
	}
	if cfg.MaxCommands == 0 {
		cfg.MaxCommands = 10_000
	}
	seed := sha256.Sum256(identity.Cert.Raw)
	if cfg.UDID == "" {
		cfg.UDID = defaultUDID(cfg.Kind, seed)
	}
	if cfg.Serial == "" {
		cfg.Serial = fmt.Sprintf("SIM%X", seed[20:25])[:12]
	}
	d := &Device{cfg: cfg, identity: identity, url: base, users: make(map[string]*Channel)}
	if cfg.Auth == AuthHeader {
		d.certHeader = clientCertHeader(identity.Cert)
	}
	d.Channel = newChannel(d, user{})
	return d, nil
}

// TLSClient makes an HTTP client that shows the identity to a server whose
// certificate roots knows; nil is the system's. Each device needs its own.
func TLSClient(identity *Identity, roots *x509.CertPool) *http.Client {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.TLSClientConfig = &tls.Config{
		MinVersion:   tls.VersionTLS12,
		RootCAs:      roots,
		Certificates: []tls.Certificate{identity.TLS()},
	}
	return &http.Client{Transport: transport}
}

// Identity is the device's current identity.
func (d *Device) Identity() *Identity { return d.identity }

// Kind is the kind of the device.
func (d *Device) Kind() Kind { return d.cfg.Kind }

// UDID is the device's UDID or, for UserEnrollment, its EnrollmentID.
func (d *Device) UDID() string { return d.cfg.UDID }

// Serial is the device's serial number.
func (d *Device) Serial() string { return d.cfg.Serial }

// User is the channel of the user with this short name, always the same one
// for the same name. A kind of device that has no user channels gets a Mac's:
// what a server makes of it is the server's business.
func (d *Device) User(shortName string) *Channel {
	d.mu.Lock()
	defer d.mu.Unlock()
	if channel, ok := d.users[shortName]; ok {
		return channel
	}
	u := user{shortName: shortName, longName: "User " + shortName}
	if d.cfg.Kind == SharedIPad {
		// Apple's constant for "there was no user authentication"; users of
		// a Shared iPad are told apart by their short names.
		u.id = "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF"
	} else {
		seed := sha256.Sum256([]byte(d.cfg.UDID + "\x00" + shortName))
		u.id = formatUUID([16]byte(seed[:16]))
	}
	channel := newChannel(d, u)
	d.users[shortName] = channel
	return channel
}

// Enroll sends Authenticate and TokenUpdate.
func (d *Device) Enroll(ctx context.Context) error {
	if err := d.Authenticate(ctx); err != nil {
		return err
	}
	return d.TokenUpdate(ctx)
}

// Authenticate begins an enrollment. Like a device that was erased it forgets
// its profiles and what it had still to report, on all channels.
func (d *Device) Authenticate(ctx context.Context) error {
	d.reset()
	d.mu.Lock()
	for _, channel := range d.users {
		channel.reset()
	}
	d.mu.Unlock()

	m := d.model()
	var p Plist
	p.String("MessageType", "Authenticate")
	d.identify(&p)
	p.String("Topic", d.cfg.Topic)
	p.String("DeviceName", m.deviceName)
	p.String("Model", m.model)
	p.String("ModelName", m.modelName)
	p.String("OSVersion", m.osVersion)
	p.String("BuildVersion", m.build)
	p.String("ProductName", m.product)
	if d.cfg.Kind != UserEnrollment {
		p.String("SerialNumber", d.cfg.Serial)
		p.OptionalString("IMEI", m.imei)
	}
	_, err := d.checkin(ctx, "Authenticate", &p)
	return err
}

// CheckOut says that the enrollment profile was removed.
func (d *Device) CheckOut(ctx context.Context) error {
	var p Plist
	p.String("MessageType", "CheckOut")
	d.identify(&p)
	p.String("Topic", d.cfg.Topic)
	_, err := d.checkin(ctx, "CheckOut", &p)
	return err
}

// SetBootstrapToken escrows a token; an empty one deletes it.
func (d *Device) SetBootstrapToken(ctx context.Context, token []byte) error {
	var p Plist
	p.String("MessageType", "SetBootstrapToken")
	d.identify(&p)
	if len(token) > 0 {
		p.Data("BootstrapToken", token)
	}
	p.Bool("AwaitingConfiguration", false)
	_, err := d.checkin(ctx, "SetBootstrapToken", &p)
	return err
}

// GetBootstrapToken asks for the escrowed token; it is empty if there is none.
func (d *Device) GetBootstrapToken(ctx context.Context) ([]byte, error) {
	var p Plist
	p.String("MessageType", "GetBootstrapToken")
	d.identify(&p)
	p.Bool("AwaitingConfiguration", false)
	response, err := d.checkin(ctx, "GetBootstrapToken", &p)
	if err != nil {
		return nil, err
	}
	var reply struct{ BootstrapToken []byte }
	if err := decodeReply(response, &reply); err != nil {
		return nil, fmt.Errorf("GetBootstrapToken: %w", err)
	}
	return reply.BootstrapToken, nil
}

// ReturnToService asks how to enroll again after an erase, and hands back the
// server's property list.
func (d *Device) ReturnToService(ctx context.Context) ([]byte, error) {
	var p Plist
	p.String("MessageType", "ReturnToService")
	d.identify(&p)
	response, err := d.checkin(ctx, "ReturnToService", &p)
	if err != nil {
		return nil, err
	}
	return response.Body, nil
}

// model is what a kind of device says about itself.
type model struct {
	deviceName, model, modelName, product string
	osVersion, build, imei                string
}

func (d *Device) model() model {
	suffix := d.cfg.Serial[max(0, len(d.cfg.Serial)-4):]
	switch d.cfg.Kind {
	case IPhone:
		return model{
			deviceName: "iPhone " + suffix, model: "MTUW3", modelName: "iPhone", product: "iPhone16,1",
			osVersion: "26.0", build: "23A341", imei: "35 900000 000000 0",
		}
	case IPad, SharedIPad:
		return model{
			deviceName: "iPad " + suffix, model: "MCFQ4", modelName: "iPad", product: "iPad15,7",
			osVersion: "26.0", build: "23A341",
		}
	}
	return model{
		deviceName: "Mac " + suffix, model: "Mac16,1", modelName: "MacBook Pro", product: "Mac16,1",
		osVersion: "26.0", build: "25A354",
	}
}

// defaultUDID has the form that the kind of device has in the field.
func defaultUDID(kind Kind, seed [32]byte) string {
	switch kind {
	case IPhone, IPad, SharedIPad:
		return fmt.Sprintf("00008120-%016X", seed[:8])
	case UserEnrollment:
		return strings.ToLower(formatUUID([16]byte(seed[:16])))
	}
	return formatUUID([16]byte(seed[:16]))
}
