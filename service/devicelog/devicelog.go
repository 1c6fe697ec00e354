// Package devicelog logs the beginning and the end of each enrollment.
package devicelog

import (
	"context"
	"log/slog"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/service"
)

// New returns a middleware that logs one line for each Authenticate and each
// CheckOut that was accepted.
func New(log *slog.Logger) service.Middleware {
	return func(next service.Handler) service.Handler {
		return service.HandlerFunc(func(ctx context.Context, r *service.Request) (*service.Response, error) {
			resp, err := next.Handle(ctx, r)
			if err == nil {
				logMessage(ctx, log, r)
			}
			return resp, err
		})
	}
}

func logMessage(ctx context.Context, log *slog.Logger, r *service.Request) {
	attrs := []slog.Attr{slog.String("request_id", r.ID), slog.String("enrollment_id", r.Enroll.ID), slog.String("enrollment_type", string(r.Enroll.Type))}
	if r.Certificate != nil {
		attrs = append(attrs, slog.String("certificate_subject", r.Certificate.Subject.String()))
	}
	switch m := r.Message.(type) {
	case *mdm.Authenticate:
		log.LogAttrs(ctx, slog.LevelInfo, "device enrolls", append(attrs,
			slog.String("serial_number", m.SerialNumber), slog.String("model", m.Model),
			slog.String("os_version", m.OSVersion), slog.String("topic", m.Topic))...)
	case *mdm.CheckOut:
		log.LogAttrs(ctx, slog.LevelInfo, "device checked out", attrs...)
	}
}
