package mdm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/groob/plist"
)

// What the decoding errors wrap. All of them are the sender's fault.
var (
	// ErrMalformed: not an XML property list holding a dict, or a key with
	// a value of the wrong type.
	ErrMalformed = errors.New("malformed property list")
	// ErrUnknownMessageType: a MessageType that Apple did not define when
	// this was written.
	ErrUnknownMessageType = errors.New("unknown MessageType")
	// ErrMissingKey: a key that the message cannot do without.
	ErrMissingKey = errors.New("missing key")
)

// Command is a command an operator queues for devices.
type Command struct {
	CommandUUID string
	RequestType string
	// Raw is the property list as the operator sent it, and as the device
	// gets it.
	Raw []byte
}

type wire struct {
	MessageType, UDID, UserID, UserShortName, UserLongName, EnrollmentID, EnrollmentUserID string
	Topic, Model, ModelName, DeviceName, OSVersion, BuildVersion, ProductName              string
	SerialNumber, IMEI, MEID, PushMagic, Endpoint, TokenServiceType                        string
	Token, UnlockToken, BootstrapToken, Data                                               []byte
	AwaitingConfiguration, NotOnConsole                                                    bool
	DigestResponse                                                                         *string
	TokenParameters                                                                        TokenParameters
	Status, CommandUUID                                                                    string
}

func decodeWire(body []byte) (*wire, error) {
	if bytes.HasPrefix(body, []byte("bplist")) {
		return nil, fmt.Errorf("%w: binary property list", ErrMalformed)
	}
	var w wire
	if err := plist.Unmarshal(body, &w); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	return &w, nil
}

// Decode decodes a body whose media type does not tell what it is: a check-in
// if it has a MessageType, else a report if it has a Status.
func Decode(body []byte) (Message, error) {
	w, err := decodeWire(body)
	if err != nil {
		return nil, err
	}
	if w.MessageType == "" && w.Status != "" {
		return DecodeReport(body)
	}
	return DecodeCheckin(body)
}

// DecodeCheckin decodes the body of a check-in.
func DecodeCheckin(body []byte) (Message, error) {
	w, err := decodeWire(body)
	if err != nil {
		return nil, err
	}
	e := Enrollment{w.UDID, w.UserID, w.UserShortName, w.UserLongName, w.EnrollmentID, w.EnrollmentUserID}
	switch Kind(w.MessageType) {
	case "":
		return nil, fmt.Errorf("%w: MessageType", ErrMissingKey)
	case KindAuthenticate:
		return &Authenticate{Enrollment: e, Topic: w.Topic, Model: w.Model, ModelName: w.ModelName, DeviceName: w.DeviceName,
			OSVersion: w.OSVersion, BuildVersion: w.BuildVersion, ProductName: w.ProductName, SerialNumber: w.SerialNumber,
			IMEI: w.IMEI, MEID: w.MEID, Raw: body}, nil
	case KindTokenUpdate:
		return &TokenUpdate{Enrollment: e, Topic: w.Topic, PushMagic: w.PushMagic, Token: w.Token, UnlockToken: w.UnlockToken,
			AwaitingConfiguration: w.AwaitingConfiguration, NotOnConsole: w.NotOnConsole, Raw: body}, nil
	case KindCheckOut:
		return &CheckOut{Enrollment: e, Topic: w.Topic, Raw: body}, nil
	case KindSetBootstrapToken:
		return &SetBootstrapToken{Enrollment: e, BootstrapToken: w.BootstrapToken, AwaitingConfiguration: w.AwaitingConfiguration, Raw: body}, nil
	case KindGetBootstrapToken:
		return &GetBootstrapToken{Enrollment: e, AwaitingConfiguration: w.AwaitingConfiguration, Raw: body}, nil
	case KindUserAuthenticate:
		m := &UserAuthenticate{Enrollment: e, Raw: body}
		if w.DigestResponse != nil {
			m.DigestResponse, m.HasDigestResponse = *w.DigestResponse, true
		}
		return m, nil
	case KindDeclarativeManagement:
		return &DeclarativeManagement{Enrollment: e, Endpoint: w.Endpoint, Data: w.Data, Raw: body}, nil
	case KindGetToken:
		return &GetToken{Enrollment: e, TokenServiceType: w.TokenServiceType, TokenParameters: w.TokenParameters, Raw: body}, nil
	case KindReturnToService:
		return &ReturnToService{Enrollment: e, Raw: body}, nil
	}
	return nil, ErrUnknownMessageType
}

// DecodeReport decodes the body of a command report.
func DecodeReport(body []byte) (*Report, error) {
	w, err := decodeWire(body)
	if err != nil {
		return nil, err
	}
	if w.Status == "" {
		return nil, fmt.Errorf("%w: Status", ErrMissingKey)
	}
	r := &Report{Status: Status(w.Status), CommandUUID: w.CommandUUID, Raw: body,
		Enrollment: Enrollment{w.UDID, w.UserID, w.UserShortName, w.UserLongName, w.EnrollmentID, w.EnrollmentUserID}}
	if badID(r.CommandUUID) != "" {
		r.CommandUUID, r.BadCommandUUID = "", true
	}
	return r, nil
}

// DecodeCommand checks and decodes a command that an operator sends.
func DecodeCommand(raw []byte) (*Command, error) {
	if bytes.HasPrefix(raw, []byte("bplist")) {
		return nil, fmt.Errorf("%w: binary property list", ErrMalformed)
	}
	var c struct {
		CommandUUID string
		Command     struct{ RequestType string }
	}
	if err := plist.Unmarshal(raw, &c); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	if c.CommandUUID == "" {
		return nil, fmt.Errorf("%w: CommandUUID", ErrMissingKey)
	}
	if c.Command.RequestType == "" {
		return nil, fmt.Errorf("%w: Command.RequestType", ErrMissingKey)
	}
	if why := badID(c.CommandUUID); why != "" {
		return nil, fmt.Errorf("%w: %s in CommandUUID", ErrMalformed, why)
	}
	return &Command{CommandUUID: c.CommandUUID, RequestType: c.Command.RequestType, Raw: raw}, nil
}
