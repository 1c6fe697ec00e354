package mdm

import (
	"math"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Inventory is what a report says about a device: the answer to
// DeviceInformation, SecurityInfo or InstalledApplicationList. Fields that are
// nil were not in it.
type Inventory struct {
	Information  *DeviceInformation
	Security     *SecurityInfo
	Applications *Applications
}

// DeviceInformation is the answer to DeviceInformation, which has the values
// that were asked for. The JSON is that of the API.
type DeviceInformation struct {
	DeviceName                 string   `json:"device_name,omitempty"`
	OSVersion                  string   `json:"os_version,omitempty"`
	SupplementalOSVersionExtra string   `json:"supplemental_os_version_extra,omitempty"`
	BuildVersion               string   `json:"build_version,omitempty"`
	SupplementalBuildVersion   string   `json:"supplemental_build_version,omitempty"`
	ModelName                  string   `json:"model_name,omitempty"`
	Model                      string   `json:"model,omitempty"`
	ModelNumber                string   `json:"model_number,omitempty"`
	ProductName                string   `json:"product_name,omitempty"`
	HostName                   string   `json:"host_name,omitempty"`
	LocalHostName              string   `json:"local_host_name,omitempty"`
	TimeZone                   string   `json:"time_zone,omitempty"`
	WiFiMAC                    string   `json:"wifi_mac,omitempty"`
	BluetoothMAC               string   `json:"bluetooth_mac,omitempty"`
	EthernetMAC                string   `json:"ethernet_mac,omitempty"`
	Supervised                 *bool    `json:"supervised,omitempty"`
	AppleSilicon               *bool    `json:"apple_silicon,omitempty"`
	ActivationLock             *bool    `json:"activation_lock,omitempty"`
	LostMode                   *bool    `json:"lost_mode,omitempty"`
	MultiUser                  *bool    `json:"multi_user,omitempty"`
	Capacity                   *float64 `json:"capacity_gb,omitempty"`
	Available                  *float64 `json:"available_gb,omitempty"`
	BatteryLevel               *float64 `json:"battery_level,omitempty"` // 0 to 1
}

// SecurityInfo is the answer to SecurityInfo, without secrets.
type SecurityInfo struct {
	FileVault                 *bool  `json:"filevault,omitempty"`
	PersonalRecoveryKey       *bool  `json:"filevault_personal_key,omitempty"`
	InstitutionalRecoveryKey  *bool  `json:"filevault_institutional_key,omitempty"`
	PasscodePresent           *bool  `json:"passcode_present,omitempty"`
	PasscodeCompliant         *bool  `json:"passcode_compliant,omitempty"`
	SystemIntegrityProtection *bool  `json:"system_integrity_protection,omitempty"`
	AuthenticatedRootVolume   *bool  `json:"authenticated_root_volume,omitempty"`
	Firewall                  *bool  `json:"firewall,omitempty"`
	FirewallBlocksAll         *bool  `json:"firewall_blocks_all,omitempty"`
	FirewallStealth           *bool  `json:"firewall_stealth,omitempty"`
	FirmwarePassword          *bool  `json:"firmware_password,omitempty"`
	RecoveryLock              *bool  `json:"recovery_lock,omitempty"`
	RemoteDesktop             *bool  `json:"remote_desktop,omitempty"`
	SecureBoot                string `json:"secure_boot,omitempty"`
	ExternalBoot              string `json:"external_boot,omitempty"`
	EnrolledViaDEP            *bool  `json:"enrolled_via_dep,omitempty"`
	UserApproved              *bool  `json:"user_approved_enrollment,omitempty"`
}

// Applications is the answer to InstalledApplicationList.
type Applications struct {
	// Count is how many there are.
	Count int `json:"count"`
	// Items are the first of them, bounded in number and bytes.
	Items []Application `json:"items"`
}

// Application is an installed application.
type Application struct {
	Identifier string `json:"identifier,omitempty"`
	Name       string `json:"name,omitempty"`
	Version    string `json:"version,omitempty"` // as people know it
	Build      string `json:"build,omitempty"`
}

const (
	// MaxInventoryText is the length of a text of an Inventory, in characters.
	MaxInventoryText = 255
	// MaxApplications is the number of Applications.Items.
	MaxApplications = 2000
	// maxApplicationBytes bounds the text of Applications.Items.
	maxApplicationBytes = 256 << 10
)

// inventoryAt is where a report has parts of an inventory.
type inventoryAt struct {
	information, security, applications value
	manner                              manner
}

func (r *reader) inventory() inventoryAt {
	at := inventoryAt{information: r.QueryResponses, security: r.SecurityInfo, applications: r.InstalledApplicationList}
	if r.damage != nil && at != (inventoryAt{}) {
		at.manner = tolerant
	}
	return at
}

// Inventory reads what the report says about the device, nil if it says
// nothing. Values of other types than Apple's are left out, and texts are cut.
func (m *Report) Inventory() *Inventory {
	at := m.inventory
	if at == (inventoryAt{}) {
		return nil
	}
	inv := new(Inventory)
	if at.information.kind == kindDict {
		inv.Information = new(DeviceInformation)
		m.readFields(at.information, inv.Information.field)
	}
	if at.security.kind == kindDict {
		inv.Security = new(SecurityInfo)
		m.readFields(at.security, inv.Security.field)
	}
	if at.applications.kind == kindArray {
		inv.Applications = m.readApplications(at.applications)
	}
	if *inv == (Inventory{}) {
		return nil
	}
	return inv
}

// at is a builder that stands behind the start tag of a value. The body was
// scanned, so that reading it again finds no fault.
func (m *Report) at(v value) *builder {
	b := &builder{scanner: scanner{body: m.Raw, manner: m.inventory.manner}, document: document{body: m.Raw}}
	if m.inventory.manner == tolerant {
		b.notUTF8 = !utf8.Valid(m.Raw)
	}
	b.pos = v.start
	return b
}

// fieldsOf returns where the value of a key goes: a pointer to a scalar,
// fieldsOf for a dict, or nil.
type fieldsOf func(key []byte) any

// emptyElement says whether a container that was found is <dict/> or <array/>.
func (m *Report) emptyElement(v value) bool { return m.Raw[v.start-2] == '/' }

// readFields reads a dict.
func (m *Report) readFields(v value, fields fieldsOf) {
	if !m.emptyElement(v) {
		_ = m.at(v).fields(fields) // see at
	}
}

// fields reads the contents and the end tag of a dict. Of several equal keys
// the last with the field's type counts.
func (b *builder) fields(fields fieldsOf) error {
	for {
		if end, err := b.ended(kindDict); end || err != nil {
			return err
		}
		k, empty, err := b.next()
		if err != nil {
			return err
		}
		name := value{kind: k, start: b.pos, end: b.pos}
		if !empty {
			if err := b.text(&name); err != nil {
				return err
			}
		}
		key := b.body[name.start:name.end]
		if name.marked {
			key = unescape(nil, key)
		}
		if k, empty, err = b.next(); err != nil {
			return err
		}
		into := fields(key)
		if inner, ok := into.(fieldsOf); ok && k == kindDict && !empty {
			err = b.fields(inner)
		} else {
			err = b.assign(into, k, empty)
		}
		if err != nil {
			return err
		}
	}
}

// assign reads the element whose start tag was read, and sets a field if the
// type is its own.
func (b *builder) assign(into any, k valueKind, empty bool) error {
	if k == kindDict || k == kindArray {
		return b.skip(k, empty)
	}
	v := value{kind: k, start: b.pos, end: b.pos}
	if err := b.scalar(&b.document, &v, empty); err != nil {
		return err
	}
	switch into := into.(type) {
	case *string:
		if k == kindString || k == kindInteger || k == kindReal {
			*into = clipText(b.document.str(v))
		}
	case **bool:
		if k == kindTrue || k == kindFalse {
			*into = new(k == kindTrue)
		}
	case **float64:
		if k == kindReal || k == kindInteger {
			if n, err := strconv.ParseFloat(strings.TrimSpace(b.document.str(v)), 64); err == nil && !math.IsInf(n, 0) && !math.IsNaN(n) {
				*into = &n
			}
		}
	}
	return nil
}

// skip passes over the element whose start tag was read. scan has bounded its
// depth.
func (b *builder) skip(k valueKind, empty bool) error {
	if k != kindDict && k != kindArray {
		v := value{kind: k, start: b.pos, end: b.pos}
		return b.scalar(&b.document, &v, empty)
	}
	for !empty {
		if end, err := b.ended(k); end || err != nil {
			return err
		}
		inner, innerEmpty, err := b.next()
		if err != nil {
			return err
		}
		if err := b.skip(inner, innerEmpty); err != nil { // keys of dicts, too
			return err
		}
	}
	return nil
}

// clipText bounds a text, and makes it one.
func clipText(s string) string {
	s = strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "")
	if len(s) <= MaxInventoryText || utf8.RuneCountInString(s) <= MaxInventoryText {
		return s
	}
	return string([]rune(s)[:MaxInventoryText])
}

