package httpapi

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/schema"
	"github.com/nanomdm/nanomdm/storage"
)

// selector chooses enrollments: the filters of GET /v1/enrollments in a body.
// A missing filter matches everything.
type selector struct {
	Type                     *string `json:"type,omitempty"`
	Enabled                  *bool   `json:"enabled,omitempty"`
	Topic                    *string `json:"topic,omitempty"`
	Serial                   *string `json:"serial,omitempty"`
	User                     *string `json:"user,omitempty"`
	Tag                      *string `json:"tag,omitempty"`
	Model                    *string `json:"model,omitempty"`
	OSVersion                *string `json:"os_version,omitempty"`
	OSVersionBelow           *string `json:"os_version_below,omitempty"`
	OSVersionFrom            *string `json:"os_version_from,omitempty"`
	FileVault                *bool   `json:"filevault,omitempty"`
	Supervised               *bool   `json:"supervised,omitempty"`
	LastSeenBefore           *string `json:"last_seen_before,omitempty"`
	LastSeenAfter            *string `json:"last_seen_after,omitempty"`
	Waiting                  *bool   `json:"waiting,omitempty"`
	PushStatus               *string `json:"push_status,omitempty"`
	CertificateExpiresBefore *string `json:"certificate_expires_before,omitempty"`
}

// selector reads the filters of a list.
func (q *query) selector() selector {
	text := func(name string) *string {
		if value := q.text(name); value != "" {
			return &value
		}
		return nil
	}
	return selector{
		Type: text("type"), Enabled: q.flag("enabled"), Topic: text("topic"), Serial: text("serial"), User: text("user"),
		Tag: text("tag"), Model: text("model"), OSVersion: text("os_version"), OSVersionBelow: text("os_version_below"),
		OSVersionFrom: text("os_version_from"), FileVault: q.flag("filevault"), Supervised: q.flag("supervised"), LastSeenBefore: text("last_seen_before"),
		LastSeenAfter: text("last_seen_after"), Waiting: q.flag("waiting"), PushStatus: text("push_status"),
		CertificateExpiresBefore: text("certificate_expires_before"),
	}
}

// filter turns a selector into the store's form. Its error names the wrong
// filter.
func (s selector) filter() (storage.EnrollmentFilter, error) {
	f := storage.EnrollmentFilter{Enabled: s.Enabled, Waiting: s.Waiting, FileVault: s.FileVault, Supervised: s.Supervised}
	var err error
	fail := func(name, want string) {
		if err == nil {
			err = badRequest("%s: %s", name, want)
		}
	}
	word := func(name string, value *string, words ...string) string {
		if value == nil {
			return ""
		}
		switch why := textFault(*value); {
		case why != "":
			fail(name, why)
		case len(words) > 0 && !slices.Contains(words, *value):
			fail(name, "use "+orList(words))
		}
		return *value
	}
	version := func(name string, value *string) string {
		text := word(name, value)
		if _, ok := schema.CompareVersions(text, text); text != "" && !ok {
			fail(name, fmt.Sprintf("%.80q is not a version such as 15.1", text))
		}
		return text
	}
	at := func(name string, value *string) time.Time {
		if value == nil {
			return time.Time{}
		}
		at, terr := time.Parse(time.RFC3339, *value)
		if terr != nil || at.UnixMicro() <= 0 {
			fail(name, fmt.Sprintf("%q is not a time such as 2026-03-01T12:00:00Z", *value))
		}
		return at.UTC()
	}
	f.Type = mdm.EnrollType(word("type", s.Type, enrollTypes()...))
	f.Topic = word("topic", s.Topic)
	f.Serial = word("serial", s.Serial)
	f.User = word("user", s.User)
	f.Tag = word("tag", s.Tag)
	f.Model = word("model", s.Model)
	f.OSVersion = word("os_version", s.OSVersion)
	f.OSVersionBelow = version("os_version_below", s.OSVersionBelow)
	f.OSVersionFrom = version("os_version_from", s.OSVersionFrom)
	f.LastSeenBefore = at("last_seen_before", s.LastSeenBefore)
	f.LastSeenAfter = at("last_seen_after", s.LastSeenAfter)
	f.Push = storage.PushStatus(word("push_status", s.PushStatus, pushStatuses()...))
	f.CertificateExpiresBefore = at("certificate_expires_before", s.CertificateExpiresBefore)
	return f, err
}

func enrollTypes() (words []string) {
	for _, t := range mdm.EnrollTypes() {
		words = append(words, string(t))
	}
	return words
}

func pushStatuses() []string {
	statuses := []string{string(storage.PushOwed), string(storage.PushUnanswered), string(storage.PushRefused)}
	return append(statuses, storage.RefusedPushes()...)
}

// selected lists the ids that a filter chooses, each once, in order.
func (a *API) selected(ctx context.Context, scope storage.Scope, f storage.EnrollmentFilter) ([]string, error) {
	var all []string
	for after := (storage.EnrollmentKey{}); ; {
		ids, next, err := a.store.FindEnrollments(ctx, scope, f, after, maxPageItems)
		if err != nil {
			return nil, err
		}
		all = append(all, ids...)
		if next == (storage.EnrollmentKey{}) {
			slices.Sort(all)
			return slices.Compact(all), nil
		}
		after = next
	}
}

// place is a storage.EnrollmentKey as a cursor.
type place struct {
	By  string `json:"b"`
	At  int64  `json:"t,omitempty"`
	Key string `json:"k"`
	ID  string `json:"i,omitempty"`
}

func (c *cursors) enrollment(r *http.Request, k storage.EnrollmentKey) string {
	if k == (storage.EnrollmentKey{}) {
		return ""
	}
	return c.seal(r, placeOf(k))
}

func placeOf(k storage.EnrollmentKey) *place {
	p := &place{By: k.By, Key: k.Key, ID: k.ID}
	if !k.At.IsZero() {
		p.At = k.At.UnixMicro()
	}
	return p
}

// key is the place as the store has it; that of nil is the beginning.
func (p *place) key() storage.EnrollmentKey {
	if p == nil {
		return storage.EnrollmentKey{}
	}
	k := storage.EnrollmentKey{By: p.By, Key: p.Key, ID: p.ID}
	if p.At != 0 {
		k.At = time.UnixMicro(p.At).UTC()
	}
	return k
}

// enrollmentPlace reads the parameter after of a list of enrollments.
func (q *query) enrollmentPlace() storage.EnrollmentKey {
	var p place
	if !q.cursor(&p) {
		return storage.EnrollmentKey{}
	}
	if p.By == "" || strings.ContainsRune(p.Key+p.ID, 0) {
		q.failCursor()
	}
	return p.key()
}
