package foreign

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"slices"
	"strings"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
	"github.com/nanomdm/nanomdm/storage"
)

// checkID says what keeps an id from being stored, or "".
func checkID(device, user string) string {
	e := mdm.Enrollment{UDID: device, UserID: user}
	if user == mdm.SharediPadUserID {
		e.UserShortName = user
	}
	if _, err := e.Resolve(); err != nil {
		return err.Error()
	}
	return ""
}

// resolved returns the identity that a check-in states, if it can be read.
func resolved(raw []byte) (mdm.EnrollID, mdm.Message, bool) {
	if len(raw) == 0 {
		return mdm.EnrollID{}, nil, false
	}
	m, err := mdm.DecodeCheckin(raw)
	if err != nil {
		return mdm.EnrollID{}, nil, false
	}
	id, err := m.Identity().Resolve()
	return id, m, err == nil
}

// deviceSpelling returns a device's id as the device writes it. A source that
// compares ids without case may have kept another spelling, and a device is
// only recognized by its own.
func deviceSpelling(id string, messages ...[]byte) string {
	for _, raw := range messages {
		if said, _, ok := resolved(raw); ok && said.DeviceID() != id && strings.EqualFold(said.DeviceID(), id) {
			return said.DeviceID()
		}
	}
	return id
}

// describe copies what the Authenticate message says about the device.
func describe(d *storage.DeviceRecord) (ok bool) {
	_, m, _ := resolved(d.Authenticate.Raw)
	a, ok := m.(*mdm.Authenticate)
	if !ok {
		return false
	}
	d.SerialNumber = cmp.Or(d.SerialNumber, a.SerialNumber)
	d.Model, d.ModelName, d.DeviceName = a.Model, a.ModelName, a.DeviceName
	d.OSVersion, d.BuildVersion, d.ProductName = a.OSVersion, a.BuildVersion, a.ProductName
	d.IMEI, d.MEID = a.IMEI, a.MEID
	d.Channel.Topic = cmp.Or(d.Channel.Topic, a.Topic)
	return true
}

// channelType is the type of a channel whose source does not keep it.
func channelType(raw []byte, user, userEnrollment bool) mdm.EnrollType {
	if id, _, ok := resolved(raw); ok {
		return id.Type
	}
	switch {
	case user && userEnrollment:
		return mdm.UserEnrollment
	case user:
		return mdm.User
	case userEnrollment:
		return mdm.UserEnrollmentDevice
	}
	return mdm.Device
}

// knownType says whether a type is one of a device or of a user channel.
func knownType(t mdm.EnrollType, user bool) bool {
	isUser := t == mdm.User || t == mdm.UserEnrollment || t == mdm.SharediPad
	return slices.Contains(mdm.EnrollTypes(), t) && isUser == user
}

// ofTokenUpdate copies what a TokenUpdate says where the source keeps no more.
func ofTokenUpdate(c *storage.ChannelRecord, raw []byte) (unlock []byte, ok bool) {
	_, m, _ := resolved(raw)
	u, ok := m.(*mdm.TokenUpdate)
	if !ok {
		return nil, false
	}
	c.Topic, c.PushMagic, c.Token = cmp.Or(c.Topic, u.Topic), cmp.Or(c.PushMagic, u.PushMagic), u.Token
	c.AwaitingConfiguration = u.AwaitingConfiguration
	return u.UnlockToken, true
}

// checkHash returns a certificate's hash in the spelling of the store, or ""
// if it is none.
func checkHash(hash string) string {
	hash = strings.ToLower(strings.TrimSpace(hash))
	raw, err := hex.DecodeString(hash)
	if err != nil || len(raw) != sha256.Size {
		return ""
	}
	return hash
}

// parsePEM reads the first certificate of a PEM text.
func parsePEM(text []byte) *x509.Certificate {
	block, _ := pem.Decode(text)
	if block == nil {
		return nil
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil
	}
	return cert
}

func parseDER(der []byte) *x509.Certificate {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil
	}
	return cert
}

// first is the first message that there is.
func first(messages ...[]byte) []byte {
	for _, raw := range messages {
		if len(raw) > 0 {
			return raw
		}
	}
	return nil
}

func hashOf(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:])
}

// settlePins says which of a device's pins is the current one and retires the
// others. identity is the certificate that came with Authenticate, if it is
// known. A certificate that was associated after Authenticate renewed it.
func settlePins(pins []storage.PinRecord, identity *x509.Certificate, authenticated time.Time) []storage.PinRecord {
	if len(pins) == 0 && identity == nil {
		return nil
	}
	var own string
	if identity != nil {
		own = hashOf(identity.Raw)
		if !slices.ContainsFunc(pins, func(p storage.PinRecord) bool { return p.SHA256 == own }) {
			pins = append(pins, storage.PinRecord{SHA256: own, CreatedAt: authenticated})
		}
	}
	slices.SortStableFunc(pins, func(a, b storage.PinRecord) int {
		return cmp.Or(a.CreatedAt.Compare(b.CreatedAt), cmp.Compare(a.SHA256, b.SHA256))
	})
	current := len(pins) - 1
	if at := slices.IndexFunc(pins, func(p storage.PinRecord) bool { return p.SHA256 == own }); at >= 0 {
		pins[at].Certificate, pins[at].NotAfter = identity.Raw, identity.NotAfter
		if !pins[current].CreatedAt.After(authenticated) {
			current = at
		}
	}
	for i := range pins {
		if i != current {
			pins[i].RetiredAt = latest(pins[current].CreatedAt, pins[i].CreatedAt)
			if pins[i].RetiredAt.IsZero() {
				pins[i].RetiredAt = time.UnixMicro(1).UTC()
			}
		}
	}
	return pins
}

func latest(times ...time.Time) (t time.Time) {
	for _, u := range times {
		if u.After(t) {
			t = u
		}
	}
	return t
}

// stateOf is the state of a command that ended with a status.
func stateOf(status string) (state storage.State, known bool) {
	switch mdm.Status(status) {
	case mdm.StatusAcknowledged:
		return storage.Acknowledged, true
	case mdm.StatusError:
		return storage.Failed, true
	case mdm.StatusCommandFormatError:
		return storage.FormatError, true
	}
	return storage.Failed, false
}

// readCommand checks a command's bytes and returns its record.
func (c *Config) readCommand(uuid string, raw []byte, at time.Time) (storage.CommandRecord, bool) {
	command, err := mdm.DecodeCommand(raw)
	switch {
	case err != nil:
		c.problem("command", uuid, "%v", err)
	case command.CommandUUID != uuid:
		c.problem("command", uuid, "its property list has the CommandUUID %q", command.CommandUUID)
	default:
		return storage.CommandRecord{UUID: uuid, RequestType: command.RequestType, Raw: bytes.Clone(raw), CreatedAt: at}, true
	}
	return storage.CommandRecord{}, false
}
