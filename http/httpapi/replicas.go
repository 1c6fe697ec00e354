package httpapi

import (
	"context"
	"net/http"
	"time"
)

// replicaSilent is the age of its last announcement at which a replica counts
// as down: three of them are missing then.
const replicaSilent = 45 * time.Second

// replicaInfo is a storage.Replica as JSON.
type replicaInfo struct {
	ID        string    `json:"id"`
	Name      string    `json:"name"`
	Version   string    `json:"version"`
	Listen    string    `json:"listen"`
	StartedAt time.Time `json:"started_at"`
	SeenAt    time.Time `json:"seen_at"`
	Up        bool      `json:"up"`
}

func (a *API) replicas(ctx context.Context) ([]replicaInfo, error) {
	list, err := a.store.Replicas(ctx)
	if err != nil {
		return nil, err
	}
	infos := make([]replicaInfo, len(list))
	for i, r := range list {
		infos[i] = replicaInfo{r.ID, r.Name, r.Version, r.Listen, r.StartedAt, r.SeenAt, a.cfg.Now().Sub(r.SeenAt) < replicaSilent}
	}
	return infos, nil
}

// listReplicas lists the servers that share the database.
func (a *API) listReplicas(ctx context.Context, _ *http.Request) (int, any, error) {
	infos, err := a.replicas(ctx)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, struct {
		Replicas []replicaInfo `json:"replicas"`
	}{infos}, nil
}
