package httpapi

import (
	"context"
	"crypto/x509"
	"net/http"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// enrollmentInfo is an enrollment as JSON.
type enrollmentInfo struct {
	ID                    string           `json:"id"`
	Type                  mdm.EnrollType   `json:"type"`
	DeviceID              string           `json:"device_id"`
	ParentID              string           `json:"parent_id,omitempty"`
	Enabled               bool             `json:"enabled"`
	OperatorDisabled      bool             `json:"operator_disabled,omitempty"`
	Topic                 string           `json:"topic,omitempty"`
	UDID                  string           `json:"udid,omitempty"`
	SerialNumber          string           `json:"serial_number,omitempty"`
	DeviceName            string           `json:"device_name,omitempty"`
	Model                 string           `json:"model,omitempty"`
	ModelName             string           `json:"model_name,omitempty"`
	ProductName           string           `json:"product_name,omitempty"`
	OSVersion             string           `json:"os_version,omitempty"`
	BuildVersion          string           `json:"build_version,omitempty"`
	IMEI                  string           `json:"imei,omitempty"`
	MEID                  string           `json:"meid,omitempty"`
	User                  *userInfo        `json:"user,omitempty"`
	TokenUpdateTally      int              `json:"token_update_tally"`
	AwaitingConfiguration bool             `json:"awaiting_configuration,omitempty"`
	EnrolledAt            time.Time        `json:"enrolled_at,omitzero"`
	CreatedAt             time.Time        `json:"created_at"`
	LastSeenAt            time.Time        `json:"last_seen_at,omitzero"`
	RenewalUntil          time.Time        `json:"renewal_until,omitzero"`
	HasBootstrapToken     bool             `json:"has_bootstrap_token"`
	HasUnlockToken        bool             `json:"has_unlock_token"`
	Certificate           *certificateInfo `json:"certificate,omitempty"`
	Push                  pushInfo         `json:"push"`
	Queue                 queueInfo        `json:"queue"`
}

type userInfo struct {
	UserID    string `json:"user_id,omitempty"`
	ShortName string `json:"short_name,omitempty"`
	LongName  string `json:"long_name,omitempty"`
}

type certificateInfo struct {
	SHA256       string    `json:"sha256"`
	Subject      string    `json:"subject,omitempty"`
	SerialNumber string    `json:"serial_number,omitempty"` // hexadecimal
	NotAfter     time.Time `json:"not_after,omitzero"`
	PinnedAt     time.Time `json:"pinned_at"`
}

type pushInfo struct {
	Owed        bool      `json:"owed"`
	Attempts    int       `json:"attempts,omitempty"`
	LastAt      time.Time `json:"last_at,omitzero"`
	LastClass   string    `json:"last_class,omitempty"`
	LastStatus  int       `json:"last_status,omitempty"`
	LastReason  string    `json:"last_reason,omitempty"`
	LastAPNsID  string    `json:"last_apns_id,omitempty"`
	NextAt      time.Time `json:"next_at,omitzero"`
	TokenDeadAt time.Time `json:"token_dead_at,omitzero"`
}

type queueInfo struct {
	Scheduled int64 `json:"scheduled"`
	Queued    int64 `json:"queued"`
	NotNow    int64 `json:"notnow"`
}

func infoOfEnrollment(e *storage.Enrollment) enrollmentInfo {
	info := enrollmentInfo{
		ID: e.ID, Type: e.Type, DeviceID: e.DeviceID, Enabled: e.Enabled, OperatorDisabled: e.OperatorDisabled, Topic: e.Topic,
		SerialNumber: e.SerialNumber, DeviceName: e.DeviceName, Model: e.Model, ModelName: e.ModelName, ProductName: e.ProductName,
		OSVersion: e.OSVersion, BuildVersion: e.BuildVersion, IMEI: e.IMEI, MEID: e.MEID,
		TokenUpdateTally: e.Tally, AwaitingConfiguration: e.AwaitingConfiguration,
		EnrolledAt: e.EnrolledAt, CreatedAt: e.CreatedAt, LastSeenAt: e.LastSeenAt, RenewalUntil: e.RenewalUntil,
		HasBootstrapToken: e.HasBootstrapToken, HasUnlockToken: e.HasUnlockToken,
		Push:  pushInfo(e.Push),
		Queue: queueInfo{Scheduled: e.Queue[storage.Scheduled], Queued: e.Queue[storage.Queued], NotNow: e.Queue[storage.NotNow]},
	}
	if e.ID != e.DeviceID {
		info.ParentID = e.DeviceID
		info.User = &userInfo{e.UserID, e.UserShortName, e.UserLongName}
	}
	if e.Type != mdm.UserEnrollment && e.Type != mdm.UserEnrollmentDevice {
		info.UDID = e.DeviceID
	}
	if c := e.Certificate; c != nil {
		info.Certificate = &certificateInfo{SHA256: c.Hash, NotAfter: c.NotAfter, PinnedAt: c.PinnedAt}
		if parsed, err := x509.ParseCertificate(c.DER); err == nil {
			info.Certificate.Subject = parsed.Subject.String()
			info.Certificate.SerialNumber = parsed.SerialNumber.Text(16)
		}
	}
	return info
}

func (a *API) listEnrollments(ctx context.Context, r *http.Request) (int, any, error) {
	q := queryOf(r)
	f, err := q.selector().filter()
	after, limit := q.enrollmentPlace(), q.limit()
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	if err != nil {
		return 0, nil, err
	}
	scope := callerOf(ctx).scope
	ids, next, err := a.store.FindEnrollments(ctx, scope, f, after, limit)
	if err != nil {
		return 0, nil, err
	}
	list, err := a.store.Enrollments(ctx, scope, ids)
	if err != nil {
		return 0, nil, err
	}
	page := struct {
		Enrollments []enrollmentInfo `json:"enrollments"`
		Next        string           `json:"next,omitempty"`
	}{make([]enrollmentInfo, len(list)), enrollmentCursor(next)}
	for i := range list {
		page.Enrollments[i] = infoOfEnrollment(&list[i])
	}
	return http.StatusOK, page, nil
}
