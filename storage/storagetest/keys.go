package storagetest

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

func keyTests() []subtest {
	return []subtest{
		{"an API key is kept, found and deleted", keyLife},
		{"names and hashes are unique", keyUnique},
		{"a broken scope does not become an unbounded one", keyBrokenScope},
	}
}

func keyLife(t *testing.T, h *Harness) {
	ctx := t.Context()
	a := storage.APIKey{Name: "a", Role: "read", Hash: storage.HashKey("one"), CreatedBy: "nanomdm"}
	require.NoError(t, h.Store.CreateAPIKey(ctx, &a))
	made := a.CreatedAt
	require.Equal(t, h.Clock.Now(), made)
	h.Clock.Advance(time.Second)
	b := storage.APIKey{Name: "B", Role: "admin", Hash: storage.HashKey("two"), Scope: storage.Scope{Topics: []string{"t,1", "t2"}}}
	require.NoError(t, h.Store.CreateAPIKey(ctx, &b))

	found, err := h.Store.FindAPIKey(ctx, storage.HashKey("one"))
	require.NoError(t, err)
	require.Equal(t, &a, found)
	found, err = h.Store.FindAPIKey(ctx, storage.HashKey("two"))
	require.NoError(t, err)
	require.Equal(t, &b, found)
	_, err = h.Store.FindAPIKey(ctx, storage.HashKey("three"))
	require.ErrorIs(t, err, storage.ErrNotFound)

	keys, err := h.Store.APIKeys(ctx)
	require.NoError(t, err)
	require.Equal(t, []storage.APIKey{b, a}, keys, "by name, byte for byte")

	require.ErrorIs(t, h.Store.DeleteAPIKey(ctx, "A"), storage.ErrNotFound)
	require.NoError(t, h.Store.DeleteAPIKey(ctx, "a"))
	require.ErrorIs(t, h.Store.DeleteAPIKey(ctx, "a"), storage.ErrNotFound)
	_, err = h.Store.FindAPIKey(ctx, storage.HashKey("one"))
	require.ErrorIs(t, err, storage.ErrNotFound)
}

func keyUnique(t *testing.T, h *Harness) {
	ctx := t.Context()
	require.NoError(t, h.Store.CreateAPIKey(ctx, &storage.APIKey{Name: "a", Role: "read", Hash: storage.HashKey("one")}))
	err := h.Store.CreateAPIKey(ctx, &storage.APIKey{Name: "a", Role: "admin", Hash: storage.HashKey("two")})
	require.ErrorIs(t, err, storage.ErrConflict)
	err = h.Store.CreateAPIKey(ctx, &storage.APIKey{Name: "b", Role: "admin", Hash: storage.HashKey("one")})
	require.ErrorIs(t, err, storage.ErrConflict)
	keys, err := h.Store.APIKeys(ctx)
	require.NoError(t, err)
	require.Len(t, keys, 1)
	require.Equal(t, "read", keys[0].Role)
}

func keyBrokenScope(t *testing.T, h *Harness) {
	ctx := t.Context()
	for i, topics := range []string{"", "[]", "null", "{", `["a"`} {
		key := storage.APIKey{Name: "a", Role: "read", Hash: storage.HashKey("one"), Scope: storage.Scope{Topics: []string{"x"}}}
		require.NoError(t, h.Store.CreateAPIKey(ctx, &key))
		require.EqualValues(t, 1, h.Exec(t, "UPDATE nano_api_keys SET topics = ?", []byte(topics)), i)
		_, err := h.Store.FindAPIKey(ctx, key.Hash)
		require.ErrorContains(t, err, "broken", "%q", topics)
		require.NoError(t, h.Store.DeleteAPIKey(ctx, "a"))
	}
}
