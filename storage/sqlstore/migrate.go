package sqlstore

import (
	"context"
	"crypto/rand"
	"embed"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
)

// Migrations are files of SQL, numbered from 1 without a gap. A statement
// ends with ; at the end of a line, is one step, can be repeated, and is
// never changed after a release.
//
//go:embed migrations/*.sql
var migrations embed.FS

// migrationTTL is how long the next replica waits when one died while
// migrating.
const migrationTTL = 10 * time.Second

// bootstrap makes the tables that migrating itself needs.
var bootstrap = [...]string{
	`CREATE TABLE IF NOT EXISTS nano_schema (
		version    BIGINT NOT NULL,
		step       BIGINT NOT NULL,
		applied_at BIGINT NOT NULL,
		PRIMARY KEY (version, step)
	) {table}`,
	`CREATE TABLE IF NOT EXISTS nano_leases (
		name   {id} NOT NULL PRIMARY KEY,
		holder {id} NOT NULL,
		fence  BIGINT NOT NULL,
		beat   BIGINT NOT NULL
	) {table}`,
}

// foreign are tables that tell a database of NanoMDM (the first ones) or of
// Fleet's fork of it when our own record is not there.
var foreign = [...]string{
	"enrollments", "enrollment_queue", "cert_auth_associations",
	"nano_enrollments", "nano_devices", "nano_users", "nano_commands",
	"nano_command_results", "nano_enrollment_queue", "nano_push_certs",
	"nano_cert_auth_associations",
}

// step is one statement of a migration.
type step struct {
	version, number int64
	statement       string
}

// steps returns every statement of every migration, in order.
func (d *dialect) steps() ([]step, error) {
	entries, err := migrations.ReadDir("migrations") // sorted by name
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
		text, err := migrations.ReadFile("migrations/" + entry.Name())
		if err != nil {
			return nil, err
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

// newestMigration is the schema that this binary knows.
func newestMigration() int64 {
	entries, _ := migrations.ReadDir("migrations")
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
func (d *dialect) ddl(statement string) string {
	for word, text := range d.words {
		statement = strings.ReplaceAll(statement, "{"+word+"}", text)
	}
	return statement
}

// migrate brings the schema up to date, under a lease, so that one of several
// replicas that start does it and the others wait.
func (s *Store) migrate(ctx context.Context) error {
	if err := s.prepareSchema(ctx); err != nil {
		return err
	}
	all, err := s.d.steps()
	if err != nil {
		return err
	}
	missing, err := s.missingSteps(ctx, all)
	if err != nil || len(missing) == 0 {
		return err
	}
	return lease.Hold(ctx, s, "schema", rand.Text(), migrationTTL, s.log,
		func(workCtx context.Context, current func() storage.Lease) error {
			missing, err := s.missingSteps(ctx, all)
			if err != nil {
				return err
			}
			for _, st := range missing {
				if workCtx.Err() != nil {
					return context.Cause(workCtx)
				}
				// A step is not interrupted when the lease is lost: one that
				// takes long would never end. Its transaction checks the
				// lease, and it can be repeated.
				if err := s.applyStep(ctx, st, current()); err != nil {
					return fmt.Errorf("migration %d, step %d: %w", st.version, st.number, err)
				}
			}
			return nil
		})
}

// prepareSchema refuses a database that is somebody else's and makes the
// tables that migrating needs.
func (s *Store) prepareSchema(ctx context.Context) error {
	tables, err := s.tables(ctx)
	if err != nil {
		return err
	}
	if !slices.Contains(tables, "nano_schema") {
		for _, name := range foreign {
			if slices.Contains(tables, name) {
				return fmt.Errorf("it holds the table %s of NanoMDM or Fleet and no record of this program; "+
					"start with an empty database and bring the enrollments over with nano2nano (PUT /migration)", name)
			}
		}
	}
	for _, statement := range bootstrap {
		if err := s.alone(ctx, func(ctx context.Context, t *tx) error {
			err := t.text(ctx, s.d.ddl(statement))
			return err
		}); err != nil && !s.d.repeated(err) {
			return err
		}
	}
	return nil
}

// tables lists the tables of the database.
func (s *Store) tables(ctx context.Context) (names []string, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		names = nil
		rows, err := t.query(ctx, s.d.tables)
		if err != nil {
			return err
		}
		defer rows.Close()
		for rows.Next() {
			var name string
			if err := rows.Scan(&name); err != nil {
				return err
			}
			names = append(names, name)
		}
		return rows.Err()
	})
	return names, err
}

// missingSteps returns the steps without a record, and refuses a database
// that a newer binary has migrated.
func (s *Store) missingSteps(ctx context.Context, all []step) (missing []step, err error) {
	err = s.read(ctx, func(ctx context.Context, t *tx) error {
		missing = nil
		version, err := schemaVersion(ctx, t)
		if err != nil {
			return err
		}
		if known := newestMigration(); version > known {
			return fmt.Errorf("it has schema %d, made by a newer version of this program; this one knows %d", version, known)
		}
		rows, err := t.query(ctx, `SELECT version, step FROM nano_schema`)
		if err != nil {
			return err
		}
		defer rows.Close()
		done := make(map[[2]int64]bool)
		for rows.Next() {
			var key [2]int64
			if err := rows.Scan(&key[0], &key[1]); err != nil {
				return err
			}
			done[key] = true
		}
		for _, st := range all {
			if !done[[2]int64{st.version, st.number}] {
				missing = append(missing, st)
			}
		}
		return rows.Err()
	})
	return missing, err
}

// applyStep runs a step and records it. Where DDL commits by itself the two
// can come apart, and the step is then repeated.
func (s *Store) applyStep(ctx context.Context, st step, l storage.Lease) error {
	run := func(statement string) error {
		return s.alone(ctx, func(ctx context.Context, t *tx) error {
			if err := t.checkLease(ctx, l); err != nil {
				return err
			}
			if statement != "" {
				if err := t.text(ctx, statement); err != nil {
					return err
				}
			}
			_, err := t.exec(ctx, t.d.upsert("nano_schema", []string{"version", "step", "applied_at"},
				[]string{"version", "step"}, nil), st.version, st.number, t.now)
			return err
		})
	}
	err := run(st.statement)
	if err != nil && s.d.repeated(err) {
		err = run("")
	}
	return err
}

// alone is write without its time limit: a step on a large table takes long.
func (s *Store) alone(ctx context.Context, fn func(ctx context.Context, t *tx) error) error {
	return s.retry(ctx, func() (bool, error) { return s.attempt(ctx, fn) })
}

// schemaVersion returns the newest migration that was begun on the database.
func schemaVersion(ctx context.Context, t *tx) (version int64, err error) {
	err = t.queryRow(ctx, `SELECT COALESCE(MAX(version), 0) FROM nano_schema`).Scan(&version)
	return version, err
}
