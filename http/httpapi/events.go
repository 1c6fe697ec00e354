package httpapi

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/service/webhook"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// longestWait bounds the wait of one call. The log is polled each
	// pollEvery meanwhile.
	longestWait = time.Minute
	pollEvery   = 500 * time.Millisecond
	// eventRows is how many events are read at once, and pageBytes the bytes
	// of payload after which a page ends.
	eventRows = 100
	pageBytes = 8 << 20
	// maxReads bounds the reads of the log that one call makes to fill a page.
	maxReads = 20
	// maxSinks bounds the sinks, each of which costs its own deliveries and
	// its own rows of metrics.
	maxSinks = 32
	// sinkSeen is the age at which a replica's sighting of a configured sink
	// no longer counts.
	sinkSeen = time.Minute
)

// lastEvent stands for the cursor of the newest event.
const lastEvent = "last"

// loggedEvent is an event as receivers get it, with its cursor in the log.
type loggedEvent struct {
	webhook.Event
	Cursor string `json:"cursor"`
	// SerialNumber and RequestType are for people; receivers do not get them.
	SerialNumber string `json:"serial_number,omitempty"`
	RequestType  string `json:"request_type,omitempty"`
}

type eventPage struct {
	Events []loggedEvent `json:"events"`
	Next   string        `json:"next"`
}

// listEvents reads the log from a cursor on. With wait it waits for the first
// event.
func (a *API) listEvents(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	limit, after, wait := q.limit(), int64(0), q.wait()
	fromNow := q.text("after") == lastEvent
	if !fromNow {
		after = q.eventCursor()
	}
	topics := q.texts("topic")
	for _, topic := range topics {
		if !slices.Contains(storage.EventTopics(), topic) {
			q.fail("topic: there is none called %q", topic)
		}
	}
	newest := q.number("newest", 0, 1, maxPageItems)
	choice := eventChoice{topics: topics, id: q.text("id"), since: q.time("since")}
	switch {
	case newest == 0 && (choice.id != "" || !choice.since.IsZero()):
		q.fail("newest: it is needed with id and since")
	case newest > 0 && (fromNow || after > 0 || wait > 0):
		q.fail("newest: it goes neither with after nor with wait")
	}
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	if newest > 0 {
		var err error
		if choice.id != "" {
			if choice.id, err = a.enrollmentID(ctx, choice.id); err != nil {
				return 0, nil, err
			}
		}
		return a.newestEvents(r, newest, &choice)
	}
	if fromNow {
		var err error
		if after, err = a.store.LastEvent(ctx); err != nil {
			return 0, nil, err
		}
	}
	return a.eventsAfter(r, storage.EventQuery{After: after, Topics: topics}, limit, wait)
}

// eventsAfter answers with a page of the log. It waits for the first event of an
// empty page.
func (a *API) eventsAfter(r *http.Request, query storage.EventQuery, limit int, wait time.Duration) (int, any, error) {
	ctx := r.Context()
	patience, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if wait > 0 {
		end, err := a.waits.begin(callerOf(ctx))
		if err != nil {
			return 0, nil, err
		}
		defer end()
	}
	for {
		page, next, err := a.readEvents(r, query, limit)
		if err != nil {
			return 0, nil, err
		}
		if len(page) > 0 || wait == 0 || !a.log.wait(patience, next, a.cfg.Draining) {
			return http.StatusOK, eventPage{Events: page, Next: a.cursors.event(r, next)}, nil
		}
		query.After = next
	}
}

// readEvents makes a page of the log. Only admins get payloads that bear
// tokens.
func (a *API) readEvents(r *http.Request, query storage.EventQuery, limit int) ([]loggedEvent, int64, error) {
	ctx, who := r.Context(), callerOf(r.Context())
	page, ids, size := []loggedEvent{}, []string{}, int64(0)
	for range maxReads {
		query.Limit = min(eventRows, limit-len(page))
		events, next, err := a.store.ReadEvents(ctx, who.scope, query)
		if err != nil {
			return nil, 0, err
		}
		for i := range events {
			e := &events[i]
			if size += max(0, e.RawSize); size > pageBytes && len(page) > 0 {
				return page, query.After, a.nameDevices(ctx, page, ids)
			}
			if err := a.completePayload(ctx, who, e); err != nil {
				return nil, 0, err
			}
			page = append(page, a.loggedEvent(r, e))
			ids = append(ids, e.Enroll.ID)
			query.After = e.Seq
		}
		ended := next == query.After && len(events) < query.Limit
		query.After = next
		if ended || len(page) > 0 && len(events) < query.Limit || len(page) == limit {
			break
		}
	}
	return page, query.After, a.nameDevices(ctx, page, ids)
}

