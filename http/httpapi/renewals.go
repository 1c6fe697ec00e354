package httpapi

import (
	"context"
	"fmt"
	"net/http"
	"time"
)

// maxRenewal bounds the length of a renewal window.
const maxRenewal = 90 * 24 * time.Hour

// renewalTime is the end of a renewal window as JSON: a duration or a time.
type renewalTime struct {
	For   *string    `json:"for,omitempty"`
	Until *time.Time `json:"until,omitempty"`
}

func (t renewalTime) end(now time.Time) (time.Time, error) {
	var until time.Time
	switch {
	case t.For != nil && t.Until != nil:
		return time.Time{}, badRequest("for, until: give one of them")
	case t.For != nil:
		d, err := time.ParseDuration(*t.For)
		if err != nil {
			return time.Time{}, badRequest("for: %q is not a time such as 24h", *t.For)
		}
		until = now.Add(d)
	case t.Until != nil:
		until = t.Until.UTC()
	default:
		return time.Time{}, badRequest("for, until: say how long, such as {\"for\": \"24h\"}")
	}
	if !until.After(now) || until.After(now.Add(maxRenewal)) {
		return time.Time{}, badRequest("for, until: the window must end within the next %d days", maxRenewal/(24*time.Hour))
	}
	return until.UTC(), nil
}

// renewalInfo is a device's renewal window.
type renewalInfo struct {
	ID    string    `json:"id"`
	Until time.Time `json:"renewal_until,omitzero"`
}

func (a *API) openRenewal(ctx context.Context, r *http.Request) (int, any, error) {
	var body renewalTime
	if err := readJSON(r, &body); err != nil {
		return 0, nil, err
	}
	until, err := body.end(a.cfg.Now())
	if err != nil {
		return 0, nil, err
	}
	return a.setRenewal(ctx, r, until, actOpenRenewal)
}

func (a *API) closeRenewal(ctx context.Context, r *http.Request) (int, any, error) {
	return a.setRenewal(ctx, r, time.Time{}, actCloseRenewal)
}

func (a *API) setRenewal(ctx context.Context, r *http.Request, until time.Time, action string) (int, any, error) {
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, action, r.PathValue("id"), err)
	}
	changed, err := a.store.SetRenewal(ctx, callerOf(ctx).scope, []string{id}, until)
	if err == nil && len(changed) == 0 {
		err = badRequest("%s is a user channel: the identity is its device's", id)
	}
	detail := ""
	if !until.IsZero() {
		detail = "until " + until.Format(time.RFC3339)
	}
	a.audit(ctx, action, id, detail, err)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, renewalInfo{id, until}, nil
}

// openRenewals opens the windows of many devices.
func (a *API) openRenewals(ctx context.Context, r *http.Request) (int, any, error) {
	var body struct {
		targetSet
		renewalTime
	}
	if err := readJSON(r, &body); err != nil {
		return 0, nil, err
	}
	until, err := body.end(a.cfg.Now())
	if err != nil {
		return 0, nil, err
	}
	if err := body.check(); err != nil {
		return 0, nil, err
	}
	ids, refusal, err := a.resolve(ctx, &body.targetSet)
	if err != nil {
		return 0, nil, err
	}
	if refusal != nil {
		return http.StatusConflict, refusal, nil
	}
	changed, err := a.store.SetRenewal(ctx, callerOf(ctx).scope, ids, until)
	a.audit(ctx, actOpenRenewal, onlyOne(changed), fmt.Sprintf("until %s for %d devices: %s", until.Format(time.RFC3339), len(changed), someOf(changed)), err)
	if err != nil {
		return 0, nil, err
	}
	answer := struct {
		Until  time.Time `json:"renewal_until"`
		Opened int       `json:"opened"`
		// Missing are ids that name no device.
		Missing []string `json:"missing,omitempty"`
	}{Until: until, Opened: len(changed)}
	if body.Selector == nil { // a selector chooses user channels, too, which have no identity of their own
		answer.Missing = without(ids, changed)
	}
	return http.StatusOK, answer, nil
}

// without returns the texts that are not in others, each once, in order.
func without(texts, others []string) (rest []string) {
	gone := make(map[string]bool, len(others))
	for _, text := range others {
		gone[text] = true
	}
	for _, text := range texts {
		if !gone[text] {
			gone[text] = true
			rest = append(rest, text)
		}
	}
	return rest
}
