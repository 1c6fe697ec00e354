package sqlstore

import (
	"context"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
)

var authenticateKind = opKind{
	op:     (*storage.Authenticate)(nil),
	begins: true, enables: true, ends: true, ordered: true,
	size:  of(func(o *storage.Authenticate) int { return len(o.Message.Raw) }),
	topic: of(func(o *storage.Authenticate) string { return o.Message.Topic }),
	write: authenticate,
}

var (
	authenticateColumns = [...]string{"id", "serial_number", "model", "model_name", "device_name", "os_version", "build_version",
		"product_name", "imei", "meid", "authenticate", "authenticate_at", "created_at", "updated_at"}
	// All but the key and created_at.
	authenticateSets = [...]string{"serial_number", "model", "model_name", "device_name", "os_version", "build_version",
		"product_name", "imei", "meid", "authenticate", "authenticate_at", "updated_at"}
)

// authenticate writes devices and their enrollments. It inserts a new device
// although another transaction may have inserted it meanwhile: see change.
func authenticate(ctx context.Context, t *tx, batch []*opRun, r *opRound) error {
	var known, fresh []any
	var begun []any
	for _, p := range batch {
		m := p.op.(*storage.Authenticate).Message
		args := []any{p.id(), m.SerialNumber, clip(m.Model), clip(m.ModelName), clip(m.DeviceName), clip(m.OSVersion),
			clip(m.BuildVersion), clip(m.ProductName), clip(m.IMEI), clip(m.MEID), t.sealed(authenticateColumn, p.id(), notNil(m.Raw)), t.Now, t.Now, t.Now}
		if r.certs.devices[p.id()] {
			known = append(known, args...)
		} else {
			fresh = append(fresh, args...)
		}
		if r.rows.byID[p.id()] == nil {
			begun = append(begun, p.id(), p.id(), string(p.src.Enroll.Type), m.Topic, t.Now, t.Now)
		}
	}
	if len(fresh) > 0 {
		if err := t.Insert(ctx, "nano_devices", authenticateColumns[:], fresh); err != nil {
			return fmt.Errorf("storing devices: %w", err)
		}
	}
	if len(known) > 0 {
		if err := t.Upsert(ctx, "nano_devices", authenticateColumns[:], []string{"id"}, authenticateSets[:], known); err != nil {
			return fmt.Errorf("storing devices: %w", err)
		}
	}
	if len(begun) > 0 {
		err := t.Insert(ctx, "nano_enrollments", []string{"id", "device_id", "type", "topic", "created_at", "updated_at"}, begun)
		if err != nil {
			return fmt.Errorf("storing enrollments: %w", err)
		}
	}
	return nil
}
