package sqldb

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Migrations bring a schema up to date, one recorded step at a time.
type Migrations struct {
	// Files are NNNN_name.sql, numbered from 1 without a gap. A statement ends
	// with ; at the end of a line, is one step, can be repeated, and is never
	// changed after a release. {word} stands for one of the engine's words. Two
	// lines before the first statement have a meaning. "-- release": this file
	// is the first one of a release. "-- contract": it takes something away that
	// the release before it uses; all others only add, so that it goes on.
	Files fs.FS
	// Checksums are those of Files, in their order; see Checksum. They freeze
	// the files: one that was edited is refused.
	Checksums []string
	// Bootstrap makes the tables that Hold needs, each by a statement that begins
	// with createTable.
	Bootstrap []string
	// Refuse checks a database without a record of migrations; it gets the
	// names of its tables.
	Refuse func(tables []string) error
	// Hold runs work while this process alone may migrate. check is to be called
	// first in each transaction; it fails if another process has taken over,
	// and so does ctx.
	Hold func(ctx context.Context, work func(ctx context.Context, check func(context.Context, *Tx) error) error) error
}

// createTable is how each statement that makes a table of Bootstrap begins.
const createTable = "CREATE TABLE IF NOT EXISTS "

// records make the tables of the steps that were done, and of the checksums of
// the migrations that were done in full.
var records = [...]string{
	`CREATE TABLE IF NOT EXISTS nano_schema (
	version    BIGINT NOT NULL,
	step       BIGINT NOT NULL,
	applied_at BIGINT NOT NULL,
	PRIMARY KEY (version, step)
) {table}`,
	`CREATE TABLE IF NOT EXISTS nano_migrations (
	version     BIGINT NOT NULL PRIMARY KEY,
	checksum    {id} NOT NULL,
	recorded_at BIGINT NOT NULL
) {table}`,
}

// Checksum is the SHA-256 of a migration's text, whatever its line ends.
func Checksum(text []byte) string {
	sum := sha256.Sum256(bytes.ReplaceAll(text, []byte("\r\n"), []byte("\n")))
	return hex.EncodeToString(sum[:])
}

// Check fails if a file is not the one of its checksum, or has none.
func (m *Migrations) Check() error {
	entries, err := fs.ReadDir(m.Files, ".") // sorted by name
	if err != nil {
		return err
	}
	for i, entry := range entries {
		text, err := fs.ReadFile(m.Files, entry.Name())
		if err != nil {
			return err
		}
		sum := Checksum(text)
		switch {
		case !strings.HasPrefix(entry.Name(), fmt.Sprintf("%04d_", i+1)):
			return fmt.Errorf("migration %s is out of order: number %04d is next", entry.Name(), i+1)
		case i >= len(m.Checksums):
			return fmt.Errorf("migration %s has no checksum in the code: it is %s", entry.Name(), sum)
		case sum != m.Checksums[i]:
			return fmt.Errorf("migration %s was edited: its checksum is %s, the code has %s; put a change into a new migration",
				entry.Name(), sum, m.Checksums[i])
		}
	}
	if len(m.Checksums) > len(entries) {
		return fmt.Errorf("%d migrations and %d checksums", len(entries), len(m.Checksums))
	}
	return nil
}

// step is one statement of a migration.
type step struct {
	version, number int64
	statement       string
}

// marks are the lines at the beginning of a migration that have a meaning, and
// the numbers of the records that are made for them before its first step.
var marks = map[string]int64{"-- release": releaseStep, "-- contract": contractStep}

const (
	releaseStep  = -1
	contractStep = 0
)

// marksOf returns the numbers of a migration's marks.
func marksOf(text string) (numbers []int64) {
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "--") {
			break
		}
		if number, ok := marks[line]; ok {
			numbers = append(numbers, number)
		}
	}
	return numbers
}

// steps returns every statement of every migration, in order.
func (m *Migrations) steps(d *Dialect) ([]step, error) {
	entries, err := fs.ReadDir(m.Files, ".") // sorted by name
	if err != nil {
		return nil, err
	}
	var all []step
	for _, entry := range entries {
		prefix, _, _ := strings.Cut(entry.Name(), "_")
		version, err := strconv.ParseInt(prefix, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("migration %s has no number: %w", entry.Name(), err)
		}
		text, err := fs.ReadFile(m.Files, entry.Name())
		if err != nil {
			return nil, err
		}
		for _, number := range marksOf(string(text)) {
			all = append(all, step{version, number, ""})
		}
		for i, statement := range statements(string(text)) {
			text := d.ddl(statement)
			if strings.HasPrefix(text, "--") { // another engine's
				text = ""
			}
			all = append(all, step{version, int64(i + 1), text})
		}
	}
	return all, nil
}