// completePayload reads a large payload, and takes one away that the caller may
// not see.
func (a *API) completePayload(ctx context.Context, who caller, e *storage.Event) (err error) {
	switch {
	case storage.BearsTokens(e.Topic) && who.role < roleAdmin:
		e.Raw = nil
	case e.RawApart:
		if e.Raw, err = a.store.EventPayload(ctx, e.Seq); err != nil && !errors.Is(err, storage.ErrNotFound) {
			return err
		}
	}
	return nil
}

func (a *API) loggedEvent(r *http.Request, e *storage.Event) loggedEvent {
	return loggedEvent{Event: webhook.NewEvent(e), Cursor: a.cursors.event(r, e.Seq), RequestType: e.RequestType}
}

// loggedEvents are events without payloads, which a list for people leaves out.
func (a *API) loggedEvents(r *http.Request, events []storage.Event) ([]loggedEvent, error) {
	page, ids := make([]loggedEvent, len(events)), make([]string, len(events))
	for i := range events {
		events[i].Raw = nil
		page[i], ids[i] = a.loggedEvent(r, &events[i]), events[i].Enroll.ID
	}
	return page, a.nameDevices(r.Context(), page, ids)
}

// eventCursor reads a number of the log, which bound keys have sealed.
func (q *query) eventCursor() (number int64) {
	if len(callerOf(q.request.Context()).scope.Topics) > 0 {
		q.cursor(&number)
		return number
	}
	text := q.text(q.cursorName)
	if text == "" {
		return 0
	}
	number, err := strconv.ParseInt(text, 10, 64)
	if err != nil || number < 0 {
		q.fail("%s: %q is not a cursor of an event", q.cursorName, text)
	}
	return number
}

// wait reads the longest time that the caller waits.
func (q *query) wait() time.Duration {
	text := q.text("wait")
	if text == "" {
		return 0
	}
	d, err := time.ParseDuration(text)
	if err != nil || d < 0 || d > longestWait {
		q.fail("wait: a time of at most %v is wanted, such as 30s", longestWait)
	}
	return d
}

// redeliver has events sent to a sink again.
func (a *API) redeliver(ctx context.Context, r *http.Request) (int, any, error) {
	var body struct {
		Sink    string `json:"sink"`
		After   string `json:"after"`
		Through string `json:"through"`
		Dead    bool   `json:"dead"`
	}
	if err := readJSON(r, &body); err != nil {
		return 0, nil, err
	}
	number := func(name, text string) (n int64, err error) {
		if text != "" {
			n, err = strconv.ParseInt(text, 10, 64)
		}
		if err != nil || n < 0 {
			err = badRequest("%s: %q is not a cursor of an event", name, text)
		}
		return n, err
	}
	after, err := number("after", body.After)
	if err != nil {
		return 0, nil, err
	}
	through, err := number("through", body.Through)
	switch {
	case err != nil:
		return 0, nil, err
	case body.Sink == "":
		return 0, nil, badRequest("sink: name one")
	case !body.Dead && body.After == "" && body.Through == "":
		return 0, nil, badRequest("after, through: give at least one of them, or dead")
	}
	n, err := a.store.Redeliver(ctx, storage.Redelivery{Sink: body.Sink, After: after, Through: through, Dead: body.Dead})
	a.audit(ctx, actRedeliver, body.Sink, fmt.Sprintf("%d events, after %d, through %d, dead letters only: %v", n, after, through, body.Dead), err)
	if errors.Is(err, storage.ErrNotFound) {
		return 0, nil, errNoSink
	}
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, struct {
		Redelivering int64 `json:"redelivering"`
	}{n}, nil
}

