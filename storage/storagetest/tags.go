package storagetest

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

func tagTests() []subtest {
	return []subtest{
		{"tags are given, taken and counted, with a record", tagsChange},
		{"a device keeps its tags when it enrolls anew", tagsSurvive},
		{"a device has a bounded number of tags", tagsBounded},
		{"tags are changed for many devices in chunks", tagsOfMany},
		{"tags are changed by several at once", tagsAtOnce},
		{"a scope sees and changes the tags of its own devices", tagsScope},
		{"tags from before a move to another topic are out of sight", tagsMove},
		{"tags from before a move to another topic take no places", tagsMoveFull},
		{"tags go along to another store", tagsImported},
	}
}

// tags changes tags and records that.
func (h *Harness) tags(t *testing.T, scope storage.Scope, ids, add, remove []string) storage.TagsChanged {
	t.Helper()
	done, err := h.Store.ChangeTags(t.Context(), scope, tagChange(ids, add, remove))
	require.NoError(t, err)
	return done
}

func tagChange(ids, add, remove []string) storage.TagChange {
	return storage.TagChange{IDs: ids, Add: add, Remove: remove, Record: func(changed []string) *storage.AuditRecord {
		r := auditRecord("tags")
		r.Detail = fmt.Sprint(len(changed))
		return r
	}}
}

// tagsOf reads the tags of an enrollment.
func (h *Harness) tagsOf(t *testing.T, scope storage.Scope, id string) []string {
	t.Helper()
	list, err := h.Store.Enrollments(t.Context(), scope, []string{id})
	require.NoError(t, err)
	require.Len(t, list, 1)
	return list[0].Tags
}

// tagCounts lists the tags in pages.
func (h *Harness) tagCounts(t *testing.T, scope storage.Scope) map[string]int64 {
	t.Helper()
	counts := make(map[string]int64)
	for after := ""; ; {
		list, err := h.Store.TagCounts(t.Context(), scope, after, 2)
		require.NoError(t, err)
		if len(list) == 0 {
			return counts
		}
		for _, c := range list {
			require.Greater(t, c.Tag, after)
			counts[c.Tag], after = c.Devices, c.Tag
		}
	}
}

func tagsChange(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	h.device("D").user("anna").enrolls(t)
	require.Empty(t, h.tagCounts(t, everything))

	done := h.tags(t, everything, []string{"D", "E", "D:anna", "nobody", "\x00"}, []string{"lab", "Lab"}, nil)
	require.Equal(t, storage.TagsChanged{Found: []string{"D", "E"}, Changed: []string{"D", "E"}}, done, "user channels have no tags of their own")
	require.Equal(t, []string{"Lab", "lab"}, h.tagsOf(t, everything, "D"))
	require.Equal(t, []string{"Lab", "lab"}, h.tagsOf(t, everything, "D:anna"), "those of its device")
	done = h.tags(t, everything, []string{"D", "E"}, []string{"lab"}, nil)
	require.Equal(t, storage.TagsChanged{Found: []string{"D", "E"}}, done, "they have it")
	done = h.tags(t, everything, []string{"D", "E"}, []string{"berlin"}, []string{"Lab", "none"})
	require.Equal(t, []string{"D", "E"}, done.Changed)
	done = h.tags(t, everything, []string{"E"}, nil, []string{"lab"})
	require.Equal(t, []string{"E"}, done.Changed)
	require.Equal(t, []string{"berlin", "lab"}, h.tagsOf(t, everything, "D"))
	require.Equal(t, map[string]int64{"berlin": 2, "lab": 1}, h.tagCounts(t, everything))

	records, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{Action: "tags"}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 3, "of what was changed")
}