func (m *Report) readApplications(v value) *Applications {
	list := &Applications{Items: []Application{}}
	if m.emptyElement(v) {
		return list
	}
	b := m.at(v)
	size := 0
	for {
		if end, err := b.ended(kindArray); end || err != nil {
			return list
		}
		k, empty, err := b.next()
		if err != nil {
			return list
		}
		list.Count++
		if k != kindDict || empty || len(list.Items) == MaxApplications || size >= maxApplicationBytes {
			err = b.skip(k, empty)
		} else {
			var a Application
			err = b.fields(a.field)
			size += len(a.Identifier) + len(a.Name) + len(a.Version) + len(a.Build)
			list.Items = append(list.Items, a)
		}
		if err != nil {
			return list
		}
	}
}

func (a *Application) field(key []byte) any {
	switch string(key) {
	case "Identifier":
		return &a.Identifier
	case "Name":
		return &a.Name
	case "ShortVersion":
		return &a.Version
	case "Version":
		return &a.Build
	}
	return nil
}

func (d *DeviceInformation) field(key []byte) any {
	switch string(key) {
	case "DeviceName":
		return &d.DeviceName
	case "OSVersion":
		return &d.OSVersion
	case "SupplementalOSVersionExtra":
		return &d.SupplementalOSVersionExtra
	case "BuildVersion":
		return &d.BuildVersion
	case "SupplementalBuildVersion":
		return &d.SupplementalBuildVersion
	case "ModelName":
		return &d.ModelName
	case "Model":
		return &d.Model
	case "ModelNumber":
		return &d.ModelNumber
	case "ProductName":
		return &d.ProductName
	case "HostName":
		return &d.HostName
	case "LocalHostName":
		return &d.LocalHostName
	case "TimeZone":
		return &d.TimeZone
	case "WiFiMAC":
		return &d.WiFiMAC
	case "BluetoothMAC":
		return &d.BluetoothMAC
	case "EthernetMAC":
		return &d.EthernetMAC
	case "IsSupervised":
		return &d.Supervised
	case "IsAppleSilicon":
		return &d.AppleSilicon
	case "IsActivationLockEnabled":
		return &d.ActivationLock
	case "IsMDMLostModeEnabled":
		return &d.LostMode
	case "IsMultiUser":
		return &d.MultiUser
	case "DeviceCapacity":
		return &d.Capacity
	case "AvailableDeviceCapacity":
		return &d.Available
	case "BatteryLevel":
		return &d.BatteryLevel
	}
	return nil
}

