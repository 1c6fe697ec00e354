package sqlstore

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var userAuthenticateKind = opKind{
	op:    (*storage.UserAuthenticate)(nil),
	needs: needsDevice, addsUser: true,
	size: of(func(o *storage.UserAuthenticate) int { return len(o.Message.Raw) }),
	write: func(ctx context.Context, t *tx, batch []*opRun, _ *opRound) error {
		return putUsers(ctx, t, "user_authenticate", userAuthenticateColumn, batch, func(p *opRun) (*mdm.Enrollment, []byte) {
			m := p.op.(*storage.UserAuthenticate).Message
			return m.Identity(), m.Raw
		})
	},
}

// putUsers writes users, each with its message. It goes into a column with one
// name in the table and another one for the seal.
func putUsers(ctx context.Context, t *tx, message, sealedAs string, batch []*opRun, read func(*opRun) (*mdm.Enrollment, []byte)) error {
	if len(batch) == 0 {
		return nil
	}
	var args []any
	for _, p := range batch {
		who, raw := read(p)
		args = append(args, p.id(), p.device, clip(cmp.Or(who.UserID, who.EnrollmentUserID)), clip(who.UserShortName),
			clip(who.UserLongName), t.sealed(sealedAs, p.id(), notNil(raw)), t.Now, t.Now, t.Now)
	}
	err := t.Upsert(ctx, "nano_users",
		[]string{"id", "device_id", "user_id", "user_short_name", "user_long_name", message, message + "_at", "created_at", "updated_at"},
		[]string{"id"},
		[]string{"device_id", "user_id", "user_short_name", "user_long_name", message, message + "_at", "updated_at"}, args)
	if err != nil {
		return fmt.Errorf("storing users: %w", err)
	}
	return nil
}

// RemoveUsers implements storage.UserUpkeep.
func (s *Store) RemoveUsers(ctx context.Context, l storage.Lease, before time.Time, limit int) (removed int, err error) {
	err = s.sweep(ctx, l, func(ctx context.Context, t *tx) error {
		removed = 0
		const old = "token_update_at IS NULL AND updated_at < ?"
		const unenrolled = " AND NOT EXISTS (SELECT 1 FROM nano_enrollments e WHERE e.id = nano_users.id)"
		ids, err := sqldb.Column[string](t.Query(ctx, "SELECT id FROM nano_users WHERE "+old+unenrolled+" ORDER BY updated_at LIMIT ?", micros(before), limit))
		if err != nil || len(ids) == 0 {
			return err
		}
		slices.Sort(ids)
		is, args := t.Among(ids)
		n, err := t.Exec(ctx, "DELETE FROM nano_users WHERE id "+is+" AND "+old+unenrolled, append(args, micros(before))...)
		removed = int(n)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("removing users: %w", err)
	}
	return removed, nil
}
