package httpapi

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

// sound fails for a text that some engine refuses to look for.
func sound(t *testing.T, texts ...string) {
	t.Helper()
	for _, text := range texts {
		require.True(t, utf8.ValidString(text), "%q", text)
		require.NotContains(t, text, "\x00")
	}
}

// FuzzQuery: whatever the parameters of a list are, they are an error of the
// caller's or something that a store can be asked.
func FuzzQuery(f *testing.F) {
	c, err := newCursors("key")
	require.NoError(f, err)
	list := &http.Request{URL: new(url.URL)}
	for _, seed := range []string{
		"", "limit=10&after=" + c.seal(list, place{By: "id", Key: "D1"}), "type=Device&enabled=true&waiting=false&topic=a&topic=b",
		"after=" + c.audit(list, storage.AuditRecord{ID: "a", At: time.Unix(1, 0)}) + "&from=2026-03-01T12:00:00Z&to=2026-03-01T12:00:00%2B02:00",
		"limit=-1", "limit=1e9", "a;b", "%zz", "who=%00", "action=%ff", "target=&target=", "last_seen_before=0001-01-01T00:00:00Z",
		"push_status=owed&certificate_expires_before=9999-12-31T23:59:59Z", "after=AA", "after=" + base64.RawURLEncoding.EncodeToString([]byte(`{"b":"id","k":"\u0000"}`)),
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, raw string) {
		r := &http.Request{URL: &url.URL{RawQuery: raw}}
		q := newQuery(r, c)
		filter, err := q.selector().filter()
		limit, at := q.limit(), q.enrollmentPlace()
		if err = errors.Join(err, q.done()); err == nil {
			require.True(t, 1 <= limit && limit <= maxPageItems)
			sound(t, string(filter.Type), filter.Topic, filter.Serial, filter.User, filter.Model, filter.OSVersion, string(filter.Push), at.By, at.Key, at.ID)
			for name := range q.values {
				require.True(t, q.known[name])
			}
		} else {
			expectProblems(t, err)
		}

		q = newQuery(r, c)
		records, after, limit, err := auditQuery(q)
		if err != nil {
			expectProblems(t, err)
			return
		}
		require.True(t, 1 <= limit && limit <= maxPageItems)
		sound(t, records.Who, records.Action, records.Target, after.ID)
	})
}

// expectProblems fails for an error that is not the caller's.
func expectProblems(t *testing.T, err error) {
	t.Helper()
	p := (*problem)(nil)
	require.ErrorAs(t, err, &p)
	require.Equal(t, http.StatusBadRequest, p.status)
}

// FuzzSelector is FuzzQuery for filters in a body.
func FuzzSelector(f *testing.F) {
	for _, seed := range []string{
		`{}`, `{"type": "Device", "enabled": true}`, `{"topic": "\u0000"}`, `{"serial": ""}`, `{"last_seen_after": "2026-03-01T12:00:00Z"}`,
		`{"push_status": "owed", "waiting": null}`, `[]`, `{"type": 7}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		var s selector
		if json.Unmarshal(body, &s) != nil {
			return
		}
		filter, err := s.filter()
		if err != nil {
			expectProblems(t, err)
			return
		}
		sound(t, string(filter.Type), filter.Topic, filter.Serial, filter.User, filter.Model, filter.OSVersion, string(filter.Push))
	})
}

// FuzzCredentials: a request is somebody's or nobody's, and never half.
func FuzzCredentials(f *testing.F) {
	f.Add("Basic " + base64.StdEncoding.EncodeToString([]byte("nanomdm:key")))
	f.Add("Bearer nmk_x")
	f.Add("bearer  ")
	f.Add("Basic Og==")
	f.Add("Basic " + base64.StdEncoding.EncodeToString([]byte(":key")))
	f.Fuzz(func(t *testing.T, value string) {
		user, key, ok := credentials(&http.Request{Header: http.Header{"Authorization": {value}}})
		if !ok {
			return
		}
		require.NotEmpty(t, key)
		if user == anyUser {
			require.True(t, strings.EqualFold(value[:6], "Bearer"))
		}
	})
}
