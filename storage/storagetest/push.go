package storagetest

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

func pushTests() []subtest {
	return []subtest{
		{"only enrolled, enabled, living enrollments are targets", pushTargets},
		{"a scope hides targets of other topics", pushScope},
		{"what is owed is claimed at its time, and again if nothing comes of it", pushClaim},
		{"a claim without the lease changes nothing", pushClaimWithoutLease},
		{"sweeps at once claim each debt once", pushClaimAtOnce},
		{"an accepted push pays what was owed when it began", pushPays},
		{"a push that APNs did not take stays owed", pushFails},
		{"a device that polled is not pushed again", pushPolled},
		{"a silent device with commands is pushed again", pushSilent},
		{"silent devices and debts share a claim", pushFair},
		{"what a device refused for now is pushed", pushNotNow},
		{"a dead token is not pushed until there is a new one", pushDeadToken},
		{"the death of an older token is not the new one's", pushOldToken},
		{"who checked out is never pushed", pushCheckedOut},
		{"who is disabled by an operator is not pushed meanwhile", pushDisabled},
		{"topics without a good certificate are passed over until they have one", pushSkips},
		{"a certificate's refusal that is stored late does not put off what the new one brings", pushRefusedLate},
		{"pushes can be made owed", pushOwe},
		{"records of unknown enrollments and of many are taken", pushRecords},
		{"push certificates are kept by topic, with a growing version", pushCerts},
	}
}

// pushLease takes the lease that claims are made under.
func pushLease(t *testing.T, h *Harness) storage.Lease {
	t.Helper()
	return take(t, h.Store, "push", "a")
}

// claim claims the due pushes and returns the sorted ids.
func (h *Harness) claim(t *testing.T, l storage.Lease, change func(*storage.PushClaim)) []string {
	t.Helper()
	now := h.Clock.Now()
	c := storage.PushClaim{Now: now, Until: now.Add(2 * time.Minute), SkipUntil: now.Add(15 * time.Minute), RenewedUntil: now.Add(10 * time.Second), Limit: 100, Silence: 3 * time.Minute}
	if change != nil {
		change(&c)
	}
	targets, _, err := h.Store.ClaimDuePushes(t.Context(), l, c)
	require.NoError(t, err)
	ids := []string{}
	for _, target := range targets {
		ids = append(ids, target.ID)
	}
	slices.Sort(ids)
	return ids
}

// target looks up one that must be a target.
func (h *Harness) target(t *testing.T, id string) storage.PushTarget {
	t.Helper()
	targets, failed, err := h.Store.PushTargets(t.Context(), storage.Scope{}, []string{id})
	require.NoError(t, err)
	require.Empty(t, failed)
	require.Len(t, targets, 1)
	return targets[0]
}

func (h *Harness) pushState(t *testing.T, id string) storage.PushState {
	t.Helper()
	states, err := h.Store.PushStates(t.Context(), storage.Scope{}, []string{id, "nobody"})
	require.NoError(t, err)
	require.Len(t, states, 1)
	return states[id]
}

// accepted records a push that APNs took now.
func (h *Harness) accepted(t *testing.T, id string, next time.Duration) {
	t.Helper()
	target := h.target(t, id)
	now := h.Clock.Now()
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{
		ID: id, At: now, Class: storage.PushAccepted, Status: 200, APNsID: "apns-id", Paid: target.Owed, Attempts: target.Attempts + 1,
		NextAt: now.Add(next), TokenAt: target.TokenAt,
	}}))
}

func (h *Harness) owed(t *testing.T) int64 {
	t.Helper()
	n, err := h.Store.CountOwedPushes(t.Context())
	require.NoError(t, err)
	return n
}

