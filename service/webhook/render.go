package webhook

import (
	"encoding/json"
	"fmt"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// Event is the JSON of an event, MicroMDM's with NanoMDM's additions. One of
// the three details is there, by the topic. docs/webhook.schema.json says the
// same.
type Event struct {
	Topic       string           `json:"topic"`
	EventID     string           `json:"event_id"`
	CreatedAt   time.Time        `json:"created_at"`
	Checkin     *CheckinEvent    `json:"checkin_event,omitempty"`
	Acknowledge *ReportEvent     `json:"acknowledge_event,omitempty"`
	Server      *ServerSideEvent `json:"server_event,omitempty"`
}

// IDs says which enrollment an event is of.
type IDs struct {
	ID       string         `json:"id"`
	Type     mdm.EnrollType `json:"type"`
	ParentID string         `json:"parent_id,omitempty"`
}

// CheckinEvent is of every message but a report.
type CheckinEvent struct {
	IDs          IDs               `json:"ids"`
	UDID         string            `json:"udid,omitempty"`
	EnrollmentID string            `json:"enrollment_id,omitempty"`
	Params       map[string]string `json:"url_params,omitempty"`
	RawPayload   []byte            `json:"raw_payload,omitempty"`
	// Tally counts TokenUpdates since the last Authenticate: 1 is a new
	// enrollment. It is there for TokenUpdate only.
	Tally *int `json:"token_update_tally,omitempty"`
}

// ReportEvent is of a poll or a result on the command connection.
type ReportEvent struct {
	IDs          IDs               `json:"ids"`
	UDID         string            `json:"udid,omitempty"`
	EnrollmentID string            `json:"enrollment_id,omitempty"`
	Status       string            `json:"status"`
	CommandUUID  string            `json:"command_uuid,omitempty"`
	Params       map[string]string `json:"url_params,omitempty"`
	RawPayload   []byte            `json:"raw_payload,omitempty"`
}

// ServerSideEvent is of a finding of the server itself.
type ServerSideEvent struct {
	IDs          *IDs              `json:"ids,omitempty"`
	UDID         string            `json:"udid,omitempty"`
	EnrollmentID string            `json:"enrollment_id,omitempty"`
	APNsTopic    string            `json:"apns_topic,omitempty"`
	CommandUUID  string            `json:"command_uuid,omitempty"`
	RequestType  string            `json:"request_type,omitempty"`
	Detail       map[string]string `json:"detail,omitempty"`
}

// NewEvent gives a record its public form.
func NewEvent(r *storage.Event) Event {
	e := Event{Topic: r.Topic, EventID: r.ID, CreatedAt: r.CreatedAt.UTC()}
	ids := IDs{ID: r.Enroll.ID, Type: r.Enroll.Type, ParentID: r.Enroll.ParentID}
	switch {
	case storage.ServerTopic(r.Topic):
		e.Server = &ServerSideEvent{UDID: r.UDID, EnrollmentID: r.EnrollmentID, APNsTopic: r.APNsTopic,
			CommandUUID: r.CommandUUID, RequestType: r.RequestType, Detail: r.Params}
		if ids.ID != "" {
			e.Server.IDs = &ids
		}
	case r.Topic == storage.TopicConnect:
		e.Acknowledge = &ReportEvent{IDs: ids, UDID: r.UDID, EnrollmentID: r.EnrollmentID, Status: r.Status,
			CommandUUID: r.CommandUUID, Params: r.Params, RawPayload: r.Raw}
	default:
		e.Checkin = &CheckinEvent{IDs: ids, UDID: r.UDID, EnrollmentID: r.EnrollmentID, Params: r.Params, RawPayload: r.Raw}
		if r.Topic == storage.TopicTokenUpdate {
			e.Checkin.Tally = &r.Tally
		}
	}
	return e
}

// render makes the body that is sent.
func render(r *storage.Event) ([]byte, error) {
	body, err := json.Marshal(NewEvent(r))
	if err != nil {
		return nil, fmt.Errorf("encoding event %s: %w", r.ID, err)
	}
	return body, nil
}
