package sqlstore

import (
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

var _ storage.Inventories = (*Store)(nil)

const inventoryTable = "nano_device_inventory"

// inventoryAnswer is what a report says about its device, encoded before the
// transaction begins.
type inventoryAnswer struct {
	*mdm.Inventory
	information, security, applications []byte
}

// newInventoryAnswer encodes an inventory; nil if the operation has none.
func newInventoryAnswer(op storage.Op) *inventoryAnswer {
	r, ok := op.(*storage.Report)
	if !ok || r.Inventory == nil || r.Src.Enroll.IsUserChannel() {
		return nil
	}
	a := &inventoryAnswer{Inventory: r.Inventory}
	a.information, a.security = encodePart(r.Inventory.Information), encodePart(r.Inventory.Security)
	a.applications = compress(encodePart(r.Inventory.Applications))
	return a
}

func encodePart[T any](part *T) []byte {
	if part == nil {
		return nil
	}
	text, err := json.Marshal(part)
	if err != nil {
		panic(err) // texts, numbers and truth values
	}
	return text
}

func (a *inventoryAnswer) bytes() int {
	if a == nil {
		return 0
	}
	return len(a.information) + len(a.security) + len(a.applications)
}

// inventoryPlan is what the reports of a round change in the inventory.
type inventoryPlan struct {
	answers []*opRun
	// information is the earlier answer, by device.
	information map[string][]byte
	// devices are the columns of nano_devices, by device.
	devices map[string]deviceNames
	// full are the commands that ask for all applications.
	full map[string]bool
	// outdated are the devices whose columns change.
	outdated map[string]deviceNames
}

// deviceNames are the columns of nano_devices that DeviceInformation answers.
type deviceNames struct{ deviceName, model, modelName, productName, osVersion, buildVersion string }

// with returns the names with what an answer has.
func (n deviceNames) with(d *mdm.DeviceInformation) deviceNames {
	for _, field := range []struct {
		into *string
		said string
	}{
		{&n.deviceName, d.DeviceName}, {&n.model, d.Model}, {&n.modelName, d.ModelName},
		{&n.productName, d.ProductName}, {&n.osVersion, d.OSVersion}, {&n.buildVersion, d.BuildVersion},
	} {
		if field.said != "" {
			*field.into = clip(field.said)
		}
	}
	return n
}

// planInventory locks and reads what the answers of reports change.
func planInventory(ctx context.Context, t *tx, ended []*opRun) (*inventoryPlan, error) {
	answers := slices.DeleteFunc(slices.Clone(ended), func(p *opRun) bool { return p.inventory == nil })
	if len(answers) == 0 {
		return nil, nil
	}
	plan := &inventoryPlan{
		answers: answers, information: make(map[string][]byte), devices: make(map[string]deviceNames),
		full: make(map[string]bool), outdated: make(map[string]deviceNames),
	}
	var ids, informed, uuids []string
	for _, p := range answers {
		ids = append(ids, p.id())
		if p.inventory.Information != nil {
			informed = append(informed, p.id())
		}
		if p.inventory.Applications != nil {
			uuids = append(uuids, p.op.(*storage.Report).CommandUUID)
		}
	}
	queries := []sqldb.BatchQuery{plan.lockQuery(t, ids)}
	if len(informed) > 0 {
		queries = append(queries, plan.devicesQuery(t, informed))
	}
	if len(uuids) > 0 {
		queries = append(queries, plan.commandsQuery(t, uuids))
	}
	if err := t.QueryBatch(ctx, queries...); err != nil {
		return nil, err
	}
	if err := plan.lockNew(ctx, t, ids); err != nil {
		return nil, err
	}
	return plan, plan.lockOutdated(ctx, t)
}

// lockQuery locks rows of the inventory and reads them.
func (plan *inventoryPlan) lockQuery(t *tx, ids []string) sqldb.BatchQuery {
	text, args := t.LockText("id, information", inventoryTable, ids)
	return sqldb.BatchQuery{Action: "locking the inventory", Text: text, Args: args, Read: func(row sqldb.Row) error {
		var id string
		var information []byte
		err := row.Scan(&id, &information)
		plan.information[id] = slices.Clone(information)
		return err
	}}
}

func (plan *inventoryPlan) devicesQuery(t *tx, ids []string) sqldb.BatchQuery {
	is, args := t.Among(ids)
	text := "SELECT id, device_name, model, model_name, product_name, os_version, build_version FROM nano_devices WHERE id " + is
	return sqldb.BatchQuery{Action: "reading devices", Text: text, Args: args, Read: func(row sqldb.Row) error {
		var id string
		var n deviceNames
		err := row.Scan(&id, &n.deviceName, &n.model, &n.modelName, &n.productName, &n.osVersion, &n.buildVersion)
		plan.devices[id] = n
		return err
	}}
}

// commandsQuery finds the commands that ask for all applications. One that asks
// for managed or named ones has an answer that is no inventory.
func (plan *inventoryPlan) commandsQuery(t *tx, uuids []string) sqldb.BatchQuery {
	is, args := t.Among(slices.Compact(slices.Sorted(slices.Values(uuids))))
	text := "SELECT command_uuid, command FROM nano_commands WHERE request_type = 'InstalledApplicationList' AND command_uuid " + is
	return sqldb.BatchQuery{Action: "reading commands", Text: text, Args: args, Read: func(row sqldb.Row) error {
		var uuid string
		var raw []byte
		if err := row.Scan(&uuid, &raw); err != nil {
			return err
		}
		plan.full[uuid] = asksForAll(t, uuid, raw)
		return nil
	}}
}

// asksForAll says whether an InstalledApplicationList is for all applications.
// A command that cannot be read asks for some.
func asksForAll(t *tx, uuid string, raw []byte) bool {
	plain, err := t.opened(commandColumn, uuid, raw)
	if err != nil {
		return false
	}
	dict, err := mdm.DecodePlist(plain)
	if err != nil {
		return false
	}
	command, _ := dict["Command"].(map[string]any)
	identifiers, _ := command["Identifiers"].([]any)
	managed, _ := command["ManagedAppsOnly"].(bool)
	return len(identifiers) == 0 && !managed
}

// lockNew waits for nobody who inserts the same rows: those who insert hold the
// push rows of the enrollments.
func (plan *inventoryPlan) lockNew(ctx context.Context, t *tx, ids []string) error {
	unknown := func() []string {
		return slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
			_, ok := plan.information[id]
			return ok
		})
	}
	missing := unknown()
	if len(missing) == 0 {
		return nil
	}
	if _, err := lock(ctx, t, "nano_enrollment_push", missing); err != nil {
		return err
	}
	if err := t.QueryBatch(ctx, plan.lockQuery(t, missing)); err != nil {
		return err
	}
	missing = unknown()
	if len(missing) == 0 {
		return nil
	}
	return t.checkSkipped(ctx, inventoryTable, missing, nil)
}

