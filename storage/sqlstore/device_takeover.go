package sqlstore

import (
	"bytes"
	"context"
	"crypto/x509"
	"database/sql"
	"fmt"

	"github.com/nanomdm/nanomdm/storage"
	"github.com/nanomdm/nanomdm/storage/sqldb"
)

// claim is the state of a device that decides whether another certificate than
// the live one may take it over.
type claim struct {
	serial      string
	topic       string
	renewing    bool   // a renewal window is open
	certificate []byte // DER of the live one; nil if unknown
}

// unsettledBy says whether the check of an operation needs claims: its
// certificate is not the device's live one, and some policy could allow it.
func (c *certificates) unsettledBy(p *opRun) bool {
	if p.src.Pin == nil || !c.devices[p.device] {
		return false
	}
	known, ok := c.byHash[p.src.Pin.Hash]
	if ok && (known.device != p.device || !known.retired) {
		return false
	}
	if p.src.Pin.EnrollsTo != nil || p.kind.begins && p.src.Pin.Reenroll != storage.ReenrollAllow {
		return true
	}
	return p.src.Pin.Renewal != storage.RenewalDeny
}

// readClaims reads claims, which few operations need.
func (c *certificates) readClaims(ctx context.Context, t *tx, batch []*opRun) error {
	var devices []string
	for _, p := range batch {
		if c.unsettledBy(p) {
			devices = append(devices, p.device)
		}
	}
	if len(devices) == 0 {
		return nil
	}
	place, args := sqldb.InList(devices)
	c.claims = make(map[string]claim)
	err := t.Query(ctx, `SELECT d.id, d.serial_number, COALESCE(e.topic, ''), e.renewal_until, a.certificate FROM nano_devices d
LEFT JOIN nano_enrollments e ON e.id = d.id
LEFT JOIN nano_cert_auth_associations a ON a.id = d.id AND a.retired_at IS NULL
WHERE d.id IN `+place, args...).Each(func(row sqldb.Row) error {
		var device string
		var k claim
		var renewal sql.Null[int64]
		if err := row.Scan(&device, &k.serial, &k.topic, &renewal, &k.certificate); err != nil {
			return err
		}
		k.renewing = renewal.Valid && renewal.V > t.Now
		c.claims[device] = k
		return nil
	})
	if err != nil {
		return fmt.Errorf("reading what may be taken over: %w", err)
	}
	return nil
}

// topicOf returns the APNs topic that a device enrolls to, or that it has.
func (c *certificates) topicOf(p *opRun) string {
	if p.kind.begins {
		if said := p.kind.topic(p.op); said != "" {
			return said
		}
	}
	return c.claims[p.device].topic
}

// enrollsTo says whether the certificate's CA enrolls devices to the topic of an
// operation's device.
func (c *certificates) enrollsTo(p *opRun) bool {
	enrolls, topic := p.src.Pin.EnrollsTo, c.topicOf(p)
	return enrolls == nil || topic == "" || enrolls(topic)
}

// mayTakeOver checks a certificate that no device has had, or a retired one of
// this device.
func (c *certificates) mayTakeOver(p *opRun) bool {
	pin := p.src.Pin
	_, retired := c.byHash[pin.Hash]
	switch {
	case !c.devices[p.device]:
		return p.kind.begins && !retired
	case retired:
		return c.claims[p.device].renewing && pin.Renewal != storage.RenewalDeny
	case pin.Retro && !c.live[p.device]:
		return true
	case p.kind.begins && pin.Reenroll == storage.ReenrollAllow:
		return true
	}
	k := c.claims[p.device]
	switch {
	case p.kind.begins && k.renewing: // an operator has allowed it
		return true
	case p.kind.begins:
		return pin.Reenroll == storage.ReenrollSameSubject && c.sameSubject(p, k)
	case pin.Renewal == storage.RenewalWindow:
		return k.renewing
	case pin.Renewal == storage.RenewalSameSubject:
		return k.renewing || c.sameSubject(p, k)
	}
	return false
}

// The reasons of ErrIdentity, for the log.
var (
	errOthers  = fmt.Errorf("%w: it is another device's", storage.ErrIdentity)
	errRetired = fmt.Errorf("%w: it was retired, and a renewal window is not open", storage.ErrIdentity)
	errBegin   = fmt.Errorf("%w: another one is pinned, and the policy lets this one not take over", storage.ErrIdentity)
	errRenew   = fmt.Errorf("%w: another one is pinned; a device that renewed its certificate needs a renewal window", storage.ErrIdentity)
	errUnknown = fmt.Errorf("%w: the device never sent Authenticate", storage.ErrIdentity)
	errExpired = fmt.Errorf("%w: it has expired, and is not pinned to this device", storage.ErrIdentity)
	errNone    = fmt.Errorf("%w: none is pinned, and no policy lets this one be", storage.ErrIdentity)
)

// refusal says why a certificate may not take a device over.
func (c *certificates) refusal(p *opRun) error {
	_, retired := c.byHash[p.src.Pin.Hash]
	switch {
	case retired:
		return errRetired
	case !c.devices[p.device]:
		return errUnknown
	case !c.live[p.device]:
		return errNone
	case p.kind.begins:
		return errBegin
	}
	return errRenew
}

// sameSubject says whether the certificate names the device, and has the
// subject of the one that it would replace, if that is known. The serial number
// is the one of the database: any device could put another's into its message.
func (c *certificates) sameSubject(p *opRun, k claim) bool {
	cert, err := x509.ParseCertificate(p.src.Pin.Certificate)
	if err != nil || !storage.NamesDevice(cert, p.device, k.serial) {
		return false
	}
	if k.certificate == nil {
		return true
	}
	was, err := x509.ParseCertificate(k.certificate)
	return err != nil || bytes.Equal(was.RawSubject, cert.RawSubject)
}
