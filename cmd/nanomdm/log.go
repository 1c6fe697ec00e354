package main

import (
	"io"
	"log/slog"
)

// newLogger returns the daemon's logger: one line of key=value text for each
// record. debug adds the records of level Debug.
func newLogger(w io.Writer, debug bool) *slog.Logger {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: level}))
}
