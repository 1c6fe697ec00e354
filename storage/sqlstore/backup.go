package sqlstore

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// BackupOptions are the options of Backup.
type BackupOptions struct {
	// PlainSecrets writes secrets that are stored unsealed as they are. Without
	// it, and without Config.Sealer, such a database is refused.
	PlainSecrets bool
	// Progress is called with a table and the number of its rows so far; it may
	// be nil.
	Progress func(table string, rows int64)
}

// ErrPlainSecrets: the backup would hold secrets that are not sealed.
var ErrPlainSecrets = errors.New("the database holds secrets that are not sealed, and no seal key was given")

// Backup writes a snapshot of the whole database to a file that Restore reads
// on every engine. Replicas may run meanwhile. Backup writes nothing to the
// database, whose schema must be the one of this program. Sealed values are
// copied; secrets that are not sealed are sealed with Config.Sealer.
func Backup(ctx context.Context, cfg Config, to io.Writer, o BackupOptions) (rows int64, err error) {
	tables, err := backupSchema()
	if err != nil {
		return 0, err
	}
	db, err := openExisting(ctx, cfg)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	err = db.Snapshot(ctx, func(ctx context.Context, t *sqldb.Tx) error {
		b := &backup{t: &tx{Tx: t, seal: newSealing(cfg)}, o: o, sealing: cfg.Sealer != nil}
		head := BackupHead{ID: rand.Text(), CreatedAt: time.UnixMicro(t.Now).UTC(), Engine: t.Dialect.Name(), Tables: tables}
		if head.Schema, err = knownSchema(ctx, t); err != nil {
			return err
		}
		if b.seals, err = sealChecks(ctx, b.t); err != nil {
			return fmt.Errorf("reading the seal keys in use: %w", err)
		}
		for id := range b.seals {
			head.SealKeys = append(head.SealKeys, id)
		}
		if b.sealing {
			head.SealKeys = append(head.SealKeys, cfg.Sealer.KeyIDs()[0])
		}
		slices.Sort(head.SealKeys)
		head.SealKeys = slices.Compact(head.SealKeys)
		if b.w, err = newBackupWriter(to, head); err != nil {
			return err
		}
		for i := range tables {
			if err := b.table(ctx, &tables[i]); err != nil {
				return fmt.Errorf("table %s: %w", tables[i].Name, err)
			}
		}
		rows = b.rows
		return b.w.close()
	})
	if err != nil {
		return 0, fmt.Errorf("backing up: %w", storageError(err))
	}
	return rows, nil
}

// backup is a run of Backup.
type backup struct {
	t       *tx
	o       BackupOptions
	w       *backupWriter
	sealing bool
	seals   map[string][]byte // rows of nano_seal
	rows    int64
}

// backupPage is how many rows a query reads.
const backupPage = 1000

// table writes a table in the order of its key.
func (b *backup) table(ctx context.Context, table *backupTable) error {
	secret := secretColumns(table)
	n := int64(0)
	write := func(values []any) error {
		if err := b.seal(table, secret, values); err != nil {
			return err
		}
		n++
		if b.o.Progress != nil && n%(100*backupPage) == 0 {
			b.o.Progress(table.Name, n)
		}
		return b.w.row(values)
	}
	if err := b.pages(ctx, table, write); err != nil {
		return err
	}
	if table.Name == "nano_seal" && b.sealing {
		id := b.t.seal.keys.KeyIDs()[0]
		if _, known := b.seals[id]; !known {
			if err := write([]any{id, b.t.sealed(sealCheckColumn, id, []byte(sealCheck)), b.t.Now}); err != nil {
				return err
			}
		}
	}
	b.rows += n
	if b.o.Progress != nil {
		b.o.Progress(table.Name, n)
	}
	return b.w.endTable(n)
}

// pages reads a table page by page. With a key of two columns it reads one
// value of the first column at a time, which is an index seek on every engine;
// a comparison of pairs is not.
func (b *backup) pages(ctx context.Context, table *backupTable, write func([]any) error) error {
	begin := "SELECT " + strings.Join(table.names(), ", ") + " FROM " + table.Name
	order := " ORDER BY " + strings.Join(table.Key, ", ") + " LIMIT ?"
	at := make([]int, len(table.Key))
	for i, name := range table.Key {
		at[i] = table.column(name)
	}
	var last []any // the key of the row before
	for equal := -1; ; {
		where, args := "", []any(nil)
		switch {
		case last == nil:
		default: // equal is the number of key columns that keep their value
			for i := range equal {
				where += table.Key[i] + " = ? AND "
				args = append(args, last[i])
			}
			where = " WHERE " + where + table.Key[equal] + " > ?"
			args = append(args, last[equal])
		}
		n := 0
		err := b.t.Query(ctx, begin+where+order, append(args, backupPage)...).Each(func(row sqldb.Row) error {
			values, err := scanRow(table, row)
			if err != nil {
				return err
			}
			n++
			last = make([]any, len(at))
			for i, column := range at {
				last[i] = values[column]
			}
			return write(values)
		})
		if err != nil {
			return err
		}
		switch {
		case n == backupPage:
			equal = len(table.Key) - 1
		case last == nil || equal <= 0:
			return nil
		default:
			equal--
		}
	}
}

// scanRow reads a row as values of a backup.
func scanRow(table *backupTable, row sqldb.Row) ([]any, error) {
	into := make([]any, len(table.Columns))
	for i, c := range table.Columns {
		switch c.Kind {
		case kindInt:
			into[i] = new(*int64)
		case kindText:
			into[i] = new(*string)
		case kindBytes:
			into[i] = new([]byte)
		}
	}
	if err := row.Scan(into...); err != nil {
		return nil, err
	}
	values := make([]any, len(into))
	for i, v := range into {
		switch v := v.(type) {
		case **int64:
			if *v != nil {
				values[i] = **v
			}
		case **string:
			if *v != nil {
				values[i] = **v
			}
		case *[]byte:
			// SQLite's driver reads empty bytes as none. They mean the same.
			if len(*v) > 0 {
				values[i] = *v
			} else if table.Columns[i].Required {
				values[i] = []byte{}
			}
		}
	}
	return values, nil
}

// secretColumns maps the places of a table's sealed columns to their full
// names. Commands are sealed only on request, and may be plain.
func secretColumns(table *backupTable) map[int]string {
	columns := make(map[int]string)
	for _, sealed := range sealedTables(false) {
		if sealed.name != table.Name || sealed.plain {
			continue
		}
		for _, column := range sealed.columns {
			columns[table.column(strings.TrimPrefix(column, table.Name+"."))] = column
		}
	}
	return columns
}

// seal seals the secrets of a row that are not sealed yet.
func (b *backup) seal(table *backupTable, secret map[int]string, values []any) error {
	for i, column := range secret {
		value, ok := values[i].([]byte)
		if !ok || len(value) == 0 {
			continue
		}
		if column == eventColumn && !storage.BearsTokens(values[table.column("topic")].(string)) {
			continue
		}
		if bytes.HasPrefix(value, []byte(sealMark)) && !bytes.HasPrefix(value, []byte(sealMark+noKey)) {
			continue
		}
		if !b.sealing {
			if b.o.PlainSecrets {
				continue
			}
			return ErrPlainSecrets
		}
		key := values[table.column(table.Key[0])].(string)
		plain, err := b.t.opened(column, key, value)
		if err != nil {
			return err
		}
		values[i] = b.t.sealed(column, key, plain)
	}
	return nil
}
