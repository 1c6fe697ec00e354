// Package mdm holds what Apple devices and this server say to each other: the
// check-in messages, the command reports, the commands, and the identifiers
// of the enrollments they speak for.
//
// Decoding is made for hostile peers and for faulty ones. A body is scanned
// once, without building a tree; only the keys the server acts on are
// extracted, and the body itself stays available as Raw. Binary property lists,
// entity declarations and deep nesting are refused. A body that is no sound XML
// for other reasons is scanned again, tolerantly: what has one meaning is taken,
// and U+FFFD replaces what XML forbids. Only the identity keys and the keys that
// a message cannot do without must be whole.
//
// The package imports nothing else of this module and keeps no state;
// everything in it may be called concurrently.
//
// Key names and rules are those of Apple's device management documentation,
// https://developer.apple.com/documentation/devicemanagement, and of the
// schemas in https://github.com/apple/device-management.
package mdm

// Media types of the device protocol. The media type of a request may carry
// parameters; compare it with them stripped.
const (
	ContentTypeCheckin = "application/x-apple-aspen-mdm-checkin"
	ContentTypeCommand = "application/x-apple-aspen-mdm"
	// ContentTypePlist is the media type of every property list sent to a device.
	ContentTypePlist = "application/xml; charset=UTF-8"
)

// Kind names the sort of a [Message]. For a check-in it is the MessageType
// on the wire.
type Kind string

// The kinds of messages.
const (
	KindAuthenticate          Kind = "Authenticate"
	KindTokenUpdate           Kind = "TokenUpdate"
	KindCheckOut              Kind = "CheckOut"
	KindSetBootstrapToken     Kind = "SetBootstrapToken"
	KindGetBootstrapToken     Kind = "GetBootstrapToken"
	KindUserAuthenticate      Kind = "UserAuthenticate"
	KindDeclarativeManagement Kind = "DeclarativeManagement"
	KindGetToken              Kind = "GetToken"
	KindReturnToService       Kind = "ReturnToService"
	// KindReport is a command report; it has a Status and no MessageType.
	KindReport Kind = "Report"
)

// Message is one check-in or report. It is sealed: the types of this package
// that embed [Enrollment] are all there are, each by pointer.
type Message interface {
	Kind() Kind
	// Identity returns the identity keys of the message, never nil.
	Identity() *Enrollment
	// RawBytes returns the body as it was received. The caller must not change it.
	RawBytes() []byte
	sealed()
}

// Authenticate starts an enrollment; it comes from the device channel only.
// Optional keys that the device withheld are empty.
type Authenticate struct {
	Enrollment
	Topic        string
	Model        string
	ModelName    string
	DeviceName   string
	OSVersion    string
	BuildVersion string
	ProductName  string
	SerialNumber string
	IMEI         string
	MEID         string
	Raw          []byte
}

// TokenUpdate tells how to push to a channel.
type TokenUpdate struct {
	Enrollment
	Topic     string
	PushMagic string
	Token     []byte
	// UnlockToken is empty when the message has none, which does not
	// invalidate one that was sent earlier. It is a secret.
	UnlockToken []byte
	// AwaitingConfiguration says that the device waits in Setup Assistant
	// for DeviceConfigured (on a Shared iPad's user channel: UserConfigured).
	AwaitingConfiguration bool
	// NotOnConsole says that the user of a macOS user channel is not at the
	// console. It has nothing to do with [SharediPadUserID].
	NotOnConsole bool
	Raw          []byte
}

// CheckOut ends an enrollment. A device sends it once and never again.
type CheckOut struct {
	Enrollment
	Topic string
	Raw   []byte
}

// SetBootstrapToken stores the bootstrap token of a device.
type SetBootstrapToken struct {
	Enrollment
	// BootstrapToken is empty when the stored token is to be deleted. It is
	// a secret.
	BootstrapToken        []byte
	AwaitingConfiguration bool
	Raw                   []byte
}

// GetBootstrapToken asks for the stored bootstrap token.
type GetBootstrapToken struct {
	Enrollment
	AwaitingConfiguration bool
	Raw                   []byte
}

// UserAuthenticate asks whether a network or mobile user of a Mac is managed.
type UserAuthenticate struct {
	Enrollment
	DigestResponse string
	// HasDigestResponse tells the second message of the handshake, which
	// answers a challenge, from the first, even when the answer is empty.
	HasDigestResponse bool
	Raw               []byte
}

// DeclarativeManagement is a request of the declarative management protocol.
type DeclarativeManagement struct {
	Enrollment
	// Endpoint is what the device sent; see [ParseDMEndpoint].
	Endpoint string
	// Data is JSON, present for the status endpoint only.
	Data []byte
	Raw  []byte
}

