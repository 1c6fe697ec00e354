package sqldb

import (
	"context"
	"errors"
)

// Snapshot runs fn in one transaction that only reads and that sees one state
// of the whole database, however long it takes. Others go on writing. It has
// no time limit and is not retried.
func (db *DB) Snapshot(ctx context.Context, fn func(ctx context.Context, t *Tx) error) error {
	conn, err := db.read.Conn(ctx)
	if err != nil {
		return db.classify(err)
	}
	defer conn.Close()
	// The connection's settings are the transaction's, so it is not used again.
	defer discard(conn)
	t := db.newTx(nil)
	t.q = conn
	for _, text := range db.dialect.snapshot {
		if _, err := conn.ExecContext(ctx, text); err != nil {
			return db.classify(err)
		}
	}
	err = fn(ctx, t)
	_, rolledBack := conn.ExecContext(context.WithoutCancel(ctx), "ROLLBACK")
	return db.classify(errors.Join(err, rolledBack))
}
