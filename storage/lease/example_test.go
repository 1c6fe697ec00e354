package lease_test

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// A replica does periodic work while it holds the lease. Work returns when its
// context ends, or, as here, when it is done.
func ExampleHold() {
	ctx := context.Background()
	store, err := sqlstore.Open(ctx, sqlstore.Config{Driver: "sqlite", DSN: ":memory:"})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer store.Close()
	clean := func(_ context.Context, current func() storage.Lease) error {
		fmt.Println("cleaning under", current().Name)
		return nil
	}
	logger := slog.New(slog.DiscardHandler)
	if err := lease.Hold(ctx, store, "cleaning", "replica 1", 30*time.Second, logger, clean); err != nil {
		fmt.Println(err)
	}
	// Output: cleaning under cleaning
}
