package httpapi

import (
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/storage"
)

const (
	// newestWindow is how many numbers of the log the search for the newest
	// events goes back at once, and newestReads bounds the reads of one call.
	newestWindow = 200
	newestReads  = 50
)

// eventChoice is what the newest events are chosen by; zero fields choose all.
type eventChoice struct {
	topics []string
	id     string
	since  time.Time
}

func (c *eventChoice) has(e *storage.Event) bool {
	return (c.id == "" || e.Enroll.ID == c.id) && !e.CreatedAt.Before(c.since)
}

// newestEvents answers with the newest events, the oldest of them first. It
// looks at a bounded stretch of the log, so that there may be fewer than were
// asked for.
func (a *API) newestEvents(r *http.Request, n int, c *eventChoice) (int, any, error) {
	ctx := r.Context()
	last, err := a.store.LastEvent(ctx)
	if err != nil {
		return 0, nil, err
	}
	var found []storage.Event
	reads := 0
	for high := last; high > 0 && len(found) < n && reads < newestReads; {
		low := max(0, high-newestWindow)
		window, oldest, err := a.eventWindow(ctx, low, high, c, &reads)
		if err != nil {
			return 0, nil, err
		}
		found = append(window, found...)
		if !oldest.IsZero() && oldest.Before(c.since) {
			break
		}
		high = low
	}
	found = found[max(0, len(found)-n):]
	page, err := a.loggedEvents(r, found)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, eventPage{Events: page, Next: a.cursors.event(r, last)}, nil
}

// eventWindow reads the chosen events with numbers above low up to high, and
// the time of the oldest one that it saw.
func (a *API) eventWindow(ctx context.Context, low, high int64, c *eventChoice, reads *int) (found []storage.Event, oldest time.Time, err error) {
	for after := low; after < high && *reads < newestReads; {
		*reads++
		events, next, err := a.store.ReadEvents(ctx, callerOf(ctx).scope, storage.EventQuery{After: after, Limit: eventRows, Topics: c.topics})
		if err != nil {
			return nil, time.Time{}, err
		}
		for i := range events {
			if events[i].Seq > high {
				return found, oldest, nil
			}
			if oldest.IsZero() {
				oldest = events[i].CreatedAt
			}
			if c.has(&events[i]) {
				found = append(found, events[i])
			}
		}
		if next <= after {
			break
		}
		after = next
	}
	return found, oldest, nil
}

// nameDevices adds the serial numbers of the devices that events are of; the
// id of an event of the server's is empty.
func (a *API) nameDevices(ctx context.Context, page []loggedEvent, ids []string) error {
	unique := slices.Compact(slices.Sorted(slices.Values(ids)))
	unique = slices.DeleteFunc(unique, func(id string) bool { return id == "" })
	if len(unique) == 0 {
		return nil
	}
	list, err := a.store.Enrollments(ctx, callerOf(ctx).scope, unique)
	if err != nil {
		return err
	}
	serials := make(map[string]string, len(list))
	for i := range list {
		serials[list[i].ID] = list[i].SerialNumber
	}
	for i := range page {
		page[i].SerialNumber = serials[ids[i]]
	}
	return nil
}
