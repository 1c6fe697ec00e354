package sqlstore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// countLimit bounds a count, so that a backlog of millions costs no more than
// one of this size.
const countLimit = 100_000

// WaitingCounts counts waiting commands, pushes and events. Each count stops at
// 100,000.
type WaitingCounts struct {
	// Waiting counts commands by state: Scheduled, Queued and NotNow are always
	// set.
	Waiting map[storage.State]Backlog
	// PushesOwed counts enrollments that are owed a push.
	PushesOwed int64
	// Unnumbered counts events that no sink can read yet.
	Unnumbered int64
}

// Backlog is the number of waiting rows and the time of the oldest; zero if
// there is none.
type Backlog struct {
	Count  int64
	Oldest time.Time
}

// WaitingCounts counts. Call it every few seconds, not for each request.
func (s *Store) WaitingCounts(ctx context.Context) (WaitingCounts, error) {
	c := WaitingCounts{Waiting: make(map[storage.State]Backlog)}
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		for _, state := range []storage.State{storage.Scheduled, storage.Queued, storage.NotNow} {
			var n, oldest int64
			err := t.QueryRow(ctx, "SELECT COUNT(*), COALESCE(MIN(created_at), 0) FROM ("+rowsInState(t.Dialect, "q.created_at", state)+") waiting",
				countLimit).Scan(&n, &oldest)
			if err != nil {
				return err
			}
			c.Waiting[state] = Backlog{Count: n, Oldest: fromMicros(oldest)}
		}
		err := t.QueryRow(ctx, "SELECT COUNT(*) FROM (SELECT id FROM nano_enrollment_push WHERE "+pushOwedIndexed+" LIMIT ?) owed", countLimit).Scan(&c.PushesOwed)
		if err != nil {
			return err
		}
		return t.QueryRow(ctx, `SELECT COALESCE(SUM(size), 0) FROM (SELECT size FROM nano_event_batches WHERE seq = 0 LIMIT ?) unnumbered`,
			countLimit).Scan(&c.Unnumbered)
	})
	if err != nil {
		return WaitingCounts{}, fmt.Errorf("counting what waits: %w", err)
	}
	return c, nil
}

// rowsInState reads some queue rows of a state. The order makes every planner
// read them from an index instead of searching all rows for the few of a state.
func rowsInState(d *sqldb.Dialect, columns string, state storage.State) string {
	return fmt.Sprintf("SELECT %s FROM nano_enrollment_queue q%s WHERE q.state = %d ORDER BY q.state, q.id, q.priority DESC, q.seq LIMIT ?",
		columns, d.Index("nano_enrollment_queue_next"), state)
}

// CertificatesExpiring counts the live certificates of devices that expire
// before each of some times, up to 100,000.
func (s *Store) CertificatesExpiring(ctx context.Context, before ...time.Time) ([]int64, error) {
	counts := make([]int64, len(before))
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		for i, at := range before {
			err := t.QueryRow(ctx, `SELECT COUNT(*) FROM (SELECT sha256 FROM nano_cert_auth_associations
				WHERE not_after < ? AND retired_at IS NULL LIMIT ?) expiring`, micros(at), countLimit).Scan(&counts[i])
			if err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("counting certificates: %w", err)
	}
	return counts, nil
}

// NextCertificateExpiry returns when the next live certificate of a device
// expires; zero if there is none.
func (s *Store) NextCertificateExpiry(ctx context.Context, now time.Time) (time.Time, error) {
	var at int64
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.QueryRow(ctx, `SELECT not_after FROM nano_cert_auth_associations
			WHERE not_after >= ? AND retired_at IS NULL ORDER BY not_after LIMIT 1`, micros(now)).Scan(&at)
	})
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, fmt.Errorf("reading when certificates expire: %w", err)
	}
	return fromMicros(at), nil
}

// PushCertificatesExpiry returns when the push certificate of each topic
// expires, up to 1,000 of them, the first to expire first.
func (s *Store) PushCertificatesExpiry(ctx context.Context) (map[string]time.Time, error) {
	var expiry map[string]time.Time
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		expiry = make(map[string]time.Time)
		err := t.Query(ctx, `SELECT topic, not_after FROM nano_push_certs ORDER BY not_after LIMIT 1000`).Each(func(row sqldb.Row) error {
			var topic string
			var at int64
			if err := row.Scan(&topic, &at); err != nil {
				return err
			}
			expiry[topic] = fromMicros(at)
			return nil
		})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading when push certificates expire: %w", err)
	}
	return expiry, nil
}
