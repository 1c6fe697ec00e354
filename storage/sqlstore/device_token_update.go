package sqlstore

import (
	"context"
	"fmt"
	"slices"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

var tokenUpdateKind = opKind{
	op:      (*storage.TokenUpdate)(nil),
	needs:   needsEnrollment,
	enables: true, addsUser: true, ordered: true,
	size:  of(func(o *storage.TokenUpdate) int { return len(o.Message.Raw) + len(o.Message.UnlockToken) }),
	topic: of(func(o *storage.TokenUpdate) string { return o.Message.Topic }),
	write: updateTokens,
}

// updateTokens writes TokenUpdates.
func updateTokens(ctx context.Context, t *tx, batch []*opRun, r *opRound) error {
	var plain, unlocking, users []*opRun
	var args []any
	var ids, repeating []string
	for _, p := range batch {
		m := p.op.(*storage.TokenUpdate).Message
		args = append(args, tokenUpdateRow(t, p, r)...)
		ids = append(ids, p.id())
		if e := r.rows.byID[p.id()]; e != nil && e.enrolledAt.Valid { // it may have been owed a push
			repeating = append(repeating, p.id())
		}
		switch {
		case p.src.Enroll.IsUserChannel():
			users = append(users, p)
		case len(m.UnlockToken) > 0:
			unlocking = append(unlocking, p)
		default:
			plain = append(plain, p)
		}
	}
	if _, err := lock(ctx, t, "nano_enrollment_push", ids); err != nil {
		return err
	}
	if err := updateDevices(ctx, t, []string{"token_update", "token_update_at"}, plain, func(p *opRun) []any {
		return []any{t.sealed(tokenUpdateColumn, p.device, notNil(p.op.(*storage.TokenUpdate).Message.Raw)), t.Now}
	}); err != nil {
		return err
	}
	if err := updateDevices(ctx, t, []string{"token_update", "token_update_at", "unlock_token", "unlock_token_at"}, unlocking, func(p *opRun) []any {
		m := p.op.(*storage.TokenUpdate).Message
		return []any{t.sealed(tokenUpdateColumn, p.device, notNil(m.Raw)), t.Now, t.sealed(unlockTokenColumn, p.device, m.UnlockToken), t.Now}
	}); err != nil {
		return err
	}
	if err := putUsers(ctx, t, "token_update", userTokenUpdateColumn, users, func(p *opRun) (*mdm.Enrollment, []byte) {
		m := p.op.(*storage.TokenUpdate).Message
		return m.Identity(), m.Raw
	}); err != nil {
		return err
	}
	err := t.Upsert(ctx, "nano_enrollments",
		slices.Concat([]string{"id", "created_at"}, tokenUpdateColumns), []string{"id"}, tokenUpdateColumns, args)
	if err != nil {
		return fmt.Errorf("storing enrollments: %w", err)
	}
	return makePushable(ctx, t, ids, repeating)
}

// tokenUpdateColumns are the columns of an enrollment that a TokenUpdate sets.
var tokenUpdateColumns = []string{"device_id", "type", "topic", "push_magic", "token", "token_at", "enabled", "token_update_tally",
	"awaiting_configuration", "enrolled_at", "updated_at"}

// tokenUpdateRow counts a TokenUpdate, and returns its enrollment's row.
func tokenUpdateRow(t *tx, p *opRun, r *opRound) []any {
	m := p.op.(*storage.TokenUpdate).Message
	tally, enrolledAt := int64(1), t.Now
	if e := r.rows.byID[p.id()]; e != nil {
		tally = e.tally + 1
		if e.tally > 0 && e.enrolledAt.Valid {
			enrolledAt = e.enrolledAt.V
		}
	}
	p.out.Tally = int(tally)
	p.facts.tally = p.out.Tally
	return []any{p.id(), t.Now, p.device, string(p.src.Enroll.Type), r.topicOf(p, m.Topic), m.PushMagic, notNil(m.Token), t.Now,
		true, tally, m.AwaitingConfiguration, enrolledAt, t.Now}
}

// makePushable makes enrollments with a new token pushable. Pushes owed to
// those that had a token before are due at once.
func makePushable(ctx context.Context, t *tx, ids, repeating []string) error {
	args := make([]any, 0, len(ids))
	for _, id := range ids {
		args = append(args, id)
	}
	err := t.Upsert(ctx, "nano_enrollment_push", []string{"id"}, []string{"id"}, []string{"token_dead_at = NULL", "attempts = 0"}, args)
	if err != nil {
		return fmt.Errorf("storing push rows: %w", err)
	}
	if len(repeating) == 0 {
		return nil
	}
	is, args := t.Among(repeating)
	_, err = t.Exec(ctx, "UPDATE nano_enrollment_push SET push_at = ? WHERE "+pushOwed+" AND id "+is, append([]any{t.Now}, args...)...)
	if err != nil {
		return fmt.Errorf("planning pushes: %w", err)
	}
	return nil
}
