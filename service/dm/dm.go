// Package dm answers declarative management by asking a backend, such as
// KMFDDM, in the form that NanoMDM asks it.
package dm

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
)

// Headers of the callout.
const (
	headerEnrollmentID   = "X-Enrollment-ID"
	headerEnrollmentType = "X-Enrollment-Type"
	headerParentID       = "X-Enrollment-ParentID"
	headerSignature      = "X-Hmac-Signature"
)

// maxAnswer bounds what is read of a backend's answer, in bytes.
const maxAnswer = 16 << 20

// Config holds what is optional.
type Config struct {
	// SendKey signs requests: base64 HMAC-SHA256 of the body in
	// X-Hmac-Signature. Empty signs nothing.
	SendKey []byte
	// RecvKey is what the backend has to sign its answers with. Empty checks
	// nothing.
	RecvKey []byte
	// Timeout bounds one callout; default 30 s.
	Timeout time.Duration
	// Client makes the requests; default a client of its own.
	Client *http.Client
}

// Backend is a service.Handler for declarative management messages. Of the
// backend's answers 200 and 404 go through to the device (404 makes it drop
// a declaration); any other is 502, since a device takes some statuses, 401
// above all, for orders.
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
		cfg.Client = &http.Client{
			// A redirect could lead the callout, and its signature, anywhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
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
		req.Header.Set("Traceparent", r.TraceParent)
	}
	if len(b.cfg.SendKey) > 0 {
		req.Header.Set(headerSignature, base64.StdEncoding.EncodeToString(sign(b.cfg.SendKey, data)))
	}
	resp, err := b.cfg.Client.Do(req)
	if err != nil {
		return nil, err
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
	if len(b.cfg.RecvKey) > 0 {
		got, err := base64.StdEncoding.DecodeString(resp.Header.Get(headerSignature))
		if err != nil || !hmac.Equal(got, sign(b.cfg.RecvKey, body)) {
			return nil, errSignature
		}
	}
	if len(body) == 0 {
		return &service.Response{}, nil
	}
	return &service.Response{ContentType: "application/json", Body: body}, nil
}

func sign(key, body []byte) []byte {
	h := hmac.New(sha256.New, key)
	h.Write(body)
	return h.Sum(nil)
}
