package sqlstore

import (
	"context"
	"database/sql"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// WriteForTest runs fn in a transaction as the package's own writes do.
func (s *Store) WriteForTest(ctx context.Context, fn func(exec func(q string, args ...any) (int64, error)) error) error {
	return s.write(ctx, func(ctx context.Context, t *tx) error {
		return fn(func(q string, args ...any) (int64, error) { return t.exec(ctx, q, args...) })
	})
}

// SettingForTest reads one value on a connection of the pool.
func (s *Store) SettingForTest(ctx context.Context, q string) (value string, err error) {
	err = s.db.QueryRowContext(ctx, q).Scan(&value)
	return value, err
}

// FilterQueryForTest is the statement that finds the candidates of a filter,
// and the indexes that it is meant to be answered by.
func (s *Store) FilterQueryForTest(scope storage.Scope, f storage.EnrollmentFilter) (indexes []string, q string, args []any) {
	src := sourceOf(scope, f)
	for _, p := range src.parts {
		indexes = append(indexes, p.index)
	}
	q, args = src.query(s.d, storage.EnrollmentKey{By: src.index, At: time.UnixMicro(1), Key: "D"}, 100)
	return indexes, q, args
}

// ExplainForTest is what the engine says of how it would run a statement.
func (s *Store) ExplainForTest(ctx context.Context, q string, args ...any) (string, error) {
	explain := map[string]string{
		"sqlite": "EXPLAIN QUERY PLAN ", "pgsql": "EXPLAIN ", "mysql": "EXPLAIN FORMAT=JSON ", "mariadb": "EXPLAIN FORMAT=JSON ",
	}[s.d.name]
	rows, err := s.db.QueryContext(ctx, s.d.rebind(explain+q), args...)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	columns, err := rows.Columns()
	if err != nil {
		return "", err
	}
	var text strings.Builder
	for rows.Next() {
		values := make([]any, len(columns))
		for i := range values {
			values[i] = new(sql.NullString)
		}
		if err := rows.Scan(values...); err != nil {
			return "", err
		}
		// The last column is the plan, or a line of it.
		text.WriteString(values[len(values)-1].(*sql.NullString).String + "\n")
	}
	return text.String(), rows.Err()
}
