package main

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"
	"strings"

	"github.com/nanomdm/nanomdm/mdm/mdmtest"
)

// peer is the queue of NanoMDM 0.9, as far as an enqueue touches it, in the
// database of a daemon that is measured: a row for the command and one for each
// enrollment, in one transaction of two statements. NanoMDM has PostgreSQL and
// MySQL alone.
type peer struct {
	db      *sql.DB
	command []byte
	numbers bool // placeholders are $1, $2, ...
}

func newPeer(ctx context.Context, d *database, devices []device) (_ *peer, err error) {
	p := &peer{numbers: d.driver == "pgx", command: mdmtest.NewCommand("UUID", "DeviceInformation", nil)}
	if p.db, err = sql.Open(d.driver, d.dsn); err != nil {
		return nil, err
	}
	if err := p.makeTables(ctx, devices); err != nil {
		p.db.Close()
		return nil, fmt.Errorf("making NanoMDM's tables: %w", err)
	}
	return p, nil
}

func (p *peer) makeTables(ctx context.Context, devices []device) error {
	times := "created_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP, updated_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP"
	statements := []string{
		"CREATE TABLE peer_enrollments (id VARCHAR(255) NOT NULL PRIMARY KEY)",
		"CREATE TABLE peer_commands (command_uuid VARCHAR(127) NOT NULL PRIMARY KEY, request_type VARCHAR(63) NOT NULL, command TEXT NOT NULL, " + times + ")",
		"CREATE TABLE peer_queue (id VARCHAR(255) NOT NULL, command_uuid VARCHAR(127) NOT NULL, active BOOLEAN NOT NULL DEFAULT TRUE, " +
			"priority SMALLINT NOT NULL DEFAULT 0, " + times + ", PRIMARY KEY (id, command_uuid), " +
			"FOREIGN KEY (id) REFERENCES peer_enrollments (id), FOREIGN KEY (command_uuid) REFERENCES peer_commands (command_uuid))",
	}
	if !p.numbers { // these two are in its schema for MySQL alone
		statements = append(statements,
			"CREATE INDEX peer_queue_order ON peer_queue (priority DESC, created_at)",
			"CREATE INDEX peer_queue_lookup ON peer_queue (id, active, priority DESC, created_at)")
	}
	for _, statement := range statements {
		if _, err := p.db.ExecContext(ctx, statement); err != nil {
			return err
		}
	}
	ids := udidsOf(devices)
	_, err := p.db.ExecContext(ctx, "INSERT INTO peer_enrollments (id) VALUES "+p.rows(len(ids), 1), anys(ids)...)
	return err
}

// rows are the placeholders of some rows.
func (p *peer) rows(n, columns int) string {
	var b strings.Builder
	for i := range n * columns {
		switch {
		case i == 0:
			b.WriteString("(")
		case i%columns == 0:
			b.WriteString("), (")
		default:
			b.WriteString(", ")
		}
		if p.numbers {
			b.WriteString("$" + strconv.Itoa(i+1))
		} else {
			b.WriteString("?")
		}
	}
	b.WriteString(")")
	return b.String()
}

// enqueue queues a command for ids.
func (p *peer) enqueue(ctx context.Context, ids []string) error {
	uuid := mdmtest.NewUUID()
	tx, err := p.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback() //nolint:errcheck // after a commit it does nothing
	_, err = tx.ExecContext(ctx, "INSERT INTO peer_commands (command_uuid, request_type, command) VALUES "+p.rows(1, 3), uuid, "DeviceInformation", p.command)
	if err != nil {
		return err
	}
	args := make([]any, 0, 2*len(ids))
	for _, id := range ids {
		args = append(args, id, uuid)
	}
	if _, err := tx.ExecContext(ctx, "INSERT INTO peer_queue (id, command_uuid) VALUES "+p.rows(len(ids), 2), args...); err != nil {
		return err
	}
	return tx.Commit()
}

func (p *peer) close() error { return p.db.Close() }

func anys(ids []string) []any {
	args := make([]any, len(ids))
	for i, id := range ids {
		args[i] = id
	}
	return args
}
