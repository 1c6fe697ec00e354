package httpapi

import (
	"cmp"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// The endpoints in this file have the form that upstream NanoMDM announced for
// its own, for clients that expect it.

const (
	// maxQueryValues bounds the values of one filter of a query.
	maxQueryValues = 10_000
	// maxQueryOffset bounds the enrollments that a query passes over.
	maxQueryOffset = 100_000
)

// announcedEnrollment is an enrollment. A device has Device, a user channel has
// User.
type announcedEnrollment struct {
	ID       string           `json:"id"`
	Type     mdm.EnrollType   `json:"type"`
	Device   *announcedDevice `json:"device,omitempty"`
	User     *announcedUser   `json:"user,omitempty"`
	Enabled  bool             `json:"enabled"`
	Tally    int              `json:"token_update_tally"`
	LastSeen time.Time        `json:"last_seen,omitzero"`
}

type announcedDevice struct {
	SerialNumber string `json:"serial_number"`
	Certificate  string `json:"device_cert,omitempty"` // PEM
}

type announcedUser struct {
	ShortName string `json:"user_short_name,omitempty"`
	LongName  string `json:"user_long_name,omitempty"`
}

// enrollmentQuery is the body of a query. Values of one filter are
// alternatives; an enrollment has to fit all filters that are given.
type enrollmentQuery struct {
	Filter struct {
		IDs            []string         `json:"ids"`
		Serials        []string         `json:"serials"`
		UserShortNames []string         `json:"user_short_names"`
		Types          []mdm.EnrollType `json:"types"`
		Enabled        *bool            `json:"enabled"`
	} `json:"filter"`
	Options struct {
		DeviceCert  bool `json:"include_device_cert"`
		UnlockToken bool `json:"include_unlock_token"`
	} `json:"options"`
}

// queryPage is the page that a query asks for: its length, and where it begins.
type queryPage struct {
	limit, offset int
	after         queryPlace
}

// queryPlace is the end of a page: the id of its last enrollment, or a place in
// the list of all enrollments of a type.
type queryPlace struct {
	ID   string `json:"i,omitempty"`
	Type int    `json:"y,omitempty"`
	List *place `json:"l,omitempty"`
}

// announcedParameters reads the query parameters; an empty one counts as
// missing.
func (a *API) announcedParameters(r *http.Request) *query {
	q := a.queryOf(r)
	q.cursorName = "cursor"
	maps.DeleteFunc(q.values, func(_ string, values []string) bool { return len(values) == 1 && values[0] == "" })
	return q
}

// announcedPage reads the parameters of a page. A limit above the API's is cut.
func (a *API) announcedPage(r *http.Request) (p queryPage, err error) {
	q := a.announcedParameters(r)
	number := func(name string, usual, most int) int {
		text := q.text(name)
		n, err := strconv.Atoi(cmp.Or(text, strconv.Itoa(usual)))
		if err != nil || n < 0 {
			q.fail("%s: %q is not a number", name, text)
		}
		return min(n, most)
	}
	p.limit = max(number("limit", pageItems, maxPageItems), 1)
	p.offset = number("offset", 0, maxQueryOffset+1)
	if q.cursor(&p.after) && p.offset > 0 {
		q.fail("cursor, offset: give one of them")
	}
	if p.offset > maxQueryOffset {
		q.fail("offset: more than %d; use cursor", maxQueryOffset)
	}
	if p.after.Type < 0 || p.after.Type >= len(mdm.EnrollTypes()) {
		q.failCursor()
	}
	return p, q.err
}

// queryEnrollments lists enrollments.
func (a *API) queryEnrollments(ctx context.Context, r *http.Request) (int, any, error) {
	page, err := a.announcedPage(r)
	if err != nil {
		return 0, nil, err
	}
	var query enrollmentQuery
	if r.ContentLength != 0 {
		if err := readJSON(r, &query); err != nil {
			return 0, nil, err
		}
	}
	if err := query.check(); err != nil {
		return 0, nil, err
	}
	list, next, err := a.findQueried(ctx, &query, page)
	if err != nil {
		return 0, nil, err
	}
	answer := struct {
		Enrollments []announcedEnrollment `json:"enrollments"`
		Next        string                `json:"next_cursor,omitempty"`
	}{Enrollments: make([]announcedEnrollment, len(list))}
	for i := range list {
		answer.Enrollments[i] = announce(&list[i], query.Options.DeviceCert)
	}
	if next != nil {
		answer.Next = a.cursors.seal(r, next)
	}
	return http.StatusOK, answer, nil
}

func (q *enrollmentQuery) check() error {
	f := &q.Filter
	for name, values := range map[string][]string{"ids": f.IDs, "serials": f.Serials, "user_short_names": f.UserShortNames} {
		if len(values) > maxQueryValues {
			return badRequest("%s: more than %d values", name, maxQueryValues)
		}
		for _, value := range values {
			if why := textFault(value); why != "" {
				return badRequest("%s: %s", name, why)
			}
		}
	}
	for _, t := range f.Types {
		if !slices.Contains(mdm.EnrollTypes(), t) {
			return badRequest("types: use %s", orList(enrollTypes()))
		}
	}
	if q.Options.UnlockToken {
		return badRequest("include_unlock_token: POST /v1/enrollments/ID/unlock_token reads one, with a record")
	}
	return nil
}

// fits checks the filters on one enrollment: the search by name or serial
// number may have found it by another field.
func (q *enrollmentQuery) fits(e *storage.Enrollment) bool {
	f := &q.Filter
	among := func(values []string, value string) bool { return len(values) == 0 || slices.Contains(values, value) }
	return among(f.IDs, e.ID) && among(f.Serials, e.SerialNumber) && among(f.UserShortNames, e.UserShortName) &&
		(len(f.Types) == 0 || slices.Contains(f.Types, e.Type)) &&
		(f.Enabled == nil || *f.Enabled == (e.Enabled && !e.OperatorDisabled))
}

// findQueried reads a page: by the ids that the filters name, in their order,
// or through the lists of all enrollments of a type.
func (a *API) findQueried(ctx context.Context, query *enrollmentQuery, page queryPage) ([]storage.Enrollment, *queryPlace, error) {
	ids, named, err := a.namedIDs(ctx, query)
	if err != nil {
		return nil, nil, err
	}
	if !named {
		return a.scanQueried(ctx, query, page)
	}
	var list []storage.Enrollment
	from, _ := slices.BinarySearch(ids, page.after.ID+"\x00") // behind the last one
	for chunk := range slices.Chunk(ids[from:], maxPageItems) {
		some, err := a.store.Enrollments(ctx, callerOf(ctx).scope, chunk)
		if err != nil {
			return nil, nil, err
		}
		slices.SortFunc(some, func(x, y storage.Enrollment) int { return cmp.Compare(x.ID, y.ID) })
		for i := range some {
			switch {
			case !query.fits(&some[i]):
			case page.offset > 0:
				page.offset--
			case len(list) == page.limit:
				return list, &queryPlace{ID: list[len(list)-1].ID}, nil
			default:
				list = append(list, some[i])
			}
		}
	}
	return list, nil, nil
}

// namedIDs lists the ids that the filters name, sorted and each once. named is
// false if no filter names any.
func (a *API) namedIDs(ctx context.Context, query *enrollmentQuery) (ids []string, named bool, err error) {
	f := &query.Filter
	switch {
	case len(f.IDs) > 0:
		ids = slices.Clone(f.IDs)
	case len(f.Serials) > 0, len(f.UserShortNames) > 0:
		var filters []storage.EnrollmentFilter
		for _, serial := range f.Serials {
			filters = append(filters, storage.EnrollmentFilter{Serial: serial})
		}
		if len(filters) == 0 {
			for _, name := range f.UserShortNames {
				filters = append(filters, storage.EnrollmentFilter{User: name})
			}
		}
		for _, filter := range filters {
			some, err := a.selected(ctx, callerOf(ctx).scope, filter)
			if err != nil {
				return nil, false, err
			}
			ids = append(ids, some...)
		}
	default:
		return nil, false, nil
	}
	slices.Sort(ids)
	return slices.Compact(ids), true, nil
}

// scanQueried reads a page of the lists of all enrollments of each type.
func (a *API) scanQueried(ctx context.Context, query *enrollmentQuery, page queryPage) (list []storage.Enrollment, next *queryPlace, err error) {
	scope := callerOf(ctx).scope
	after := page.after.List.key()
	for t := page.after.Type; t < len(mdm.EnrollTypes()); t++ {
		filter := storage.EnrollmentFilter{Type: mdm.EnrollTypes()[t], Enabled: query.Filter.Enabled}
		if len(query.Filter.Types) > 0 && !slices.Contains(query.Filter.Types, filter.Type) {
			continue
		}
		for more := true; more; {
			var ids []string
			ids, after, err = a.store.FindEnrollments(ctx, scope, filter, after, min(page.limit-len(list)+page.offset, maxPageItems))
			if err != nil {
				return nil, nil, err
			}
			passed := min(page.offset, len(ids))
			page.offset -= passed
			some, err := a.store.Enrollments(ctx, scope, ids[passed:])
			if err != nil {
				return nil, nil, err
			}
			list = append(list, some...)
			more = after != (storage.EnrollmentKey{})
			switch {
			case len(list) < page.limit:
			case more:
				return list, &queryPlace{Type: t, List: placeOf(after)}, nil
			case t+1 < len(mdm.EnrollTypes()):
				return list, &queryPlace{Type: t + 1}, nil
			}
		}
	}
	return list, nil, nil
}

func announce(e *storage.Enrollment, certificate bool) announcedEnrollment {
	a := announcedEnrollment{ID: e.ID, Type: e.Type, Enabled: e.Enabled && !e.OperatorDisabled, Tally: e.Tally, LastSeen: e.LastSeenAt}
	if e.ID != e.DeviceID {
		a.User = &announcedUser{e.UserShortName, e.UserLongName}
		return a
	}
	a.Device = &announcedDevice{SerialNumber: e.SerialNumber}
	if certificate && e.Certificate != nil && len(e.Certificate.DER) > 0 {
		a.Device.Certificate = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: e.Certificate.DER}))
	}
	return a
}

