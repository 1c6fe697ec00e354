//go:build linux

package main

import (
	"context"
	"database/sql"
	"sync"
	"time"
)

// watchEvery is the resolution of take-over times.
const watchEvery = 250 * time.Millisecond

// leaseWatch measures how long periodic work stands still when its lease goes
// from one replica to another.
type leaseWatch struct {
	db   *sql.DB
	stop context.CancelFunc
	done sync.WaitGroup

	seen      map[string]leaseSighting
	takeovers int
	longest   time.Duration
}

// leaseSighting is the state of a lease, and when the watch first saw it.
type leaseSighting struct {
	fence, beat int64
	at          time.Time
}

// watchLeases reads the leases in the database of a replica until end.
func watchLeases(ctx context.Context, storage, dsn string) (*leaseWatch, error) {
	driver := "mysql"
	if storage == "pgsql" {
		// A pooler gives each statement another connection.
		driver, dsn = "pgx", dsn+"&default_query_exec_mode=simple_protocol"
	}
	db, err := sql.Open(driver, dsn)
	if err != nil {
		return nil, err
	}
	w := &leaseWatch{db: db, seen: make(map[string]leaseSighting)}
	ctx, w.stop = context.WithCancel(ctx)
	w.done.Go(func() { w.run(ctx) })
	return w, nil
}

func (w *leaseWatch) run(ctx context.Context) {
	ticker := time.NewTicker(watchEvery)
	defer ticker.Stop()
	for {
		select {
		case <-ticker.C:
			w.look(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// look reads the leases once. While the database is away, nothing is seen, and
// that time counts for the next holder.
func (w *leaseWatch) look(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	rows, err := w.db.QueryContext(ctx, "SELECT name, fence, beat FROM nano_leases")
	if err != nil {
		return
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		now := leaseSighting{at: time.Now()}
		if rows.Scan(&name, &now.fence, &now.beat) != nil {
			return
		}
		w.note(name, now)
	}
}

// note counts a take-over: a new fence, after the last renewal of the holder
// before.
func (w *leaseWatch) note(name string, now leaseSighting) {
	before, known := w.seen[name]
	switch {
	case !known:
	case now.fence != before.fence:
		w.takeovers++
		w.longest = max(w.longest, now.at.Sub(before.at))
	case now.beat == before.beat:
		return
	}
	w.seen[name] = now
}

// end stops the watch.
func (w *leaseWatch) end() {
	w.stop()
	w.done.Wait()
	_ = w.db.Close()
}
