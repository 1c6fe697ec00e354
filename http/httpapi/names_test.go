package httpapi_test

import (
	"context"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/http/httpapi"
	"github.com/nanomdm/nanomdm/storage"
)

// An enrollment that an operator disabled is called that, and not "not
// enrolled".
func TestDisabledIsSaid(t *testing.T) {
	o := newOperators(t)
	o.enrollMac("mac", "MacBookPro18,3", "15.1")
	o.asks(o.admin(), 200, "POST", "/v1/enrollments/mac/disable", "")
	_, a := o.ask(o.admin(), "PUT", "/v1/push/mac,nobody", "")
	require.Equal(t, "disabled by an operator", a.Status["mac"].PushError)
	require.Equal(t, "not enrolled", a.Status["nobody"].PushError)
	_, a = o.ask(o.admin(), "PUT", "/v1/enqueue/mac,nobody", command("A"))
	require.Equal(t, "disabled by an operator", a.Status["mac"].PushError)
	require.Equal(t, "not enrolled", a.Status["nobody"].CommandError)
}

// The enrollments of a command come with the names that people know.
func TestCommandNamesDevices(t *testing.T) {
	o := newOperators(t)
	o.enrollMac("mac", "MacBookPro18,3", "15.1")
	o.asks(o.admin(), 200, "PUT", "/v1/enqueue/mac", command("A"))
	v := o.asks(o.admin(), 200, "GET", "/v1/commands/A", "")
	item := v["enrollments"].([]any)[0].(map[string]any)
	require.Equal(t, "serial of mac", item["serial_number"])
	require.Equal(t, "Mac of mac", item["device_name"])
}

// A database that is away is called that.
func TestDatabaseAwayIsSaid(t *testing.T) {
	o := newOperators(t)
	away := &awayStore{Store: o.store}
	_, mux := o.replica(away)
	status, answer, header := o.do(call{user: "nanomdm", key: mainKey, handler: mux}, "GET", "/v1/stats", "")
	require.Equal(t, 503, status)
	require.Contains(t, answer, "the database does not answer; try again")
	require.NotEmpty(t, header.Get("Retry-After"))
}

// awayStore is a store whose database is away.
type awayStore struct{ httpapi.Store }

func (*awayStore) Statistics(context.Context, storage.Scope) (*storage.Statistics, error) {
	return nil, fmt.Errorf("counting: %w", storage.ErrUnavailable)
}
