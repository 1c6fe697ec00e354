package webhook

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

var update = flag.Bool("update", false, "write the examples of docs/webhook-events.md")

// schema is docs/webhook.schema.json, as far as it is checked: a word that is
// not known here is an error.
type schema map[string]any

var eventSchema = sync.OnceValue(func() schema {
	text, err := os.ReadFile("../../docs/webhook.schema.json")
	if err != nil {
		panic(err)
	}
	var s schema
	if err := json.Unmarshal(text, &s); err != nil {
		panic(err)
	}
	return s
})

// validate says how the JSON of an event differs from its schema.
func validate(body []byte) error {
	var v any
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.UseNumber()
	if err := dec.Decode(&v); err != nil {
		return err
	}
	return eventSchema().check(v, "")
}

func (s schema) sub(word, name string) (schema, bool) {
	of, _ := s[word].(map[string]any)
	sub, ok := of[name].(map[string]any)
	return sub, ok
}

func (s schema) check(v any, at string) error {
	for _, word := range slices.Sorted(maps.Keys(s)) {
		if err := s.checkWord(word, v, at); err != nil {
			return err
		}
	}
	return nil
}

func (s schema) checkWord(word string, v any, at string) error {
	text, isText := v.(string)
	object, isObject := v.(map[string]any)
	wrong := func() error { return fmt.Errorf("%s: %v is not as %s says: %v", at, v, word, s[word]) }
	switch word {
	case "$schema", "$defs", "title", "description":
	case "$ref":
		sub, ok := eventSchema().sub("$defs", strings.TrimPrefix(s[word].(string), "#/$defs/"))
		if !ok {
			return wrong()
		}
		return sub.check(v, at)
	case "type":
		n, isNumber := v.(json.Number)
		_, err := n.Int64()
		if is := map[string]bool{"string": isText, "object": isObject, "integer": isNumber && err == nil}; !is[s[word].(string)] {
			return wrong()
		}
	case "enum":
		if !slices.Contains(s[word].([]any), v) {
			return wrong()
		}
	case "pattern":
		if !regexp.MustCompile(s[word].(string)).MatchString(text) {
			return wrong()
		}
	case "minimum":
		if n, _ := v.(json.Number).Float64(); n < s[word].(float64) {
			return wrong()
		}
	case "format":
		if _, err := time.Parse(time.RFC3339, text); s[word] != "date-time" || err != nil {
			return wrong()
		}
	case "contentEncoding":
		if _, err := base64.StdEncoding.DecodeString(text); s[word] != "base64" || err != nil {
			return wrong()
		}
	case "required":
		for _, name := range s[word].([]any) {
			if _, ok := object[name.(string)]; !ok {
				return wrong()
			}
		}
	case "properties":
		for name, value := range object {
			if sub, ok := s.sub(word, name); ok {
				if err := sub.check(value, at+"/"+name); err != nil {
					return err
				}
			}
		}
	case "additionalProperties":
		for name, value := range object {
			if _, ok := s.sub("properties", name); ok {
				continue
			}
			rest, ok := s[word].(map[string]any)
			if !ok {
				return fmt.Errorf("%s: %s is not in the schema", at, name)
			}
			if err := schema(rest).check(value, at+"/"+name); err != nil {
				return err
			}
		}
	case "oneOf":
		fits := 0
		for _, one := range s[word].([]any) {
			if schema(one.(map[string]any)).check(v, at) == nil {
				fits++
			}
		}
		if fits != 1 {
			return fmt.Errorf("%s: it fits %d of oneOf", at, fits)
		}
	default:
		return fmt.Errorf("%s: the test does not know %s", at, word)
	}
	return nil
}

func TestSchemaRefuses(t *testing.T) {
	good := `{"topic": "mdm.Connect", "event_id": "01234567-89ab-7cde-8f01-23456789abcd", "created_at": "2026-03-01T12:00:00Z",
		"acknowledge_event": {"ids": {"id": "D", "type": "Device"}, "status": "Idle"}}`
	require.NoError(t, validate([]byte(good)))
	for what, with := range map[string]string{
		`mdm.Connect`: `mdm.CheckOut`, `"status": "Idle"`: `"sheep": 1`, `"Device"`: `"Sheep"`, `-7cde-`: `-4cde-`, `2026-03-01T12:00:00Z`: `today`,
		`"acknowledge_event"`: `"checkin_event"`, `"id": "D"`: `"id": 1`, `{"topic"`: `{"sheep": 1, "topic"`, `"Idle"`: `"Idle", "raw_payload": "!"`,
	} {
		require.Error(t, validate([]byte(strings.Replace(good, what, with, 1))), with)
	}
}