func pushTargets(t *testing.T, h *Harness) {
	h.Enroll(t, "A", "B", "gone")
	require.NoError(t, h.device("begun").authenticate(t))
	require.NoError(t, h.device("gone").checkOut(t))
	h.device("A").user("u").enrolls(t)
	targets, failed, err := h.Store.PushTargets(t.Context(), storage.Scope{}, []string{"B", "A", "A", "gone", "begun", "unknown", "", "A\x00", "A:u"})
	require.NoError(t, err)
	slices.SortFunc(targets, func(a, b storage.PushTarget) int { return slices.Compare([]byte(a.ID), []byte(b.ID)) })
	require.Len(t, targets, 3)
	require.Equal(t, storage.PushTarget{ID: "A", Topic: topicA, Magic: "magic", Token: []byte("token"), TokenAt: h.Clock.Now()}, targets[0])
	require.Equal(t, []string{"", "A\x00", "begun", "gone", "unknown"}, slices.Sorted(maps.Keys(failed)))
	for id, err := range failed {
		require.ErrorIs(t, err, storage.ErrNotEnrolled, id)
	}
}

func pushScope(t *testing.T, h *Harness) {
	h.Enroll(t, "A")
	other := storage.Scope{Topics: []string{"com.apple.mgmt.other"}}
	targets, failed, err := h.Store.PushTargets(t.Context(), other, []string{"A"})
	require.NoError(t, err)
	require.Empty(t, targets)
	require.ErrorIs(t, failed["A"], storage.ErrNotEnrolled)
	failed, err = h.Store.OwePush(t.Context(), other, []string{"A"}, h.Clock.Now())
	require.NoError(t, err)
	require.ErrorIs(t, failed["A"], storage.ErrNotEnrolled)
	require.Zero(t, h.owed(t))
	states, err := h.Store.PushStates(t.Context(), other, []string{"A"})
	require.NoError(t, err)
	require.Empty(t, states)
	states, err = h.Store.PushStates(t.Context(), storage.Scope{Topics: []string{"x", topicA}}, []string{"A"})
	require.NoError(t, err)
	require.Contains(t, states, "A")
}

func pushClaim(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	h.Enroll(t, "A", "B")
	h.enqueue(t, []string{"A"}, "C1")
	require.Empty(t, h.claim(t, l, nil), "the replica that queued pushes first")
	require.EqualValues(t, 1, h.owed(t))
	require.True(t, h.pushState(t, "A").Owed)
	h.Clock.Advance(30 * time.Second)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil))
	require.Empty(t, h.claim(t, l, nil))
	h.Clock.Advance(2 * time.Minute)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil), "nothing came of the first claim")
	require.EqualValues(t, 1, h.owed(t))
}

func pushClaimWithoutLease(t *testing.T, h *Harness) {
	old := pushLease(t, h)
	l := take(t, h.Store, "push", "b")
	h.Enroll(t, "A")
	h.enqueue(t, []string{"A"}, "C1")
	h.Clock.Advance(time.Minute)
	_, _, err := h.Store.ClaimDuePushes(t.Context(), old, storage.PushClaim{Now: h.Clock.Now(), Until: h.Clock.Now().Add(time.Hour), Limit: 10})
	require.ErrorIs(t, err, storage.ErrLeaseLost)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil))
}

func pushClaimAtOnce(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	var ids []string
	for i := range 60 {
		ids = append(ids, fmt.Sprintf("D%02d", i))
	}
	h.Enroll(t, ids...)
	h.enqueue(t, ids, "C1")
	now := h.Clock.Advance(time.Minute)
	var mu sync.Mutex
	var claimed []string
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for range 10 {
				targets, _, err := h.Store.ClaimDuePushes(t.Context(), l, storage.PushClaim{Now: now, Until: now.Add(time.Hour), Limit: 7})
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, target := range targets {
					claimed = append(claimed, target.ID)
				}
				mu.Unlock()
			}
		})
	}
	wg.Go(func() { // devices poll meanwhile
		for _, id := range ids[:20] {
			if _, err := h.device(id).report(t, mdm.StatusIdle, ""); err != nil {
				t.Error(err)
			}
		}
		if err := h.Store.Flush(context.Background()); err != nil {
			t.Error(err)
		}
	})
	wg.Wait()
	slices.Sort(claimed)
	require.Equal(t, claimed, slices.Compact(slices.Clone(claimed)), "each at most once")
	require.Subset(t, claimed, ids[20:])
}

