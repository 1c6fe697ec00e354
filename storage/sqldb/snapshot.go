package sqldb

import (
	"context"
	"database/sql"
	"errors"
)

// Snapshot is a transaction that only reads and that sees one state of the
// whole database, however long it takes. Others go on writing. It has no time
// limit and is not retried. It is used by one goroutine at a time.
type Snapshot struct {
	Tx *Tx

	db   *DB
	conn *sql.Conn
}

// OpenSnapshot begins a snapshot. With SQLite the first query decides which
// state it sees. Close must be called to release its connection.
func (db *DB) OpenSnapshot(ctx context.Context) (*Snapshot, error) {
	conn, err := db.read.Conn(ctx)
	if err != nil {
		return nil, db.classify(err)
	}
	s := &Snapshot{Tx: db.newTx(nil), db: db, conn: conn}
	s.Tx.q = conn
	for _, text := range db.dialect.snapshot {
		if _, err := conn.ExecContext(ctx, text); err != nil {
			s.release()
			return nil, db.classify(err)
		}
	}
	return s, nil
}

// Close ends the snapshot.
func (s *Snapshot) Close() error {
	_, err := s.conn.ExecContext(context.Background(), "ROLLBACK")
	s.release()
	return s.db.classify(err)
}

// release closes the connection, whose settings are those of the transaction.
func (s *Snapshot) release() {
	discard(s.conn)
	_ = s.conn.Close() // it is closed already
}

// Snapshot runs fn in a snapshot.
func (db *DB) Snapshot(ctx context.Context, fn func(ctx context.Context, t *Tx) error) error {
	s, err := db.OpenSnapshot(ctx)
	if err != nil {
		return err
	}
	return db.classify(errors.Join(fn(ctx, s.Tx), s.Close()))
}