// lockOutdated locks the devices that answered something new. Their Authenticate
// cannot come in between: it would have to cancel the queue rows that the reports
// have locked.
func (plan *inventoryPlan) lockOutdated(ctx context.Context, t *tx) error {
	var ids []string
	for _, p := range plan.answers {
		was, known := plan.devices[p.id()]
		if !known || p.inventory.Information == nil {
			continue
		}
		if now := was.with(p.inventory.Information); now != was {
			plan.outdated[p.id()] = now
			ids = append(ids, p.id())
		}
	}
	_, err := lock(ctx, t, "nano_devices", ids)
	return err
}

// store writes the answers.
func (plan *inventoryPlan) store(ctx context.Context, t *tx) error {
	if plan == nil {
		return nil
	}
	var informations, securities, applications []any
	for _, p := range plan.answers {
		a := p.inventory
		if a.Information != nil {
			merged, text := mergedInformation(plan.information[p.id()], a)
			informations = append(informations, p.id(), flagOf(merged.Supervised), text, t.Now)
		}
		if a.Security != nil {
			securities = append(securities, p.id(), flagOf(a.Security.FileVault), a.security, t.Now)
		}
		if a.Applications != nil && plan.full[p.op.(*storage.Report).CommandUUID] {
			applications = append(applications, p.id(), a.applications, t.Now)
		}
	}
	for _, part := range []struct {
		columns []string
		args    []any
	}{
		{[]string{"supervised", "information", "information_at"}, informations},
		{[]string{"filevault", "security", "security_at"}, securities},
		{[]string{"applications", "applications_at"}, applications},
	} {
		if len(part.args) == 0 {
			continue
		}
		if err := t.Upsert(ctx, inventoryTable, slices.Concat([]string{"id"}, part.columns), []string{"id"}, part.columns, part.args); err != nil {
			return fmt.Errorf("storing the inventory: %w", err)
		}
	}
	for _, p := range plan.answers {
		n, ok := plan.outdated[p.id()]
		if !ok {
			continue
		}
		err := t.ExecDeferred(ctx, `UPDATE nano_devices SET device_name = ?, model = ?, model_name = ?, product_name = ?, os_version = ?, build_version = ?,
updated_at = ? WHERE id = ?`, n.deviceName, n.model, n.modelName, n.productName, n.osVersion, n.buildVersion, t.Now, p.id())
		if err != nil {
			return fmt.Errorf("updating devices: %w", err)
		}
	}
	return nil
}