// Token service types that Apple defines for [GetToken].
const (
	TokenServiceMAID         = "com.apple.maid"
	TokenServiceWatchPairing = "com.apple.watch.pairing"
)

// GetToken asks for a token that another service demands.
type GetToken struct {
	Enrollment
	// TokenServiceType may be any text; an unknown one is answered with 400.
	TokenServiceType string
	TokenParameters  TokenParameters
	Raw              []byte
}

// TokenParameters are the parameters of a [TokenServiceWatchPairing] token.
type TokenParameters struct {
	SecurityToken string
	PhoneUDID     string
	WatchUDID     string
}

// ReturnToService asks for the settings of an erase that comes back enrolled.
type ReturnToService struct {
	Enrollment
	Raw []byte
}

// Status is the status of a report. A device may send one that is not among
// the constants: it is kept as it is, and is neither idle nor terminal.
type Status string

// The statuses that Apple defines.
const (
	StatusIdle               Status = "Idle"
	StatusAcknowledged       Status = "Acknowledged"
	StatusError              Status = "Error"
	StatusCommandFormatError Status = "CommandFormatError"
	StatusNotNow             Status = "NotNow"
)

// StatusUnreadable is this server's own word for a report that cannot be read;
// see [Unreadable].
const StatusUnreadable Status = "Unreadable"

// Terminal reports whether the command of the report is finished, well or not.
func (s Status) Terminal() bool {
	switch s {
	case StatusAcknowledged, StatusError, StatusCommandFormatError, StatusUnreadable:
		return true
	}
	return false
}

// ErrorChainItem is one error of a report, the first one being the top level.
type ErrorChainItem struct {
	// ErrorCode is 0 when it is missing or no number. A fraction is cut
	// off, and a number beyond int64 becomes the nearest int64.
	ErrorCode            int64
	ErrorDomain          string
	LocalizedDescription string
	USEnglishDescription string
}

// Report is what a device says on the command connection: the outcome of a
// command, or that it is idle.
type Report struct {
	Enrollment
	Status Status
	// CommandUUID is opaque, at most [MaxIDLen] bytes, and empty when Idle.
	CommandUUID string
	// BadCommandUUID says that the message has a CommandUUID that is no
	// text, is too long or has control characters, and that CommandUUID
	// is therefore empty.
	BadCommandUUID bool
	// ErrorChain holds what could be read of the errors, best effort; their
	// shape never fails a report.
	ErrorChain []ErrorChainItem
	Raw        []byte

	inventory inventoryAt
}

func (*Authenticate) Kind() Kind          { return KindAuthenticate }
func (*TokenUpdate) Kind() Kind           { return KindTokenUpdate }
func (*CheckOut) Kind() Kind              { return KindCheckOut }
func (*SetBootstrapToken) Kind() Kind     { return KindSetBootstrapToken }
func (*GetBootstrapToken) Kind() Kind     { return KindGetBootstrapToken }
func (*UserAuthenticate) Kind() Kind      { return KindUserAuthenticate }
func (*DeclarativeManagement) Kind() Kind { return KindDeclarativeManagement }
func (*GetToken) Kind() Kind              { return KindGetToken }
func (*ReturnToService) Kind() Kind       { return KindReturnToService }
func (*Report) Kind() Kind                { return KindReport }

func (m *Authenticate) RawBytes() []byte          { return m.Raw }
func (m *TokenUpdate) RawBytes() []byte           { return m.Raw }
func (m *CheckOut) RawBytes() []byte              { return m.Raw }
func (m *SetBootstrapToken) RawBytes() []byte     { return m.Raw }
func (m *GetBootstrapToken) RawBytes() []byte     { return m.Raw }
func (m *UserAuthenticate) RawBytes() []byte      { return m.Raw }
func (m *DeclarativeManagement) RawBytes() []byte { return m.Raw }
func (m *GetToken) RawBytes() []byte              { return m.Raw }
func (m *ReturnToService) RawBytes() []byte       { return m.Raw }
func (m *Report) RawBytes() []byte                { return m.Raw }

func (*Authenticate) sealed()          {}
func (*TokenUpdate) sealed()           {}
func (*CheckOut) sealed()              {}
func (*SetBootstrapToken) sealed()     {}
func (*GetBootstrapToken) sealed()     {}
func (*UserAuthenticate) sealed()      {}
func (*DeclarativeManagement) sealed() {}
func (*GetToken) sealed()              {}
func (*ReturnToService) sealed()       {}
func (*Report) sealed()                {}
