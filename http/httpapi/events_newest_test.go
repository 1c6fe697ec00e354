package httpapi_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// The newest events are found from the end of the log, by device, topic and
// time, with the serial numbers that people know.
func TestNewestEvents(t *testing.T) {
	o := newOperators(t)
	require.NoError(t, o.store.PutEventSink(t.Context(), storage.EventSink{Name: "log", Enabled: true}))
	o.enrollMac("mac", "MacBookPro18,3", "15.1")
	o.enrollMac("other", "MacBookPro18,3", "15.1")
	for i := range 450 {
		id, topic := "mac", "mdm.TokenUpdate"
		if i%3 == 0 {
			id, topic = "other", "mdm.CheckOut"
		}
		o.tells(id, topic, fmt.Sprintf("e%03d", i), nil)
		o.advance(time.Second)
	}
	o.number()
	list := func(query string) (ids []string) {
		v := o.asks(o.admin(), 200, "GET", "/v1/events?"+query, "")
		for _, e := range v["events"].([]any) {
			ids = append(ids, e.(map[string]any)["event_id"].(string))
		}
		return ids
	}
	require.Equal(t, []string{"e447", "e448", "e449"}, list("newest=3"))
	require.Equal(t, []string{"e444", "e447"}, list("newest=2&id=serial+of+other"))
	require.Equal(t, []string{"e446", "e448", "e449"}, list("newest=3&topic=mdm.TokenUpdate"))
	require.Len(t, list("newest=1000"), 450)
	require.Len(t, list("newest=1000&since="+o.clock().Add(-100*time.Second).Format(time.RFC3339)), 100)

	v := o.asks(o.admin(), 200, "GET", "/v1/events?newest=1", "")
	require.Equal(t, "serial of mac", v["events"].([]any)[0].(map[string]any)["serial_number"])
	o.tells("mac", "mdm.CheckOut", "after", nil)
	o.number()
	require.Equal(t, []string{"after"}, list("after="+v["next"].(string)))
	for query, want := range map[string]string{"newest=0": "newest: ", "id=mac": "newest: it is needed", "newest=1&after=3": "neither", "newest=1&id=nobody": ""} {
		status, answer, _ := o.do(o.admin(), "GET", "/v1/events?"+query, "")
		require.GreaterOrEqual(t, status, 400, query)
		require.Contains(t, answer, want)
	}
}
