package sqldb

import (
	"cmp"
	"context"
	"encoding/json"
	"slices"
	"strings"
)

// In returns "(?, ?, ...)" with n placeholders.
func In(n int) string {
	if n < 1 {
		return "(NULL)" // matches nothing
	}
	return "(?" + strings.Repeat(", ?", n-1) + ")"
}

// tuples returns the placeholders of rows to insert.
func tuples(columns, rows int) string {
	one := In(columns)
	return one + strings.Repeat(", "+one, rows-1)
}

// InList returns the placeholders and arguments of an IN list. Its length is a
// power of two, with the last value repeated, so that there are few different
// texts to prepare and to plan. There must be a value.
func InList[T any](values []T) (places string, args []any) {
	n := 1
	for n < len(values) {
		n *= 2
	}
	args = make([]any, n)
	for i := range args {
		args[i] = values[min(i, len(values)-1)]
	}
	return In(n), args
}

// Among returns the text behind the name of a column that must be one of ids,
// and its arguments. There must be an id. A plan for any array would compare
// each row with each of its elements if it read the table; that of a join
// looks them up.
func (t *Tx) Among(ids []string) (is string, args []any) {
	if t.Dialect.arrays {
		return "IN (SELECT unnest(" + t.Dialect.Opaque("?::text[]") + "))", []any{ids}
	}
	places, args := InList(ids)
	return "IN " + places, args
}

// QueryLocked locks the rows of a table that have one of ids, in key order
// where there are locks, and reads columns of them. PostgreSQL looks each id
// up: a plan for all of them that was made while the table was small would go
// on reading all of it.
func (t *Tx) QueryLocked(ctx context.Context, columns, table string, ids []string) Result {
	q, args := t.LockText(columns, table, ids)
	return t.Query(ctx, q, args...)
}

// LockText is the statement of QueryLocked.
func (t *Tx) LockText(columns, table string, ids []string) (q string, args []any) {
	d := t.Dialect
	is, args := t.Among(slices.Compact(slices.Sorted(slices.Values(ids))))
	if d.arrays {
		return "SELECT " + columns + " FROM " + d.ArrayTable("key") + ", LATERAL (SELECT * FROM " + table + " WHERE id = r.key" + t.locking() + ") k", args
	}
	return "SELECT " + columns + " FROM " + table + d.Index("PRIMARY") + " WHERE id " + is + " ORDER BY id" + t.locking(), args
}

// locking ends a SELECT that locks its rows.
func (t *Tx) locking() string {
	if t.SkipLocked {
		return t.Dialect.forUpdate + t.Dialect.skipLocked
	}
	return t.Dialect.forUpdate
}

// LockDeferred locks the rows of a table that have one of ids, at the latest
// with the next statement that returns something. The number of rows it locked
// is known after that. It is false where the engine does not count them; then
// nothing was done.
func (t *Tx) LockDeferred(table string, ids []string) (locked *int, ok bool) {
	if t.conn == nil || !t.Dialect.batchCounts {
		return nil, false
	}
	locked = new(int)
	q, args := t.LockText("id", table, ids)
	t.deferStatement(q, args, locked)
	return locked, true
}

// UpdateLockedText changes rows that the transaction has locked by their ids.
func (t *Tx) UpdateLockedText(table, set string, ids []string) (q string, args []any) {
	d := t.Dialect
	is, args := t.Among(ids)
	if d.arrays {
		return "UPDATE " + table + " u SET " + set + " FROM " + d.ArrayTable("key") + ", LATERAL (SELECT ctid FROM " + table + " WHERE id = r.key OFFSET 0) k WHERE u.ctid = k.ctid", args
	}
	return "UPDATE " + table + d.Index("PRIMARY") + " SET " + set + " WHERE id " + is, args
}

// ArrayTable is the derived table r of one array of texts for each column, on
// engines that have arrays.
func (d *Dialect) ArrayTable(columns ...string) string {
	place := d.Opaque("?::text[]")
	return "unnest(" + place + strings.Repeat(", "+place, len(columns)-1) + ") AS r (" + strings.Join(columns, ", ") + ")"
}

