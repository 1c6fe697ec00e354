package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

// statsInfo is the number of enrollments, commands, pushes and events as JSON.
type statsInfo struct {
	Version     string `json:"version"`
	Enrollments struct {
		ByType      map[string]int64 `json:"by_type"`
		Enabled     int64            `json:"enabled"`
		Disabled    int64            `json:"disabled"`
		NotEnrolled int64            `json:"not_enrolled"`
	} `json:"enrollments"`
	Queue struct {
		ByState         map[string]int64 `json:"by_state"`
		Limit           int64            `json:"limit"`
		OldestWaitingAt time.Time        `json:"oldest_waiting_at,omitzero"`
	} `json:"queue"`
	Push struct {
		Owed       int64           `json:"owed"`
		Unanswered int64           `json:"unanswered"`
		Topics     []pushTopicInfo `json:"topics"`
	} `json:"push"`
	Events   *eventStats   `json:"events,omitempty"`
	Replicas []replicaInfo `json:"replicas,omitempty"`
}

// pushTopicInfo is the topic of a push certificate as JSON.
type pushTopicInfo struct {
	Topic       string    `json:"topic"`
	NotAfter    time.Time `json:"not_after"`
	Enrollments int64     `json:"enrollments"`
	LastClass   string    `json:"last_class,omitempty"`
	LastAt      time.Time `json:"last_at,omitzero"`
}

// eventStats counts the events of the log, and those that receivers have not
// received.
type eventStats struct {
	Waiting         int64      `json:"waiting"`
	Dead            int64      `json:"dead"`
	OldestWaitingAt time.Time  `json:"oldest_waiting_at,omitzero"`
	Logged          int64      `json:"logged,omitempty"`
	LogBytes        int64      `json:"log_bytes,omitempty"`
	Sinks           []sinkStat `json:"sinks"`
}

type sinkStat struct {
	Name            string    `json:"name"`
	Waiting         int64     `json:"waiting"`
	Dead            int64     `json:"dead"`
	Dropped         int64     `json:"dropped,omitempty"`
	OldestWaitingAt time.Time `json:"oldest_waiting_at,omitzero"`
}

func (a *API) stats(ctx context.Context, _ *http.Request) (int, any, error) {
	scope := callerOf(ctx).scope
	st, err := a.store.Statistics(ctx, scope)
	if err != nil {
		return 0, nil, err
	}
	info := statsInfo{Version: a.cfg.Version}
	info.Enrollments.ByType = make(map[string]int64)
	for typ, n := range st.ByType {
		info.Enrollments.ByType[string(typ)] = n
	}
	info.Enrollments.Enabled, info.Enrollments.Disabled, info.Enrollments.NotEnrolled = st.Enabled, st.Disabled, st.NotEnrolled
	info.Queue.ByState, info.Queue.Limit, info.Queue.OldestWaitingAt = make(map[string]int64), storage.StatisticsLimit, st.OldestWaiting
	for state, n := range st.Queue {
		info.Queue.ByState[state.String()] = n
	}
	info.Push.Owed, info.Push.Unanswered, info.Push.Topics = st.PushesOwed, st.PushesUnanswered, []pushTopicInfo{}
	certs, err := a.store.PushCertInfos(ctx, scope)
	if err != nil {
		return 0, nil, err
	}
	for _, c := range certs {
		info.Push.Topics = append(info.Push.Topics, pushTopicInfo{c.Topic, c.NotAfter, c.Enrollments, c.LastClass, c.LastAt})
	}
	if len(scope.Topics) == 0 { // events concern all topics
		if info.Events, err = a.eventStats(ctx); err != nil {
			return 0, nil, err
		}
		if info.Replicas, err = a.replicas(ctx); err != nil {
			return 0, nil, err
		}
	}
	return http.StatusOK, info, nil
}

func (a *API) eventStats(ctx context.Context) (*eventStats, error) {
	backlogs, err := a.store.EventBacklogs(ctx)
	if err != nil {
		return nil, err
	}
	size, err := a.store.EventLogSize(ctx)
	if err != nil {
		return nil, err
	}
	s := &eventStats{Logged: size.Events, LogBytes: size.Bytes, Sinks: []sinkStat{}}
	for _, b := range backlogs {
		waiting := b.Behind + b.Waiting + b.Again
		s.Waiting += waiting
		s.Dead += b.Dead
		if !b.Oldest.IsZero() && (s.OldestWaitingAt.IsZero() || b.Oldest.Before(s.OldestWaitingAt)) {
			s.OldestWaitingAt = b.Oldest
		}
		s.Sinks = append(s.Sinks, sinkStat{b.Sink, waiting, b.Dead, b.Dropped, b.Oldest})
	}
	return s, nil
}
