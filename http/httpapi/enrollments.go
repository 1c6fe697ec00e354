package httpapi

import (
	"context"
	"crypto/x509"
	"errors"
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
	Supervised            *bool            `json:"supervised,omitempty"`
	FileVault             *bool            `json:"filevault,omitempty"`
	IMEI                  string           `json:"imei,omitempty"`
	MEID                  string           `json:"meid,omitempty"`
	User                  *userInfo        `json:"user,omitempty"`
	Tags                  []string         `json:"tags,omitempty"`
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
	Scheduled int64     `json:"scheduled"`
	Queued    int64     `json:"queued"`
	NotNow    int64     `json:"notnow"`
	Head      *itemInfo `json:"head,omitempty"`
}

// enrollmentDetail is an enrollment with the parts that lists leave out.
type enrollmentDetail struct {
	enrollmentInfo
	Inventory *inventoryInfo `json:"inventory,omitempty"`
	Channels  []string       `json:"channels"`
	Diagnosis []string       `json:"diagnosis"`
	// Refusals are of its requests, the newest first.
	Refusals []refusalInfo `json:"refusals"`
}

type refusalInfo struct {
	Cause   string    `json:"cause"`
	Count   int64     `json:"count"`
	Other   string    `json:"other_enrollment,omitempty"`
	Detail  string    `json:"detail,omitempty"`
	FirstAt time.Time `json:"first_at"`
	LastAt  time.Time `json:"last_at"`
}

func infoOfRefusals(list []storage.EnrollmentRefusal) []refusalInfo {
	infos := make([]refusalInfo, len(list))
	for i, r := range list {
		infos[i] = refusalInfo{r.Cause, r.Count, r.Other, r.Detail, r.First, r.Last}
	}
	return infos
}

func infoOfEnrollment(e *storage.Enrollment) enrollmentInfo {
	info := enrollmentInfo{
		ID: e.ID, Type: e.Type, DeviceID: e.DeviceID, Enabled: e.Enabled, OperatorDisabled: e.OperatorDisabled, Topic: e.Topic,
		SerialNumber: e.SerialNumber, DeviceName: e.DeviceName, Model: e.Model, ModelName: e.ModelName, ProductName: e.ProductName,
		OSVersion: e.OSVersion, BuildVersion: e.BuildVersion, IMEI: e.IMEI, MEID: e.MEID, Tags: e.Tags,
		Supervised: e.Supervised, FileVault: e.FileVault,
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
	q := a.queryOf(r)
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
	}{make([]enrollmentInfo, len(list)), a.cursors.enrollment(r, next)}
	for i := range list {
		page.Enrollments[i] = infoOfEnrollment(&list[i])
	}
	return http.StatusOK, page, nil
}

// maxChannels bounds the user channels in the answer for a device.
const maxChannels = 1000

// enrollmentID resolves an id or a serial number in a path to an id. Of several
// devices with a serial number it chooses the only one that is enrolled.
func (a *API) enrollmentID(ctx context.Context, name string) (string, error) {
	scope := callerOf(ctx).scope
	if textFault(name) != "" {
		return "", errNoEnrollment
	}
	list, err := a.store.Enrollments(ctx, scope, []string{name})
	if err != nil || len(list) == 1 {
		return name, err
	}
	ids, _, err := a.store.FindEnrollments(ctx, scope, storage.EnrollmentFilter{Serial: name}, storage.EnrollmentKey{}, maxPageItems)
	if err != nil {
		return "", err
	}
	if list, err = a.store.Enrollments(ctx, scope, ids); err != nil {
		return "", err
	}
	var devices, enabled []string
	for i := range list {
		if e := &list[i]; e.ID == e.DeviceID {
			devices = append(devices, e.ID)
			if e.Enabled {
				enabled = append(enabled, e.ID)
			}
		}
	}
	switch {
	case len(enabled) == 1:
		return enabled[0], nil
	case len(devices) == 1:
		return devices[0], nil
	case len(devices) == 0:
		return "", errNoEnrollment
	}
	return "", &problem{http.StatusConflict, "several devices have that serial number: " + someOf(devices) + "; use an id"}
}

var errNoEnrollment = &problem{http.StatusNotFound, "no enrollment has that id or serial number"}

// noEnrollment explains that an enrollment disappeared after its lookup.
func noEnrollment(err error) error {
	if errors.Is(err, storage.ErrNotFound) {
		return errNoEnrollment
	}
	return err
}

func (a *API) showEnrollment(ctx context.Context, r *http.Request) (int, any, error) {
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, err
	}
	detail, err := a.enrollmentDetail(ctx, id)
	if err != nil {
		return 0, nil, noEnrollment(err)
	}
	return http.StatusOK, detail, nil
}

func (a *API) enrollmentDetail(ctx context.Context, id string) (*enrollmentDetail, error) {
	scope := callerOf(ctx).scope
	list, err := a.store.Enrollments(ctx, scope, []string{id})
	if err != nil {
		return nil, err
	}
	if len(list) == 0 {
		return nil, storage.ErrNotFound
	}
	c := diagnosis{now: a.cfg.Now(), e: &list[0], expiredServed: a.cfg.ExpiredServed}
	if c.e.ID != c.e.DeviceID {
		if list, err = a.store.Enrollments(ctx, scope, []string{c.e.DeviceID}); err != nil {
			return nil, err
		}
		if len(list) == 1 {
			c.device = &list[0]
		}
	}
	if c.head, err = a.head(ctx, scope, c.e); err != nil {
		return nil, err
	}
	if c.e.Topic != "" {
		if c.cert, err = a.store.PushCertState(ctx, c.e.Topic); err != nil && !errors.Is(err, storage.ErrNotFound) {
			return nil, err
		}
	}
	if c.refusals, err = a.refusals(ctx, scope, c.e); err != nil {
		return nil, err
	}
	detail := &enrollmentDetail{
		enrollmentInfo: infoOfEnrollment(c.e), Channels: []string{}, Diagnosis: c.sentences(), Refusals: infoOfRefusals(c.refusals),
	}
	inv, err := a.store.DeviceInventory(ctx, scope, id)
	if err != nil {
		return nil, err
	}
	detail.Inventory = infoOfInventory(inv)
	if c.head != nil {
		detail.Queue.Head = new(infoOfItem(c.head))
	}
	if c.e.ID == c.e.DeviceID {
		channels, err := a.store.UserChannels(ctx, scope, id, maxChannels)
		if err != nil {
			return nil, err
		}
		detail.Channels = append(detail.Channels, channels...)
	}
	return detail, nil
}

