package sqlstore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// restoreLease is the name of the row of nano_leases during a restore. Its
// holder is the id of the backup.
const restoreLease = "restore"

var (
	// ErrNotEmpty: the database to restore into is in use.
	ErrNotEmpty = errors.New("the database is not empty")
	// ErrRestoring: a restore into the database has not ended.
	ErrRestoring = errors.New("a restore into the database did not end: run it again, or start with an empty database")
)

// Restore reads a backup into an empty database, which it migrates. It checks
// the whole file first. Repeating an interrupted restore with the same file
// continues it; until it has ended, Open refuses the database.
func Restore(ctx context.Context, cfg Config, file io.ReadSeeker, progress func(table string, rows int64)) (head BackupHead, rows int64, err error) {
	if head, _, err = CheckBackup(file); err != nil {
		return head, 0, err
	}
	if known := migrations().Newest(); head.Schema > known {
		return head, 0, fmt.Errorf("%w: the backup has schema %d, this binary knows %d", ErrSchema, head.Schema, known)
	}
	s, err := connectStore(ctx, cfg)
	if err != nil {
		return head, 0, err
	}
	defer func() { err = errors.Join(err, s.db.Close()) }()
	if err := s.beginRestore(ctx, head); err != nil {
		return head, 0, err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return head, 0, err
	}
	b, _, err := newBackupReader(file)
	if err != nil {
		return head, 0, err
	}
	defer b.close()
	for i := range head.Tables {
		n, err := s.restoreTable(ctx, b, &head.Tables[i])
		if err != nil {
			return head, 0, fmt.Errorf("restoring table %s: %w", head.Tables[i].Name, err)
		}
		rows += n
		if progress != nil {
			progress(head.Tables[i].Name, n)
		}
	}
	err = s.write(ctx, func(ctx context.Context, t *tx) error {
		_, err := t.Exec(ctx, "DELETE FROM nano_leases WHERE name = ?", restoreLease)
		return err
	})
	return head, rows, err
}

// CheckBackup reads a backup from end to end and counts its rows by table. An
// incomplete one is ErrBackup.
func CheckBackup(file io.Reader) (head BackupHead, rows map[string]int64, err error) {
	b, head, err := newBackupReader(file)
	if err != nil {
		return head, nil, err
	}
	defer b.close()
	known, err := backupSchema()
	if err != nil {
		return head, nil, err
	}
	rows = make(map[string]int64)
	for i := range head.Tables {
		table := &head.Tables[i]
		// Names go into statements.
		at := slices.IndexFunc(known, func(k backupTable) bool { return k.Name == table.Name })
		if at < 0 || !slices.Equal(known[at].Key, table.Key) ||
			slices.ContainsFunc(table.Columns, func(c backupColumn) bool { return !slices.Contains(known[at].Columns, c) }) {
			return head, nil, fmt.Errorf("%w: its table %.60q is not one that this binary knows", ErrBackup, table.Name)
		}
		n := int64(0)
		for {
			values, err := b.row(table, n)
			if err != nil {
				return head, nil, err
			}
			if values == nil {
				break
			}
			n++
		}
		rows[table.Name] = n
	}
	return head, rows, b.end()
}

// beginRestore records that the restore of a backup has begun. The database
// must be empty but for rows of the same restore.
func (s *Store) beginRestore(ctx context.Context, head BackupHead) error {
	return s.write(ctx, func(ctx context.Context, t *tx) error {
		holders, err := sqldb.Column[string](t.Query(ctx, "SELECT holder FROM nano_leases WHERE name = ?", restoreLease))
		if err != nil {
			return err
		}
		if len(holders) > 0 {
			if holders[0] != head.ID {
				return fmt.Errorf("%w (it was of another backup)", ErrRestoring)
			}
			return nil
		}
		for i := range head.Tables {
			table := &head.Tables[i]
			found, err := sqldb.Column[int64](t.Query(ctx, "SELECT 1 FROM "+table.Name+" LIMIT 1"))
			if err != nil {
				return err
			}
			if len(found) > 0 {
				return fmt.Errorf("%w: table %s has rows", ErrNotEmpty, table.Name)
			}
		}
		_, err = t.Exec(ctx, t.Dialect.Upsert("nano_leases", []string{"name", "holder", "fence", "beat"}, []string{"name"}, nil), restoreLease, head.ID, 0, 0)
		return err
	})
}

// Bounds of a transaction of a restore.
const (
	restoreRows  = 2000
	restoreBytes = 8 << 20
)

func (s *Store) restoreTable(ctx context.Context, b *backupReader, table *backupTable) (rows int64, err error) {
	var set []string
	for _, name := range table.names() {
		if !slices.Contains(table.Key, name) {
			set = append(set, name)
		}
	}
	var args []any
	size := 0
	flush := func() error {
		if len(args) == 0 {
			return nil
		}
		batch := args
		args, size = nil, 0
		return s.write(ctx, func(ctx context.Context, t *tx) error {
			return t.upsertChunks(ctx, table.Name, table.names(), table.Key, set, slices.Clone(batch))
		})
	}
	for {
		values, err := b.row(table, rows)
		if err != nil {
			return 0, err
		}
		if values == nil {
			return rows, flush()
		}
		rows++
		args = append(args, values...)
		for _, v := range values {
			if raw, ok := v.([]byte); ok {
				size += len(raw)
			}
		}
		if len(args) >= restoreRows*len(table.Columns) || size > restoreBytes {
			if err := flush(); err != nil {
				return 0, err
			}
		}
	}
}

// checkRestored refuses a database whose restore has not ended.
func (s *Store) checkRestored(ctx context.Context) error {
	return s.read(ctx, func(ctx context.Context, t *tx) error {
		found, err := sqldb.Column[string](t.Query(ctx, "SELECT holder FROM nano_leases WHERE name = ?", restoreLease))
		if err == nil && len(found) > 0 {
			return ErrRestoring
		}
		return err
	})
}