// KeyPair is a key of two columns: the id of a row's owner, and which of the
// owner's rows it is.
type KeyPair struct{ ID, Item string }

// Compare orders pairs as the primary keys (item, id) of their tables do, in
// which rows are locked.
func (k KeyPair) Compare(other KeyPair) int {
	return cmp.Or(strings.Compare(k.Item, other.Item), strings.Compare(k.ID, other.ID))
}

// PairTable is a table whose primary key is a pair, the columns Item and ID.
type PairTable struct{ Name, ID, Item string }

// Among is the condition that a row has one of keys. It is no IN list of
// tuples since MariaDB scans the table for that. The planners of MySQL and
// MariaDB try all indexes for each key unless they are told the primary one:
// Dialect.Index("PRIMARY") belongs behind the table's name.
func (p *PairTable) Among(t *Tx, keys []KeyPair) (where string, args []any) {
	if t.Dialect.arrays {
		ids, items := columnsOf(keys)
		return "(" + p.ID + ", " + p.Item + ") IN (SELECT * FROM unnest(?::text[], ?::text[]))", []any{ids, items}
	}
	one := "(" + p.ID + " = ? AND " + p.Item + " = ?)"
	n := 1
	for n < len(keys) {
		n *= 2
	}
	args = make([]any, 0, 2*n)
	for i := range n {
		k := keys[min(i, len(keys)-1)]
		args = append(args, k.ID, k.Item)
	}
	return "(" + one + strings.Repeat(" OR "+one, n-1) + ")", args
}

// LockText locks rows q that have one of keys and meet a condition, in key
// order, and reads columns of them.
func (p *PairTable) LockText(t *Tx, columns string, keys []KeyPair, and string) (q string, args []any) {
	d := t.Dialect
	if d.arrays {
		ids, items := columnsOf(slices.Compact(slices.SortedFunc(slices.Values(keys), KeyPair.Compare)))
		return "SELECT " + columns + " FROM " + d.ArrayTable("key", "item") + `,
LATERAL (SELECT * FROM ` + p.Name + " WHERE " + p.ID + " = r.key AND " + p.Item + " = r.item" + and + t.locking() + ") q", []any{ids, items}
	}
	where, args := p.Among(t, keys)
	return "SELECT " + columns + " FROM " + p.Name + " q" + d.Index("PRIMARY") + " WHERE " + where + and +
		" ORDER BY " + p.Item + ", " + p.ID + t.locking(), args
}

// UpdateLockedText changes rows that the transaction has locked. They stay
// where they are while it has, so that PostgreSQL can be told to look each of
// them up, and not to join with its guess of the table's size.
func (p *PairTable) UpdateLockedText(t *Tx, set string, keys []KeyPair) (q string, args []any) {
	d := t.Dialect
	if d.arrays {
		ids, items := columnsOf(keys)
		return "UPDATE " + p.Name + " q SET " + set + " FROM " + d.ArrayTable("key", "item") + `,
LATERAL (SELECT ctid FROM ` + p.Name + " WHERE " + p.ID + " = r.key AND " + p.Item + " = r.item OFFSET 0) k WHERE q.ctid = k.ctid", []any{ids, items}
	}
	where, args := p.Among(t, keys)
	return "UPDATE " + p.Name + d.Index("PRIMARY") + " SET " + set + " WHERE " + where, args
}

func columnsOf(keys []KeyPair) (ids, items []string) {
	ids, items = make([]string, len(keys)), make([]string, len(keys))
	for i, k := range keys {
		ids[i], items[i] = k.ID, k.Item
	}
	return ids, items
}

// arrayPairs are the arguments of a derived table of two arrays.
func arrayPairs(keys []KeyPair) ([]any, error) {
	ids, items := columnsOf(keys)
	return []any{ids, items}, nil
}

// jsonPairs is the argument of a derived table of JSON.
func jsonPairs(keys []KeyPair) ([]any, error) {
	pairs := make([][2]string, len(keys))
	for i, k := range keys {
		pairs[i] = [2]string{k.ID, k.Item}
	}
	text, err := json.Marshal(pairs)
	return []any{string(text)}, err
}