// mergedInformation is an answer with what an earlier one says beyond it: a
// DeviceInformation may ask for a single value.
func mergedInformation(earlier []byte, a *inventoryAnswer) (*mdm.DeviceInformation, []byte) {
	var merged mdm.DeviceInformation
	if len(earlier) == 0 || bytes.Equal(earlier, a.information) || json.Unmarshal(earlier, &merged) != nil || json.Unmarshal(a.information, &merged) != nil {
		return a.Information, a.information
	}
	return &merged, encodePart(&merged)
}

// flagOf is a column that is NULL if the value is not known.
func flagOf(b *bool) any {
	if b == nil {
		return nil
	}
	return *b
}

// DeviceInventory implements storage.Inventories.
func (s *Store) DeviceInventory(ctx context.Context, scope storage.Scope, id string) (*storage.DeviceInventory, error) {
	var inv *storage.DeviceInventory
	err := s.read(ctx, func(ctx context.Context, t *tx) (err error) {
		device, err := findEnrollment(ctx, t, scope, id)
		if err != nil {
			return err
		}
		inv, err = readDeviceInventory(ctx, t, scope, device)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("reading an inventory: %w", err)
	}
	return inv, nil
}

func readDeviceInventory(ctx context.Context, t *tx, scope storage.Scope, device string) (*storage.DeviceInventory, error) {
	inv := new(storage.DeviceInventory)
	var information, security, applications []byte
	var informationAt, securityAt, applicationsAt, movedAt sql.Null[int64]
	err := t.QueryRow(ctx, `SELECT i.information, i.information_at, i.security, i.security_at, i.applications, i.applications_at, v.moved_at
FROM nano_device_inventory i LEFT JOIN nano_topic_moves v ON v.id = i.id WHERE i.id = ?`, device).
		Scan(&information, &informationAt, &security, &securityAt, &applications, &applicationsAt, &movedAt)
	if errors.Is(err, sql.ErrNoRows) {
		return inv, nil
	}
	if err != nil {
		return nil, err
	}
	if inv.Information, inv.InformationAt, err = readPart[mdm.DeviceInformation](scope, information, informationAt, movedAt); err != nil {
		return nil, err
	}
	if inv.Security, inv.SecurityAt, err = readPart[mdm.SecurityInfo](scope, security, securityAt, movedAt); err != nil {
		return nil, err
	}
	if applications, err = decompress(applications, maxInventory); err != nil {
		return nil, err
	}
	inv.Applications, inv.ApplicationsAt, err = readPart[mdm.Applications](scope, applications, applicationsAt, movedAt)
	return inv, err
}

// maxInventory bounds the JSON of a list of applications.
const maxInventory = 16 << 20

// readPart decodes a part of an inventory; nil if there is none, or if the scope
// does not see it.
func readPart[T any](scope storage.Scope, text []byte, at, movedAt sql.Null[int64]) (*T, time.Time, error) {
	if len(text) == 0 || !at.Valid || answeredElsewhere(scope, at, movedAt) {
		return nil, time.Time{}, nil
	}
	part := new(T)
	if err := json.Unmarshal(text, part); err != nil {
		return nil, time.Time{}, err
	}
	return part, fromMicros(at.V), nil
}

// answeredElsewhere says whether an answer is from before the device came to its
// APNs topic, and so another tenant's.
func answeredElsewhere(scope storage.Scope, at, movedAt sql.Null[int64]) bool {
	return len(scope.Topics) > 0 && movedAt.Valid && movedAt.V >= at.V
}
