package httpapi

import (
	"context"
	"errors"
	"net/http"

	"github.com/nanomdm/nanomdm/storage"
)

// The default and the largest number of rows of one call of reseal.
const (
	resealRows    = 100
	maxResealRows = 1000
)

// reseal rewrites a batch of values that are sealed with an older key, or not
// at all. The caller repeats it with after=NEXT until next is missing.
func (a *API) reseal(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	limit := q.number("limit", resealRows, 1, maxResealRows)
	after := q.text("after")
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	done, err := a.store.Reseal(ctx, after, limit)
	switch {
	case errors.Is(err, storage.ErrNotSealing):
		return 0, nil, &problem{http.StatusConflict, "sealing is off: start the server with -seal-key-file"}
	case errors.Is(err, storage.ErrNotFound):
		return 0, nil, badRequest("after: that is not a next of this endpoint's")
	case err != nil:
		return 0, nil, err
	}
	if after == "" { // one record for each run
		a.audit(ctx, actReseal, "", "begun", nil)
	}
	return http.StatusOK, struct {
		Table      string `json:"table"`
		Looked     int    `json:"looked"`
		Rewritten  int    `json:"rewritten"`
		Unreadable int    `json:"unreadable,omitempty"`
		Next       string `json:"next,omitempty"`
	}{done.Table, done.Looked, done.Rewritten, done.Unreadable, done.Next}, nil
}
