package sqlstore_test

import (
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/mdmtest"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
	"github.com/nanomdm/nanomdm/supervise"
)

// The store's goroutine starts again after a panic, and a panic of one that works
// for a caller is the caller's.
func TestPanicsInTheStore(t *testing.T) {
	var armed atomic.Bool
	failed := make(chan string, 4)
	store, err := sqlstore.Open(t.Context(), sqlstore.Config{
		Driver: "sqlite", DSN: filepath.Join(t.TempDir(), "mdm.db"), RecordActivityEvery: time.Millisecond,
		Now: func() time.Time {
			if armed.CompareAndSwap(true, false) {
				panic("boom")
			}
			return time.Now()
		},
		Supervisor: supervise.New(supervise.Config{Failed: func(name string) { failed <- name }}),
	})
	require.NoError(t, err)
	armed.Store(true) // for the goroutine, since nobody else is here
	require.Equal(t, "activity", <-failed)

	cmd, err := mdm.DecodeCommand(mdmtest.NewCommand("C1", "ProfileList", nil))
	require.NoError(t, err)
	enqueue := func() error {
		_, err := store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: cmd, IDs: []string{"D1"}})
		return err
	}
	armed.Store(true) // the goroutine pauses for a second at least
	require.Panics(t, func() { _ = enqueue() })
	require.NoError(t, enqueue())
	require.NoError(t, store.Close())
}
