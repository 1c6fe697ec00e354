package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nanomdm/nanomdm/backoff"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// openPauses space the attempts to open a store that is away.
var openPauses = backoff.Policy{First: 500 * time.Millisecond, Max: 10 * time.Second}

// openStore opens the store, and waits for a database server that is away
// until ctx ends. It returns errors that waiting does not mend at once: a wrong
// password, foreign tables, a newer schema. It calls waiting before each pause.
func openStore(ctx context.Context, cfg sqlstore.Config, log *slog.Logger, waiting func()) (*sqlstore.Store, error) {
	begun := time.Now()
	for attempt := 1; ; attempt++ {
		store, err := sqlstore.Open(ctx, cfg)
		if err == nil {
			if attempt > 1 {
				log.Info("the database is there", "after", time.Since(begun).Round(time.Millisecond))
			}
			return store, nil
		}
		if ctx.Err() != nil || !errors.Is(err, storage.ErrUnavailable) {
			return nil, err
		}
		pause := openPauses.Pause(attempt)
		log.Warn("waiting for the database, which is away", "error", err, "next_attempt_in", pause.Round(time.Millisecond))
		waiting()
		if err := backoff.Sleep(ctx, pause); err != nil {
			return nil, err
		}
	}
}
