package sqldb

import (
	"context"
	"fmt"
	"time"
)

const (
	// clockSlack is how far apart the clocks of this machine and the database's
	// may be before times follow the database's. Below it the measurement is no
	// better than the clock.
	clockSlack = time.Second
	// clockWarning is a difference that an operator has to know of.
	clockWarning = 5 * time.Second
)

// MeasureClock compares Config.Now with the database's clock. From then on Now
// is bounded by it. A measurement that took long says nothing and changes
// nothing.
func (db *DB) MeasureClock(ctx context.Context) error {
	if db.dialect.clock == "" {
		return nil
	}
	var before, after time.Time
	var micros int64
	err := db.Read(ctx, func(ctx context.Context, t *Tx) error {
		before = db.machine()
		err := t.QueryRow(ctx, db.dialect.clock).Scan(&micros)
		after = db.machine()
		return err
	})
	if err != nil {
		return fmt.Errorf("reading the database's clock: %w", err)
	}
	took := after.Sub(before)
	if took > clockSlack {
		return nil
	}
	offset := time.UnixMicro(micros).Sub(before.Add(took / 2))
	was := time.Duration(db.offset.Swap(int64(offset)))
	if offset.Abs() > clockWarning && was.Abs() <= clockWarning {
		db.log.WarnContext(ctx, "the clocks of this machine and of the database differ; look at their NTP", "database_ahead", offset.Round(time.Millisecond))
	}
	return nil
}

// ClockOffset is how far the database's clock was ahead of this machine's when
// MeasureClock last looked.
func (db *DB) ClockOffset() time.Duration { return time.Duration(db.offset.Load()) }

// Now is Config.Now, moved to the database's clock if the two differ.
func (db *DB) Now() time.Time {
	now := db.machine()
	if offset := db.ClockOffset(); offset.Abs() > clockSlack {
		now = now.Add(offset)
	}
	return now
}
