package sqlstore

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// among returns the places and arguments of an IN list. Its length is a power
// of two, with the last id repeated, so that there are few different texts to
// prepare and to plan. There must be an id.
func among(ids []string) (place string, args []any) {
	n := 1
	for n < len(ids) {
		n *= 2
	}
	args = make([]any, n)
	for i := range args {
		args[i] = ids[min(i, len(ids)-1)]
	}
	return in(n), args
}

// among returns what follows the name of a column that must be one of ids,
// and its arguments. There must be an id. A plan for any array would compare
// each row with each of its elements if it read the table; that of a join
// looks them up.
func (t *tx) among(ids []string) (is string, args []any) {
	if t.d.arrays {
		return "IN (SELECT unnest(" + t.d.hide("?::text[]") + "))", []any{ids}
	}
	place, args := among(ids)
	return "IN " + place, args
}

// locked locks the rows of a table that have one of ids, in key order where
// there are locks, and reads columns of them. PostgreSQL looks each id up: a
// plan for all of them that was made while the table was small would go on
// reading all of it.
func (t *tx) locked(ctx context.Context, columns, table string, ids []string) (*sql.Rows, error) {
	q, args := t.lockedText(columns, table, slices.Compact(slices.Sorted(slices.Values(ids))))
	return t.query(ctx, q, args...)
}

func (t *tx) lockedText(columns, table string, ids []string) (q string, args []any) {
	is, args := t.among(ids)
	if t.d.arrays {
		return "SELECT " + columns + " FROM " + t.d.arrayTable("key") + ", LATERAL (SELECT * FROM " + table + " WHERE id = r.key" + t.d.forUpdate + ") k", args
	}
	return "SELECT " + columns + " FROM " + table + t.d.by("PRIMARY") + " WHERE id " + is + " ORDER BY id" + t.d.forUpdate, args
}

// updateLockedIDsText is updateLockedText for rows that ids are the keys of.
func (t *tx) updateLockedIDsText(table, set string, ids []string) (q string, args []any) {
	is, args := t.among(ids)
	if t.d.arrays {
		return "UPDATE " + table + " u SET " + set + " FROM " + t.d.arrayTable("key") + ", LATERAL (SELECT ctid FROM " + table + " WHERE id = r.key OFFSET 0) k WHERE u.ctid = k.ctid", args
	}
	return "UPDATE " + table + t.d.by("PRIMARY") + " SET " + set + " WHERE id " + is, args
}

// arrayTable is the derived table r of one array of texts for each column.
func (d *dialect) arrayTable(columns ...string) string {
	place := d.hide("?::text[]")
	return "unnest(" + place + strings.Repeat(", "+place, len(columns)-1) + ") AS r (" + strings.Join(columns, ", ") + ")"
}

// tuples returns the places of rows to insert.
func tuples(columns, rows int) string {
	one := in(columns)
	return one + strings.Repeat(", "+one, rows-1)
}

// queueKey is the key of a queue row or a result.
type queueKey struct{ id, uuid string }

// amongKeys is among for the keys of queue rows and results. It is no IN list
// of tuples since MariaDB scans the table for that. The planners of MySQL and
// MariaDB try all indexes for each key unless they are told the primary one:
// t.d.by("PRIMARY") belongs behind the table's name.
func (t *tx) amongKeys(keys []queueKey) (where string, args []any) {
	if t.d.arrays {
		ids, uuids := columnsOf(keys)
		return "(id, command_uuid) IN (SELECT * FROM unnest(?::text[], ?::text[]))", []any{ids, uuids}
	}
	const one = "(id = ? AND command_uuid = ?)"
	n := 1
	for n < len(keys) {
		n *= 2
	}
	args = make([]any, 0, 2*n)
	for i := range n {
		k := keys[min(i, len(keys)-1)]
		args = append(args, k.id, k.uuid)
	}
	return "(" + one + strings.Repeat(" OR "+one, n-1) + ")", args
}

// lockedKeysText is lockedText for queue rows q that meet a condition too.
func (t *tx) lockedKeysText(columns string, keys []queueKey, and string) (q string, args []any) {
	if t.d.arrays {
		ids, uuids := columnsOf(slices.Compact(slices.SortedFunc(slices.Values(keys), compareKeys)))
		return "SELECT " + columns + " FROM " + t.d.arrayTable("key", "uuid") + `,
LATERAL (SELECT * FROM nano_enrollment_queue WHERE id = r.key AND command_uuid = r.uuid` + and + t.d.forUpdate + ") q", []any{ids, uuids}
	}
	where, args := t.amongKeys(keys)
	return "SELECT " + columns + " FROM nano_enrollment_queue q" + t.d.by("PRIMARY") + " WHERE " + where + and + " ORDER BY command_uuid, id" + t.d.forUpdate, args
}

