package sqlstore

import (
	"context"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var (
	setBootstrapTokenKind = opKind{
		op:    (*storage.SetBootstrapToken)(nil),
		needs: needsDevice, ordered: true,
		size:  of(func(o *storage.SetBootstrapToken) int { return len(o.Token) }),
		write: setBootstrapTokens,
	}
	getBootstrapTokenKind = opKind{
		op:    (*storage.GetBootstrapToken)(nil),
		reads: func(storage.Op) bool { return true },
		poll: func(ctx context.Context, t *tx, batch []*opRun, _ map[string]*enrollmentState) error {
			return readBootstrapTokens(ctx, t, batch)
		},
		write: func(ctx context.Context, t *tx, batch []*opRun, _ *opRound) error {
			return readBootstrapTokens(ctx, t, batch)
		},
	}
)

func setBootstrapTokens(ctx context.Context, t *tx, batch []*opRun, _ *opRound) error {
	return updateDevices(ctx, t, []string{"bootstrap_token", "bootstrap_token_at"}, batch, func(p *opRun) []any {
		token := p.op.(*storage.SetBootstrapToken).Token
		if len(token) == 0 {
			return []any{nil, nil}
		}
		return []any{t.sealed(bootstrapTokenColumn, p.device, token), t.Now}
	})
}

func readBootstrapTokens(ctx context.Context, t *tx, batch []*opRun) error {
	devices := make([]string, len(batch))
	for i, p := range batch {
		devices[i] = p.device
	}
	is, args := t.Among(devices)
	tokens := make(map[string][]byte, len(batch))
	unreadable := make(map[string]error)
	err := t.Query(ctx, "SELECT id, bootstrap_token FROM nano_devices WHERE id "+is, args...).Each(func(row sqldb.Row) error {
		var id string
		var token []byte
		if err := row.Scan(&id, &token); err != nil {
			return err
		}
		var err error
		if tokens[id], err = t.opened(bootstrapTokenColumn, id, token); err != nil {
			unreadable[id] = err
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading bootstrap tokens: %w", err)
	}
	for _, p := range batch {
		p.out.BootstrapToken, p.err = tokens[p.device], unreadable[p.device]
	}
	return nil
}
