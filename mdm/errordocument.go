package mdm

import (
	"encoding/json"
	"fmt"
)

// ContentTypeErrorDocument is the media type of an ErrorDocument; a device
// does not read one without it.
const ContentTypeErrorDocument = "application/json"

// ErrorCode is what an ErrorDocument says.
type ErrorCode string

// CodeUnrecognizedDevice: the server does not manage this device, which then
// removes its enrollment profile. Known since iOS 17, macOS 14, tvOS 17,
// visionOS 1.1 and watchOS 10; to older systems it is any other failure.
const CodeUnrecognizedDevice ErrorCode = "com.apple.unrecognized.device"

// ErrorDocument is the body of a 403 to a device.
//
// Source: Apple, "Error Unrecognized Device" of the device management schema.
type ErrorDocument struct {
	Code ErrorCode `json:"code"`
	// Description is for the device's log, Message for its user, who may get
	// to see it. Either may be empty.
	Description string `json:"description,omitempty"`
	Message     string `json:"message,omitempty"`
}

// Encode gives the document in the form of ContentTypeErrorDocument.
func (d *ErrorDocument) Encode() ([]byte, error) {
	body, err := json.Marshal(d)
	if err != nil {
		return nil, fmt.Errorf("encoding error document: %w", err)
	}
	return body, nil
}
