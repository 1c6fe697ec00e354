package httpapi_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// A replica that has been silent for three announcements is down, and a key
// that is bound to topics does not see any.
func TestReplicas(t *testing.T) {
	o := newOperators(t)
	for _, r := range []storage.Replica{{ID: "1", Name: "a", StartedAt: o.clock()}, {ID: "2", Name: "b", StartedAt: o.clock()}} {
		require.NoError(t, o.store.AnnounceReplica(t.Context(), &r))
		o.advance(30 * time.Second)
	}
	for path, key := range map[string]string{"/v1/replicas": "replicas", "/v1/stats": "replicas"} {
		list := o.asks(o.admin(), 200, "GET", path, "")[key].([]any)
		require.Len(t, list, 2)
		require.Equal(t, false, list[0].(map[string]any)["up"])
		require.Equal(t, true, list[1].(map[string]any)["up"])
	}
	bound := call{key: o.makeKey("tenant", "admin", "com.apple.mgmt.a")}
	status, _, _ := o.do(bound, "GET", "/v1/replicas", "")
	require.Equal(t, 403, status)
	require.NotContains(t, o.asks(bound, 200, "GET", "/v1/stats", ""), "replicas")
}