func pushPays(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	h.Enroll(t, "A")
	h.enqueue(t, []string{"A"}, "C1")
	before := h.target(t, "A")
	require.Greater(t, before.Owed, before.Paid)
	h.enqueue(t, []string{"A"}, "C2") // while the push is under way
	now := h.Clock.Now()
	record := storage.PushRecord{ID: "A", At: now, Class: storage.PushAccepted, Status: 200, APNsID: "id-1", Paid: before.Owed, Attempts: 1,
		NextAt: now.Add(time.Hour), TokenAt: before.TokenAt}
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{record}))
	require.EqualValues(t, 1, h.owed(t), "C2 is")
	h.Clock.Advance(30 * time.Second)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil), "and keeps its time")
	h.accepted(t, "A", time.Hour)
	require.Zero(t, h.owed(t))
	h.Clock.Advance(10 * time.Minute)
	require.Empty(t, h.claim(t, l, nil))
	state := h.pushState(t, "A")
	require.Equal(t, storage.PushState{
		Attempts: 2, LastAt: now.Add(30 * time.Second), LastClass: "accepted", LastStatus: 200, LastAPNsID: "apns-id",
		NextAt: now.Add(30*time.Second + time.Hour),
	}, state)
	require.Equal(t, "accepted", h.target(t, "A").LastClass)
}

func pushFails(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	h.Enroll(t, "A")
	h.enqueue(t, []string{"A"}, "C1")
	now := h.Clock.Now()
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{
		ID: "A", At: now, Class: "retry_later", Status: 503, Reason: "ServiceUnavailable", Attempts: 3, NextAt: now.Add(20 * time.Minute),
	}}))
	h.Clock.Advance(19 * time.Minute)
	require.Empty(t, h.claim(t, l, nil), "before its time")
	require.EqualValues(t, 1, h.owed(t))
	require.Equal(t, 3, h.target(t, "A").Attempts)
	h.Clock.Advance(time.Minute)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil))
	state := h.pushState(t, "A")
	require.True(t, state.Owed)
	require.Equal(t, []any{503, "ServiceUnavailable", "retry_later"}, []any{state.LastStatus, state.LastReason, state.LastClass})
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{ID: "A", At: h.Clock.Now(), Class: "do_not_retry", Attempts: 1}}))
	h.Clock.Advance(1000 * time.Hour)
	require.Empty(t, h.claim(t, l, nil), "no time is planned")
	require.True(t, h.pushState(t, "A").Owed)
}

func pushPolled(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	a := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "C1")
	began := h.Clock.Now()
	target := h.target(t, "A")
	h.Clock.Advance(time.Second)
	require.Equal(t, "C1", a.polls(t))
	require.Empty(t, a.reports(t, mdm.StatusAcknowledged, "C1"))
	require.NoError(t, h.Store.Flush(t.Context()))
	// The outcome of a push that began before is stored late.
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{
		ID: "A", At: began, Class: "retry_later", Attempts: 1, NextAt: began.Add(time.Minute), Paid: 0, TokenAt: target.TokenAt,
	}}))
	require.Zero(t, h.owed(t))
	require.Zero(t, h.target(t, "A").Attempts, "it was woken since")
	h.Clock.Advance(100 * time.Hour)
	require.Empty(t, h.claim(t, l, nil))
}

