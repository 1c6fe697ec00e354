// Package core is the MDM protocol: it turns each device message into one
// store operation and the store's outcome into the reply. A new message gets
// its case here.
package core

import (
	"context"
	"errors"
	"fmt"
	"net/http"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/storage"
)

// Config holds what may be attached to the protocol. The zero value is a
// server without declarative management and without tokens.
type Config struct {
	// DeclarativeManagement answers declarative management messages after
	// the sender's identity is checked; nil answers 404.
	DeclarativeManagement service.Handler
	// Tokens answer GetToken by service type; other types get Apple's 400.
	Tokens map[string]service.Handler
	// EmptyDigestChallenge answers UserAuthenticate with an empty
	// DigestChallenge instead of 410, so that network users are managed
	// without a password check.
	EmptyDigestChallenge bool
	// ReturnToService is the ReturnToService dict for devices that ask; nil
	// says that the feature is off.
	ReturnToService map[string]any
}

// Core implements service.Handler.
type Core struct {
	store storage.Devices
	cfg   Config
}

// New makes the innermost handler over a store.
func New(store storage.Devices, cfg Config) *Core {
	return &Core{store: store, cfg: cfg}
}

var (
	errUserChannel   = errors.New("message is for the device channel only")
	errDeviceChannel = errors.New("message is for a user channel only")
	errTokenService  = errors.New("unknown token service type")
)

// Handle implements service.Handler.
func (c *Core) Handle(ctx context.Context, r *service.Request) (*service.Response, error) {
	src := storage.Source{Enroll: r.Enroll, Pin: r.Pin, Copy: r.Copy, Events: r.Events, GivenUp: r.GivenUp}
	switch m := r.Message.(type) {
	case *mdm.Report:
		return c.report(ctx, src, m)
	case *mdm.Authenticate:
		if r.Enroll.IsUserChannel() {
			return nil, badRequest(errUserChannel)
		}
		return c.apply(ctx, &storage.Authenticate{Src: src, Message: m})
	case *mdm.TokenUpdate:
		return c.apply(ctx, &storage.TokenUpdate{Src: src, Message: m})
	case *mdm.CheckOut:
		if r.Enroll.IsUserChannel() {
			return nil, badRequest(errUserChannel)
		}
		return c.apply(ctx, &storage.CheckOut{Src: src})
	case *mdm.SetBootstrapToken:
		return c.apply(ctx, &storage.SetBootstrapToken{Src: src, Token: m.BootstrapToken})
	case *mdm.GetBootstrapToken:
		return c.bootstrapToken(ctx, src)
	case *mdm.UserAuthenticate:
		return c.userAuthenticate(ctx, src, m)
	case *mdm.DeclarativeManagement:
		return c.declarativeManagement(ctx, src, r)
	case *mdm.GetToken:
		return c.token(ctx, src, r, m)
	case *mdm.ReturnToService:
		return c.returnToService(ctx, src)
	}
	return nil, fmt.Errorf("core: message of kind %q has no handler", r.Message.Kind())
}

func badRequest(err error) error {
	return &service.StatusError{Status: http.StatusBadRequest, Err: err}
}

func (c *Core) apply(ctx context.Context, op storage.Op) (*service.Response, error) {
	if _, err := c.store.Apply(ctx, op); err != nil {
		return nil, err
	}
	return &service.Response{}, nil
}

func (c *Core) report(ctx context.Context, src storage.Source, m *mdm.Report) (*service.Response, error) {
	op := &storage.Report{Src: src, Status: m.Status, CommandUUID: m.CommandUUID, Raw: m.Raw}
	if m.Status == mdm.StatusAcknowledged && !src.Enroll.IsUserChannel() {
		op.Inventory = m.Inventory()
	}
	out, err := c.store.Apply(ctx, op)
	if err != nil {
		return nil, err
	}
	if out.Command == nil {
		return &service.Response{}, nil
	}
	return &service.Response{ContentType: mdm.ContentTypePlist, Body: out.Command.Raw}, nil
}

// bootstrapToken always answers a dict: a zero-byte body is not what a Mac
// expects, even if there is no token.
func (c *Core) bootstrapToken(ctx context.Context, src storage.Source) (*service.Response, error) {
	out, err := c.store.Apply(ctx, &storage.GetBootstrapToken{Src: src})
	if err != nil {
		return nil, err
	}
	return plist(struct {
		BootstrapToken []byte `plist:"BootstrapToken"`
	}{out.BootstrapToken})
}

// userAuthenticate answers both messages of the handshake alike for every
// user, since the server has no passwords to check. An empty challenge says
// that no token is needed; the empty AuthToken refuses a digest that comes all
// the same. The 410 declines this user and leaves the device alone.
func (c *Core) userAuthenticate(ctx context.Context, src storage.Source, m *mdm.UserAuthenticate) (*service.Response, error) {
	if !src.Enroll.IsUserChannel() {
		return nil, badRequest(errDeviceChannel)
	}
	if _, err := c.store.Apply(ctx, &storage.UserAuthenticate{Src: src, Message: m}); err != nil {
		return nil, err
	}
	if !c.cfg.EmptyDigestChallenge {
		return &service.Response{Status: http.StatusGone}, nil
	}
	if m.HasDigestResponse {
		return plist(struct {
			AuthToken string `plist:"AuthToken"`
		}{})
	}
	return plist(struct {
		DigestChallenge string `plist:"DigestChallenge"`
	}{})
}

func (c *Core) declarativeManagement(ctx context.Context, src storage.Source, r *service.Request) (*service.Response, error) {
	if _, err := c.store.Apply(ctx, &storage.Seen{Src: src}); err != nil {
		return nil, err
	}
	if c.cfg.DeclarativeManagement == nil {
		return &service.Response{Status: http.StatusNotFound}, nil
	}
	return c.cfg.DeclarativeManagement.Handle(ctx, r)
}

func (c *Core) token(ctx context.Context, src storage.Source, r *service.Request, m *mdm.GetToken) (*service.Response, error) {
	if _, err := c.store.Apply(ctx, &storage.Seen{Src: src}); err != nil {
		return nil, err
	}
	h, ok := c.cfg.Tokens[m.TokenServiceType]
	if !ok {
		return nil, badRequest(fmt.Errorf("%w: %.64q", errTokenService, m.TokenServiceType))
	}
	return h.Handle(ctx, r)
}

// returnToService mirrors the argument of EraseDevice. A configured answer
// without a bootstrap token gets the device's own, which the device needs to
// keep its apps.
func (c *Core) returnToService(ctx context.Context, src storage.Source) (*service.Response, error) {
	if src.Enroll.IsUserChannel() {
		return nil, badRequest(errUserChannel)
	}
	out, err := c.store.Apply(ctx, &storage.GetBootstrapToken{Src: src})
	if err != nil {
		return nil, err
	}
	answer := map[string]any{"Enabled": false}
	if c.cfg.ReturnToService != nil {
		answer = make(map[string]any, len(c.cfg.ReturnToService)+1)
		if len(out.BootstrapToken) > 0 {
			answer["BootstrapToken"] = out.BootstrapToken
		}
		for k, v := range c.cfg.ReturnToService {
			answer[k] = v
		}
	}
	return plist(map[string]any{"ReturnToService": answer})
}

func plist(v any) (*service.Response, error) {
	body, err := mdm.EncodePlist(v)
	if err != nil {
		return nil, fmt.Errorf("encoding reply: %w", err)
	}
	return &service.Response{ContentType: mdm.ContentTypePlist, Body: body}, nil
}
