package storage

import (
	"context"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// The records of an import: the state of another server, or of another store,
// as far as the daemon has a place for it. A zero time is unknown or never.

// Checkin is a check-in message as the device sent it. Raw is empty if the
// source does not have it.
type Checkin struct {
	Raw []byte
	At  time.Time
}

// Token is an unlock or bootstrap token.
type Token struct {
	Value []byte
	At    time.Time
}

// ChannelRecord is an enrollment: a device channel or a user channel.
type ChannelRecord struct {
	ID        string
	Type      mdm.EnrollType
	Topic     string
	PushMagic string
	Token     []byte
	TokenAt   time.Time
	Enabled   bool
	// OperatorDisabled keeps an enrollment from becoming active, whatever the
	// device sends.
	OperatorDisabled      bool
	Tally                 int
	AwaitingConfiguration bool
	RenewalUntil          time.Time
	EnrolledAt            time.Time
	LastSeenAt            time.Time
	// Queue is in the order in which the device is offered the commands.
	Queue []ItemRecord
}

// DeviceRecord is a device with all of its channels.
type DeviceRecord struct {
	// Channel is the device channel.
	Channel ChannelRecord
	// What the Authenticate message says; the source fills it in, also where
	// there is no message.
	SerialNumber, Model, ModelName, DeviceName string
	OSVersion, BuildVersion, ProductName       string
	IMEI, MEID                                 string
	// Tags are those that an operator gave it, sorted. An import adds them to
	// those that are there.
	Tags []string

	Authenticate   Checkin
	TokenUpdate    Checkin
	UnlockToken    Token
	BootstrapToken Token
	Pins           []PinRecord
	Users          []UserRecord // by Channel.ID
}

// UserRecord is a user channel.
type UserRecord struct {
	Channel                   ChannelRecord
	UserID                    string
	UserShortName             string
	UserLongName              string
	TokenUpdate               Checkin
	UserAuthenticate          Checkin
	UserAuthenticateDiscarded bool // the source has an earlier message as well
}

// PinRecord is an identity certificate that acts for a device, or did.
type PinRecord struct {
	SHA256      string // lower-case hex of the SHA-256 of the DER
	Certificate []byte // DER; nil if only the hash is known
	NotAfter    time.Time
	CreatedAt   time.Time
	RetiredAt   time.Time
}

// ItemRecord is a command in the queue of an enrollment.
type ItemRecord struct {
	CommandUUID  string
	State        State
	Priority     int
	SupersedeKey string
	CreatedAt    time.Time
	NotBefore    time.Time
	ExpiresAt    time.Time
	FinishedAt   time.Time
	NotNowCount  int
	NotNowAt     time.Time
	Result       *CommandResult // nil if there is none
}

// CommandRecord is a command, for any number of enrollments.
type CommandRecord struct {
	UUID        string
	RequestType string
	Raw         []byte
	CreatedAt   time.Time
}

// Imported is what an import step did with its records.
type Imported struct {
	Written int
	// Kept counts records that the store left as they are, because they are
	// newer here: the device has already spoken to this server.
	Kept int
	// Refused are records that the store cannot take.
	Refused []Refusal
}

// Refusal is a record that cannot be imported.
type Refusal struct {
	Kind   string // "device", "tag", "pin", "command", "item", "push certificate"
	Key    string
	Reason string
}

// Importer takes the records of another server. Every method may be repeated:
// the same records leave the same state. One call is one transaction.
type Importer interface {
	// ImportPushCerts stores push certificates. One that is there stays if
	// it ends later.
	ImportPushCerts(ctx context.Context, certs []PushCert) (Imported, error)
	// ImportCommands stores commands. One that is there with other bytes is
	// refused.
	ImportCommands(ctx context.Context, commands []CommandRecord) (Imported, error)
	// ImportDevices stores devices with their channels, pins and queues. A
	// device that has sent a check-in here since the one in the record is
	// kept as it is. A queue row only moves forward: one that ended here
	// stays ended. A row that waits here and that came with an earlier import
	// is cancelled if the record no longer has it.
	//
	// A command that waits makes a push owed, due after some minutes, spread
	// over the enrollments.
	ImportDevices(ctx context.Context, devices []*DeviceRecord) (Imported, error)
}

// Exporter reads back what an Importer takes.
type Exporter interface {
	// ExportPushCerts returns all push certificates, by topic.
	ExportPushCerts(ctx context.Context) ([]PushCert, error)
	// ExportCommands returns up to limit commands after a CommandUUID, by
	// CommandUUID.
	ExportCommands(ctx context.Context, after string, limit int) ([]CommandRecord, error)
	// ExportDeviceIDs returns up to limit ids of devices after one, sorted.
	ExportDeviceIDs(ctx context.Context, after string, limit int) ([]string, error)
	// ExportDevices returns those of the devices that exist, by id.
	ExportDevices(ctx context.Context, ids []string) ([]*DeviceRecord, error)
}
