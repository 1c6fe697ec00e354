package storage

import (
	"context"
	"time"

	"github.com/nanomdm/nanomdm/mdm"
)

// The records of an import are the state of another server or store, as far as
// this store has a place for it. A zero time is unknown or never.

// Checkin is a check-in message of a device. Raw is empty if the source does not
// have it.
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
	// OperatorDisabled keeps an enrollment disabled whatever the device sends.
	OperatorDisabled      bool
	Tally                 int
	AwaitingConfiguration bool
	RenewalUntil          time.Time
	EnrolledAt            time.Time
	LastSeenAt            time.Time
	// MovedAt is when the enrollment came from another APNs topic to this one.
	// Callers that are bound to topics see nothing from before.
	MovedAt time.Time
	// Queue is in the order in which the device is offered the commands.
	Queue []ItemRecord
}

// DeviceRecord is a device with all of its channels.
type DeviceRecord struct {
	// Channel is the device channel.
	Channel ChannelRecord
	// The fields of the Authenticate message. The source sets them also if it
	// does not have the message.
	SerialNumber, Model, ModelName, DeviceName string
	OSVersion, BuildVersion, ProductName       string
	IMEI, MEID                                 string
	// Tags are the device's tags, sorted. An import adds them to those of the
	// store. FormerTags are from before Channel.MovedAt.
	Tags, FormerTags []string

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

// PinRecord is an identity certificate that is, or was, pinned to a device.
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

// Imported is the outcome of an import step.
type Imported struct {
	Written int
	// Kept counts records that the store ignored because it has a newer state:
	// the device has already sent messages to this server.
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
	// ImportPushCerts stores push certificates. The store's own stays if it
	// expires later.
	ImportPushCerts(ctx context.Context, certs []PushCert) (Imported, error)
	// ImportCommands stores commands. It refuses a command whose CommandUUID the
	// store has with other bytes.
	ImportCommands(ctx context.Context, commands []CommandRecord) (Imported, error)
	// ImportDevices stores devices with their channels, pins and queues. A
	// device that has sent a check-in to this server since the one in the
	// record keeps its state. A queue row that has ended in the store stays
	// ended. A waiting row of an earlier import is cancelled if the record no
	// longer has it. A record with another APNs topic than the store's moves the
	// enrollment, at the time of the record's Authenticate if it does not say when.
	//
	// A new row that waits makes a push owed, due after some minutes, spread
	// over the enrollments.
	ImportDevices(ctx context.Context, devices []*DeviceRecord) (Imported, error)
}

// Exporter reads the records that an Importer writes.
type Exporter interface {
	// ExportPushCerts returns all push certificates, by topic.
	ExportPushCerts(ctx context.Context) ([]PushCert, error)
	// ExportCommands returns up to limit commands after a CommandUUID, by
	// CommandUUID.
	ExportCommands(ctx context.Context, after string, limit int) ([]CommandRecord, error)
	// ExportDeviceIDs returns up to limit ids of devices after one, sorted.
	ExportDeviceIDs(ctx context.Context, after string, limit int) ([]string, error)
	// ExportDevices returns devices, by id, and leaves out unknown ones.
	ExportDevices(ctx context.Context, ids []string) ([]*DeviceRecord, error)
}
