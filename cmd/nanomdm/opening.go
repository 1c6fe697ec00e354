package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// Pauses between attempts to open a store that is away; they double.
const (
	firstOpenPause = 500 * time.Millisecond
	maxOpenPause   = 10 * time.Second
)

// openStore opens the store, and waits for a database server that is away
// until ctx ends. What waiting does not mend is returned at once: a wrong
// password, foreign tables, a newer schema. waiting is called before each
// pause.
func openStore(ctx context.Context, cfg sqlstore.Config, log *slog.Logger, waiting func()) (*sqlstore.Store, error) {
	begun := time.Now()
	pause := firstOpenPause
	for {
		store, err := sqlstore.Open(ctx, cfg)
		if err == nil {
			if waited := time.Since(begun); pause > firstOpenPause {
				log.Info("the database is there", "after", waited.Round(time.Millisecond))
			}
			return store, nil
		}
		if ctx.Err() != nil || !errors.Is(err, storage.ErrUnavailable) {
			return nil, err
		}
		log.Warn("waiting for the database, which is away", "error", err, "next_attempt_in", pause)
		waiting()
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		}
		pause = min(2*pause, maxOpenPause)
	}
}
