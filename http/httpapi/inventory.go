package httpapi

import (
	"context"
	"net/http"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// inventoryInfo is what a device answered last, without its applications, as
// JSON.
type inventoryInfo struct {
	Information       *mdm.DeviceInformation `json:"information,omitempty"`
	InformationAt     time.Time              `json:"information_at,omitzero"`
	Security          *mdm.SecurityInfo      `json:"security,omitempty"`
	SecurityAt        time.Time              `json:"security_at,omitzero"`
	ApplicationsCount *int                   `json:"applications_count,omitempty"`
	ApplicationsAt    time.Time              `json:"applications_at,omitzero"`
}

// infoOfInventory is nil if the device answered nothing.
func infoOfInventory(inv *storage.DeviceInventory) *inventoryInfo {
	if *inv == (storage.DeviceInventory{}) {
		return nil
	}
	info := &inventoryInfo{
		Information: inv.Information, InformationAt: inv.InformationAt, Security: inv.Security, SecurityAt: inv.SecurityAt,
		ApplicationsAt: inv.ApplicationsAt,
	}
	if inv.Applications != nil {
		info.ApplicationsCount = &inv.Applications.Count
	}
	return info
}

// listApplications answers with the applications of a device.
func (a *API) listApplications(ctx context.Context, r *http.Request) (int, any, error) {
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, err
	}
	inv, err := a.store.DeviceInventory(ctx, callerOf(ctx).scope, id)
	if err != nil {
		return 0, nil, noEnrollment(err)
	}
	answer := struct {
		ID           string            `json:"id"`
		At           time.Time         `json:"applications_at,omitzero"`
		Count        int               `json:"count"`
		Applications []mdm.Application `json:"applications"`
	}{ID: id, At: inv.ApplicationsAt, Applications: []mdm.Application{}}
	if inv.Applications != nil {
		answer.Count, answer.Applications = inv.Applications.Count, inv.Applications.Items
	}
	return http.StatusOK, answer, nil
}
