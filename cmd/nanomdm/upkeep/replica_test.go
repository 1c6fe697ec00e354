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
	list    []storage.Replica
}

func (a *announcements) AnnounceReplica(context.Context, *storage.Replica) error {
	a.at = append(a.at, time.Since(a.began))
	if len(a.at) == 2 {
		return errors.New("away")
	}
	return nil
}

func (a *announcements) Replicas(context.Context) ([]storage.Replica, error) { return a.list, nil }

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

// Replicas share the connections; one share is left for a replica that starts,
// and replicas that are silent have none.
func TestReplicasShareConnections(t *testing.T) {
	now := time.Unix(1000, 0)
	up, silent := storage.Replica{SeenAt: now.Add(-44 * time.Second)}, storage.Replica{SeenAt: now.Add(-45 * time.Second)}
	for _, c := range []struct {
		name     string
		total    int
		replicas []storage.Replica
		want     []int
	}{
		{"no bound", 0, []storage.Replica{up}, nil},
		{"alone, with more than one replica opens", 90, []storage.Replica{up}, []int{24}},
		{"three", 80, []storage.Replica{up, up, up, silent}, []int{20}},
		{"the smallest share", 5, []storage.Replica{up, up, up}, []int{2}},
	} {
		t.Run(c.name, func(t *testing.T) {
			var limits []int
			r := &Replica{Store: &announcements{list: c.replicas}, Connections: c.total, PerReplica: 24,
				Limit: func(n int) { limits = append(limits, n) }, Now: func() time.Time { return now }}
			require.NoError(t, r.share(t.Context()))
			require.Equal(t, c.want, limits)
		})
	}
}