// refusals lists an enrollment's refused requests. Other enrollments that the
// caller may not see are not named.
func (a *API) refusals(ctx context.Context, scope storage.Scope, e *storage.Enrollment) ([]storage.EnrollmentRefusal, error) {
	list, err := a.store.EnrollmentRefusals(ctx, e.ID)
	if err != nil || len(scope.Topics) == 0 {
		return list, err
	}
	for i := range list {
		seen, err := a.store.Enrollments(ctx, scope, []string{list[i].Other})
		if err != nil {
			return nil, err
		}
		if len(seen) == 0 {
			list[i].Other, list[i].Detail = "", ""
		}
	}
	return list, nil
}

// head is the command that the device is offered next, or else the next
// scheduled one; nil if no command waits.
func (a *API) head(ctx context.Context, scope storage.Scope, e *storage.Enrollment) (*storage.QueueItem, error) {
	for _, state := range []storage.State{0, storage.Scheduled} {
		items, err := a.store.Queue(ctx, scope, e.ID, state, storage.QueueKey{}, 1)
		if err != nil {
			return nil, err
		}
		if len(items) > 0 {
			return &items[0], nil
		}
	}
	return nil, nil
}

func (a *API) disable(ctx context.Context, r *http.Request) (int, any, error) {
	return a.setDisabled(ctx, r, true, actDisable)
}

func (a *API) enable(ctx context.Context, r *http.Request) (int, any, error) {
	return a.setDisabled(ctx, r, false, actEnable)
}

func (a *API) setDisabled(ctx context.Context, r *http.Request, disabled bool, action string) (int, any, error) {
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, action, r.PathValue("id"), err)
	}
	ids, err := a.store.SetDisabled(ctx, callerOf(ctx).scope, id, disabled, auditRecord(ctx, action, id, ""))
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, action, id, noEnrollment(err))
	}
	if !disabled {
		a.wakeSoon(ctx, ids)
	}
	return http.StatusOK, struct {
		ID       string   `json:"id"`
		Disabled bool     `json:"operator_disabled"`
		Changed  []string `json:"changed"`
	}{id, disabled, ids}, nil
}

func (a *API) deleteEnrollment(ctx context.Context, r *http.Request) (int, any, error) {
	q := a.queryOf(r)
	confirm := q.text("confirm")
	if err := q.done(); err != nil {
		return 0, nil, err
	}
	id, err := a.enrollmentID(ctx, r.PathValue("id"))
	if errors.Is(err, errNoEnrollment) && confirm != "" {
		status, body, err := a.gone(ctx, actDelete, confirm, err)
		if err != nil {
			err = a.auditRefusal(ctx, actDelete, r.PathValue("id"), err)
		}
		return status, body, err
	}
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actDelete, r.PathValue("id"), err)
	}
	if confirm != id {
		return 0, nil, a.auditRefusal(ctx, actDelete, id, badRequest("confirm: repeat the enrollment's id, %s, to delete it", id))
	}
	err = a.store.DeleteEnrollment(ctx, callerOf(ctx).scope, id, auditRecord(ctx, actDelete, id, ""))
	if errors.Is(err, storage.ErrConflict) {
		err = &problem{http.StatusConflict, "it enrolled anew while it was being deleted, and was left so"}
	}
	if err != nil {
		return 0, nil, a.auditRefusal(ctx, actDelete, id, noEnrollment(err))
	}
	return http.StatusOK, struct {
		ID string `json:"id"`
	}{id}, nil
}

func (a *API) readBootstrapToken(ctx context.Context, r *http.Request) (int, any, error) {
	id, token, err := a.readToken(ctx, r, actReadBootstrap, a.store.BootstrapToken)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, struct {
		ID    string `json:"id"`
		Token []byte `json:"bootstrap_token"`
	}{id, token}, nil
}

func (a *API) readUnlockToken(ctx context.Context, r *http.Request) (int, any, error) {
	id, token, err := a.readToken(ctx, r, actReadUnlock, a.store.UnlockToken)
	if err != nil {
		return 0, nil, err
	}
	return http.StatusOK, struct {
		ID    string `json:"id"`
		Token []byte `json:"unlock_token"`
	}{id, token}, nil
}

func (a *API) readToken(ctx context.Context, r *http.Request, action string,
	read func(context.Context, storage.Scope, string, *storage.AuditRecord) ([]byte, error)) (id string, token []byte, err error) {
	if id, err = a.enrollmentID(ctx, r.PathValue("id")); err != nil {
		return "", nil, a.auditRefusal(ctx, action, r.PathValue("id"), err)
	}
	token, err = read(ctx, callerOf(ctx).scope, id, auditRecord(ctx, action, id, ""))
	if err == nil && token == nil {
		err = &problem{http.StatusNotFound, "the device has not escrowed one"}
	}
	if err != nil {
		return "", nil, a.auditRefusal(ctx, action, id, noEnrollment(err))
	}
	return id, token, nil
}
