package sqldb

import (
	"context"
	"database/sql"
	"fmt"
	"strings"
)

// Insert inserts rows, which follow each other in args; see ExecDeferred for its
// error.
func (t *Tx) Insert(ctx context.Context, table string, cols []string, args []any) error {
	return t.insertRows(ctx, table, cols, "", args)
}

// Upsert is Insert that changes the rows that are there; see Dialect.Upsert.
// The keys of args differ from each other.
func (t *Tx) Upsert(ctx context.Context, table string, cols, key, set []string, args []any) error {
	return t.insertRows(ctx, table, cols, t.Dialect.onConflict(key, set), args)
}

// maxInsertRows is the most rows of one statement where inserts go in chunks: in texts of 64, 32, ... rows, as
// few as can stay prepared.
const maxInsertRows = 64

func (t *Tx) insertRows(ctx context.Context, table string, cols []string, end string, args []any) error {
	begin := "INSERT INTO " + table + " (" + strings.Join(cols, ", ") + ") "
	if t.Dialect.arrays {
		places, arrays, err := t.Dialect.toArrays(table, cols, args)
		if err != nil {
			return err
		}
		return t.ExecDeferred(ctx, begin+"SELECT * FROM unnest("+places+")"+end, arrays...)
	}
	for len(args) > 0 {
		rows := len(args) / len(cols)
		if t.Dialect.chunkInserts {
			n := maxInsertRows
			for n > rows {
				n /= 2
			}
			rows = n
		}
		if err := t.ExecDeferred(ctx, begin+"VALUES "+tuples(len(cols), rows)+end, args[:rows*len(cols)]...); err != nil {
			return err
		}
		args = args[rows*len(cols):]
	}
	return nil
}

// toArrays turns rows into one array for each column.
func (d *Dialect) toArrays(table string, cols []string, args []any) (places string, arrays []any, err error) {
	var b strings.Builder
	rows := len(args) / len(cols)
	for i, c := range cols {
		if i > 0 {
			b.WriteString(", ")
		}
		arrayType := d.arrayTypes[table+"."+c]
		b.WriteString("?::" + arrayType)
		column := make([]any, rows)
		for r := range column {
			column[r] = args[r*len(cols)+i]
		}
		array, err := toArray(arrayType, column)
		if err != nil {
			return "", nil, fmt.Errorf("column %s: %w", c, err)
		}
		arrays = append(arrays, array)
	}
	return b.String(), arrays, nil
}

// The arrayTypes of arrays.
const (
	textArray  = "text[]"
	intArray   = "bigint[]"
	bytesArray = "bytea[]"
)

func toArray(arrayType string, column []any) (any, error) {
	switch arrayType {
	case textArray:
		return arrayOf(column, func(v any) (s string, ok bool) {
			s, ok = v.(string)
			return s, ok
		})
	case intArray:
		return arrayOf(column, toInt)
	case bytesArray:
		out := make([][]byte, len(column))
		for i, v := range column {
			b, ok := v.([]byte)
			if v != nil && !ok {
				return nil, fmt.Errorf("a %T is not bytes", v)
			}
			out[i] = b
		}
		return out, nil
	}
	return nil, fmt.Errorf("the database has no such column, or of an unknown type %q", arrayType)
}

// arrayOf is a slice of values, or of pointers if some are missing.
func arrayOf[T any](column []any, to func(any) (T, bool)) (any, error) {
	out, missing := make([]T, len(column)), make([]bool, len(column))
	some := false
	for i, v := range column {
		if null, ok := v.(sql.Null[T]); ok {
			v = nil
			if null.Valid {
				v = null.V
			}
		}
		if v == nil {
			missing[i], some = true, true
			continue
		}
		value, ok := to(v)
		if !ok {
			return nil, fmt.Errorf("a %T does not belong there", v)
		}
		out[i] = value
	}
	if !some {
		return out, nil
	}
	pointers := make([]*T, len(out))
	for i := range out {
		if !missing[i] {
			pointers[i] = &out[i]
		}
	}
	return pointers, nil
}

func toInt(v any) (int64, bool) {
	switch n := v.(type) {
	case int64:
		return n, true
	case int:
		return int64(n), true
	case bool:
		if n {
			return 1, true
		}
		return 0, true
	}
	return 0, false
}

// readArrayTypes fills Dialect.arrayTypes where the engine needs them.
func (db *DB) readArrayTypes(ctx context.Context) error {
	if !db.dialect.arrays {
		return nil
	}
	types := make(map[string]string)
	err := db.Read(ctx, func(ctx context.Context, t *Tx) error {
		err := t.Query(ctx, db.dialect.arrayColumns).Each(func(row Row) error {
			var column, arrayType string
			if err := row.Scan(&column, &arrayType); err != nil {
				return err
			}
			types[column] = arrayType
			return nil
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("reading the columns' types: %w", err)
	}
	db.dialect.arrayTypes = types
	return nil
}
