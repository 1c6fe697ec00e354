package storagetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

func replicaTests() []subtest {
	return []subtest{
		{"a replica is announced, seen again, retired and forgotten", replicaLife},
	}
}

func replicaLife(t *testing.T, h *Harness) {
	ctx := t.Context()
	began := h.Clock.Now()
	b := storage.Replica{ID: "1", Name: "b", Version: "1.0", Listen: "[::]:9000", StartedAt: began}
	a := storage.Replica{ID: "2", Name: "a", Version: "1.1", Listen: "[::]:9001", StartedAt: began}
	silent := storage.Replica{ID: "3", Name: "c", Version: "1.1", Listen: "[::]:9002", StartedAt: began}
	for _, r := range []*storage.Replica{&b, &a, &silent} {
		require.NoError(t, h.Store.AnnounceReplica(ctx, r))
	}
	h.Clock.Advance(time.Minute)
	require.NoError(t, h.Store.AnnounceReplica(ctx, &b), "an announcement repeats")
	a.SeenAt, b.SeenAt, silent.SeenAt = began, h.Clock.Now(), began
	list, err := h.Store.Replicas(ctx)
	require.NoError(t, err)
	require.Equal(t, []storage.Replica{a, b, silent}, list)

	require.NoError(t, h.Store.RetireReplica(ctx, "2"))
	require.NoError(t, h.Store.RetireReplica(ctx, "2"))
	h.Clock.Advance(storage.ReplicaForgotten)
	require.NoError(t, h.Store.AnnounceReplica(ctx, &b))
	b.SeenAt = h.Clock.Now()
	list, err = h.Store.Replicas(ctx)
	require.NoError(t, err)
	require.Equal(t, []storage.Replica{b}, list)
}