func pushSilent(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	a := h.device("A").enrolls(t)
	h.Enroll(t, "idle")
	h.enqueue(t, []string{"A"}, "C1")
	h.accepted(t, "A", 3*time.Minute)
	h.accepted(t, "idle", 3*time.Minute)
	require.Zero(t, h.owed(t))
	h.Clock.Advance(3 * time.Minute)
	require.Empty(t, h.claim(t, l, func(c *storage.PushClaim) { c.Limit = 1; c.Now = c.Now.Add(-time.Second) }))
	require.Equal(t, []string{"A"}, h.claim(t, l, nil), "for idle no command waits")
	h.accepted(t, "A", time.Hour)
	require.Equal(t, 2, h.target(t, "A").Attempts)
	require.True(t, h.pushState(t, "idle").NextAt.IsZero())

	// It comes, and leaves a command behind.
	h.Clock.Advance(time.Second)
	require.Equal(t, "C1", a.polls(t))
	require.NoError(t, h.Store.Flush(t.Context()))
	planned := h.pushState(t, "A").NextAt

	// Several messages of one visit plan one push, and count all the same.
	h.Clock.Advance(20 * time.Second)
	require.Equal(t, "C1", a.polls(t))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, planned, h.pushState(t, "A").NextAt)
	h.Clock.Advance(3*time.Minute - 20*time.Second)
	require.Empty(t, h.claim(t, l, nil), "it is silent for less than three minutes")
	h.Clock.Advance(19 * time.Second)
	require.Empty(t, h.claim(t, l, nil))
	h.Clock.Advance(time.Second)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil))

	h.Clock.Advance(time.Second)
	require.Equal(t, "C1", a.polls(t))
	h.Clock.Advance(20 * time.Second)
	require.Equal(t, "C1", a.polls(t))
	h.Clock.Advance(20 * time.Second)
	require.Equal(t, "C1", a.polls(t))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, h.Clock.Now().Add(3*time.Minute), h.pushState(t, "A").NextAt)

	// That nothing waits, which is not written yet, does not undo what is planned
	// for what it is offered next.
	require.Empty(t, a.reports(t, mdm.StatusAcknowledged, "C1"))
	_, err := h.Store.Enqueue(t.Context(), storage.Scope{}, &storage.Enqueue{Command: command("C2"), IDs: []string{"A"}, NoPush: true})
	require.NoError(t, err)
	require.Equal(t, "C2", a.polls(t))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.Equal(t, h.Clock.Now().Add(3*time.Minute), h.pushState(t, "A").NextAt)

	h.Clock.Advance(4 * time.Minute)
	require.Empty(t, h.claim(t, l, func(c *storage.PushClaim) { c.Silence = 5 * time.Minute }), "it may be silent longer")
	h.Clock.Advance(time.Minute)
	require.Equal(t, []string{"A"}, h.claim(t, l, func(c *storage.PushClaim) { c.Silence = 5 * time.Minute }))
	h.Clock.Advance(time.Hour)
	require.Empty(t, h.claim(t, l, func(c *storage.PushClaim) { c.Silence = 0 }), "off")
	h.Clock.Advance(time.Hour)
	require.Empty(t, h.claim(t, l, nil), "and nothing is planned any more")
}

func pushFair(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	var silent, owed []string
	for i := range 12 {
		silent = append(silent, fmt.Sprintf("silent%02d", i))
		owed = append(owed, fmt.Sprintf("owed%02d", i))
	}
	h.Enroll(t, slices.Concat(silent, owed)...)
	h.enqueue(t, silent, "C1")
	for _, id := range silent {
		h.accepted(t, id, time.Minute)
	}
	h.Clock.Advance(time.Hour)
	h.enqueue(t, owed, "C2")
	h.Clock.Advance(time.Minute)
	count := func(ids []string) (s, o int) {
		for _, id := range ids {
			if slices.Contains(silent, id) {
				s++
			} else {
				o++
			}
		}
		return s, o
	}
	s, o := count(h.claim(t, l, func(c *storage.PushClaim) { c.Limit = 8 }))
	require.Equal(t, []int{2, 6}, []int{s, o}, "older silent devices do not keep debts waiting")
	s, o = count(h.claim(t, l, func(c *storage.PushClaim) { c.Limit = 8 }))
	require.Equal(t, []int{0, 6}, []int{s, o}, "those without room are put off")
	total := 2
	for range 5 {
		h.Clock.Advance(2 * time.Minute)
		s, _ = count(h.claim(t, l, func(c *storage.PushClaim) { c.Limit = 8 }))
		total += s
	}
	require.GreaterOrEqual(t, total, 10, "and have their turn later")
}

