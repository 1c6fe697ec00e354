package httpapi_test

import (
	"encoding/json"
	"net/url"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
)

// get asks and decodes an answer with status 200.
func (o *operators) get(c call, path string, into any) {
	o.t.Helper()
	status, answer, _ := o.do(c, "GET", path, "")
	require.Equal(o.t, 200, status, answer)
	require.NoError(o.t, json.Unmarshal([]byte(answer), into), answer)
}

type listed struct {
	Enrollments []struct{ ID string }
	Next        string
}

// list pages through a list of enrollments.
func (o *operators) list(c call, query url.Values) []string {
	o.t.Helper()
	ids := []string{}
	for range 1000 {
		var page listed
		o.get(c, "/v1/enrollments?"+query.Encode(), &page)
		for _, e := range page.Enrollments {
			ids = append(ids, e.ID)
		}
		if page.Next == "" {
			slices.Sort(ids)
			return ids
		}
		query.Set("after", page.Next)
	}
	o.t.Fatal("the list does not end")
	return nil
}

func TestListEnrollments(t *testing.T) {
	o := newOperators(t)
	for _, id := range []string{"a-1", "a-2", "a-3"} {
		o.enrollOnly(id, "topic-a")
	}
	o.enrollOnly("b-1", "topic-b")
	// There is no push certificate, so the pushes stay owed.
	status, answer, _ := o.do(o.admin(), "PUT", "/v1/enqueue/a-2,b-1?push=async", command("one"))
	require.Equal(t, 200, status, answer)

	bound := call{key: o.makeKey("tenant", "read", "topic-a")}
	for query, want := range map[string][]string{
		"":                                      {"a-1", "a-2", "a-3", "b-1"},
		"topic=topic-a":                         {"a-1", "a-2", "a-3"},
		"waiting=true":                          {"a-2", "b-1"},
		"waiting=false":                         {"a-1", "a-3"},
		"enabled=false":                         {},
		"type=Device":                           {"a-1", "a-2", "a-3", "b-1"},
		"type=User":                             {},
		"push_status=owed":                      {"a-2", "b-1"},
		"last_seen_before=2000-01-01T00:00:00Z": {},
		"waiting=true&topic=topic-b&push_status=owed": {"b-1"},
	} {
		for _, limit := range []string{"1", "2", "1000"} {
			values, err := url.ParseQuery(query)
			require.NoError(t, err)
			values.Set("limit", limit)
			require.Equal(t, want, o.list(o.admin(), values), "%s, %s a page", query, limit)
			values.Del("after")
			own := slices.DeleteFunc(slices.Clone(want), func(id string) bool { return id[0] == 'b' })
			require.Equal(t, own, o.list(bound, values), "%s for a tenant", query)
		}
	}
}

func TestListEnrollmentsRefuses(t *testing.T) {
	o := newOperators(t)
	o.enroll("a", "topic-a")
	o.enroll("b", "topic-a")
	var page listed
	o.get(o.admin(), "/v1/enrollments?topic=topic-a&limit=1", &page)
	require.NotEmpty(t, page.Next)
	for query, want := range map[string]string{
		"type=Phone":                 "type: use Device, User, User Enrollment (Device), User Enrollment or Shared iPad",
		"enabled=yes":                "enabled: use true or false",
		"topic=":                     "topic: it is empty; leave it out",
		"serial=%00":                 "serial: it is not text",
		"user=a%ff":                  "user: it is not text",
		"serial=a&serial=b":          "serial: it is given twice",
		"last_seen_before=yesterday": `last_seen_before: "yesterday" is not a time such as 2026-03-01T12:00:00Z`,
		"certificate_expires_before=0001-01-01T00:00:00Z": "is not a time",
		"push_status=accepted":                            "push_status: use owed, unanswered, refused, token_dead",
		"limit=0":                                         "limit: a number from 1 to 1000 is wanted",
		"after=x":                                         "after: that is not a next of this list's",
		"after=" + page.Next:                              "after: that is not a next of this list's",
		"after=e30":                                       "after: that is not a next of this list's",
		"serail=S":                                        "serail: there is no such query parameter here",
		"a=%zz":                                           "the query cannot be read",
	} {
		status, answer, _ := o.do(o.admin(), "GET", "/v1/enrollments?"+query, "")
		require.Equal(t, 400, status, query)
		var e struct{ Error string }
		require.NoError(t, json.Unmarshal([]byte(answer), &e))
		require.Contains(t, e.Error, want, query)
	}
}
