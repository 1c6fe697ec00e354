package storage

import (
	"context"
	"time"
)

// Replica is a running server.
type Replica struct {
	// ID is new at each start.
	ID string
	// Name is the name of the machine, Listen the address of its listener.
	Name, Version, Listen string
	StartedAt             time.Time
	SeenAt                time.Time // set by the store
}

// ReplicaForgotten is the age at which a replica that was not retired leaves the
// list.
const ReplicaForgotten = 24 * time.Hour

// Replicas lists the servers that share the database.
type Replicas interface {
	// AnnounceReplica records that a replica runs, and removes replicas that
	// were last seen longer ago than ReplicaForgotten.
	AnnounceReplica(ctx context.Context, r *Replica) error
	// RetireReplica removes a replica that stops; an unknown one is no error.
	RetireReplica(ctx context.Context, id string) error
	// Replicas lists them by name and start.
	Replicas(ctx context.Context) ([]Replica, error)
}