func pushNotNow(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	a := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "C1", "C2")
	require.Equal(t, "C1", a.polls(t))
	require.Equal(t, "C2", a.reports(t, mdm.StatusNotNow, "C1"))
	require.Empty(t, a.reports(t, mdm.StatusAcknowledged, "C2"))
	require.NoError(t, h.Store.Flush(t.Context()))
	require.EqualValues(t, 1, h.owed(t), "it would not come back for C1 by itself")
	require.Equal(t, []string{"A"}, h.claim(t, l, nil), "at once")
}

// dies records that APNs said the token of the target is dead.
func (h *Harness) dies(t *testing.T, target storage.PushTarget, since time.Time) {
	t.Helper()
	now := h.Clock.Now()
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{
		ID: target.ID, At: now, Class: "token_dead", Status: 410, Reason: "Unregistered", Attempts: 1,
		NextAt: now.Add(time.Minute), TokenDeadAt: since, TokenAt: target.TokenAt,
	}}))
}

func pushDeadToken(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	a := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "C1")
	h.accepted(t, "A", time.Minute)
	h.Clock.Advance(time.Hour)
	h.dies(t, h.target(t, "A"), h.Clock.Now())
	_, failed, err := h.Store.PushTargets(t.Context(), storage.Scope{}, []string{"A"})
	require.NoError(t, err)
	require.ErrorIs(t, failed["A"], storage.ErrTokenDead)
	require.Equal(t, h.Clock.Now(), h.pushState(t, "A").TokenDeadAt)
	h.enqueue(t, []string{"A"}, "C2")
	h.Clock.Advance(100 * time.Hour)
	require.Empty(t, h.claim(t, l, nil), "although commands are queued")
	require.Zero(t, h.owed(t), "nobody can pay")
	_, err = a.tokenUpdate(t)
	require.NoError(t, err)
	require.True(t, h.pushState(t, "A").TokenDeadAt.IsZero())
	require.Equal(t, []string{"A"}, h.claim(t, l, nil), "at once")
}

func pushOldToken(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	a := h.device("A").enrolls(t)
	h.enqueue(t, []string{"A"}, "C1")
	old := h.target(t, "A")
	h.Clock.Advance(time.Minute)
	_, err := a.tokenUpdate(t)
	require.NoError(t, err)
	h.dies(t, old, h.Clock.Now().Add(time.Second))
	require.True(t, h.pushState(t, "A").TokenDeadAt.IsZero(), "the push went to the old one")
	h.dies(t, h.target(t, "A"), h.Clock.Now().Add(-time.Second))
	require.True(t, h.pushState(t, "A").TokenDeadAt.IsZero(), "it is newer than APNs' word")
	h.Clock.Advance(time.Minute)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil))
}

func pushCheckedOut(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	a := h.device("A").enrolls(t)
	u := a.user("u").enrolls(t)
	h.enqueue(t, []string{"A", u.enroll.ID}, "C1")
	target := h.target(t, "A")
	require.NoError(t, a.checkOut(t))
	require.Zero(t, h.owed(t))
	// A push that was under way fails late, and must not plan another.
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{
		ID: "A", At: h.Clock.Now(), Class: "retry_later", Attempts: 1, NextAt: h.Clock.Now().Add(time.Minute), TokenAt: target.TokenAt}}))
	h.Clock.Advance(100 * time.Hour)
	require.Empty(t, h.claim(t, l, nil))
	failed, err := h.Store.OwePush(t.Context(), storage.Scope{}, []string{"A", u.enroll.ID}, h.Clock.Now())
	require.NoError(t, err)
	require.Len(t, failed, 2)
	require.Empty(t, h.claim(t, l, nil))
}

func pushDisabled(t *testing.T, h *Harness) {
	h.shared(t)
	l := pushLease(t, h)
	h.Enroll(t, "A")
	h.enqueue(t, []string{"A"}, "C1")
	h.Exec(t, "UPDATE nano_enrollments SET operator_disabled = 1 WHERE id = 'A'")
	h.Clock.Advance(time.Minute)
	require.Empty(t, h.claim(t, l, nil))
	h.Exec(t, "UPDATE nano_enrollments SET operator_disabled = 0 WHERE id = 'A'")
	h.Clock.Advance(time.Hour)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil), "the debt is not forgotten")
}

