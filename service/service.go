// Package service is the chain that a device message goes through, between
// HTTP and storage: one Request, one Response, one method. Behaviour is added
// by wrapping a Handler; package core is the innermost one.
package service

import (
	"context"
	"crypto/x509"
	"fmt"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// Request is one decoded device message with what is known about it.
// Middleware annotates it (Pin, Events) and passes it on; core turns message
// and annotations into one store operation. A Request belongs to the
// goroutine that handles it.
type Request struct {
	ID string // of the HTTP request, for logs and X-Trace-ID
	// TraceParent is the proxy's traceparent header, checked, for callouts
	// that are made because of the request; "" if there was none.
	TraceParent string
	// Client is the address that the request came from, as far as a trusted
	// proxy or the connection says so; "" if unknown.
	Client  string
	Message mdm.Message
	Enroll  mdm.EnrollID
	// Params are the query parameters of the URL that the device was given
	// at enrollment; the first value of each.
	Params map[string]string
	// Certificate is the device's identity, verified to chain to the
	// configured CA; nil where no identity is asked for (migration).
	Certificate *x509.Certificate
	// Pin is set by package certauth; nil leaves identity unchecked.
	Pin *storage.Pin
	// Copy marks a message that an exporter of another server sent: see
	// storage.Source.
	Copy bool
	// Events are committed with the change.
	Events []storage.Event
	// GivenUp says whether the client may have given the request up; nil is
	// never. See storage.Source.
	GivenUp func() bool
}

// Response is the reply to a device. The zero value is the protocol's plain
// success: 200 with zero bytes.
type Response struct {
	Status      int // 0 means 200
	ContentType string
	Body        []byte
}

// Handler handles device messages; any number of goroutines may call it.
type Handler interface {
	Handle(ctx context.Context, r *Request) (*Response, error)
}

// HandlerFunc makes a function a Handler.
type HandlerFunc func(ctx context.Context, r *Request) (*Response, error)

// Handle calls f.
func (f HandlerFunc) Handle(ctx context.Context, r *Request) (*Response, error) { return f(ctx, r) }

// Middleware wraps a Handler.
type Middleware func(Handler) Handler

// Chain wraps h so that the first Middleware is the outermost.
func Chain(h Handler, ms ...Middleware) Handler {
	for i := len(ms) - 1; i >= 0; i-- {
		h = ms[i](h)
	}
	return h
}

// StatusError is an error that decides the HTTP status of the reply. Its
// text is for the log; the device gets the status alone, or with it a
// document of Apple's. Handlers never use 401, which makes a device unenroll.
type StatusError struct {
	Status   int
	Document *mdm.ErrorDocument // of a 403; nil if there is none
	Err      error
}

// Error implements error.
func (e *StatusError) Error() string { return fmt.Sprintf("answered %d: %v", e.Status, e.Err) }

// Unwrap gives the cause.
func (e *StatusError) Unwrap() error { return e.Err }