// examples are of each topic, in the order of the documentation.
func examples() []storage.Event {
	at := time.Date(2026, 3, 1, 12, 0, 0, 123456000, time.UTC)
	device := mdm.EnrollID{Type: mdm.Device, ID: "5A1DB3C2-8E8B-4D0A-9C2D-2F8A1C0E7B11"}
	user := mdm.EnrollID{Type: mdm.User, ID: device.ID + ":0B7C4F6E-37C1-4B38-8C69-0E5E0D8D8A11", ParentID: device.ID}
	var list []storage.Event
	add := func(topic string, enroll mdm.EnrollID, change func(*storage.Event)) {
		r := storage.Event{Enroll: enroll}
		n := len(list) + 1
		r.ID = fmt.Sprintf("019ca949-0%03x-7f3c-9a41-6d1c2b8e%04x", n, n*7919%65536)
		r.Topic, r.CreatedAt, r.UDID = topic, at.Add(time.Duration(n)*time.Minute), device.ID
		if !storage.ServerTopic(topic) {
			r.Raw = []byte("<plist>...</plist>")
		}
		if change != nil {
			change(&r)
		}
		list = append(list, r)
	}
	add(storage.TopicAuthenticate, device, func(r *storage.Event) { r.Params = map[string]string{"site": "berlin"} })
	add(storage.TopicTokenUpdate, device, func(r *storage.Event) { r.Tally = 1 })
	add(storage.TopicCheckOut, device, nil)
	add(storage.TopicUserAuthenticate, user, nil)
	add(storage.TopicSetBootstrapToken, device, nil)
	add(storage.TopicGetBootstrapToken, device, nil)
	add(storage.TopicConnect, device, func(r *storage.Event) {
		r.Status, r.CommandUUID = "Acknowledged", "7f9a2c1e-5b0d-4d7e-8f55-0d7a7e1f3c90"
	})
	add(storage.TopicDeclarativeManagement, device, nil)
	add(storage.TopicGetToken, device, nil)
	add(storage.TopicCommandExpired, device, func(r *storage.Event) {
		r.APNsTopic, r.CommandUUID, r.RequestType = "com.apple.mgmt.External.a", "7f9a2c1e-5b0d-4d7e-8f55-0d7a7e1f3c90", "DeviceLock"
	})
	add(storage.TopicPushFailed, device, func(r *storage.Event) {
		r.APNsTopic = "com.apple.mgmt.External.a"
		r.Params = map[string]string{"class": "token_dead", "status": "410", "reason": "Unregistered", "apns_id": "C2F4D1B6-6D0B-4E6A-9B54-3C0A8F4F1E22"}
	})
	add(storage.TopicPushCertExpiring, mdm.EnrollID{}, func(r *storage.Event) {
		r.UDID, r.APNsTopic, r.Params = "", "com.apple.mgmt.External.a", map[string]string{"not_after": "2026-03-29T12:00:00Z"}
	})
	add(storage.TopicIdentityExpiring, device, func(r *storage.Event) {
		r.APNsTopic = "com.apple.mgmt.External.a"
		r.Params = map[string]string{"not_after": "2026-03-29T12:00:00Z", "certificate_sha256": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"}
	})
	add(storage.TopicEnrollmentDeleted, device, func(r *storage.Event) { r.APNsTopic = "com.apple.mgmt.External.a" })
	add(storage.TopicEventLogFull, mdm.EnrollID{}, func(r *storage.Event) {
		r.UDID, r.Params = "", map[string]string{"max_bytes": "17179869184"}
	})
	return list
}

// meanings are what the documentation says of the topics.
var meanings = map[string]string{
	storage.TopicAuthenticate:          "A device begins to enroll, or begins anew.",
	storage.TopicTokenUpdate:           "A channel can be woken. `token_update_tally` 1 is a new enrollment. Holds tokens.",
	storage.TopicCheckOut:              "A device leaves.",
	storage.TopicUserAuthenticate:      "A network user logs in. Holds digests.",
	storage.TopicSetBootstrapToken:     "A Mac escrows its bootstrap token, or takes it back. Holds tokens.",
	storage.TopicGetBootstrapToken:     "A Mac asks for it.",
	storage.TopicConnect:               "A device asks for commands (Idle), or says what became of one: the result is in the payload.",
	storage.TopicDeclarativeManagement: "A device fetches declarations or sends a status report.",
	storage.TopicGetToken:              "A device asks for a token of a service. Holds tokens.",
	storage.TopicCommandExpired:        "A command's time was over before the device took it.",
	storage.TopicPushFailed:            "APNs says that the push token is dead: the device cannot be woken until it sends another one.",
	storage.TopicPushCertExpiring:      "A push certificate ends within `-expiry-notice`. Once for each.",
	storage.TopicIdentityExpiring:      "The pinned certificate of a device does. Once for each.",
	storage.TopicEnrollmentDeleted:     "An operator deleted an enrollment.",
	storage.TopicEventLogFull:          "The event log has `-max-event-bytes`; its oldest events are removed. Once a day.",
}

func TestExamples(t *testing.T) {
	const page = "../../docs/webhook-events.md"
	var b strings.Builder
	var topics []string
	for _, r := range examples() {
		body, err := render(&r)
		require.NoError(t, err)
		require.NoError(t, validate(body), "%s", body)
		var indented bytes.Buffer
		require.NoError(t, json.Indent(&indented, body, "", "  "))
		require.NotEmpty(t, meanings[r.Topic])
		fmt.Fprintf(&b, "## %s\n\n%s\n\n```json\n%s\n```\n\n", r.Topic, meanings[r.Topic], indented.Bytes())
		topics = append(topics, r.Topic)
	}
	require.Equal(t, storage.EventTopics(), topics)
	text, err := os.ReadFile(page)
	require.NoError(t, err)
	head, rest, ok := strings.Cut(string(text), "-update -->\n")
	require.True(t, ok)
	_, tail, ok := strings.Cut(rest, "<!-- end of examples")
	require.True(t, ok)
	want := head + "-update -->\n\n" + b.String() + "<!-- end of examples" + tail
	if *update {
		require.NoError(t, os.WriteFile(page, []byte(want), 0o644))
		return
	}
	require.Equal(t, want, string(text), "run: go test ./service/webhook -run TestExamples -update")
}
