package sqlstore

import (
	"context"
	"database/sql"
	"fmt"
	"strconv"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// enrollmentState is what the database knows of the enrollment that speaks.
type enrollmentState struct {
	id     string
	topic  string // APNs
	active bool   // may get commands
	pinned string // hash of the device's live certificate
	owed   int64
	paid   int64
	pushAt sql.Null[int64]
	// The heads of the two lists that a device may be offered a command from.
	queued, notnow sql.Null[string]
}

// deviceTexts are the texts that read who speaks and who changes. They are made
// once, as they are long.
type deviceTexts struct{ enrollmentState, certificateLookup string }

func newDeviceTexts(d *sqldb.Dialect) deviceTexts {
	return deviceTexts{enrollmentState: enrollmentStateText(d), certificateLookup: certificateLookupText(d)}
}

// enrollmentStateText reads enrollments of the derived table r, each with the heads of
// its lists. A head is one index seek: it needs all the columns in its order,
// since MySQL would sort what waits otherwise, and to be told the index. Where
// it is not told, a planner that knows how rare a state was when it last looked
// would read all rows in that state by another index. The live certificate is
// not looked for by retired_at, by which an index has that of every device.
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

// readStates reads enrollments, and the next command of each besides that of the
// key, all as of the same moment. Enrollments that do not exist are missing.
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
