package sqlstore

import (
	"bytes"
	"context"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// deviceMessages are the messages of a device that the store keeps.
type deviceMessages struct{ authenticate, tokenUpdate, bootstrapToken []byte }

// settleCopies settles copies from another server that must undo nothing: see
// storage.Source.
func settleCopies(ctx context.Context, t *tx, batch []*opRun, certs *certificates) error {
	var copies []*opRun
	var devices []string
	for _, p := range batch {
		if _, begins := p.op.(*storage.Authenticate); p.err == nil && p.src.Copy && certs.devices[p.device] && (begins || certs.live[p.device]) {
			copies = append(copies, p)
			devices = append(devices, p.device)
		}
	}
	if len(copies) == 0 {
		return nil
	}
	kept, err := readMessages(ctx, t, devices)
	if err != nil {
		return err
	}
	for _, p := range copies {
		switch {
		case keeps(kept[p.device], p.op):
			p.settled = true
		case certs.live[p.device]:
			p.err = storage.ErrOwnWord
		}
	}
	return nil
}

// keeps says whether a message is the stored one. Messages of user channels are
// not compared.
func keeps(m deviceMessages, op storage.Op) bool {
	switch o := op.(type) {
	case *storage.Authenticate:
		return bytes.Equal(m.authenticate, o.Message.Raw)
	case *storage.TokenUpdate:
		return !o.Src.Enroll.IsUserChannel() && bytes.Equal(m.tokenUpdate, o.Message.Raw)
	case *storage.SetBootstrapToken:
		return bytes.Equal(m.bootstrapToken, o.Token)
	}
	return false
}

func readMessages(ctx context.Context, t *tx, devices []string) (map[string]deviceMessages, error) {
	kept := make(map[string]deviceMessages, len(devices))
	place, args := sqldb.InList(devices)
	err := t.Query(ctx, "SELECT id, authenticate, token_update, bootstrap_token FROM nano_devices WHERE id IN "+place, args...).Each(func(row sqldb.Row) error {
		var id string
		var m deviceMessages
		if err := row.Scan(&id, &m.authenticate, &m.tokenUpdate, &m.bootstrapToken); err != nil {
			return err
		}
		for column, value := range map[string]*[]byte{
			authenticateColumn: &m.authenticate, tokenUpdateColumn: &m.tokenUpdate, bootstrapTokenColumn: &m.bootstrapToken,
		} {
			if len(*value) == 0 {
				continue
			}
			// A value that cannot be opened differs from every message.
			*value, _ = t.opened(column, id, *value)
		}
		kept[id] = m
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading messages that are kept: %w", err)
	}
	return kept, nil
}
