package mdmtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"
)

const (
	checkinType = "application/x-apple-aspen-mdm-checkin"
	commandType = "application/x-apple-aspen-mdm; charset=UTF-8"
	// maxReply bounds what a device reads of a reply.
	maxReply = 64 << 20
)

// user is empty for the device channel.
type user struct {
	id, shortName, longName string
}

// Channel is a device channel or a user channel. It is safe for concurrent
// use.
type Channel struct {
	device *Device
	user   user

	mu        sync.Mutex
	profiles  []profile // in order of installation
	unsent    []report  // results that no server has taken yet
	authToken string    // of the last UserAuthenticate
}

type profile struct {
	identifier, displayName, uuid string
}

func newChannel(d *Device, u user) *Channel {
	return &Channel{device: d, user: u}
}

func (c *Channel) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.profiles, c.unsent, c.authToken = nil, nil, ""
}

// Response is a reply of the server, whatever its status.
type Response struct {
	Status int
	Header http.Header
	Body   []byte
}

// RefusedError is a reply that is not a 2xx.
type RefusedError struct {
	// Kind is the message type or the report's status.
	Kind     string
	Response *Response
}

// Error says the status and the beginning of the body.
func (e *RefusedError) Error() string {
	body := e.Response.Body
	if len(body) > 200 {
		body = body[:200]
	}
	return fmt.Sprintf("%s: the server answered %d %q", e.Kind, e.Response.Status, body)
}

// EnrollmentID is the channel's identifier in the server's API.
func (c *Channel) EnrollmentID() string {
	switch {
	case c.user.id == "":
		return c.device.cfg.UDID
	case c.device.cfg.Kind == SharedIPad:
		return c.device.cfg.UDID + ":" + c.user.shortName
	}
	return c.device.cfg.UDID + ":" + c.user.id
}

// Profiles lists the identifiers of the installed profiles, oldest first.
func (c *Channel) Profiles() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var identifiers []string
	for _, p := range c.profiles {
		identifiers = append(identifiers, p.identifier)
	}
	return identifiers
}

// PushToken is the token that TokenUpdate sends: the SHA-256 of the
// enrollment ID.
func (c *Channel) PushToken() []byte {
	token := sha256.Sum256([]byte(c.EnrollmentID()))
	return token[:]
}

// PushMagic is the magic that TokenUpdate sends, a UUID that depends on the
// enrollment ID.
func (c *Channel) PushMagic() string {
	seed := sha256.Sum256([]byte("magic " + c.EnrollmentID()))
	return formatUUID([16]byte(seed[:16]))
}

// TokenUpdate says how to push to the channel. The first one after
// Authenticate completes the enrollment; on a user channel it begins one.
func (c *Channel) TokenUpdate(ctx context.Context) error {
	var p Plist
	p.String("MessageType", "TokenUpdate")
	c.identify(&p)
	p.String("Topic", c.device.cfg.Topic)
	p.Data("Token", c.PushToken())
	p.String("PushMagic", c.PushMagic())
	kind := c.device.cfg.Kind
	switch {
	case c.user.id == "":
		p.Bool("AwaitingConfiguration", false)
		if kind == IPhone || kind == IPad {
			p.Data("UnlockToken", []byte("unlock "+c.device.cfg.UDID))
		}
	case kind != SharedIPad:
		p.Bool("NotOnConsole", false)
	}
	_, err := c.checkin(ctx, "TokenUpdate", &p)
	return err
}

// UserAuth is the reply to UserAuthenticate.
type UserAuth struct {
	DigestChallenge string
	AuthToken       string
}

// UserAuthenticate asks whether the user is managed; the second step has a
// digest response. A server that declines answers 410, a RefusedError. An
// AuthToken that it hands out is in all later messages of the channel.
func (c *Channel) UserAuthenticate(ctx context.Context, digestResponse string) (UserAuth, error) {
	var p Plist
	p.String("MessageType", "UserAuthenticate")
	c.identify(&p)
	p.OptionalString("DigestResponse", digestResponse)
	response, err := c.checkin(ctx, "UserAuthenticate", &p)
	if err != nil {
		return UserAuth{}, err
	}
	var reply UserAuth
	if err := decodeReply(response, &reply); err != nil {
		return UserAuth{}, fmt.Errorf("UserAuthenticate: %w", err)
	}
	c.mu.Lock()
	c.authToken = reply.AuthToken
	c.mu.Unlock()
	return reply, nil
}

