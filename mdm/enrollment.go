package mdm

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"
)

// EnrollType is the type of an enrollment, as it appears in JSON and in the
// database.
type EnrollType string

// The enrollment types.
const (
	Device               EnrollType = "Device"
	User                 EnrollType = "User"
	UserEnrollmentDevice EnrollType = "User Enrollment (Device)"
	UserEnrollment       EnrollType = "User Enrollment"
	SharediPad           EnrollType = "Shared iPad"
)

// EnrollTypes returns all enrollment types.
func EnrollTypes() []EnrollType {
	return []EnrollType{Device, User, UserEnrollmentDevice, UserEnrollment, SharediPad}
}

// SharediPadUserID is the UserID of every user channel of a Shared iPad;
// there the users differ by UserShortName.
const SharediPadUserID = "FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF"

// MaxIDLen is the most bytes an enrollment ID or a CommandUUID may have.
const MaxIDLen = 255

// ErrIdentity is wrapped by every error of [Enrollment.Resolve].
var ErrIdentity = errors.New("invalid enrollment identity")

// EnrollID is the resolved identity of one channel.
type EnrollID struct {
	Type EnrollType
	ID   string
	// ParentID is the ID of the device channel; it is empty on the device
	// channel itself.
	ParentID string
}

// DeviceID returns the ID of the device channel, the one a certificate is
// pinned to: all channels of a device share one identity certificate.
func (e EnrollID) DeviceID() string {
	if e.ParentID != "" {
		return e.ParentID
	}
	return e.ID
}

// IsUserChannel reports whether the enrollment is a user's on a device.
func (e EnrollID) IsUserChannel() bool {
	return e.ParentID != ""
}

// Enrollment holds the identity keys that all messages share, as sent.
type Enrollment struct {
	UDID             string
	UserID           string
	UserShortName    string
	UserLongName     string
	EnrollmentID     string
	EnrollmentUserID string
}

// Identity returns e; it makes a message that embeds e identify itself.
func (e *Enrollment) Identity() *Enrollment { return e }

// Resolve returns the identity the keys stand for. A UDID wins over an
// EnrollmentID. UDIDs are opaque: their case and length are kept. Errors
// wrap [ErrIdentity] and name the key, but never repeat its value.
func (e *Enrollment) Resolve() (EnrollID, error) {
	var id EnrollID
	var device, deviceKey, user, userKey string
	switch {
	case e.UDID != "":
		device, deviceKey, id.Type = e.UDID, "UDID", Device
		switch e.UserID {
		case "":
		case SharediPadUserID:
			if e.UserShortName == "" {
				return EnrollID{}, fmt.Errorf("%w: Shared iPad user without UserShortName", ErrIdentity)
			}
			user, userKey, id.Type = e.UserShortName, "UserShortName", SharediPad
		default:
			user, userKey, id.Type = e.UserID, "UserID", User
		}
	case e.EnrollmentID != "":
		device, deviceKey, id.Type = e.EnrollmentID, "EnrollmentID", UserEnrollmentDevice
		if e.EnrollmentUserID != "" {
			user, userKey, id.Type = e.EnrollmentUserID, "EnrollmentUserID", UserEnrollment
		}
	default:
		return EnrollID{}, fmt.Errorf("%w: neither UDID nor EnrollmentID", ErrIdentity)
	}

	// The colon separates the halves of an ID: in the device's half it would
	// let one device take the ID of another device's user.
	if strings.Contains(device, ":") {
		return EnrollID{}, fmt.Errorf("%w: colon in %s", ErrIdentity, deviceKey)
	}
	if why := badID(device); why != "" {
		return EnrollID{}, fmt.Errorf("%w: %s in %s", ErrIdentity, why, deviceKey)
	}
	if user == "" {
		id.ID = device
		return id, nil
	}
	if why := badID(user); why != "" {
		return EnrollID{}, fmt.Errorf("%w: %s in %s", ErrIdentity, why, userKey)
	}
	id.ID, id.ParentID = device+":"+user, device
	if len(id.ID) > MaxIDLen {
		return EnrollID{}, fmt.Errorf("%w: more than %d bytes in %s and %s together", ErrIdentity, MaxIDLen, deviceKey, userKey)
	}
	return id, nil
}

// badID says what makes s unfit for an identifier, and "" if nothing does.
func badID(s string) string {
	if len(s) > MaxIDLen {
		return fmt.Sprintf("more than %d bytes", MaxIDLen)
	}
	if !utf8.ValidString(s) {
		return "invalid UTF-8"
	}
	for _, r := range s {
		// C0, DEL and C1.
		if r < 0x20 || r >= 0x7f && r < 0xa0 {
			return "control characters"
		}
	}
	return ""
}