func tagsSurvive(t *testing.T, h *Harness) {
	d := h.device("D").with("c1").enrolls(t)
	h.tags(t, everything, []string{"D"}, []string{"lab"}, nil)
	h.Clock.Advance(time.Hour)
	require.NoError(t, d.checkOut(t))
	require.Equal(t, []string{"lab"}, h.tagsOf(t, everything, "D"))
	h.Clock.Advance(time.Hour)
	h.device("D").with("c1").enrolls(t)
	require.Equal(t, []string{"lab"}, h.tagsOf(t, everything, "D"))
	require.Equal(t, []string{"D"}, h.found(t, tenantA, storage.EnrollmentFilter{Tag: "lab"}, 10))

	require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("delete")))
	require.Empty(t, h.tagCounts(t, everything))
	h.device("D").with("c2").enrolls(t)
	require.Empty(t, h.tagsOf(t, everything, "D"))
}

func tagsBounded(t *testing.T, h *Harness) {
	h.Enroll(t, "D", "E")
	all := numbered("t", storage.MaxTags)
	done := h.tags(t, everything, []string{"D"}, all, nil)
	require.Equal(t, []string{"D"}, done.Changed)
	done = h.tags(t, everything, []string{"D", "E"}, []string{"more"}, nil)
	require.Equal(t, storage.TagsChanged{Found: []string{"D", "E"}, Changed: []string{"E"}, Full: []string{"D"}}, done)
	require.Equal(t, all, h.tagsOf(t, everything, "D"), "as before")
	done = h.tags(t, everything, []string{"D"}, []string{"more"}, all[:1])
	require.Equal(t, []string{"D"}, done.Changed, "one goes and one comes")
	done = h.tags(t, everything, []string{"D"}, all[1:3], nil)
	require.Equal(t, storage.TagsChanged{Found: []string{"D"}}, done, "it has them")
}

func tagsOfMany(t *testing.T, h *Harness) {
	ids := numbered("D", 2300)
	plantEnrollments(t, h, ids)
	done := h.tags(t, everything, ids, []string{"a", "b"}, nil)
	slices.Sort(done.Changed)
	require.Equal(t, slices.Sorted(slices.Values(ids)), done.Changed)
	require.Equal(t, map[string]int64{"a": 2300, "b": 2300}, h.tagCounts(t, everything))
	h.tags(t, everything, ids[:1100], nil, []string{"a", "b"})
	require.Equal(t, map[string]int64{"a": 1200, "b": 1200}, h.tagCounts(t, everything))
	require.Len(t, h.found(t, everything, storage.EnrollmentFilter{Tag: "a"}, 100), 1200)
}

func tagsAtOnce(t *testing.T, h *Harness) {
	ids := numbered("D", 20)
	h.Enroll(t, ids...)
	stores := h.stores(t)
	errs := together(8, func(i int) error {
		for n := range 5 {
			c := tagChange(slices.Clone(ids), []string{fmt.Sprintf("t%d-%d", i, n)}, nil)
			if i%2 == 1 {
				slices.Reverse(c.IDs)
			}
			if _, err := stores[i%len(stores)].(storage.Tags).ChangeTags(t.Context(), everything, c); err != nil {
				return err
			}
		}
		return nil
	})
	require.NoError(t, errors.Join(errs...))
	for _, id := range ids {
		require.Len(t, h.tagsOf(t, everything, id), 40, id)
	}
}

func tagsScope(t *testing.T, h *Harness) {
	h.Enroll(t, "A")
	b := h.device("B")
	require.NoError(t, b.begins(t, topicB))
	require.NoError(t, b.saysToken(t, topicB))
	h.tags(t, everything, []string{"A", "B"}, []string{"lab"}, nil)
	done := h.tags(t, tenantB, []string{"A", "B"}, []string{"mine"}, []string{"lab"})
	require.Equal(t, storage.TagsChanged{Found: []string{"B"}, Changed: []string{"B"}}, done)
	require.Equal(t, []string{"lab"}, h.tagsOf(t, everything, "A"))
	require.Equal(t, []string{"mine"}, h.tagsOf(t, everything, "B"))
	require.Equal(t, map[string]int64{"lab": 1}, h.tagCounts(t, tenantA))
	require.Equal(t, map[string]int64{"mine": 1}, h.tagCounts(t, tenantB))
	require.Empty(t, h.found(t, tenantA, storage.EnrollmentFilter{Tag: "mine"}, 10))
}