// DeclarativeManagement fetches an endpoint, or sends data to "status", and
// hands back the server's JSON.
func (c *Channel) DeclarativeManagement(ctx context.Context, endpoint string, data []byte) ([]byte, error) {
	var p Plist
	p.String("MessageType", "DeclarativeManagement")
	c.identify(&p)
	p.String("Endpoint", endpoint)
	if len(data) > 0 {
		p.Data("Data", data)
	}
	response, err := c.checkin(ctx, "DeclarativeManagement", &p)
	if err != nil {
		return nil, err
	}
	return response.Body, nil
}

// GetToken asks for a token of the given service type.
func (c *Channel) GetToken(ctx context.Context, serviceType string) ([]byte, error) {
	var p Plist
	p.String("MessageType", "GetToken")
	c.identify(&p)
	p.String("TokenServiceType", serviceType)
	response, err := c.checkin(ctx, "GetToken", &p)
	if err != nil {
		return nil, err
	}
	var reply struct{ TokenData []byte }
	if err := decodeReply(response, &reply); err != nil {
		return nil, fmt.Errorf("GetToken: %w", err)
	}
	return reply.TokenData, nil
}

// Idle asks for a command, which is nil if there is none.
func (c *Channel) Idle(ctx context.Context) (*Command, error) {
	return c.Report(ctx, StatusIdle, "", nil)
}

// Report sends a report once, without caching it, and returns the command
// that the server offers next, nil if none. Extra is property list XML, see
// Plist.Content.
func (c *Channel) Report(ctx context.Context, status Status, uuid string, extra []byte) (*Command, error) {
	return c.send(ctx, report{status: status, uuid: uuid, extra: extra})
}

// Do sends a body as the channel's device would, signed or with its header,
// to a path on the server; an empty path is the ServerURL. Nothing is cached,
// and a status that is not a 2xx is no error.
func (c *Channel) Do(ctx context.Context, path, contentType string, body []byte) (*Response, error) {
	target := *c.device.url
	if path != "" {
		resolved, err := target.Parse(path)
		if err != nil {
			return nil, fmt.Errorf("making a request: %w", err)
		}
		target = *resolved
	}
	return c.put(ctx, target.String(), contentType, body)
}

// Exchange is one command of a visit.
type Exchange struct {
	Command *Command
	Status  Status
	// Extra is what went with the status.
	Extra []byte
}

// Visit is what happened on one connection.
type Visit struct {
	// Resent are results of earlier visits that were sent first, and taken.
	Resent []Exchange
	// Exchanges are the commands that were received, in order, each with the
	// answer that the server took.
	Exchanges []Exchange
}

// ErrEndless is returned at a server that offers more commands on a
// connection than Config.MaxCommands.
var ErrEndless = errors.New("the server does not stop offering commands")

// Poll is a whole connection, as after a push: it sends results that no
// server took yet, or Idle, and answers commands until the server has none. A
// result that the server does not take (any reply but a 2xx, or none) is kept
// for the next Poll, except NotNow, which devices do not keep.
func (c *Channel) Poll(ctx context.Context) (Visit, error) {
	var visit Visit
	command, err := c.begin(ctx, &visit)
	if err != nil {
		return visit, err
	}
	for command != nil {
		if len(visit.Exchanges) == c.device.cfg.MaxCommands {
			return visit, ErrEndless
		}
		r := c.answer(command)
		next, err := c.send(ctx, r)
		if err != nil && r.status != StatusNotNow && !errors.Is(err, errReply) {
			c.mu.Lock()
			c.unsent = append(c.unsent, r)
			c.mu.Unlock()
		}
		if err != nil && !errors.Is(err, errReply) {
			return visit, err
		}
		visit.Exchanges = append(visit.Exchanges, r.exchange())
		if err != nil {
			return visit, err
		}
		command = next
	}
	return visit, nil
}

// begin opens a connection: with kept results if there are any.
func (c *Channel) begin(ctx context.Context, visit *Visit) (*Command, error) {
	c.mu.Lock()
	unsent := c.unsent
	c.unsent = nil
	c.mu.Unlock()
	if len(unsent) == 0 {
		return c.Idle(ctx)
	}
	var command *Command
	for i, r := range unsent {
		next, err := c.send(ctx, r)
		if err != nil {
			if !errors.Is(err, errReply) {
				i-- // this one was not taken either
			}
			c.mu.Lock()
			c.unsent = append(unsent[i+1:len(unsent):len(unsent)], c.unsent...)
			c.mu.Unlock()
			return nil, err
		}
		visit.Resent = append(visit.Resent, r.exchange())
		command = next // what an earlier one offered is offered again
	}
	return command, nil
}

