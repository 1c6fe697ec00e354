package webhook_test

import (
	"encoding/json"
	"fmt"

	"github.com/nanomdm/nanomdm/service/webhook"
)

// A receiver in Go decodes the body of a request into an Event. The consumer
// in docs/webhook-consumer checks its signature before.
func ExampleEvent() {
	body := []byte(`{
		"topic": "mdm.Connect",
		"event_id": "019ca949-0007-7f3c-9a41-6d1c2b8ed889",
		"created_at": "2026-03-01T12:07:00.123456Z",
		"acknowledge_event": {
			"ids": {"id": "5A1DB3C2", "type": "Device"},
			"udid": "5A1DB3C2",
			"status": "Acknowledged",
			"command_uuid": "7f9a2c1e",
			"raw_payload": "PHBsaXN0Pi4uLjwvcGxpc3Q+"
		}
	}`)
	var e webhook.Event
	if err := json.Unmarshal(body, &e); err != nil {
		fmt.Println(err)
		return
	}
	switch {
	case e.Acknowledge != nil:
		fmt.Println(e.Acknowledge.IDs.ID, e.Acknowledge.Status, e.Acknowledge.CommandUUID)
		fmt.Printf("%s\n", e.Acknowledge.RawPayload)
	case e.Checkin != nil:
		fmt.Println(e.Checkin.IDs.ID, e.Topic)
	}
	// Output:
	// 5A1DB3C2 Acknowledged 7f9a2c1e
	// <plist>...</plist>
}
