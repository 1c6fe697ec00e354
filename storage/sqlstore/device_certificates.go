package sqlstore

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// certificates are the database's rows of a batch's certificates and devices.
type certificates struct {
	byHash  map[string]certificate
	live    map[string]bool // devices that have a live certificate
	devices map[string]bool // devices that exist
	// claims are of devices that send another certificate than the live one.
	claims map[string]claim
}

type certificate struct {
	device  string
	retired bool
}

// certificateLookupText reads the fields of certificates for each device and
// hash of the derived table r. It does not look for the live certificate by
// retired_at, since that index has the live ones of all devices side by side.
func certificateLookupText(d *sqldb.Dialect) string {
	return `SELECT r.id, r.command_uuid, d.id, a.id, a.retired_at, l.id
FROM ` + d.PairTable("id", "command_uuid") +
		d.Lookup(true, "nano_devices", "d", "d.id = r.id") +
		d.Lookup(true, "nano_cert_auth_associations", "a", "a.sha256 = r.command_uuid") +
		d.Lookup(true, "nano_cert_auth_associations", "l", "l.id = r.id AND COALESCE(l.retired_at, 0) = 0")
}

func readCertificates(ctx context.Context, t *tx, batch []*opRun) (*certificates, error) {
	keys := make([]keyPair, len(batch))
	for i, p := range batch {
		keys[i] = keyPair{ID: p.device, Item: p.hash()}
	}
	pairs, err := t.Dialect.PairArgs(keys)
	if err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	c := &certificates{
		byHash:  make(map[string]certificate),
		live:    make(map[string]bool),
		devices: make(map[string]bool),
	}
	err = t.Query(ctx, t.texts.certificateLookup, pairs...).Each(func(row sqldb.Row) error {
		var device, hash string
		var known, owner, live sql.Null[string]
		var retired sql.Null[int64]
		if err := row.Scan(&device, &hash, &known, &owner, &retired, &live); err != nil {
			return err
		}
		if known.Valid {
			c.devices[device] = true
		}
		if owner.Valid {
			c.byHash[hash] = certificate{device: owner.V, retired: retired.Valid}
		}
		if live.Valid {
			c.live[device] = true
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading certificates: %w", err)
	}
	return c, c.readClaims(ctx, t, batch)
}

// expired says whether the certificate of an operation has expired.
func (p *opRun) expired(now int64) bool {
	end := p.src.Pin.NotAfter
	return !end.IsZero() && micros(end) < now
}

// checkCertificate checks whether the certificate of an operation may act for
// its device, and whether it must be pinned first.
func (c *certificates) checkCertificate(p *opRun, now int64) (pin bool, err error) {
	if p.src.Pin == nil {
		return false, nil
	}
	if p.kind.begins && !c.enrollsTo(p) {
		return false, storage.ErrTopicCA
	}
	if known, ok := c.byHash[p.src.Pin.Hash]; ok && known.device == p.device && !known.retired {
		return false, nil
	} else if ok && known.device != p.device {
		return false, errOthers
	}
	if !c.devices[p.device] && !p.expired(now) {
		switch p.kind.needs {
		case skipsUnknown:
			return false, nil
		case needsDevice, needsEnrollment:
			return false, storage.ErrNotEnrolled
		}
	}
	if p.expired(now) {
		return false, errExpired
	}
	if !c.mayTakeOver(p) {
		return false, c.refusal(p)
	}
	if !c.enrollsTo(p) {
		return false, storage.ErrTopicCA
	}
	if p.src.Pin.Unconfirmed {
		return false, storage.ErrUnconfirmed
	}
	return true, nil
}

// admit locks the devices of operations, checks their certificates, and pins
// those that may be pinned. It sets err of operations that are refused, or that
// their clients have given up: from here on the lock of the device keeps their
// order.
func admit(ctx context.Context, t *tx, batch []*opRun) (*certificates, error) {
	if len(batch) == 0 {
		return nil, nil
	}
	certs, err := lockDevices(ctx, t, batch)
	if err != nil {
		return nil, err
	}
	var pins []*opRun
	var renewed []string
	for _, p := range batch {
		pin, err := certs.checkCertificate(p, t.Now)
		if errors.Is(err, storage.ErrTopicCA) {
			if err := auditTopic(ctx, t, p, err, "another CA issued its certificate than enrolls devices to "+certs.topicOf(p)); err != nil {
				return nil, err
			}
		}
		p.err = cmp.Or(err, p.givenUp())
		if !pin || p.err != nil {
			continue
		}
		pins = append(pins, p)
		if certs.live[p.device] {
			renewed = append(renewed, p.device)
		}
	}
	if len(renewed) > 0 {
		is, args := t.Among(renewed)
		_, err := t.Exec(ctx, "UPDATE nano_cert_auth_associations SET retired_at = ? WHERE retired_at IS NULL AND id "+is,
			append([]any{t.Now}, args...)...)
		if err != nil {
			return nil, fmt.Errorf("retiring certificates: %w", err)
		}
	}
	return certs, pinCertificates(ctx, t, pins, certs)
}

// pinCertificates pins certificates that no device has had, or that the device
// itself had before. If another transaction has pinned one meanwhile, the
// insert violates the key: see change.
func pinCertificates(ctx context.Context, t *tx, batch []*opRun, certs *certificates) error {
	var args []any
	var again []string
	for _, p := range batch {
		pin := p.src.Pin
		if _, had := certs.byHash[pin.Hash]; had {
			again = append(again, pin.Hash)
			continue
		}
		args = append(args, pin.Hash, p.device, pin.Certificate, null(micros(pin.NotAfter)), t.Now)
	}
	if len(again) > 0 {
		is, hashes := t.Among(again)
		if _, err := t.Exec(ctx, "UPDATE nano_cert_auth_associations SET retired_at = NULL WHERE sha256 "+is, hashes...); err != nil {
			return fmt.Errorf("pinning certificates again: %w", err)
		}
	}
	if len(args) == 0 {
		return nil
	}
	err := t.Insert(ctx, "nano_cert_auth_associations", []string{"sha256", "id", "certificate", "not_after", "created_at"}, args)
	if err != nil {
		return fmt.Errorf("pinning certificates: %w", err)
	}
	return nil
}

// lockDevices locks devices and reads their certificates, so that two messages
// do not both find a device without certificate, or retire the same one. It
// repeats the read for a device that was inserted after the locks were taken,
// or that another transaction has locked.
func lockDevices(ctx context.Context, t *tx, batch []*opRun) (*certificates, error) {
	devices := make([]string, len(batch))
	for i, p := range batch {
		devices[i] = p.device
	}
	locked, err := lockDeferred(ctx, t, "nano_devices", devices)
	if err != nil {
		return nil, err
	}
	for {
		certs, err := readCertificates(ctx, t, batch)
		if err != nil || t.Dialect.ForUpdate() == "" || len(certs.devices) <= *locked {
			return certs, err
		}
		again, err := lock(ctx, t, "nano_devices", devices)
		if err != nil {
			return nil, err
		}
		*locked = len(again)
	}
}

// EnrollmentByCertificate implements storage.PinnedEnrollments.
func (s *Store) EnrollmentByCertificate(ctx context.Context, hash string) (string, error) {
	var id string
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.QueryRow(ctx, "SELECT id FROM nano_cert_auth_associations WHERE sha256 = ? AND retired_at IS NULL", hash).Scan(&id)
	})
	if errors.Is(err, sql.ErrNoRows) {
		return "", storage.ErrNotFound
	}
	if err != nil {
		return "", fmt.Errorf("looking a certificate up: %w", err)
	}
	return id, nil
}

// ActiveEnrollmentByCertificate implements storage.ActiveEnrollments.
func (s *Store) ActiveEnrollmentByCertificate(ctx context.Context, hash string) (string, error) {
	var id string
	var active bool
	err := s.read(ctx, func(ctx context.Context, t *tx) error {
		return t.QueryRow(ctx, `SELECT c.id, CASE WHEN e.enabled = 1 AND e.operator_disabled = 0 THEN 1 ELSE 0 END
			FROM nano_cert_auth_associations c LEFT JOIN nano_enrollments e ON e.id = c.id
			WHERE c.sha256 = ? AND c.retired_at IS NULL`, hash).Scan(&id, &active)
	})
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return "", storage.ErrNotFound
	case err != nil:
		return "", fmt.Errorf("looking a certificate up: %w", err)
	case !active:
		return id, storage.ErrNotEnrolled
	}
	return id, nil
}