// report is one message of the command protocol.
type report struct {
	status  Status
	uuid    string
	chain   []ErrorItem
	extra   []byte
	command *Command // what it answers; nil for Report
}

func (r report) exchange() Exchange {
	return Exchange{Command: r.command, Status: r.status, Extra: r.extra}
}

// errReply marks a 2xx whose body is no command: the report was taken.
var errReply = errors.New("bad reply")

func (c *Channel) send(ctx context.Context, r report) (*Command, error) {
	var p Plist
	c.identify(&p)
	p.String("Status", string(r.status))
	p.OptionalString("CommandUUID", r.uuid)
	if len(r.chain) > 0 {
		p.Array("ErrorChain", func(p *Plist) {
			for _, item := range r.chain {
				p.DictItem(func(p *Plist) {
					p.Int("ErrorCode", item.Code)
					p.String("ErrorDomain", item.Domain)
					p.String("LocalizedDescription", item.Description)
					p.String("USEnglishDescription", item.Description)
				})
			}
		})
	}
	p.Raw(r.extra)
	response, err := c.message(ctx, string(r.status), c.device.url.String(), commandType, p.Document())
	if err != nil || len(response.Body) == 0 {
		return nil, err
	}
	command, err := ParseCommand(response.Body)
	if err != nil {
		return nil, fmt.Errorf("%s: %w: %w", r.status, errReply, err)
	}
	return command, nil
}

func (c *Channel) checkin(ctx context.Context, kind string, p *Plist) (*Response, error) {
	return c.message(ctx, kind, c.device.cfg.CheckinURL, checkinType, p.Document())
}

// message sends one message and makes an error of what is not a 2xx.
func (c *Channel) message(ctx context.Context, kind, target, contentType string, body []byte) (*Response, error) {
	start := time.Now()
	response, err := c.put(ctx, target, contentType, body)
	switch {
	case err != nil:
		err = fmt.Errorf("%s: %w", kind, err)
	case response.Status < 200 || response.Status > 299:
		err = &RefusedError{Kind: kind, Response: response}
	}
	if observe := c.device.cfg.Observe; observe != nil {
		observe(kind, time.Since(start), err)
	}
	if err != nil {
		return nil, err
	}
	return response, nil
}

func (c *Channel) put(ctx context.Context, target, contentType string, body []byte) (*Response, error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodPut, target, bytes.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("making a request: %w", err)
	}
	for name, values := range c.device.cfg.Header {
		request.Header[name] = values
	}
	request.Header.Set("User-Agent", "MDM/1.0 mdmsim")
	if contentType != "" {
		request.Header.Set("Content-Type", contentType)
	}
	switch c.device.cfg.Auth {
	case AuthSignature:
		signature, err := Sign(c.device.identity, body, c.device.cfg.Sign)
		if err != nil {
			return nil, err
		}
		request.Header.Set("Mdm-Signature", signature)
	case AuthHeader:
		request.Header.Set(c.device.cfg.CertHeader, c.device.certHeader)
	}
	reply, err := c.device.cfg.Client.Do(request)
	if err != nil {
		return nil, err
	}
	defer reply.Body.Close()
	replyBody, err := io.ReadAll(io.LimitReader(reply.Body, maxReply))
	if err != nil {
		return nil, fmt.Errorf("reading the reply: %w", err)
	}
	return &Response{Status: reply.StatusCode, Header: reply.Header, Body: replyBody}, nil
}

// identify adds the keys that say who is speaking.
func (c *Channel) identify(p *Plist) {
	d := c.device
	if d.cfg.Kind == UserEnrollment {
		p.String("EnrollmentID", d.cfg.UDID)
		p.OptionalString("EnrollmentUserID", c.user.id)
	} else {
		p.String("UDID", d.cfg.UDID)
		p.OptionalString("UserID", c.user.id)
	}
	p.OptionalString("UserShortName", c.user.shortName)
	if d.cfg.Kind != SharedIPad {
		p.OptionalString("UserLongName", c.user.longName)
	}
	c.mu.Lock()
	authToken := c.authToken
	c.mu.Unlock()
	p.OptionalString("AuthToken", authToken)
}

// decodeReply reads a property list; a zero-byte reply leaves into as it is.
func decodeReply(response *Response, into any) error {
	if len(response.Body) == 0 {
		return nil
	}
	if err := decodeXML(response.Body, into); err != nil {
		return fmt.Errorf("%w: %w", errReply, err)
	}
	return nil
}
