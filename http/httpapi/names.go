package httpapi

import (
	"context"
	"slices"

	"github.com/nanomdm/nanomdm/http/requestlog"
	"github.com/nanomdm/nanomdm/storage"
)

// disabledText is the error of an enrollment that an operator disabled, where
// the store says that it is not enrolled.
const disabledText = "disabled by an operator"

// sayDisabled replaces the text of storage.ErrNotEnrolled for enrollments that
// an operator disabled. The call is done by now, so that a failure to find out
// leaves the text as it is.
func (a *API) sayDisabled(ctx context.Context, res *result) {
	var ids []string
	notEnrolled := storage.ErrNotEnrolled.Error()
	for id, s := range res.Status {
		if s.PushError == notEnrolled {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	for part := range slices.Chunk(ids, maxPageItems) {
		list, err := a.store.Enrollments(ctx, callerOf(ctx).scope, part)
		if err != nil {
			a.cfg.Logger.WarnContext(ctx, "disabled enrollments are reported as not enrolled", "request_id", requestlog.ID(ctx), "error", err)
			return
		}
		for i := range list {
			if !list[i].OperatorDisabled {
				continue
			}
			s := res.Status[list[i].ID]
			s.PushError = disabledText
			res.Status[list[i].ID] = s
		}
	}
}

// namedItems are queue items of one command with the names of their devices.
func (a *API) namedItems(ctx context.Context, items []storage.QueueItem) ([]itemInfo, error) {
	infos := infosOfItems(items)
	if len(items) == 0 {
		return infos, nil
	}
	ids := make([]string, len(items))
	for i := range items {
		ids[i] = items[i].Enrollment
	}
	list, err := a.store.Enrollments(ctx, callerOf(ctx).scope, ids)
	if err != nil {
		return nil, err
	}
	byID := make(map[string]*storage.Enrollment, len(list))
	for i := range list {
		byID[list[i].ID] = &list[i]
	}
	for i := range infos {
		if e := byID[infos[i].EnrollmentID]; e != nil {
			infos[i].SerialNumber, infos[i].DeviceName = e.SerialNumber, e.DeviceName
		}
	}
	return infos, nil
}
