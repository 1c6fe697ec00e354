package storagetest

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/storage"
)

func auditTests() []subtest {
	return []subtest{
		{"records are listed newest first, page by page", auditPages},
		{"records are found by who, action, target and time", auditFilters},
		{"texts that fit no column are cut", auditLong},
		{"old records go in batches, under the lease", auditRemoved},
	}
}

// appendAudit appends a record.
func appendAudit(t *testing.T, h *Harness, r storage.AuditRecord) storage.AuditRecord {
	t.Helper()
	require.NoError(t, h.Store.AppendAudit(t.Context(), &r))
	return r
}

func auditPages(t *testing.T, h *Harness) {
	var all []storage.AuditRecord
	for i := range 7 {
		if i%3 != 0 { // some at the same time
			h.Clock.Advance(time.Second)
		}
		r := appendAudit(t, h, storage.AuditRecord{Who: "ann", Action: "command.cancel", Target: fmt.Sprint("T", i), Detail: "two\nlines", Outcome: storage.AuditDone, RequestID: "R"})
		require.Equal(t, h.Clock.Now(), r.At)
		require.NotEmpty(t, r.ID)
		all = append(all, r)
	}
	whole, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{}, storage.AuditKey{}, 100)
	require.NoError(t, err)
	require.ElementsMatch(t, all, whole)
	for i := 1; i < len(whole); i++ {
		require.False(t, whole[i].At.After(whole[i-1].At))
	}
	var paged []storage.AuditRecord
	var after storage.AuditKey
	for {
		page, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{}, after, 2)
		require.NoError(t, err)
		if len(page) == 0 {
			break
		}
		paged = append(paged, page...)
		last := page[len(page)-1]
		after = storage.AuditKey{At: last.At, ID: last.ID}
	}
	require.Equal(t, whole, paged)
}

func auditFilters(t *testing.T, h *Harness) {
	begin := h.Clock.Now()
	for i, who := range []string{"ann", "bob", "ann", "Ann"} {
		appendAudit(t, h, storage.AuditRecord{Who: who, Action: fmt.Sprint("a", i%2), Target: fmt.Sprint("t", i/2), Detail: fmt.Sprint(i)})
		h.Clock.Advance(time.Minute)
	}
	for _, tc := range []struct {
		name string
		f    storage.AuditFilter
		want string
	}{
		{"all", storage.AuditFilter{}, "3210"},
		{"who, byte for byte", storage.AuditFilter{Who: "ann"}, "20"},
		{"action", storage.AuditFilter{Action: "a1"}, "31"},
		{"target", storage.AuditFilter{Target: "t0"}, "10"},
		{"from", storage.AuditFilter{From: begin.Add(time.Minute)}, "321"},
		{"to", storage.AuditFilter{To: begin.Add(time.Minute)}, "0"},
		{"all of them", storage.AuditFilter{Who: "ann", Action: "a0", Target: "t1", From: begin, To: begin.Add(time.Hour)}, "2"},
		{"nothing", storage.AuditFilter{Who: "ann", Action: "a1"}, ""},
	} {
		records, err := h.Store.AuditRecords(t.Context(), tc.f, storage.AuditKey{}, 10)
		require.NoError(t, err, tc.name)
		got := ""
		for _, r := range records {
			got += r.Detail
		}
		require.Equal(t, tc.want, got, tc.name)
	}
}

func auditLong(t *testing.T, h *Harness) {
	long := strings.Repeat("é", 10_000)
	appendAudit(t, h, storage.AuditRecord{Who: long, Action: long, Target: long, Detail: long + "\x00\xff", Outcome: long, RequestID: long})
	records, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{Target: long}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, records, 1)
	require.Equal(t, strings.Repeat("é", 255), records[0].Target)
	require.Less(t, len(records[0].Detail), 9000)
}

func auditRemoved(t *testing.T, h *Harness) {
	for i := range 5 {
		appendAudit(t, h, storage.AuditRecord{Who: "ann", Action: "a", Detail: fmt.Sprint(i)})
		h.Clock.Advance(time.Hour)
	}
	old := take(t, h.Store, "history", "a")
	l := take(t, h.Store, "history", "b")
	before := h.Clock.Now().Add(-90 * time.Minute)
	_, err := h.Store.RemoveAudit(t.Context(), old, before, 3)
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	for _, want := range []int{3, 1, 0} {
		n, err := h.Store.RemoveAudit(t.Context(), l, before, 3)
		require.NoError(t, err)
		require.Equal(t, want, n)
	}
	left, err := h.Store.AuditRecords(t.Context(), storage.AuditFilter{}, storage.AuditKey{}, 10)
	require.NoError(t, err)
	require.Len(t, left, 1)
	require.Equal(t, "4", left[0].Detail)
}
