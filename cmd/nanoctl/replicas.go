package main

import (
	"context"
	"flag"
	"net/http"
	"time"
)

// replica is a server that shares the database.
type replica struct {
	Name      string     `json:"name"`
	Version   string     `json:"version"`
	Listen    string     `json:"listen"`
	StartedAt *time.Time `json:"started_at"`
	SeenAt    *time.Time `json:"seen_at"`
	Up        bool       `json:"up"`
}

func (r *replica) state() string {
	if r.Up {
		return "up since " + ago(r.StartedAt)
	}
	return "down, seen " + ago(r.SeenAt)
}

var replicaColumns = []column[replica]{
	{heading: "NAME", cell: func(r *replica) string { return r.Name }, clip: true},
	{heading: "STATE", cell: (*replica).state, tone: toneOf},
	{heading: "VERSION", cell: func(r *replica) string { return r.Version }},
	{heading: "LISTEN", cell: func(r *replica) string { return r.Listen }},
}

func replicasCommand() command {
	return command{
		name: "replicas", short: "List the servers that share the database", example: "nanoctl replicas",
		prepare: func(*flag.FlagSet) runner {
			return func(ctx context.Context, e *env, _ []string) error {
				a, err := e.api.do(ctx, http.MethodGet, "/v1/replicas", nil, nil)
				return e.printAnswer(a, err, nil, func() error { return showItems(e, a, "replicas", replicaColumns) })
			}
		},
	}
}
