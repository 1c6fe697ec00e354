package sqlstore

import (
	"cmp"
	"context"
	"fmt"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
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
