package webhook

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// DefaultSink is the name of the sink that -webhook-url makes.
const DefaultSink = "webhook"

// MirrorSink is the name of the sink that -mirror-url makes.
const MirrorSink = "mirror"

// Mirror is the sink by which another server's migration endpoint gets the
// check-ins that change enrollments, in order for each, with key as the password
// of the user nanomdm. One that it refuses holds up the later ones of its
// enrollment, as one that a server without its database refuses has to.
func Mirror(endpoint *url.URL, key string) storage.EventSink {
	k := storage.EventSink{
		Name: MirrorSink, URL: endpoint.String(), Form: storage.FormCheckin, Tokens: true, OnError: storage.OnErrorHold, Enabled: true,
		Filter: storage.EventFilter{Topics: []string{
			storage.TopicAuthenticate, storage.TopicTokenUpdate, storage.TopicCheckOut, storage.TopicSetBootstrapToken,
		}},
	}
	if key != "" {
		k.Keys = []string{key}
	}
	return k
}

// Sink is the JSON of a sink, in a file or through the API.
type Sink struct {
	Name string `json:"name,omitempty"` // in a file; the API has it in the path
	// URL may be left out: events are then only kept in the log.
	URL string `json:"url,omitempty"`
	// Keys sign; the first one alone signs X-Hmac-Signature.
	Keys []string `json:"keys,omitempty"`
	// Tokens sends events that hold tokens and secrets.
	Tokens bool                `json:"tokens,omitempty"`
	Filter storage.EventFilter `json:"filter,omitzero"`
	// OnError is hold or skip; empty is hold.
	OnError storage.OnError `json:"on_error,omitempty"`
	// Disabled keeps the sink and sends nothing.
	Disabled bool `json:"disabled,omitempty"`
}

var sinkName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

// maxKeys is how many keys a sink may have: two are in use while keys are
// changed, and slow consumers need some more.
const maxKeys = 4

// Check turns the JSON form into a sink. Its error names the wrong field.
func (k *Sink) Check() (storage.EventSink, error) {
	out := storage.EventSink{Name: k.Name, URL: k.URL, Keys: k.Keys, Tokens: k.Tokens, Filter: k.Filter, OnError: k.OnError, Enabled: !k.Disabled}
	if !sinkName.MatchString(k.Name) {
		return out, errors.New("name: use 1 to 63 of a-z, 0-9, dot, dash and underscore")
	}
	if k.URL != "" {
		u, err := url.Parse(k.URL)
		if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" {
			return out, errors.New("url: not a URL with http or https and a host")
		}
	}
	switch k.OnError {
	case "":
		out.OnError = storage.OnErrorHold
	case storage.OnErrorHold, storage.OnErrorSkip:
	default:
		return out, fmt.Errorf("on_error: %q is neither %s nor %s", k.OnError, storage.OnErrorHold, storage.OnErrorSkip)
	}
	if len(k.Keys) > maxKeys {
		return out, fmt.Errorf("keys: at most %d", maxKeys)
	}
	for i, key := range k.Keys {
		if key == "" {
			return out, fmt.Errorf("keys: number %d is empty", i+1)
		}
		if err := CheckKey(key); err != nil {
			return out, fmt.Errorf("keys: number %d %w", i+1, err)
		}
	}
	for _, topic := range k.Filter.Topics {
		if !slices.Contains(storage.EventTopics(), topic) {
			return out, fmt.Errorf("filter.topics: no topic %q; there are %s", topic, strings.Join(storage.EventTopics(), ", "))
		}
	}
	types := []mdm.EnrollType{mdm.Device, mdm.User, mdm.UserEnrollmentDevice, mdm.UserEnrollment, mdm.SharediPad}
	for _, t := range k.Filter.EnrollmentTypes {
		if !slices.Contains(types, t) {
			return out, fmt.Errorf("filter.enrollment_types: no type %q; there are %q", t, types)
		}
	}
	return out, nil
}

// SendsTokensInClear says whether a sink sends tokens over http to another
// machine.
func SendsTokensInClear(k *storage.EventSink) bool {
	u, err := url.Parse(k.URL)
	if err != nil || !k.Tokens || u.Scheme != "http" {
		return false
	}
	addr, err := netip.ParseAddr(u.Hostname())
	return u.Hostname() != "localhost" && (err != nil || !addr.Unmap().IsLoopback())
}

// CheckKey refuses a key that looks like Standard Webhooks' form and is not.
func CheckKey(key string) error {
	encoded, ok := strings.CutPrefix(key, secretPrefix)
	if !ok {
		return nil
	}
	if raw, err := base64.StdEncoding.DecodeString(encoded); err != nil || len(raw) == 0 {
		return errors.New("begins with " + secretPrefix + " but is not Base64 after that")
	}
	return nil
}

// ParseSink reads one sink from JSON, without a name.
func ParseSink(text []byte) (*Sink, error) {
	var k Sink
	if err := strict(text, &k); err != nil {
		return nil, err
	}
	return &k, nil
}

// ParseConfig reads the file of -webhook-config: {"sinks": [{"name": ...}]}.
func ParseConfig(text []byte) ([]storage.EventSink, error) {
	var file struct {
		Sinks []Sink `json:"sinks"`
	}
	if err := strict(text, &file); err != nil {
		return nil, err
	}
	var sinks []storage.EventSink
	for i := range file.Sinks {
		k, err := file.Sinks[i].Check()
		if err != nil {
			return nil, fmt.Errorf("sink number %d: %w", i+1, err)
		}
		if !k.Enabled {
			continue
		}
		if slices.ContainsFunc(sinks, func(other storage.EventSink) bool { return other.Name == k.Name }) {
			return nil, fmt.Errorf("sink number %d: the name %s is there twice", i+1, k.Name)
		}
		sinks = append(sinks, k)
	}
	return sinks, nil
}

// strict decodes one JSON value with no unknown keys.
func strict(text []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return fmt.Errorf("not the JSON that is expected: %w", err)
	}
	if dec.More() {
		return errors.New("not the JSON that is expected: something follows it")
	}
	return nil
}