// Statements returns every statement of every migration as an engine gets it.
func (m *Migrations) Statements(d *Dialect) ([]string, error) {
	steps, err := m.steps(d)
	var all []string
	for _, st := range steps {
		all = append(all, st.statement)
	}
	return all, err
}

// Newest is the schema that the files make.
func (m *Migrations) Newest() int64 {
	entries, _ := fs.ReadDir(m.Files, ".")
	return int64(len(entries))
}

// statements splits a file at each ; that ends a line, without comments.
func statements(text string) []string {
	var all []string
	var b strings.Builder
	for line := range strings.Lines(text) {
		trimmed := strings.TrimSpace(line)
		if trimmed == "" || strings.HasPrefix(trimmed, "--") {
			continue
		}
		if last, ended := strings.CutSuffix(trimmed, ";"); ended {
			b.WriteString(last)
			all = append(all, b.String())
			b.Reset()
			continue
		}
		b.WriteString(trimmed + "\n")
	}
	return all
}

// ddl puts the engine's words in.
func (d *Dialect) ddl(statement string) string {
	for word, text := range d.words {
		statement = strings.ReplaceAll(statement, "{"+word+"}", text)
	}
	return statement
}

// Migrate brings the schema up to date. Of several processes that start at
// once one does it and the others wait.
func (db *DB) Migrate(ctx context.Context, m *Migrations) error {
	if err := m.Check(); err != nil {
		return err
	}
	if err := db.prepareSchema(ctx, m); err != nil {
		return err
	}
	recorded, err := db.checkRecorded(ctx, m)
	if err != nil {
		return err
	}
	all, err := m.steps(db.dialect)
	if err != nil {
		return err
	}
	missing, err := db.missingSteps(ctx, m, all)
	if err != nil {
		return err
	}
	if len(missing) > 0 {
		err := m.Hold(ctx, func(workCtx context.Context, check func(context.Context, *Tx) error) error {
			return db.applySteps(ctx, workCtx, m, all, check)
		})
		if err != nil {
			return err
		}
	}
	if recorded < len(m.Checksums) {
		if err := db.recordChecksums(ctx, m); err != nil {
			return err
		}
	}
	return db.readArrayTypes(ctx)
}

// checkRecorded compares the checksums of the database with those of the code,
// and returns how many of the code's the database has.
func (db *DB) checkRecorded(ctx context.Context, m *Migrations) (recorded int, err error) {
	err = db.Read(ctx, func(ctx context.Context, t *Tx) error {
		recorded = 0
		err := t.Query(ctx, `SELECT version, checksum FROM nano_migrations ORDER BY version`).Each(func(row Row) error {
			var version int
			var sum string
			if err := row.Scan(&version, &sum); err != nil {
				return err
			}
			if version < 1 || version > len(m.Checksums) {
				return nil // a newer release's; see Serves
			}
			if known := m.Checksums[version-1]; sum != known {
				return fmt.Errorf("its migration %d has checksum %s, the one of this program has %s: "+
					"another program, or an edited migration, made this schema", version, sum, known)
			}
			recorded++
			return nil
		})
		return err
	})
	return recorded, err
}

// recordChecksums records the checksums of migrations that are done. Those
// that were done before there were checksums are trusted.
func (db *DB) recordChecksums(ctx context.Context, m *Migrations) error {
	return db.Write(ctx, func(ctx context.Context, t *Tx) error {
		q := t.Dialect.Upsert("nano_migrations", []string{"version", "checksum", "recorded_at"}, []string{"version"}, nil)
		for i, sum := range m.Checksums {
			if _, err := t.Exec(ctx, q, i+1, sum, t.Now); err != nil {
				return fmt.Errorf("recording the checksum of migration %d: %w", i+1, err)
			}
		}
		return nil
	})
}

// slowStep is how long a step takes to be worth a line of its own in the log.
const slowStep = time.Second