func pushSkips(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	h.Enroll(t, "A", "B")
	h.enqueue(t, []string{"A", "B"}, "C1")
	h.Clock.Advance(time.Minute)
	skip := func(version int64) func(*storage.PushClaim) {
		return func(c *storage.PushClaim) { c.Skip = map[string]int64{topicA: version} }
	}
	require.Empty(t, h.claim(t, l, skip(0)))
	require.Empty(t, h.claim(t, l, nil), "put off")
	require.EqualValues(t, 2, h.owed(t))
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: topicA, NotAfter: h.Clock.Now()}))
	require.Equal(t, []string{"A", "B"}, h.claim(t, l, nil), "due with the new certificate")
	h.Clock.Advance(2 * time.Minute)
	require.Empty(t, h.claim(t, l, skip(1)))
	h.Clock.Advance(15 * time.Minute)
	require.Equal(t, []string{"A", "B"}, h.claim(t, l, nil), "or after a while")
	h.Clock.Advance(2 * time.Minute)
	require.Empty(t, h.claim(t, l, skip(0)), "the sweeper does not know of the certificate yet")
	h.Clock.Advance(10 * time.Second)
	require.Equal(t, []string{"A", "B"}, h.claim(t, l, nil))
}

// The outcome of a push with the old certificate is stored after the new one.
func pushRefusedLate(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	h.Enroll(t, "A")
	h.enqueue(t, []string{"A"}, "C1")
	began := h.Clock.Now()
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: topicA, NotAfter: began}))
	require.NoError(t, h.Store.RecordPushes(t.Context(), []storage.PushRecord{{
		ID: "A", At: began, Class: "certificate_fault", Status: 403, Attempts: 1, KeepPlan: true,
	}}))
	require.Equal(t, "certificate_fault", h.pushState(t, "A").LastClass)
	require.Equal(t, []string{"A"}, h.claim(t, l, nil))
}

func pushOwe(t *testing.T, h *Harness) {
	l := pushLease(t, h)
	var ids []string
	for i := range 600 {
		ids = append(ids, fmt.Sprintf("D%03d", i))
	}
	h.Enroll(t, "D000", "D550")
	at := h.Clock.Now().Add(30 * time.Second)
	failed, err := h.Store.OwePush(t.Context(), storage.Scope{}, ids, at)
	require.NoError(t, err)
	require.Len(t, failed, 598)
	require.EqualValues(t, 2, h.owed(t))
	require.Equal(t, at, h.pushState(t, "D000").NextAt)
	_, err = h.Store.OwePush(t.Context(), storage.Scope{}, []string{"D000"}, at.Add(time.Hour))
	require.NoError(t, err)
	require.Equal(t, at, h.pushState(t, "D000").NextAt, "a nearer time stays")
	h.Clock.Advance(30 * time.Second)
	require.Equal(t, []string{"D000", "D550"}, h.claim(t, l, nil), "though no command waits")
	h.enqueue(t, []string{"D000"}, "C1") // the numbers do not collide
	require.Equal(t, "C1", h.device("D000").polls(t))
}

func pushRecords(t *testing.T, h *Harness) {
	var ids []string
	var records []storage.PushRecord
	for i := range 777 {
		id := fmt.Sprintf("D%03d", i)
		ids = append(ids, id)
		records = append(records, storage.PushRecord{ID: id, At: h.Clock.Now(), Class: "accepted", Attempts: i})
	}
	h.Enroll(t, ids[:20]...)
	h.Enroll(t, ids[760:]...)
	slices.Reverse(records)
	records = append(records, storage.PushRecord{ID: "D001", At: h.Clock.Now(), Class: "retry_later", Reason: fmt.Sprintf("%0300d\x00\xff", 0), Attempts: 9})
	require.NoError(t, h.Store.RecordPushes(t.Context(), records))
	states, err := h.Store.PushStates(t.Context(), storage.Scope{}, ids)
	require.NoError(t, err)
	require.Len(t, states, 37)
	require.Equal(t, 776, states["D776"].Attempts)
	require.Equal(t, "retry_later", states["D001"].LastClass, "the last one counts")
	require.Len(t, states["D001"].LastReason, 255)
}

