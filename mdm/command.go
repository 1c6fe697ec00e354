package mdm

import "fmt"

// Command is a command an operator queues for devices.
type Command struct {
	CommandUUID string
	RequestType string
	// Raw is the property list as the operator sent it, and as the device
	// gets it.
	Raw []byte
}

// DecodeCommand checks and decodes a command that an operator sends: an XML
// property list with CommandUUID and Command.RequestType. Other keys of Command
// are the operator's business and pass unchanged, but must be a sound property
// list. The command keeps raw as its Raw. Errors wrap [ErrMalformed]
// or [ErrMissingKey] and say what to mend.
func DecodeCommand(raw []byte) (*Command, error) {
	var r reader
	if err := scan(&r.document, raw, strict); err != nil {
		return nil, err
	}
	if k := r.CommandUUID.kind; k != kindAbsent && k != kindString {
		r.wrongType("CommandUUID", "string", r.CommandUUID)
	}
	c := &Command{
		CommandUUID: r.need("CommandUUID", r.CommandUUID),
		Raw:         raw,
	}
	switch r.Command.kind {
	case kindAbsent:
		r.fail(fmt.Errorf("%w: Command", ErrMissingKey))
	case kindDict:
		c.RequestType = r.need("Command.RequestType", r.requestType)
	default:
		r.wrongType("Command", "dict", r.Command)
	}
	if why := badID(c.CommandUUID); why != "" {
		r.fail(fmt.Errorf("%w: %s in CommandUUID", ErrMalformed, why))
	}
	if why := badID(c.RequestType); why != "" {
		r.fail(fmt.Errorf("%w: %s in Command.RequestType", ErrMalformed, why))
	}
	if r.err != nil {
		return nil, r.err
	}
	return c, nil
}
