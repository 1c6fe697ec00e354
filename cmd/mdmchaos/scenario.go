//go:build linux

package main

import "context"

// scenario is a cluster and the faults that it meets.
type scenario struct {
	name, about string
	database    func(dir string) database
	// sinks are the receivers of events, and args what one replica is started
	// with, which names them.
	sinks []sink
	args  func(w *world, replica int) ([]string, error)
	// program is the one that replicas begin with; nil is the daemon as it is.
	// It is empty where the flag that names it is missing.
	program func(o *options) string
	// env is the environment of one replica, in addition.
	env func(replica int) []string
	// times is set when operators also queue commands with times.
	times bool
	// fault breaks one thing and mends it, again and again until the time is up.
	fault func(ctx context.Context, w *world) error
}

func scenarios() []scenario {
	list := []scenario{
		{name: "kills", about: "PostgreSQL; replicas are killed", database: postgres, fault: killReplica},
		{name: "stops", about: "PostgreSQL; replicas are stopped for seconds and go on", database: postgres, fault: stopReplica},
		{name: "cuts", about: "PostgreSQL; connections break right after COMMIT was sent", database: postgres, fault: cutCommits},
		{name: "failover", about: "PostgreSQL with a synchronous standby; the primary dies", database: synchronousPostgres, fault: failOver},
		{name: "lagging", about: "the same; the standby hangs before the primary dies", database: synchronousPostgres, fault: failOverLagging},
		{name: "pgbouncer", about: "PostgreSQL behind PgBouncer in transaction mode; replicas are killed", database: pooledPostgres, fault: killReplica},
		{name: "disk-full", about: "PostgreSQL; the data's disk is full for seconds", database: smallPostgres, fault: fillDisk},
		{name: "galera-one", about: "Galera, one node takes all writes; nodes are killed and stopped", database: galera(1), fault: breakGalera},
		{name: "galera-many", about: "Galera, each replica writes to a node of its own; nodes and replicas are killed", database: galera(galeraNodes), fault: breakGaleraAndReplicas},
		{name: "galera-calm", about: "Galera with several writers and no fault: certification alone", database: galera(galeraNodes), fault: nothing},
		{name: "upgrade", about: "PostgreSQL; replicas change between the release before (-before) and this one", database: postgres, program: func(o *options) string { return o.before }, fault: changeRelease},
		{name: "sinks", about: "PostgreSQL, away for up to a minute; replicas name different webhook sinks, in turn", database: postgres, fault: breakSinks,
			sinks: sinkPerType(), args: differentSinks},
		{name: "clock", about: "PostgreSQL; clocks of replicas (-shifted) are ten minutes off both ways, and replicas are killed", database: postgres, fault: killOne,
			program: func(o *options) string { return o.shifted }, env: wrongClocks, times: true},
	}
	for i := range list {
		if list[i].sinks == nil {
			list[i].sinks, list[i].args = everything, oneSink
		}
	}
	return list
}

// oneSink are the arguments of replicas that all name the same sink.
func oneSink(w *world, _ int) ([]string, error) {
	return []string{"-webhook-url", w.receiver.url(w.sinks[0].name)}, nil
}

func postgres(dir string) database            { return &pgCluster{dir: dir} }
func synchronousPostgres(dir string) database { return &pgCluster{dir: dir, synchronous: true} }
func pooledPostgres(dir string) database      { return &pgCluster{dir: dir, pooled: true} }
func smallPostgres(dir string) database       { return &pgCluster{dir: dir, diskSize: 512 << 20} }

func galera(writers int) func(string) database {
	return func(dir string) database { return &galeraCluster{dir: dir, writers: writers} }
}
