package mdmtest

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/groob/plist"
)

// Command is a command as a device received it.
type Command struct {
	UUID        string
	RequestType string
	// Raw is the whole property list, byte for byte.
	Raw []byte
}

// ParseCommand reads the reply that carries a command.
func ParseCommand(raw []byte) (*Command, error) {
	var envelope struct {
		CommandUUID string
		Command     struct{ RequestType string }
	}
	if err := decodeXML(raw, &envelope); err != nil {
		return nil, fmt.Errorf("reading a command: %w", err)
	}
	if envelope.CommandUUID == "" || envelope.Command.RequestType == "" {
		return nil, errors.New("reading a command: it lacks CommandUUID or RequestType")
	}
	return &Command{UUID: envelope.CommandUUID, RequestType: envelope.Command.RequestType, Raw: raw}, nil
}

// decodeXML refuses binary property lists, which groob/plist would take: no
// server sends them, and the library is not safe with them.
func decodeXML(raw []byte, into any) error {
	if bytes.HasPrefix(raw, []byte("bplist")) {
		return errors.New("binary property list")
	}
	return plist.Unmarshal(raw, into)
}

// NewCommand makes the property list of a command that needs no keys beyond
// its request type, or those that content adds. An empty uuid is replaced by
// a random one.
func NewCommand(uuid, requestType string, content func(*Plist)) []byte {
	if uuid == "" {
		uuid = NewUUID()
	}
	var p Plist
	p.Dict("Command", func(p *Plist) {
		p.String("RequestType", requestType)
		if content != nil {
			content(p)
		}
	})
	p.String("CommandUUID", uuid)
	return p.Document()
}

// NewProfile makes an unsigned configuration profile without payloads.
func NewProfile(identifier, displayName string) []byte {
	var p Plist
	p.Array("PayloadContent", func(*Plist) {})
	p.String("PayloadDisplayName", displayName)
	p.String("PayloadIdentifier", identifier)
	p.String("PayloadType", "Configuration")
	p.String("PayloadUUID", NewUUID())
	p.Int("PayloadVersion", 1)
	return p.Document()
}

// NewUUID makes a random UUID in Apple's upper case.
func NewUUID() string {
	var b [16]byte
	rand.Read(b[:]) // never fails, by its contract
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return formatUUID(b)
}

func formatUUID(b [16]byte) string {
	return fmt.Sprintf("%X-%X-%X-%X-%X", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}