// updateLockedText changes queue rows that the transaction has locked. They
// stay where they are while it has, so that PostgreSQL can be told to look
// each of them up, and not to join with whatever it takes the table for.
func (t *tx) updateLockedText(set string, keys []queueKey) (q string, args []any) {
	if t.d.arrays {
		ids, uuids := columnsOf(keys)
		return "UPDATE nano_enrollment_queue q SET " + set + " FROM " + t.d.arrayTable("key", "uuid") + `,
LATERAL (SELECT ctid FROM nano_enrollment_queue WHERE id = r.key AND command_uuid = r.uuid OFFSET 0) k WHERE q.ctid = k.ctid`, []any{ids, uuids}
	}
	where, args := t.amongKeys(keys)
	return "UPDATE nano_enrollment_queue" + t.d.by("PRIMARY") + " SET " + set + " WHERE " + where, args
}

func columnsOf(keys []queueKey) (ids, uuids []string) {
	ids, uuids = make([]string, len(keys)), make([]string, len(keys))
	for i, k := range keys {
		ids[i], uuids[i] = k.id, k.uuid
	}
	return ids, uuids
}

// arrayPairs are the arguments of a derived table of two arrays.
func arrayPairs(keys []queueKey) ([]any, error) {
	ids, uuids := columnsOf(keys)
	return []any{ids, uuids}, nil
}

// jsonPairs is the argument of a derived table of JSON.
func jsonPairs(keys []queueKey) ([]any, error) {
	pairs := make([][2]string, len(keys))
	for i, k := range keys {
		pairs[i] = [2]string{k.id, k.uuid}
	}
	text, err := json.Marshal(pairs)
	return []any{string(text)}, err
}

// insert inserts rows, which follow each other in args; see later for its error.
func (t *tx) insert(ctx context.Context, table string, cols []string, args []any) error {
	return t.insertRows(ctx, table, cols, "", args)
}

// upsert is insert that changes the rows that are there; see dialect.upsert.
// The keys of args differ from each other.
func (t *tx) upsert(ctx context.Context, table string, cols, key, set []string, args []any) error {
	return t.insertRows(ctx, table, cols, t.d.onConflict(key, set), args)
}

// mostRows is the most rows that go stepwise: in texts of 64, 32, ... rows, as
// few as can stay prepared.
const mostRows = 64

func (t *tx) insertRows(ctx context.Context, table string, cols []string, end string, args []any) error {
	begin := "INSERT INTO " + table + " (" + strings.Join(cols, ", ") + ") "
	if t.d.arrays {
		places, arrays, err := t.d.toArrays(table, cols, args)
		if err != nil {
			return err
		}
		return t.later(ctx, begin+"SELECT * FROM unnest("+places+")"+end, arrays...)
	}
	for len(args) > 0 {
		rows := len(args) / len(cols)
		if t.d.stepwise {
			n := mostRows
			for n > rows {
				n /= 2
			}
			rows = n
		}
		if err := t.later(ctx, begin+"VALUES "+tuples(len(cols), rows)+end, args[:rows*len(cols)]...); err != nil {
			return err
		}
		args = args[rows*len(cols):]
	}
	return nil
}

// toArrays turns rows into one array for each column.
func (d *dialect) toArrays(table string, cols []string, args []any) (places string, arrays []any, err error) {
	var b strings.Builder
	rows := len(args) / len(cols)
	for i, c := range cols {
		if i > 0 {
			b.WriteString(", ")
		}
		kind := d.kinds[table+"."+c]
		b.WriteString("?::" + kind)
		column := make([]any, rows)
		for r := range column {
			column[r] = args[r*len(cols)+i]
		}
		array, err := toArray(kind, column)
		if err != nil {
			return "", nil, fmt.Errorf("column %s: %w", c, err)
		}
		arrays = append(arrays, array)
	}
	return b.String(), arrays, nil
}

// The kinds of arrays.
const (
	textArray  = "text[]"
	intArray   = "bigint[]"
	bytesArray = "bytea[]"
)

func toArray(kind string, column []any) (any, error) {
	switch kind {
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
	return nil, fmt.Errorf("the database has no such column, or of an unknown type %q", kind)
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

// readKinds fills kinds, where they are needed.
func (s *Store) readKinds(ctx context.Context) error {
	if !s.d.arrays {
		return nil
	}
	kinds := make(map[string]string)
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		rows, err := t.query(ctx, s.d.columns)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var column, kind string
			if err := rows.Scan(&column, &kind); err != nil {
				return err
			}
			kinds[column] = kind
		}
		return rows.Err()
	})
	if err != nil {
		return fmt.Errorf("reading the columns' types: %w", err)
	}
	s.d.kinds = kinds
	return nil
}
