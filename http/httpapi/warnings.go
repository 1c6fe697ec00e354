package httpapi

import (
	"context"
	"net/http"
	"slices"
	"strings"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/mdm/schema"
	"github.com/nanomdm/nanomdm/storage"
)

const (
	// maxChecked bounds the command that is checked against Apple's schemas.
	maxChecked = 4 << 20
	// checkedTargets bounds the enrollments that a command is checked for;
	// strict calls check all of theirs.
	checkedTargets = maxPageItems
)

// strict is the parameter that turns warnings into a refusal.
func (q *query) strict() bool { return q.word("strict", "0", "1") == "1" }

// warned is the answer to a strict call that has warnings.
type warned struct {
	Error    string   `json:"error"`
	Warnings []string `json:"warnings"`
}

func refuseWarned(warnings []string) (int, any, error) {
	return http.StatusBadRequest, warned{"strict: " + strings.Join(warnings, "; "), warnings}, nil
}

// warnings compares a command with Apple's schemas: its keys, and the
// enrollments that cannot take its request type. The endpoint that NanoMDM has
// looks at enrollments only if the call is strict.
func (a *API) warnings(ctx context.Context, o *enqueueRequest, cmd *mdm.Command, ids []string) ([]string, error) {
	var list []string
	if len(cmd.Raw) <= maxChecked {
		list = schema.Check(cmd)
	}
	switch {
	case o.strict:
	case !o.extended:
		return list, nil
	default:
		ids = ids[:min(len(ids), checkedTargets)]
	}
	check := schema.NewTargetCheck(cmd.RequestType)
	for part := range slices.Chunk(ids, maxPageItems) {
		found, err := a.store.Enrollments(ctx, callerOf(ctx).scope, part)
		if err != nil {
			return nil, err
		}
		for i := range found {
			check.Add(found[i].ID, targetOf(&found[i]))
		}
	}
	return append(list, check.Findings()...), nil
}

// targetOf is an enrollment as the schemas see it.
func targetOf(e *storage.Enrollment) schema.Target {
	t := schema.Target{
		OSVersion: e.OSVersion, User: e.ID != e.DeviceID,
		UserEnrollment: e.Type == mdm.UserEnrollmentDevice || e.Type == mdm.UserEnrollment,
	}
	t.Platform = schema.Platform(e.ProductName, e.Model, e.ModelName)
	return t
}
