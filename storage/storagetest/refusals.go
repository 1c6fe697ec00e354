package storagetest

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"

	"github.com/nanomdm/nanomdm/storage"
)

func refusalTests() []subtest {
	return []subtest{
		{"a refusal is counted for its enrollment", refusalCounted},
		{"a certificate of another enrollment is told at both", refusalAtBoth},
		{"a refusal of nobody is not kept", refusalOfNobody},
		{"refusals of several replicas add up", refusalConcurrent},
		{"refusals go with their enrollment", refusalDeleted},
	}
}

func refusals(t *testing.T, h *Harness, id string) []storage.EnrollmentRefusal {
	t.Helper()
	list, err := h.Store.EnrollmentRefusals(t.Context(), id)
	require.NoError(t, err)
	return list
}

func refusalCounted(t *testing.T, h *Harness) {
	d := h.device("D").with("A").enrolls(t)
	d.user("U").enrolls(t)
	first := h.Clock.Now().UTC().Truncate(time.Microsecond)
	last := first.Add(time.Minute)
	record := func(r ...storage.DeviceRefusal) { require.NoError(t, h.Store.RecordRefusals(t.Context(), r)) }
	record(
		storage.DeviceRefusal{Certificate: "A", Enrollment: "D", Cause: "too_large", Count: 2, First: first, Last: first, Detail: "larger"},
		storage.DeviceRefusal{Certificate: "A", Cause: "malformed", Count: 1, First: last, Last: last, Detail: "odd \x00\xff" + strings.Repeat("é", 300)},
		storage.DeviceRefusal{Certificate: "A", Enrollment: "D:U", Cause: "too_large", Count: 1, First: first, Last: first},
		storage.DeviceRefusal{Certificate: "of an intruder", Enrollment: "D", Cause: "not_enrolled", Count: 1, First: first, Last: first},
	)
	record(storage.DeviceRefusal{Certificate: "A", Enrollment: "D", Cause: "too_large", Count: 3, First: last, Last: last.Add(time.Second), Detail: "larger still"})
	list := refusals(t, h, "D")
	require.Len(t, list, 3)
	require.Equal(t, storage.EnrollmentRefusal{Cause: "too_large", Count: 5, Detail: "larger still", First: first, Last: last.Add(time.Second)}, list[0])
	require.Equal(t, "odd \ufffd"+strings.Repeat("é", 250), list[1].Detail)
	require.Equal(t, "not_enrolled", list[2].Cause)
	require.Len(t, refusals(t, h, "D:U"), 1)
	require.Empty(t, refusals(t, h, "nobody"))
}

func refusalAtBoth(t *testing.T, h *Harness) {
	h.device("D").with("A").enrolls(t)
	h.device("E").with("B").enrolls(t)
	now := h.Clock.Now()
	require.NoError(t, h.Store.RecordRefusals(t.Context(), []storage.DeviceRefusal{
		{Certificate: "A", Enrollment: "E", Cause: storage.CauseForeignCertificate, Count: 1, First: now, Last: now},
		{Certificate: "A", Enrollment: "unknown", Cause: "malformed", Count: 1, First: now, Last: now},
	}))
	require.Equal(t, "E", refusals(t, h, "D")[0].Other)
	require.Equal(t, "unknown", refusals(t, h, "D")[1].Other)
	require.Len(t, refusals(t, h, "E"), 1)
	require.Equal(t, "D", refusals(t, h, "E")[0].Other)
}

func refusalOfNobody(t *testing.T, h *Harness) {
	now := h.Clock.Now()
	require.NoError(t, h.Store.RecordRefusals(t.Context(), []storage.DeviceRefusal{
		{Certificate: "A", Enrollment: "D", Cause: "malformed", Count: 1, First: now, Last: now},
		{Certificate: "A", Enrollment: "odd\x00" + strings.Repeat("x", 300), Cause: "malformed", Count: 1, First: now, Last: now},
		{Certificate: "A", Cause: "malformed", Count: 1, First: now, Last: now},
	}))
	require.NoError(t, h.Store.RecordRefusals(t.Context(), nil))
	require.Empty(t, refusals(t, h, "D"))
}

func refusalConcurrent(t *testing.T, h *Harness) {
	const replicas, rounds, devices = 4, 5, 6
	var batch []storage.DeviceRefusal
	now := h.Clock.Now()
	for i := range devices {
		id := fmt.Sprintf("D%d", i)
		h.device(id).with("C" + id).enrolls(t)
		batch = append(batch, storage.DeviceRefusal{Certificate: "C" + id, Enrollment: id, Cause: "malformed", Count: 2, First: now, Last: now})
	}
	group, ctx := errgroup.WithContext(context.Background())
	for range replicas {
		group.Go(func() error {
			for range rounds {
				if err := h.Store.RecordRefusals(ctx, batch); err != nil {
					return err
				}
			}
			return nil
		})
	}
	require.NoError(t, group.Wait())
	for i := range devices {
		list := refusals(t, h, fmt.Sprintf("D%d", i))
		require.Len(t, list, 1)
		require.EqualValues(t, 2*replicas*rounds, list[0].Count)
	}
}

func refusalDeleted(t *testing.T, h *Harness) {
	h.device("D").with("A").enrolls(t)
	now := h.Clock.Now()
	require.NoError(t, h.Store.RecordRefusals(t.Context(), []storage.DeviceRefusal{{Certificate: "A", Enrollment: "D", Cause: "malformed", Count: 1, First: now, Last: now}}))
	require.Len(t, refusals(t, h, "D"), 1)
	require.NoError(t, h.Store.DeleteEnrollment(t.Context(), everything, "D", auditRecord("x")))
	require.Empty(t, refusals(t, h, "D"))
}