var errNoSink = &problem{http.StatusNotFound, "no sink of that name"}

// sinkInfo is a sink as JSON, without its keys and without a password in its
// URL.
type sinkInfo struct {
	Name       string              `json:"name"`
	URL        string              `json:"url,omitempty"`
	KeyCount   int                 `json:"key_count"`
	Tokens     bool                `json:"tokens"`
	Form       storage.EventForm   `json:"form,omitempty"`
	OnError    storage.OnError     `json:"on_error"`
	Filter     storage.EventFilter `json:"filter"`
	Disabled   bool                `json:"disabled"`
	Reason     string              `json:"reason,omitempty"`
	DownSince  time.Time           `json:"down_since,omitzero"`
	DownError  string              `json:"down_error,omitempty"`
	Configured bool                `json:"configured"`
	Cursor     string              `json:"cursor"`
	CreatedAt  time.Time           `json:"created_at"`
	UpdatedAt  time.Time           `json:"updated_at"`
	Warning    string              `json:"warning,omitempty"`
	Backlog    *sinkBacklog        `json:"backlog,omitempty"`
}

// sinkBacklog counts the events that an enabled sink has not received.
type sinkBacklog struct {
	Behind   int64     `json:"behind"`
	OldestAt time.Time `json:"oldest_at,omitzero"`
	Waiting  int64     `json:"waiting"`
	Again    int64     `json:"again"`
	Dead     int64     `json:"dead"`
	Dropped  int64     `json:"dropped"`
}

func redactedURL(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return ""
	}
	return u.Redacted()
}

func infoOfSink(k *storage.EventSink, backlogs []storage.SinkBacklog) sinkInfo {
	info := sinkInfo{
		Name: k.Name, URL: redactedURL(k.URL), KeyCount: len(k.Keys), Tokens: k.Tokens, Form: k.Form, OnError: cmp.Or(k.OnError, storage.OnErrorHold),
		Filter: k.Filter, Disabled: !k.Enabled,
		Reason: k.Reason, DownSince: k.DownSince, DownError: k.DownError, Configured: k.Configured, Cursor: strconv.FormatInt(k.Cursor, 10), CreatedAt: k.CreatedAt, UpdatedAt: k.UpdatedAt,
	}
	if webhook.SendsTokensInClear(k) {
		info.Warning = "tokens are sent over http, which anybody on the way can read: use https"
	}
	for _, b := range backlogs {
		if b.Sink == k.Name {
			info.Backlog = &sinkBacklog{Behind: b.Behind, OldestAt: b.Oldest, Waiting: b.Waiting, Again: b.Again, Dead: b.Dead, Dropped: b.Dropped}
		}
	}
	return info
}

func (a *API) listSinks(ctx context.Context, _ *http.Request) (int, any, error) {
	sinks, err := a.store.EventSinks(ctx)
	if err != nil {
		return 0, nil, err
	}
	backlogs, err := a.store.EventBacklogs(ctx)
	if err != nil {
		return 0, nil, err
	}
	list := struct {
		Sinks []sinkInfo `json:"sinks"`
	}{[]sinkInfo{}}
	for i := range sinks {
		list.Sinks = append(list.Sinks, infoOfSink(&sinks[i], backlogs))
	}
	return http.StatusOK, list, nil
}

// findSink reads a sink, or returns nil.
func (a *API) findSink(ctx context.Context, name string) (found *storage.EventSink, others int, err error) {
	sinks, err := a.store.EventSinks(ctx)
	if err != nil {
		return nil, 0, err
	}
	for i := range sinks {
		if sinks[i].Name == name {
			return &sinks[i], len(sinks) - 1, nil
		}
	}
	return nil, len(sinks), nil
}

func (a *API) showSink(ctx context.Context, r *http.Request) (int, any, error) {
	k, _, err := a.findSink(ctx, r.PathValue("name"))
	if err != nil {
		return 0, nil, err
	}
	if k == nil {
		return 0, nil, errNoSink
	}
	backlogs, err := a.store.EventBacklogs(ctx)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, infoOfSink(k, backlogs), nil
}

