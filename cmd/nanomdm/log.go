package main

import (
	"context"
	"io"
	"log"
	"log/slog"
	"regexp"
	"strings"

	"github.com/nanomdm/nanomdm/http/requestlog"
)

// Formats of -log-format.
const (
	logText = "text"
	logJSON = "json"
)

// newLogger returns the daemon's logger: one line for each record, of the format
// and from the level that o has.
func newLogger(w io.Writer, o options) *slog.Logger {
	opts := &slog.HandlerOptions{Level: slog.LevelInfo}
	if o.debug || o.debugEnrollment != "" {
		opts.Level = slog.LevelDebug
	}
	var handler slog.Handler = slog.NewTextHandler(w, opts)
	if o.logFormat == logJSON {
		handler = slog.NewJSONHandler(w, opts)
	}
	if o.debugEnrollment != "" && !o.debug {
		handler = &follower{Handler: handler, enrollment: o.debugEnrollment}
	}
	return slog.New(handler)
}

// follower passes records of level Debug on for one enrollment alone: those of
// requests of the device or of its users.
type follower struct {
	slog.Handler
	enrollment string
}

// Enabled implements slog.Handler.
func (f *follower) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo || f.follows(requestlog.Enrollment(ctx))
}

func (f *follower) follows(enrollment string) bool {
	user, ok := strings.CutPrefix(enrollment, f.enrollment)
	return ok && (user == "" || user[0] == ':')
}

// WithAttrs implements slog.Handler.
func (f *follower) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &follower{Handler: f.Handler.WithAttrs(attrs), enrollment: f.enrollment}
}

// WithGroup implements slog.Handler.
func (f *follower) WithGroup(name string) slog.Handler {
	return &follower{Handler: f.Handler.WithGroup(name), enrollment: f.enrollment}
}

// serverErrors takes the lines that net/http writes about connections, and logs
// each cause once a minute.
type serverErrors struct {
	log      *slog.Logger
	server   string
	throttle requestlog.Throttle
}

// newServerErrors returns a logger for http.Server.ErrorLog.
func newServerErrors(server string, l *slog.Logger) *log.Logger {
	return log.New(&serverErrors{log: l, server: server}, "", 0)
}

var handshakeError = regexp.MustCompile(`^http: TLS handshake error from (\S+): (.*)$`)

// plainHTTP is the text of crypto/tls for a request without TLS.
const plainHTTP = "client sent an HTTP request to an HTTPS server"

// Write implements io.Writer for one line of package log.
func (s *serverErrors) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	msg, cause, attrs := "the HTTP server reports", text, []any{"error", text}
	if m := handshakeError.FindStringSubmatch(text); m != nil {
		msg, cause, attrs = "a TLS handshake failed", m[2], []any{"peer", m[1], "error", m[2]}
		if m[2] == plainHTTP {
			msg = "a client speaks plain HTTP to the TLS port: give it a URL with https://, or let the proxy speak TLS to this port"
			attrs = []any{"peer", m[1]}
		}
	}
	if skipped, ok := s.throttle.Allow(cause); ok {
		s.log.Warn(msg, append(attrs, "server", s.server, "skipped", skipped)...)
	}
	return len(line), nil
}
