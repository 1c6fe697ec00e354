package storage

import (
	"context"
	"time"
)

// Replica is a running server.
type Replica struct {
	// ID is made at each start.
	ID string
	// Name is that of the machine, Listen the address of its listener.
	Name, Version, Listen string
	StartedAt             time.Time
	SeenAt                time.Time // set by the store
}

// ReplicaForgotten is the age at which a replica that stopped without a word
// leaves the list.
const ReplicaForgotten = 24 * time.Hour

// Replicas keeps which servers share the database.
type Replicas interface {
	// AnnounceReplica notes that a replica runs, and forgets those that have
	// not been seen for ReplicaForgotten.
	AnnounceReplica(ctx context.Context, r *Replica) error
	// RetireReplica forgets a replica that stops; an unknown one is no error.
	RetireReplica(ctx context.Context, id string) error
	// Replicas lists them by name and start.
	Replicas(ctx context.Context) ([]Replica, error)
}