// applySteps runs the steps without a record. A step is not interrupted when
// workCtx ends: one that takes long would never end. Its transaction checks
// that nobody else migrates, and it can be repeated.
func (db *DB) applySteps(ctx, workCtx context.Context, m *Migrations, all []step, check func(context.Context, *Tx) error) error {
	missing, err := db.missingSteps(ctx, m, all)
	if err != nil {
		return err
	}
	if len(missing) == 0 {
		return nil // another process was first
	}
	began := time.Now()
	db.log.InfoContext(ctx, "migrating the database", "to", m.Newest(), "steps", len(missing))
	for _, st := range missing {
		if workCtx.Err() != nil {
			return context.Cause(workCtx)
		}
		stepBegan := time.Now()
		if err := db.applyStep(ctx, st, check); err != nil {
			return fmt.Errorf("migration %d, step %d: %w", st.version, st.number, err)
		}
		if took := time.Since(stepBegan); took > slowStep {
			db.log.InfoContext(ctx, "a slow step of a migration is done", "version", st.version, "step", st.number,
				"statement", statement{text: st.statement}.name(), "took", took.Round(time.Millisecond))
		}
	}
	db.log.InfoContext(ctx, "the database is migrated", "to", m.Newest(), "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// prepareSchema refuses a database of another program and makes the tables
// that migrating needs.
func (db *DB) prepareSchema(ctx context.Context, m *Migrations) error {
	tables, err := db.tables(ctx)
	if err != nil {
		return err
	}
	if !slices.Contains(tables, "nano_schema") {
		if err := m.Refuse(tables); err != nil {
			return err
		}
	}
	for _, statement := range slices.Concat(records[:], m.Bootstrap) {
		// A statement waits for the table even if it has nothing to make.
		if made := strings.Fields(strings.TrimPrefix(statement, createTable)); slices.Contains(tables, made[0]) {
			continue
		}
		if err := db.writeUntimed(ctx, func(ctx context.Context, t *Tx) error {
			return t.execText(ctx, db.dialect.ddl(statement))
		}); err != nil && !db.dialect.repeated(err) {
			return err
		}
	}
	return nil
}

// tables lists the tables of the database.
func (db *DB) tables(ctx context.Context) (names []string, err error) {
	err = db.Read(ctx, func(ctx context.Context, t *Tx) error {
		names = nil
		err := t.Query(ctx, db.dialect.tables).Each(func(row Row) error {
			var name string
			if err := row.Scan(&name); err != nil {
				return err
			}
			names = append(names, name)
			return nil
		})
		return err
	})
	return names, err
}

// missingSteps returns the steps without a record, and refuses a database
// that the files cannot serve.
func (db *DB) missingSteps(ctx context.Context, m *Migrations, all []step) (missing []step, err error) {
	err = db.Read(ctx, func(ctx context.Context, t *Tx) error {
		missing = nil
		if _, err := m.Serves(ctx, t); err != nil {
			return err
		}
		done := make(map[[2]int64]bool)
		err = t.Query(ctx, `SELECT version, step FROM nano_schema`).Each(func(row Row) error {
			var key [2]int64
			err := row.Scan(&key[0], &key[1])
			done[key] = true
			return err
		})
		if err != nil {
			return err
		}
		for _, st := range all {
			if !done[[2]int64{st.version, st.number}] {
				missing = append(missing, st)
			}
		}
		return nil
	})
	return missing, err
}

// applyStep runs a step and records it. Where DDL commits by itself the two
// can come apart, and the step is then repeated.
func (db *DB) applyStep(ctx context.Context, st step, check func(context.Context, *Tx) error) error {
	run := func(statement string) error {
		return db.writeUntimed(ctx, func(ctx context.Context, t *Tx) error {
			if err := check(ctx, t); err != nil {
				return err
			}
			if statement != "" {
				if err := t.execText(ctx, statement); err != nil {
					return err
				}
			}
			_, err := t.Exec(ctx, t.Dialect.Upsert("nano_schema", []string{"version", "step", "applied_at"},
				[]string{"version", "step"}, nil), st.version, st.number, t.Now)
			return err
		})
	}
	err := run(st.statement)
	if err != nil && db.dialect.repeated(err) {
		err = run("")
	}
	return err
}

// Serves says whether a program with these migrations can work with the
// database as it is. That is so with the schema of the next release, unless it
// takes something away: a rolling upgrade, and one step back from it, runs both
// releases on it. newer says that it is that schema.
func (m *Migrations) Serves(ctx context.Context, t *Tx) (newer bool, err error) {
	known := m.Newest()
	var version, releases, contracts int64
	err = t.QueryRow(ctx, `SELECT COALESCE(MAX(version), 0), COALESCE(SUM(CASE WHEN version > ? AND step = ? THEN 1 ELSE 0 END), 0),
		COALESCE(SUM(CASE WHEN version > ? AND step = ? THEN 1 ELSE 0 END), 0) FROM nano_schema`,
		known, releaseStep, known, contractStep).Scan(&version, &releases, &contracts)
	switch {
	case err != nil:
		return false, err
	case releases > 1 || contracts > 0:
		return false, fmt.Errorf("%w: it has schema %d, made by a newer version of this program; this one knows %d", ErrNewer, version, known)
	}
	return version > known, nil
}

// ErrNewer: a newer program has migrated the database to a schema that this one
// cannot work with.
var ErrNewer = errors.New("the schema is too new")

// SchemaVersion returns the newest migration that was begun on the database.
func SchemaVersion(ctx context.Context, t *Tx) (version int64, err error) {
	err = t.QueryRow(ctx, `SELECT COALESCE(MAX(version), 0) FROM nano_schema`).Scan(&version)
	return version, err
}
