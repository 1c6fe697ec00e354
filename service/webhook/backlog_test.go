package webhook

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func names(list []*blocked) (out []string) {
	for _, e := range list {
		out = append(out, e.enrollment)
	}
	slices.Sort(out)
	return out
}

func TestBacklogDue(t *testing.T) {
	b := newBacklog()
	require.Empty(t, b.due(noon, 10))
	b.block("now", noon)
	b.block("later", noon.Add(10*time.Second))
	b.block("soon", noon.Add(200*time.Millisecond))
	require.Empty(t, b.due(noon, 10), "right after a scan there is no other one")
	require.Equal(t, noon.Add(scanPause), b.nextScan)
	now := b.nextScan
	require.Empty(t, b.due(now, 0), "there is no room")
	due := b.due(now, 10)
	require.Equal(t, []string{"now"}, names(due))
	due[0].reserve()
	require.Equal(t, noon.Add(200*time.Millisecond), b.nextScan, "the next scan is when the next one is due")
	due = b.due(b.nextScan, 10)
	require.Equal(t, []string{"soon"}, names(due), "one in flight is not due")
	due[0].reserve()

	// One that ends is due again at its time; one that is not blocked is not.
	b.finish("now", noon.Add(time.Second))
	b.finish("unknown", noon)
	require.Nil(t, b.get("unknown"))
	require.Equal(t, []string{"now"}, names(b.due(noon.Add(time.Second), 10)))
	b.release("now")
	require.Equal(t, 2, b.len())
	require.Equal(t, []string{"later"}, names(b.due(noon.Add(time.Minute), 10)))
}

func TestBacklogScansAgainWhereThereWasNoRoom(t *testing.T) {
	b := newBacklog()
	for i := range 5 {
		b.block(fmt.Sprint(i), noon)
	}
	now, seen := noon, 0
	for range 3 {
		require.LessOrEqual(t, now.Sub(noon), 2*scanPause)
		due := b.due(now, 2)
		for _, e := range due {
			e.reserve()
		}
		seen += len(due)
		now = b.nextScan
	}
	require.Equal(t, 5, seen)
}

func TestBacklogAfterAnOutage(t *testing.T) {
	b := newBacklog()
	require.Nil(t, b.earliest())
	b.block("second", noon.Add(2*time.Minute))
	b.block("first", noon.Add(time.Minute))
	require.Equal(t, "first", b.earliest().enrollment)
	b.earliest().reserve()
	require.Equal(t, "second", b.earliest().enrollment, "one in flight probes already")
	b.finish("first", noon.Add(time.Hour))
	b.makeDue(noon)
	require.Equal(t, []string{"first", "second"}, names(b.due(noon.Add(scanPause), 10)))
}

func TestBacklogIsBounded(t *testing.T) {
	b := newBacklog()
	for i := range maxBlocked {
		require.False(t, b.full())
		b.block(fmt.Sprint(i), noon)
	}
	require.True(t, b.full())
}

func TestOutcomes(t *testing.T) {
	o := newOutcomes(7)
	require.False(t, o.pending())
	require.False(t, o.due(noon))
	e := storage.Event{Seq: 9, Enroll: mdm.EnrollID{ID: "A"}, CreatedAt: noon}
	o.wait(&e)
	o.delivered(8)
	o.cursor = 9
	require.True(t, o.due(noon))
	want := storage.Settlement{
		Cursor: 9, Done: []int64{8},
		Put: []storage.Delivery{{Seq: 9, Enrollment: "A", CreatedAt: noon, State: storage.DeliveryWaiting}},
	}
	require.Equal(t, want, o.settlement())
	require.Equal(t, want, o.settlement(), "it stays until it is stored")
	o.stored(noon)
	require.False(t, o.pending())
	o.delivered(9)
	require.False(t, o.due(noon.Add(storeEvery-1)))
	require.True(t, o.due(noon.Add(storeEvery)))
	require.Equal(t, storage.Settlement{Done: []int64{9}}, o.settlement(), "the cursor did not move")
	for seq := range int64(pageRows) {
		o.delivered(seq)
	}
	require.True(t, o.due(noon), "so many are stored at once")
}