func (s *SecurityInfo) field(key []byte) any {
	switch string(key) {
	case "FDE_Enabled":
		return &s.FileVault
	case "FDE_HasPersonalRecoveryKey":
		return &s.PersonalRecoveryKey
	case "FDE_HasInstitutionalRecoveryKey":
		return &s.InstitutionalRecoveryKey
	case "PasscodePresent":
		return &s.PasscodePresent
	case "PasscodeCompliant":
		return &s.PasscodeCompliant
	case "SystemIntegrityProtectionEnabled":
		return &s.SystemIntegrityProtection
	case "AuthenticatedRootVolumeEnabled":
		return &s.AuthenticatedRootVolume
	case "IsRecoveryLockEnabled":
		return &s.RecoveryLock
	case "RemoteDesktopEnabled":
		return &s.RemoteDesktop
	case "FirewallSettings":
		return fieldsOf(s.firewallField)
	case "FirmwarePasswordStatus":
		return named("PasswordExists", &s.FirmwarePassword)
	case "SecureBoot":
		return fieldsOf(s.secureBootField)
	case "ManagementStatus":
		return fieldsOf(s.managementField)
	}
	return nil
}

// named is a dict with one wanted key.
func named(name string, into any) fieldsOf {
	return func(key []byte) any {
		if string(key) == name {
			return into
		}
		return nil
	}
}

func (s *SecurityInfo) firewallField(key []byte) any {
	switch string(key) {
	case "FirewallEnabled":
		return &s.Firewall
	case "BlockAllIncoming":
		return &s.FirewallBlocksAll
	case "StealthMode":
		return &s.FirewallStealth
	}
	return nil
}

func (s *SecurityInfo) secureBootField(key []byte) any {
	switch string(key) {
	case "SecureBootLevel":
		return &s.SecureBoot
	case "ExternalBootLevel":
		return &s.ExternalBoot
	}
	return nil
}

func (s *SecurityInfo) managementField(key []byte) any {
	switch string(key) {
	case "EnrolledViaDEP":
		return &s.EnrolledViaDEP
	case "UserApprovedEnrollment":
		return &s.UserApproved
	}
	return nil
}
