package sqlstore

import (
	"context"
	"errors"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// tx is a transaction of sqldb with the seal of the store's columns and its
// prepared texts.
type tx struct {
	*sqldb.Tx
	seal  *sealing
	texts *deviceTexts
	// maxUserChannels is Config.MaxUserChannels.
	maxUserChannels int
}

// keyPair is the key of a queue row or a result, or another pair of keys.
type keyPair = sqldb.KeyPair

// queueRows is the table of queue rows. Results have the same key.
var queueRows = sqldb.PairTable{Name: "nano_enrollment_queue", ID: "id", Item: "command_uuid"}

// write runs fn in one transaction; see sqldb.DB.Write.
func (s *Store) write(ctx context.Context, fn func(ctx context.Context, t *tx) error) error {
	return storageError(s.db.Write(ctx, s.wrap(fn)))
}

// read runs fn outside a transaction; see sqldb.DB.Read.
func (s *Store) read(ctx context.Context, fn func(ctx context.Context, t *tx) error) error {
	return storageError(s.db.Read(ctx, s.wrap(fn)))
}

func (s *Store) wrap(fn func(ctx context.Context, t *tx) error) func(context.Context, *sqldb.Tx) error {
	return func(ctx context.Context, t *sqldb.Tx) error {
		return fn(ctx, &tx{Tx: t, seal: s.seal, texts: &s.texts, maxUserChannels: s.cfg.MaxUserChannels})
	}
}

// storageError adds the error of package storage to one of sqldb's.
func storageError(err error) error {
	for _, same := range [...]struct{ from, to error }{
		{sqldb.ErrUnavailable, storage.ErrUnavailable},
		{sqldb.ErrBusy, storage.ErrBusy},
		{sqldb.ErrClosed, storage.ErrClosed},
	} {
		if errors.Is(err, same.from) && !errors.Is(err, same.to) {
			return &translated{err, same.to}
		}
	}
	return err
}

// translated is an error with the text of the first and the identity of both.
type translated struct {
	error
	also error
}

// Unwrap lets errors.Is find both.
func (e *translated) Unwrap() []error { return []error{e.error, e.also} }
