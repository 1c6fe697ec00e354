package main

import (
	"context"
	"crypto/rand"
	"os"
	"time"

	"github.com/nanomdm/nanomdm/cmd/nanomdm/upkeep"
	"github.com/nanomdm/nanomdm/release"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/lease"
	"github.com/nanomdm/nanomdm/storage/sqlstore"
)

// leaseTTL is how long periodic work stands still after its replica died.
const leaseTTL = 15 * time.Second

// upkeep adds the periodic work on queue and history, each under its lease.
func (b *building) upkeep(store *sqlstore.Store) {
	holder := rand.Text()
	queue := &upkeep.Queue{Store: store, Log: b.log, Now: store.Now}
	b.s.background("queue sweep", func(ctx context.Context) error {
		return lease.Hold(ctx, store, "queue", holder, leaseTTL, b.log, queue.Work)
	})
	host, err := os.Hostname()
	if err != nil {
		host = "unknown"
	}
	replica := &upkeep.Replica{Store: store, Log: b.log, Self: storage.Replica{
		ID: rand.Text(), Name: host, Version: release.String(), Listen: b.address, StartedAt: store.Now(),
	}, Connections: b.o.storageOptions.maxTotalConns, PerReplica: store.Pools()["write"].MaxOpenConnections, Limit: store.LimitConnections, Now: store.Now}
	b.s.background("replica", replica.Work)
	history := &upkeep.History{
		Store: store, Log: b.log, Now: store.Now, Commands: b.o.retainCommands, Results: b.o.retainResults,
		Audit: b.o.retainAudit, Users: b.o.retainUsers, DeleteAcked: b.o.storageOptions.deleteAcked,
	}
	if history.Idle() {
		return
	}
	b.s.background("history sweep", func(ctx context.Context) error {
		return lease.Hold(ctx, store, "history", holder, leaseTTL, b.log, history.Work)
	})
}
