package sqlstore

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// probeEvery is how often Ping writes while writing works.
const probeEvery = 10 * time.Second

// writeProbe remembers what became of writes that only try whether the database
// takes any.
type writeProbe struct {
	mu     sync.Mutex
	next   time.Duration // uptime of the next
	failed bool          // the last one
}

// ask writes if it is time to, and fails if that failed twice in a row: one
// failure may be that of a busy moment.
func (p *writeProbe) ask(uptime time.Duration, write func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if uptime < p.next {
		return nil
	}
	err := write()
	again := p.failed
	p.failed = err != nil
	switch {
	case err == nil:
		p.next = uptime + probeEvery
	case again:
		return err
	}
	return nil
}

// probeWrite commits a small write that leaves nothing. A standby, a full disk
// and a cluster's node without the others refuse it.
func (s *Store) probeWrite(ctx context.Context) error {
	name := "probe " + rand.Text()
	err := s.write(ctx, func(ctx context.Context, t *tx) error {
		if _, err := t.Exec(ctx, `INSERT INTO nano_leases (name, holder, fence, beat) VALUES (?, '', 0, 0)`, name); err != nil {
			return err
		}
		_, err := t.Exec(ctx, `DELETE FROM nano_leases WHERE name = ?`, name)
		return err
	})
	if err != nil {
		return fmt.Errorf("trying to write: %w", err)
	}
	return nil
}

// notNow makes what the database refuses for the time being, such as a write to
// a standby, ErrUnavailable.
func notNow(err error) error {
	if errors.Is(err, storage.ErrBusy) {
		return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
	}
	return err
}

// measureClock compares the clocks, if the store goes by the database's.
func (s *Store) measureClock(ctx context.Context) error {
	if !s.cfg.DatabaseClock {
		return nil
	}
	return storageError(s.db.MeasureClock(ctx))
}