func pushCerts(t *testing.T, h *Harness) {
	_, err := h.Store.PushCert(t.Context(), topicA)
	require.ErrorIs(t, err, storage.ErrNotFound)
	_, err = h.Store.PushCertVersion(t.Context(), topicA)
	require.ErrorIs(t, err, storage.ErrNotFound)
	h.Enroll(t, "A", "B", "gone")
	require.NoError(t, h.device("gone").checkOut(t))
	stranded, err := h.Store.StrandedEnrollments(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[string]int64{topicA: 2}, stranded)

	notAfter := h.Clock.Now().Add(24 * time.Hour)
	c := &storage.PushCert{Topic: topicA, CertPEM: []byte("cert 1"), KeyPEM: []byte("key 1"), NotAfter: notAfter}
	require.NoError(t, h.Store.StorePushCert(t.Context(), c))
	first := c.Version
	require.NoError(t, h.Store.RecordPushCertOutcome(t.Context(), topicA, "certificate_fault", h.Clock.Now()))
	infos, err := h.Store.PushCertInfos(t.Context(), storage.Scope{})
	require.NoError(t, err)
	require.Equal(t, []storage.PushCertInfo{{Topic: topicA, NotAfter: notAfter, Version: first, UpdatedAt: h.Clock.Now(), Enrollments: 2,
		LastClass: "certificate_fault", LastAt: h.Clock.Now()}}, infos)

	h.Clock.Advance(time.Hour)
	c = &storage.PushCert{Topic: topicA, CertPEM: []byte("cert 2"), KeyPEM: []byte("key 2"), NotAfter: notAfter}
	require.NoError(t, h.Store.StorePushCert(t.Context(), c))
	require.Greater(t, c.Version, first)
	version, err := h.Store.PushCertVersion(t.Context(), topicA)
	require.NoError(t, err)
	require.Equal(t, c.Version, version)
	read, err := h.Store.PushCert(t.Context(), topicA)
	require.NoError(t, err)
	require.Equal(t, c, read)
	require.NoError(t, h.Store.StorePushCert(t.Context(), &storage.PushCert{Topic: "other", NotAfter: notAfter}))
	infos, err = h.Store.PushCertInfos(t.Context(), storage.Scope{Topics: []string{topicA}})
	require.NoError(t, err)
	require.Len(t, infos, 1)
	require.Empty(t, infos[0].LastClass, "of the new certificate nothing is known")
	stranded, err = h.Store.StrandedEnrollments(t.Context())
	require.NoError(t, err)
	require.Empty(t, stranded)
	require.NoError(t, h.Store.RecordPushCertOutcome(t.Context(), "none", "accepted", h.Clock.Now()), "it may have gone")

	require.NoError(t, h.Store.DeletePushCert(t.Context(), topicA))
	require.ErrorIs(t, h.Store.DeletePushCert(t.Context(), topicA), storage.ErrNotFound)
	_, err = h.Store.PushCert(t.Context(), topicA)
	require.ErrorIs(t, err, storage.ErrNotFound)
	stranded, err = h.Store.StrandedEnrollments(t.Context())
	require.NoError(t, err)
	require.Equal(t, map[string]int64{topicA: 2}, stranded)
	h.Clock.Advance(time.Second)
	again := &storage.PushCert{Topic: topicA, CertPEM: []byte("cert 3"), KeyPEM: []byte("key 3"), NotAfter: notAfter}
	require.NoError(t, h.Store.StorePushCert(t.Context(), again))
	require.Greater(t, again.Version, c.Version, "a replica may remember the deleted one")
}