// storeSink makes or replaces a sink. Secrets that an operator cannot see stay
// if the body leaves them out: the keys, and the password in the URL.
func (a *API) storeSink(ctx context.Context, r *http.Request) (int, any, error) {
	body, err := readBody(r)
	if err != nil {
		return 0, nil, err
	}
	name := r.PathValue("name")
	config, err := webhook.ParseSink(body)
	if err != nil {
		return 0, nil, badRequest("body: %v", err)
	}
	if config.Name != "" && config.Name != name {
		return 0, nil, badRequest("name: the path says %s", name)
	}
	config.Name = name
	was, others, err := a.findSink(ctx, name)
	switch {
	case err != nil:
		return 0, nil, err
	case was == nil && others >= maxSinks:
		return 0, nil, &problem{http.StatusConflict, fmt.Sprintf("there are %d sinks; delete one first", others)}
	case was != nil && was.Configured:
		return 0, nil, &problem{http.StatusConflict, "that sink is in the configuration of a replica; change it there"}
	case was != nil && config.Keys == nil:
		config.Keys = was.Keys
	}
	if was != nil && config.URL == redactedURL(was.URL) {
		config.URL = was.URL
	}
	k, err := config.Check()
	if err != nil {
		return 0, nil, badRequest("%v", err)
	}
	if err := a.cfg.SinkGuard.CheckURL(k.URL); err != nil {
		return 0, nil, badRequest("url: %v; -webhook-networks can allow it", err)
	}
	if err := a.store.PutEventSink(ctx, k); err != nil {
		return 0, nil, err
	}
	a.sinksChanged(ctx, "event sink stored", name)
	a.audit(ctx, actStoreSink, name, sinkDetail(&k), nil)
	stored, _, err := a.findSink(ctx, name)
	if err != nil {
		return 0, nil, err
	}
	if stored == nil { // deleted again by somebody else
		return 0, nil, errNoSink
	}
	return http.StatusOK, infoOfSink(stored, nil), nil
}

// sinkDetail describes a sink in the audit.
func sinkDetail(k *storage.EventSink) string {
	filter, _ := json.Marshal(k.Filter) // it is lists of texts
	return fmt.Sprintf("url %s, %d keys, tokens: %v, on error: %s, enabled: %v, filter %s", redactedURL(k.URL), len(k.Keys), k.Tokens, k.OnError, k.Enabled, filter)
}

func (a *API) deleteSink(ctx context.Context, r *http.Request) (int, any, error) {
	name := r.PathValue("name")
	k, _, err := a.findSink(ctx, name)
	switch {
	case err != nil:
		return 0, nil, err
	case k == nil:
		return a.gone(ctx, actDeleteSink, name, errNoSink)
	case k.Configured && a.cfg.Now().Sub(k.SeenAt) < sinkSeen:
		return 0, nil, &problem{http.StatusConflict, "that sink is in the configuration of a running replica, or was a moment ago; remove it there first"}
	}
	if err := a.store.DeleteEventSink(ctx, name); errors.Is(err, storage.ErrNotFound) {
		return a.gone(ctx, actDeleteSink, name, errNoSink)
	} else if err != nil {
		return 0, nil, err
	}
	a.sinksChanged(ctx, "event sink deleted", name)
	a.audit(ctx, actDeleteSink, name, "", nil)
	return http.StatusOK, struct {
		Name string `json:"name"`
	}{name}, nil
}

// sinksChanged applies a change here at once; other replicas see it a few
// seconds later.
func (a *API) sinksChanged(ctx context.Context, what, name string) {
	id := requestlog.ID(ctx)
	a.cfg.Logger.InfoContext(ctx, what, "request_id", id, "name", name, "by", callerOf(ctx).name)
	if a.cfg.SinksChanged == nil {
		return
	}
	if err := a.cfg.SinksChanged(ctx); err != nil {
		a.cfg.Logger.WarnContext(ctx, "cannot read the event sinks; the change is seen later", "request_id", id, "error", err)
	}
}
