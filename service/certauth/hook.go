package certauth

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
	"github.com/nanomdm/nanomdm/service/callout"
)

// maxAnswer bounds what is read of an answer, in bytes.
const maxAnswer = 64 << 10

// HookConfig holds what is optional.
type HookConfig struct {
	// Key signs questions: base64 HMAC-SHA256 of the body in
	// X-Hmac-Signature. Empty signs nothing.
	Key []byte
	// Timeout bounds one question; default 10 s.
	Timeout time.Duration
	// MaxInFlight is how many questions are open at once; past it a device
	// gets 503 and comes again, so that a hook that hangs does not take the
	// places of devices that need none. Default 256.
	MaxInFlight int
	// MaxPerAddress is how many of those are of one client address, default
	// 16. A certificate and a device have one each.
	MaxPerAddress int
	// Client makes the requests; default a client of its own.
	Client *http.Client
}

// Hook is a Confirmer that asks another server, by POST of JSON.
//
// 200 and 204 agree. 403 refuses: the device gets 403 with Apple's document
// for an unrecognized device, which makes it unenroll; a message and a
// description in the answer's JSON become those of the document. Any other
// answer, or none, is a fault of the hook: the device gets 503 and comes again.
type Hook struct {
	url    string
	cfg    HookConfig
	places *places
}

// NewHook makes a Hook that asks at a URL.
func NewHook(at string, cfg HookConfig) (*Hook, error) {
	u, err := url.Parse(at)
	if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
		// Not wrapped: the error would quote a password.
		return nil, errors.New("hook: not a URL with http:// or https:// and a host")
	}
	if cfg.Timeout <= 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.MaxInFlight <= 0 {
		cfg.MaxInFlight = 256
	}
	if cfg.MaxPerAddress <= 0 {
		cfg.MaxPerAddress = 16
	}
	if cfg.Client == nil {
		cfg.Client = callout.Client(nil)
	}
	return &Hook{url: at, cfg: cfg, places: newPlaces(cfg.MaxInFlight, cfg.MaxPerAddress)}, nil
}

// question is what the hook is sent.
type question struct {
	MessageType  mdm.Kind          `json:"message_type"`
	IDs          questionIDs       `json:"ids"`
	UDID         string            `json:"udid,omitempty"`
	EnrollmentID string            `json:"enrollment_id,omitempty"`
	Params       map[string]string `json:"url_params,omitempty"`
	// RawPayload is an Authenticate; other messages may hold secrets.
	RawPayload  []byte      `json:"raw_payload,omitempty"`
	Certificate certificate `json:"certificate"`
}

type questionIDs struct {
	ID       string         `json:"id"`
	Type     mdm.EnrollType `json:"type"`
	ParentID string         `json:"parent_id,omitempty"`
}

type certificate struct {
	SHA256       string    `json:"sha256"`
	Subject      string    `json:"subject"`
	Issuer       string    `json:"issuer"`
	SerialNumber string    `json:"serial_number"` // hexadecimal
	NotBefore    time.Time `json:"not_before"`
	NotAfter     time.Time `json:"not_after"`
	PEM          string    `json:"pem"`
}

// answer is what is read of a refusal.
type answer struct {
	Description string `json:"description"`
	Message     string `json:"message"`
}

var (
	errRefused  = errors.New("the authenticate hook refuses the device")
	errHookBusy = errors.New("too many questions to the authenticate hook are open")
)

// Confirm implements Confirmer.
func (h *Hook) Confirm(ctx context.Context, r *service.Request) error {
	release, ok := h.places.take(r.Pin.Hash, cmp.Or(r.Enroll.ParentID, r.Enroll.ID), r.Client)
	if !ok {
		return unavailable(errHookBusy)
	}
	defer release()
	ctx, cancel := context.WithTimeout(ctx, h.cfg.Timeout)
	defer cancel()
	status, body, err := h.ask(ctx, r)
	switch {
	case err != nil:
		return unavailable(fmt.Errorf("asking the authenticate hook: %w", callout.WithoutURL(err)))
	case status == http.StatusOK, status == http.StatusNoContent:
		return nil
	case status != http.StatusForbidden:
		return unavailable(fmt.Errorf("the authenticate hook answered %d", status))
	}
	var a answer
	_ = json.Unmarshal(body, &a) // it need not say anything
	return &service.StatusError{
		Status:   http.StatusForbidden,
		Document: &mdm.ErrorDocument{Code: mdm.CodeUnrecognizedDevice, Description: a.Description, Message: a.Message},
		Err:      errRefused,
	}
}

func unavailable(err error) error {
	return &service.StatusError{Status: http.StatusServiceUnavailable, Err: err}
}

func (h *Hook) ask(ctx context.Context, r *service.Request) (status int, body []byte, err error) {
	text, err := json.Marshal(questionOf(r))
	if err != nil {
		return 0, nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, h.url, bytes.NewReader(text))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/json; charset=utf-8")
	req.Header.Set(callout.HeaderTraceID, r.ID)
	if r.TraceParent != "" {
		req.Header.Set(callout.HeaderTraceParent, r.TraceParent)
	}
	callout.Sign(req.Header, h.cfg.Key, text)
	resp, err := h.cfg.Client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err != nil {
		return 0, nil, fmt.Errorf("reading the answer: %w", err)
	}
	return resp.StatusCode, body, nil
}

func questionOf(r *service.Request) question {
	who, cert := r.Message.Identity(), r.Certificate
	q := question{
		MessageType:  r.Message.Kind(),
		IDs:          questionIDs{ID: r.Enroll.ID, Type: r.Enroll.Type, ParentID: r.Enroll.ParentID},
		UDID:         who.UDID,
		EnrollmentID: who.EnrollmentID,
		Params:       r.Params,
		Certificate: certificate{
			SHA256: r.Pin.Hash, Subject: cert.Subject.String(), Issuer: cert.Issuer.String(), SerialNumber: cert.SerialNumber.Text(16),
			NotBefore: cert.NotBefore.UTC(), NotAfter: cert.NotAfter.UTC(),
			PEM: string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})),
		},
	}
	if m, ok := r.Message.(*mdm.Authenticate); ok {
		q.RawPayload = m.Raw
	}
	return q
}
