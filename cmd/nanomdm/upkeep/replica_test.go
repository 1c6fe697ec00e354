package upkeep

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// announcements are the calls of a store of replicas.
type announcements struct {
	at      []time.Duration
	began   time.Time
	retired []string
}

func (a *announcements) AnnounceReplica(context.Context, *storage.Replica) error {
	a.at = append(a.at, time.Since(a.began))
	if len(a.at) == 2 {
		return errors.New("away")
	}
	return nil
}

func (a *announcements) Replicas(context.Context) ([]storage.Replica, error) { return nil, nil }

func (a *announcements) RetireReplica(ctx context.Context, id string) error {
	a.retired = append(a.retired, id)
	return ctx.Err()
}

// A replica announces itself at once and every quarter of a minute, whether or
// not the database is there, and retires when it stops.
func TestReplicaAnnouncesItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := &announcements{began: time.Now()}
		ctx, stop := context.WithTimeout(t.Context(), 40*time.Second)
		defer stop()
		r := &Replica{Store: store, Log: slog.New(slog.DiscardHandler), Self: storage.Replica{ID: "me"}}
		require.NoError(t, r.Work(ctx))
		require.Equal(t, []time.Duration{0, 15 * time.Second, 30 * time.Second}, store.at)
		require.Equal(t, []string{"me"}, store.retired)
	})
}