// announcedCommand is a command that waits.
type announcedCommand struct {
	UUID        string `json:"command_uuid"`
	RequestType string `json:"request_type"`
	Command     []byte `json:"command"`
}

// readQueue lists the commands that wait for an enrollment, in the order of
// their delivery, with their property lists.
func (a *API) readQueue(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.announcedParameters(r)
	var after queuePlace
	q.cursor(&after)
	limit := q.limit()
	if q.err != nil {
		return 0, nil, q.err
	}
	ids, err := pathIDs(r)
	switch {
	case err != nil:
		return 0, nil, err
	case len(ids) > 1:
		return 0, nil, badRequest("the path names %d enrollments; one queue is read at a time", len(ids))
	}
	items, err := a.store.Queue(ctx, callerOf(ctx).scope, ids[0], 0, storage.QueueKey(after), limit+1)
	if err != nil {
		return 0, nil, noEnrollment(err)
	}
	answer := struct {
		Commands []announcedCommand `json:"commands"`
		Next     string             `json:"next_cursor,omitempty"`
	}{Commands: []announcedCommand{}}
	if len(items) > limit {
		items = items[:limit]
		answer.Next = a.cursors.seal(r, queuePlace{items[limit-1].Priority, items[limit-1].Seq})
	}
	uuids := make([]string, len(items))
	for i := range items {
		uuids[i] = items[i].CommandUUID
	}
	payloads, err := a.store.CommandPayloads(ctx, uuids)
	if err != nil {
		return 0, nil, err
	}
	for i := range items {
		answer.Commands = append(answer.Commands, announcedCommand{uuids[i], items[i].RequestType, payloads[uuids[i]]})
	}
	a.audit(ctx, actReadQueue, ids[0], fmt.Sprintf("%d commands", len(items)), nil)
	return http.StatusOK, answer, nil
}

// clearQueues cancels the commands that wait for enrollments.
func (a *API) clearQueues(ctx context.Context, r *http.Request) (int, any, error) {
	ids, err := pathIDs(r)
	if err != nil {
		return 0, nil, err
	}
	failed := make(map[string]string)
	for _, id := range ids {
		n, err := a.store.ClearQueue(ctx, callerOf(ctx).scope, id)
		a.audit(ctx, actClearQueue, id, fmt.Sprintf("%d cancelled", n), noEnrollment(err))
		switch {
		case errors.Is(err, storage.ErrNotFound):
			failed[id] = errNoEnrollment.Error()
		case err != nil:
			return 0, nil, err
		}
	}
	answer := struct {
		Status map[string]string `json:"status"`
	}{failed}
	switch len(failed) {
	case 0:
		return http.StatusNoContent, nil, nil
	case len(ids):
		return http.StatusInternalServerError, answer, nil
	}
	return http.StatusMultiStatus, answer, nil
}