func tagsMove(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	h.tags(t, tenantA, []string{"D"}, []string{"secret", "lab"}, nil)
	h.Clock.Advance(time.Minute)
	require.NoError(t, d.begins(t, topicB))
	require.NoError(t, d.saysToken(t, topicB))
	require.Empty(t, h.tagsOf(t, tenantB, "D"))
	require.Empty(t, h.tagCounts(t, tenantB))
	require.Empty(t, h.found(t, tenantB, storage.EnrollmentFilter{Tag: "secret"}, 10))
	require.Equal(t, []string{"lab", "secret"}, h.tagsOf(t, everything, "D"))

	h.Clock.Advance(time.Minute)
	require.Empty(t, h.tags(t, tenantB, []string{"D"}, nil, []string{"secret"}).Changed, "it is not there for them")
	require.Equal(t, []string{"D"}, h.tags(t, tenantB, []string{"D"}, []string{"lab"}, nil).Changed)
	require.Equal(t, []string{"lab"}, h.tagsOf(t, tenantB, "D"))
	require.Equal(t, []string{"D"}, h.found(t, tenantB, storage.EnrollmentFilter{Tag: "lab"}, 10))
	require.Equal(t, []string{"lab", "secret"}, h.tagsOf(t, everything, "D"))
}

// The former tenant's tags take no places of the new one's, which would tell how
// many they are.
func tagsMoveFull(t *testing.T, h *Harness) {
	d := h.device("D").enrolls(t)
	var theirs, own []string
	for i := range storage.MaxTags {
		theirs = append(theirs, fmt.Sprint("theirs-", i))
		own = append(own, fmt.Sprint("own-", i))
	}
	h.tags(t, tenantA, []string{"D"}, theirs, nil)
	h.Clock.Advance(time.Minute)
	require.NoError(t, d.begins(t, topicB))
	require.NoError(t, d.saysToken(t, topicB))
	h.Clock.Advance(time.Minute)
	require.Empty(t, h.tags(t, tenantB, []string{"D"}, own, nil).Full)
	require.Len(t, h.tagsOf(t, tenantB, "D"), storage.MaxTags)
	require.Equal(t, []string{"D"}, h.tags(t, tenantB, []string{"D"}, []string{"more"}, nil).Full)
}

func tagsImported(t *testing.T, h *Harness) {
	d := importedDevice("D")
	d.Channel.Queue, d.Users = nil, nil
	d.Tags = []string{"lab", "berlin", "no tag"}
	for range 2 {
		done, err := h.Store.ImportDevices(t.Context(), []*storage.DeviceRecord{d})
		require.NoError(t, err)
		require.Equal(t, []storage.Refusal{{Kind: "tag", Key: "D", Reason: `"no tag": it has other characters than letters, digits and . _ : @ + -`}}, done.Refused)
	}
	require.Equal(t, []string{"berlin", "lab"}, h.tagsOf(t, everything, "D"))
	list, err := h.Store.ExportDevices(t.Context(), []string{"D"})
	require.NoError(t, err)
	require.Equal(t, []string{"berlin", "lab"}, list[0].Tags)
	h.tags(t, everything, []string{"D"}, []string{"here"}, nil)
	d.Tags = append(numbered("t", storage.MaxTags), "lab")
	done, err := h.Store.ImportDevices(t.Context(), []*storage.DeviceRecord{d})
	require.NoError(t, err)
	require.Len(t, done.Refused, 3, "three are there")
	require.Len(t, h.tagsOf(t, everything, "D"), storage.MaxTags)
}
