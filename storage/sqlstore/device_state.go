package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// enrollmentState is the state of the enrollment that a message is from.
type enrollmentState struct {
	id     string
	topic  string // APNs
	active bool   // may get commands
	pinned string // hash of the device's live certificate
	owed   int64
	paid   int64
	pushAt sql.Null[int64]
	// The first rows of the two lists from which a device may be offered a
	// command.
	queued, notnow sql.Null[string]
}

// deviceTexts are the statements that read enrollments and certificates. They
// are long, and made once.
type deviceTexts struct{ enrollmentState, certificateLookup string }

func newDeviceTexts(d *sqldb.Dialect) deviceTexts {
	return deviceTexts{enrollmentState: enrollmentStateText(d), certificateLookup: certificateLookupText(d)}
}

// enrollmentStateText reads enrollments of the derived table r, each with the
// first rows of its lists. A first row is one index seek. Its ORDER BY names
// all columns of the index, since MySQL would sort the waiting rows otherwise,
// and the statement names the index: with an old statistic of a rare state, a
// planner may read all rows in that state by another one. The live certificate
// is not found by retired_at, since that index has the live ones of all devices
// side by side.
func enrollmentStateText(d *sqldb.Dialect) string {
	head := func(state storage.State) string {
		return fmt.Sprintf(`, (SELECT q.command_uuid FROM nano_enrollment_queue q%s
WHERE q.id = e.id AND q.state = %s AND q.command_uuid <> r.command_uuid AND (q.expires_at IS NULL OR q.expires_at > ?)
ORDER BY q.state, q.id, q.priority DESC, q.seq LIMIT 1)`, d.Index("nano_enrollment_queue_next"), d.Opaque(strconv.Itoa(int(state))))
	}
	return `SELECT e.id, e.topic, e.enabled, e.operator_disabled, a.sha256, p.owed_seq, p.paid_seq, p.push_at` +
		head(storage.Queued) + head(storage.NotNow) + `
FROM ` + d.PairTable("id", "command_uuid") +
		d.Lookup(false, "nano_enrollments", "e", "e.id = r.id") +
		d.Lookup(true, "nano_cert_auth_associations", "a", "a.id = e.device_id AND COALESCE(a.retired_at, 0) = 0") +
		d.Lookup(true, "nano_enrollment_push", "p", "p.id = e.id")
}

// readStates reads enrollments, and the next command of each other than that of
// the key, in one statement. Unknown enrollments are missing.
func readStates(ctx context.Context, t *tx, keys []keyPair) (map[string]*enrollmentState, error) {
	states := make(map[string]*enrollmentState, len(keys))
	q, err := statesQuery(t, keys, states)
	if err != nil {
		return nil, err
	}
	return states, t.QueryBatch(ctx, q)
}

// statesQuery is the query of readStates.
func statesQuery(t *tx, keys []keyPair, into map[string]*enrollmentState) (sqldb.BatchQuery, error) {
	pairs, err := t.Dialect.PairArgs(keys)
	if err != nil {
		return sqldb.BatchQuery{}, fmt.Errorf("reading enrollments: %w", err)
	}
	read := func(row sqldb.Row) error {
		var s enrollmentState
		var enabled, disabled bool
		var pinned sql.Null[string]
		var owed, paid sql.Null[int64]
		err := row.Scan(&s.id, &s.topic, &enabled, &disabled, &pinned, &owed, &paid, &s.pushAt, &s.queued, &s.notnow)
		if err != nil {
			return err
		}
		s.active = enabled && !disabled
		s.pinned, s.owed, s.paid = pinned.V, owed.V, paid.V
		into[s.id] = &s
		return nil
	}
	return sqldb.BatchQuery{Action: "reading enrollments", Text: t.texts.enrollmentState, Args: append([]any{t.Now, t.Now}, pairs...), Read: read}, nil
}
