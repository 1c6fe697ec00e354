// Package dm answers declarative management by asking a backend, such as
// KMFDDM, in the form that NanoMDM asks it.
package dm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/callout"
)

// Headers of the callout.
const (
	headerEnrollmentID   = "X-Enrollment-ID"
	headerEnrollmentType = "X-Enrollment-Type"
	headerParentID       = "X-Enrollment-ParentID"
)

// maxAnswer bounds what is read of a backend's answer, in bytes.
const maxAnswer = 16 << 20

// Config holds what is optional.
type Config struct {
	// SendKey signs requests: base64 HMAC-SHA256 of the body in
	// X-Hmac-Signature. Empty signs nothing.
	SendKey []byte
	// RecvKey is the key that the backend signs its answers with. Empty checks
	// nothing.
	RecvKey []byte
	// Timeout bounds one callout; default 30 s.
	Timeout time.Duration
	// Client makes the requests. Default: callout.Client with the system's CAs.
	Client *http.Client
}

// Backend is a service.Handler for declarative management messages. It passes
// the backend's answers 200 and 404 to the device (404 makes a device drop a
// declaration). It turns any other into 502, since a device takes some
// statuses, 401 above all, for orders.
type Backend struct {
	base string
	cfg  Config
}

var (
	errSignature = errors.New("backend's answer has a missing or wrong signature")
	errMessage   = errors.New("not a declarative management message")
)

// New makes a Backend that resolves endpoints below base.
func New(base string, cfg Config) (*Backend, error) {
	u, err := url.Parse(base)
	if err != nil {
		return nil, fmt.Errorf("declarative management URL: %w", err)
	}
	if (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		return nil, errors.New("declarative management URL: needs http:// or https:// and a host")
	}
	if u.RawQuery != "" || u.Fragment != "" {
		return nil, errors.New("declarative management URL: must have no query and no fragment")
	}
	if !strings.HasSuffix(base, "/") {
		base += "/"
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 30 * time.Second
	}
	if cfg.Client == nil {
		cfg.Client = callout.Client(nil)
	}
	return &Backend{base: base, cfg: cfg}, nil
}

// Handle implements service.Handler.
func (b *Backend) Handle(ctx context.Context, r *service.Request) (*service.Response, error) {
	m, ok := r.Message.(*mdm.DeclarativeManagement)
	if !ok {
		return nil, fmt.Errorf("declarative management: %w", errMessage)
	}
	// The device chooses the endpoint, so it is checked against Apple's forms
	// and escaped before it becomes part of a URL.
	endpoint, err := mdm.ParseDMEndpoint(m.Endpoint)
	if err != nil {
		return nil, &service.StatusError{Status: http.StatusBadRequest, Err: err}
	}
	ctx, cancel := context.WithTimeout(ctx, b.cfg.Timeout)
	defer cancel()
	resp, err := b.ask(ctx, r, b.base+endpoint.Path(), m.Data)
	if err != nil {
		return nil, &service.StatusError{Status: http.StatusBadGateway, Err: fmt.Errorf("declarative management callout: %w", err)}
	}
	return resp, nil
}

func (b *Backend) ask(ctx context.Context, r *service.Request, url string, data []byte) (*service.Response, error) {
	method := http.MethodGet
	if len(data) > 0 {
		method = http.MethodPut
	}
	req, err := http.NewRequestWithContext(ctx, method, url, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	if len(data) > 0 {
		req.Header.Set("Content-Type", "application/json")
	}
	req.Header.Set(headerEnrollmentID, r.Enroll.ID)
	req.Header.Set(headerEnrollmentType, string(r.Enroll.Type))
	if r.Enroll.ParentID != "" {
		req.Header.Set(headerParentID, r.Enroll.ParentID)
	}
	if r.TraceParent != "" {
		req.Header.Set(callout.HeaderTraceParent, r.TraceParent)
	}
	callout.Sign(req.Header, b.cfg.SendKey, data)
	resp, err := b.cfg.Client.Do(req)
	if err != nil {
		return nil, callout.WithoutURL(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("reading answer: %w", err)
	}
	if len(body) > maxAnswer {
		return nil, fmt.Errorf("answer is longer than %d bytes", maxAnswer)
	}
	switch resp.StatusCode {
	case http.StatusNotFound:
		return &service.Response{Status: http.StatusNotFound}, nil
	case http.StatusOK, http.StatusNoContent:
	default:
		return nil, fmt.Errorf("backend answered %d to %s", resp.StatusCode, method)
	}
	if !callout.Signed(resp.Header, b.cfg.RecvKey, body) {
		return nil, errSignature
	}
	if len(body) == 0 {
		return &service.Response{}, nil
	}
	return &service.Response{ContentType: "application/json", Body: body}, nil
}
